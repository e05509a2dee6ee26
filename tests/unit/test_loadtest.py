"""The load generator against servers that answer by a script."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_serve import loadtest
from realtime_serve.errors import ConfigError
from realtime_serve.loadtest import Load, Measured, percentile, run_load, summary, table

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = b'event: done\ndata: {"finish_reason":"length"}\n\n'
ERROR = b'event: error\ndata: {"error":{"message":"the worker died","code":"worker_died"}}\n\n'


def tokens(count: int) -> bytes:
    return b"".join(b'id: %d\ndata: {"token":" a","token_id":1,"index":%d}\n\n' % (i, i) for i in range(count))


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


def chunked(body: bytes, size: int = 10**6) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return CHUNKED + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


def answer(status: str, body: bytes, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n%s" % (status.encode(), headers, len(body), body)


class Scripted:
    """Answers the n-th request with the n-th bytes of its script, and any later one with the last; None hangs up."""

    def __init__(self, *script: bytes | None) -> None:
        self.script = script
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = (line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                body = await reader.readexactly(int(length.split(b":")[1]))
                reply = self.script[min(len(self.requests), len(self.script) - 1)]
                self.requests.append((head, body))
                if reply is None:
                    break
                writer.write(reply)
                if b"Transfer-Encoding" not in reply and b"Content-Length" not in reply:
                    break
        writer.close()


@contextlib.asynccontextmanager
async def scripted(*script: bytes | None) -> AsyncIterator[Scripted]:
    server = Scripted(*script)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()


async def load(server: Scripted, **options: Any) -> Measured:
    return await run_load(Load(**{"url": server.url, "concurrency": 1, "requests": 1, **options}))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    ordered = sorted(values)
    got = percentile(ordered, percent)
    assert got == pytest.approx(np.percentile(ordered, percent), rel=1e-9, abs=1e-9)


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0], 50) == 1.5
    assert [percentile(range(101), p) for p in (0, 50, 99, 100)] == [0, 50, 99, 100]


async def test_what_is_asked_for() -> None:
    async with scripted(chunked(tokens(1) + DONE)) as server:
        await load(server, model="m", max_tokens=7, prompt="hé")
        await load(server, url=server.url + "/behind/a/proxy/")
    (head, body), (other_head, other_body) = server.requests
    assert head.startswith(b"POST /infer HTTP/1.1\r\n")
    assert f"Host: {server.url.removeprefix('http://')}\r\n".encode() in head
    assert json.loads(body) == {"model": "m", "prompt": "hé", "max_tokens": 7, "ignore_eos": True}
    assert other_head.startswith(b"POST /behind/a/proxy/infer HTTP/1.1\r\n")
    assert "model" not in json.loads(other_body)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
async def test_tokens_are_counted_however_they_are_cut(size: int) -> None:
    async with scripted(chunked(tokens(10) + DONE, size)) as server:
        measured = await load(server, requests=3)
    assert (measured.completed, measured.tokens, measured.errors.total()) == (3, 30, 0)
    assert len(measured.to_first_token) == 3
    assert len(measured.between_tokens) == 3 * 9
    assert all(gap >= 0 for gap in measured.between_tokens)
    assert all(0 < first < measured.duration for first in measured.to_first_token)
    assert server.connections == 1


async def test_a_gap_belongs_between_the_tokens_that_it_separates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loadtest, "_now", itertools.count().__next__)  # every look at the clock is a second later
    two_chunks = CHUNKED + chunk(tokens(3)) + chunk(tokens(2) + DONE) + b"0\r\n\r\n"
    async with scripted(two_chunks) as server:
        measured = await load(server)
    assert measured.to_first_token == [1]
    assert measured.between_tokens == [0, 0, 1, 0]
    assert measured.duration == 4


async def test_as_many_at_a_time_as_asked_for() -> None:
    async with scripted(chunked(tokens(2) + DONE)) as server:
        measured = await load(server, concurrency=4, requests=20)
        assert (measured.completed, measured.tokens) == (20, 40)
        assert (server.connections, len(server.requests)) == (4, 20)
        assert (await load(server, concurrency=100, requests=3)).completed == 3
    assert server.connections == 4 + 3


async def test_a_connection_that_the_server_closes_is_opened_again() -> None:
    closing = HEAD + b"Connection: close\r\n\r\n" + tokens(2) + DONE
    old = b"HTTP/1.0 200 OK\r\n\r\n" + tokens(2) + DONE
    async with scripted(closing, old, chunked(tokens(2) + DONE)) as server:
        measured = await load(server, requests=4)
    assert (measured.completed, measured.tokens, measured.errors.total()) == (4, 8, 0)
    assert server.connections == 3


@pytest.mark.parametrize(
    ("reply", "reason", "tokens_seen"),
    [
        (answer("404 Not Found", b'{"error":{"message":"not\\nserved"}}'), "404 not served", 0),
        (answer("502 Bad Gateway", b"<html>\n" + b"x" * 1000), "502 <html> " + "x" * 193, 0),
        (answer("500 Oops", b'{"error": "text"}'), '500 {"error": "text"}', 0),
        (answer("200 OK", b"{}"), "the stream ended without saying why", 0),
        (chunked(tokens(2) + ERROR), "the worker died", 2),
        (chunked(tokens(2)), "the stream ended without saying why", 2),
        (HEAD + b"\r\n" + tokens(2), "the stream ended without saying why", 2),
        (CHUNKED + b"zz\r\n", "the connection broke: ValueError", 0),
        (b"SSH-2.0-OpenSSH\r\n", "the connection broke: ValueError", 0),
        (b"220 smtp ESMTP ready\r\n\r\n", "the connection broke: ValueError", 0),
        (None, "the connection broke: IncompleteReadError", 0),
        (b"x" * 200_000, "the connection broke: LimitOverrunError", 0),
    ],
)  # fmt: skip
async def test_an_answer_that_is_none_is_counted(reply: bytes | None, reason: str, tokens_seen: int) -> None:
    async with scripted(reply, chunked(tokens(3) + DONE)) as server:
        measured = await load(server, requests=3)
    assert measured.errors == {reason: 1}
    assert (measured.completed, measured.tokens) == (2, tokens_seen + 6)
    # The next request has a connection of its own.
    assert server.connections == 2


async def test_a_server_that_goes_away() -> None:
    listening: list[asyncio.Server] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        listening[0].close()
        writer.write(HEAD + b"\r\n" + tokens(1) + DONE)
        writer.close()

    listening.append(await asyncio.start_server(serve, "127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening[0].sockets[0].getsockname()[1]}"
    measured = await run_load(Load(url, None, 1, 3))
    assert measured.completed == 1
    assert measured.errors == {"the connection broke: ConnectionRefusedError": 2}


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://x:70000", "http://[::1", "file:///x"]
)
async def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="url") as caught:
        await run_load(Load(url))
    assert caught.value.field == "url"


async def test_a_server_that_is_not_there() -> None:
    async with scripted(None) as server:
        pass
    with pytest.raises(ConfigError, match=f"no server can be reached at {server.url}: .*") as caught:
        await run_load(Load(server.url))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no server can be reached"):
        await run_load(Load(f"http://{'x' * 64}.invalid"))


def test_figures() -> None:
    measured = Measured(
        duration=2.0, tokens=300, completed=3, to_first_token=[0.002, 0.001, 0.003], between_tokens=[0.01] * 99 + [0.02]
    )
    measured.errors["429 the queue is full"] = 2
    figures = summary(Load("http://x", "m", 4, 5), measured)
    assert figures == {
        "url": "http://x",
        "model": "m",
        "concurrency": 4,
        "requests": 5,
        "completed": 3,
        "errors": 2,
        "duration_s": 2.0,
        "tokens": 300,
        "tokens_per_s": 150.0,
        "ttft_ms": {"p50": 2.0, "p99": 2.98},
        "itl_ms": {"p50": 10.0, "p99": 10.1},
    }
    shown = table(figures, measured.errors)
    for text in ("3 of 5 complete", "150.0", "p50 2.0 ms", "p99 10.1 ms", "2 × 429 the queue is full"):
        assert text in shown


def test_figures_of_nothing() -> None:
    figures = summary(Load(), Measured())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert figures["tokens_per_s"] is None
    assert figures["ttft_ms"] == figures["itl_ms"] == {"p50": None, "p99": None}
    assert "–" in table(figures, Measured().errors)
