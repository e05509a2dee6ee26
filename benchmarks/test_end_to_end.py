"""Everything but the model: `null` over HTTP from a server process, and inside this process with isolation="thread".

A regression benchmark: its client is Python and shares the machine, so that these are no ceilings.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import uvloop
from http_client import Client, post
from null_server import null_server

from realtime_serve import InferenceRequest, InferenceServer

_TOKENS = 128
_STREAMS = 32


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with _serving() as listens_on:
        yield listens_on


@pytest.fixture(scope="module")
def predict_port() -> Iterator[int]:
    with _serving("predict") as listens_on:
        yield listens_on


@contextmanager
def _serving(*arguments: str) -> Iterator[int]:
    command = [sys.executable, Path(__file__).with_name("null_server.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            listens_on = int(process.stdout.readline())
            _wait_ready(listens_on)
            yield listens_on
        finally:
            process.terminate()


def _wait_ready(port: int) -> None:
    deadline = time.monotonic() + 60
    with closing(Client(port, 1)) as client:
        while b" 200 " not in client.ask(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")[0]:
            assert time.monotonic() < deadline, "the server was not ready within a minute"
            time.sleep(0.02)


def test_http_stream(measure, port: int) -> None:
    """A token of 32 streams."""
    request = post({"prompt": "hi", "max_tokens": _TOKENS})

    def run() -> None:
        for answer in client.ask(request):
            assert answer.count(b'"index":') == _TOKENS

    with closing(Client(port, _STREAMS)) as client:
        measure(run, operations=_STREAMS * _TOKENS, rounds=20)


def test_http_json(measure, port: int) -> None:
    """An answer of one token, 16 connections."""
    connections, times = 16, 20
    request = post({"prompt": "hi", "max_tokens": 1, "stream": False})

    def run() -> None:
        assert all(b'"finish_reason":"length"' in answer for answer in client.ask(request, times))

    with closing(Client(port, connections)) as client:
        measure(run, operations=connections * times, rounds=20)


def test_http_first_token(measure, port: int) -> None:
    """An answer of one token, the server being idle."""
    request = post({"prompt": "hi", "max_tokens": 1})
    with closing(Client(port, 1)) as client:
        measure(lambda: client.ask(request), operations=1, rounds=500, budget_ns=300_000)


def test_http_predict_alone(measure, predict_port: int) -> None:
    """A prediction of a model that costs nothing, the server being idle."""
    request = post({"input": [1.0, 2.0, 3.0, 4.0]}, "/predict")
    with closing(Client(predict_port, 1)) as client:
        measure(lambda: client.ask(request), operations=1, rounds=500)


def test_http_predict(measure, predict_port: int) -> None:
    """A prediction of a model that costs nothing, 64 connections."""
    connections, times = 64, 10
    request = post({"input": [1.0, 2.0, 3.0, 4.0]}, "/predict")

    def run() -> None:
        assert all(b'"output":[1.0,2.0,3.0,4.0]' in answer for answer in client.ask(request, times))

    with closing(Client(predict_port, connections)) as client:
        measure(run, operations=connections * times, rounds=10)


@pytest.fixture(scope="module")
def in_process() -> Iterator[tuple[asyncio.Runner, InferenceServer]]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        server = null_server(isolation="thread")
        runner.run(server.__aenter__())
        yield runner, server
        runner.run(server.__aexit__(None, None, None))


def test_in_process_stream(measure, in_process) -> None:
    """A token of 32 streams."""
    runner, server = in_process

    async def read() -> None:
        tokens = 0
        async for _ in server.stream(InferenceRequest("r", "null", "hi", max_tokens=_TOKENS)):
            tokens += 1
        assert tokens == _TOKENS

    async def run() -> None:
        await asyncio.gather(*(read() for _ in range(_STREAMS)))

    measure(lambda: runner.run(run()), operations=_STREAMS * _TOKENS, rounds=20)


def test_in_process_first_token(measure, in_process) -> None:
    """An answer of one token, the engine being idle; the budget is for the time to the token."""
    runner, server = in_process
    times: list[float] = []

    async def run() -> None:
        for _ in range(50):
            started = time.perf_counter()
            stream = server.stream(InferenceRequest("r", "null", "hi", max_tokens=1))
            await anext(stream)
            times.append(time.perf_counter() - started)
            async for _ in stream:
                raise AssertionError("a second token")

    measure(
        lambda: runner.run(run()),
        operations=50,
        rounds=20,
        note=lambda: f"first token: p50 {statistics.median(times) * 1e6:.0f} µs, budget 120",
    )
