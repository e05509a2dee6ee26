"""Every error on every route is one object, and one request's error stays its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from client import Connection, ask, infer, request_bytes
from support import null_model, serving, until, worker_pid

from realtime_serve import InferenceServer
from realtime_serve.engine import supervisor


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with serving(null_model(max_seq_length=128), max_body_bytes=4096) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("POST", "/infer/", 404, "route_not_found"),
        ("GET", "/%F0%9F%8E%89?x=1", 404, "route_not_found"),
        ("GET", "/infer", 405, "method_not_allowed"),
        ("OPTIONS", "/infer", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_routes(server: InferenceServer, method: str, path: str, status: int, code: str) -> None:
    answer = await ask(server.port, method, path)
    assert (answer.status, answer.error()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert ("Allow" in answer.headers) == (status == 405)


async def test_head(server: InferenceServer) -> None:
    assert (await ask(server.port, "HEAD", "/health")).status == 200
    assert (await ask(server.port, "HEAD", "/infer")).status == 405
    assert (await ask(server.port, "HEAD", "/nothing")).status == 404


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"\xff\xfe", 400, "invalid_json", None),
        (b"[" * 2000, 400, "invalid_json", None),
        (b'"text"', 400, "invalid_json", None),
        ({"model": "null"}, 400, "missing_field", "prompt"),
        ({"prompt": "x", "promt": "x"}, 400, "unknown_field", "promt"),
        ({"prompt": "x", "model": "other"}, 404, "model_not_found", "model"),
        ({"prompt": "x", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"prompt": "x", "max_tokens": 128}, 400, "invalid_value", "max_tokens"),
        ({"prompt": "x" * 128}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * 4096}, 413, "body_too_large", None),
    ],
)
async def test_bodies(
    server: InferenceServer, body: bytes | dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = await ask(server.port, "POST", "/infer", body)
    error = answer.error()
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert (await infer(server.port, max_tokens=127)).status == 200
    assert server.stream_manager.open_count() == 0


async def test_bytes_that_are_not_http_close_their_connection_alone(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n")
        assert (await connection.answer()).status == 400
        assert await connection.is_closed()
    assert (await infer(server.port, max_tokens=2)).status == 200


async def test_a_full_queue_is_429_with_the_time_to_wait() -> None:
    async with serving(null_model(step_ms=1), max_batch_size=1, max_queue=1) as server:
        async with await Connection.open(server.port) as first, await Connection.open(server.port) as second:
            for connection in (first, second):
                connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 4000}))
            await until(lambda: server.stream_manager.open_count() == 2)
            refused = await infer(server.port)
            assert (refused.status, refused.error()["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await infer(server.port, max_tokens=2)).status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_silence_before_the_first_token_is_504(stream: bool) -> None:
    async with serving(null_model(), isolation="process") as server:
        os.kill(worker_pid(server), signal.SIGSTOP)
        answer = await infer(server.port, timeout=0.05, stream=stream)
        assert (answer.status, answer.error()["code"]) == (504, "timeout")
        os.kill(worker_pid(server), signal.SIGCONT)
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await infer(server.port, max_tokens=2)).status == 200


async def test_silence_after_the_first_token_is_an_error_event() -> None:
    async with (
        serving(null_model(max_seq_length=1_000_000), isolation="process") as server,
        await Connection.open(server.port) as connection,
    ):
        body = {"prompt": "x", "max_tokens": 900_000, "timeout": 0.05}
        connection.send(request_bytes("POST", "/infer", body))
        head = await connection.head()
        os.kill(worker_pid(server), signal.SIGSTOP)
        head.chunks = [chunk async for chunk in connection.body(head)]
        *tokens, last = head.events()
        assert [event.id for event in tokens] == [str(index) for index in range(len(tokens))]
        assert (last.name, last.data["error"]["code"]) == ("error", "timeout")
        os.kill(worker_pid(server), signal.SIGCONT)
        # After the error came the terminator: the connection serves on.
        assert (await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})).status == 200


async def test_a_worker_that_dies_mid_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    async with serving(null_model(max_seq_length=1_000_000), isolation="process") as server:
        connections = [await Connection.open(server.port) for _ in range(5)]
        heads = []
        for connection in connections:
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 900_000}))
            heads.append(await connection.head())
        os.kill(worker_pid(server), signal.SIGKILL)
        for connection, head in zip(connections, heads, strict=True):
            head.chunks = [chunk async for chunk in connection.body(head)]
            *tokens, last = head.events()
            assert [event.id for event in tokens] == [str(index) for index in range(len(tokens))]
            assert (last.name, last.data["error"]["code"]) == ("error", "worker_died")
        await until(lambda: server.model_registry.get_model("null").worker.is_ready)
        for connection in connections:
            assert (await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})).status == 200
            connection.writer.close()
        models = (await ask(server.port, "GET", "/models")).json()["models"]
        assert [(model["state"], model["restarts"]) for model in models] == [("ready", 1)]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_worker_that_dies_before_the_first_token(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (3600.0,))
    async with serving(null_model(), isolation="process") as server:
        pid = worker_pid(server)
        os.kill(pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(infer(server.port, stream=stream))
        await until(lambda: server.stream_manager.open_count() == 1)
        os.kill(pid, signal.SIGKILL)
        answer = await asking
        assert (answer.status, answer.error()["code"]) == (500, "worker_died")
        refused = await infer(server.port)
        assert (refused.status, refused.error()["code"]) == (503, "model_unavailable")
        assert int(refused.headers["Retry-After"]) >= 3600
        ready = await ask(server.port, "GET", "/ready")
        assert (ready.status, ready.json()["waiting_for"]) == (503, ["null 1.0.0"])
