"""What clients do to connections: too many of them, silent ones, what is no HTTP, readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator

import pytest
from client import Answer, Connection, ask, infer, request_bytes
from support import DEADLINE_S, null_model, serving, until

from realtime_serve import InferenceServer
from realtime_serve.http import body, connection


async def test_a_connection_too_many_is_told_so_at_once() -> None:
    async with serving(max_connections=2) as server, contextlib.AsyncExitStack() as stack:
        held = [await stack.enter_async_context(await Connection.open(server.port)) for _ in range(2)]
        for connection in held:  # accepted: each has been answered
            assert (await connection.ask("GET", "/health")).status == 200
        async with await Connection.open(server.port) as surplus:
            refused = await surplus.answer()
            assert (refused.status, refused.error()["code"]) == (503, "too_many_connections")
            assert refused.headers["Retry-After"] == "1"
            assert await surplus.is_closed()
        assert (await held[0].ask("GET", "/health")).status == 200
        held[1].writer.transport.abort()
        await until(lambda: server.connections == 1)
        assert (await infer(server.port, max_tokens=1)).status == 200


async def test_many_idle_connections_keep_nobody_out() -> None:
    async with serving(max_connections=64) as server, contextlib.AsyncExitStack() as stack:
        busy = await stack.enter_async_context(await Connection.open(server.port))
        assert (await busy.ask("GET", "/health")).status == 200
        for _ in range(300):
            await stack.enter_async_context(await Connection.open(server.port))
        assert (await busy.ask("POST", "/infer", {"model": "null", "prompt": "x", "max_tokens": 2})).status == 200
        assert server.connections <= 64


async def drip(connection: Connection, data: bytes) -> None:
    """Sends a byte at a time, for as long as it is let."""
    for byte in itertools.cycle(data):
        connection.send(bytes((byte,)))
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def dripping(connection: Connection, data: bytes) -> AsyncIterator[None]:
    sender = asyncio.ensure_future(drip(connection, data))
    try:
        yield
    finally:
        sender.cancel()


def is_408(answer: Answer, what: str) -> bool:
    error = answer.error()
    return (answer.status, error["code"]) == (408, "request_timeout") and f"the {what} did not arrive" in error[
        "message"
    ]


@pytest.fixture
def short_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEADERS_WITHIN_S", 0.05)


ASKED = request_bytes("GET", "/health")
HEAD = b"POST /infer HTTP/1.1\r\nHost: t\r\n"


@pytest.mark.parametrize("before", [b"", ASKED], ids=["at first", "after an answer"])
@pytest.mark.usefixtures("short_headers")
async def test_a_silent_connection_is_closed(before: bytes) -> None:
    async with serving() as server, await Connection.open(server.port) as silent:
        if before:
            silent.send(before)
            assert (await silent.answer()).status == 200
        assert await silent.is_closed()
        await until(lambda: server.connections == 0)


@pytest.mark.parametrize("before", [b"", ASKED], ids=["at first", "after an answer"])
@pytest.mark.usefixtures("short_headers")
async def test_headers_that_drip_are_cut(before: bytes) -> None:
    async with serving() as server, await Connection.open(server.port) as slow:
        if before:
            slow.send(before)
            assert (await slow.answer()).status == 200
        slow.send(HEAD)
        async with dripping(slow, b"X: abcdefghijklmnopqrstuvwxyz\r\n"):
            assert is_408(await slow.answer(), "headers")
        await until(lambda: server.connections == 0)


@pytest.mark.usefixtures("short_headers")
async def test_a_body_that_came_with_its_request_is_no_half_of_the_next() -> None:
    async with serving() as server, await Connection.open(server.port) as silent:
        body = json.dumps({"prompt": "x", "max_tokens": 1, "stream": False}).encode()
        silent.send(request_bytes("POST", "/infer", Content_Length=str(len(body))))
        await until(lambda: server._listener._open and next(iter(server._listener._open)).task is not None)
        silent.send(body)
        assert (await silent.answer()).status == 200
        assert await silent.is_closed()


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
async def test_a_body_that_drips_is_cut(monkeypatch: pytest.MonkeyPatch, framing: str) -> None:
    monkeypatch.setattr(body, "_WITHIN_S", 0.05)
    async with serving() as server, await Connection.open(server.port) as slow:
        slow.send(HEAD + framing.encode() + b"\r\n\r\n")
        async with dripping(slow, b"1\r\n \r\n"):
            assert is_408(await slow.answer(), "body")
        assert server.stream_manager.open_count() == 0
        # What still comes of it is read for a while, and is no request.
        async with await Connection.open(server.port) as other:
            assert (await other.ask("GET", "/health")).status == 200


@pytest.mark.usefixtures("short_headers")
async def test_a_request_that_takes_longer_than_its_headers_may_is_served() -> None:
    async with serving(null_model(step_ms=20)) as server:
        assert len((await infer(server.port, max_tokens=10)).events()) == 11


@pytest.mark.parametrize("closing", [{}, {"Connection": "close"}], ids=["keep-alive", "close"])
async def test_a_json_answer_that_is_not_read_is_cut(closing: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    async with (
        serving(null_model(max_seq_length=100_000), slow_reader_timeout=0.001) as server,
        await Connection.open(server.port, receive_buffer=4096) as reader,
    ):
        body = {"prompt": "x", "max_tokens": 10_000, "stream": False}
        reader.send(request_bytes("POST", "/infer", body, **closing))
        reader.writer.transport.pause_reading()
        await until(lambda: server.connections == 1)
        await until(lambda: server.connections == 0)
    assert [record.getMessage() for record in caplog.records if "unread" in record.getMessage()] == [
        "a client that left its answer unread for 1.001 s is cut off"
    ]


async def test_the_last_bytes_of_a_connection_that_closes_are_waited_for_no_longer() -> None:
    """Fewer than make the transport ask for a pause."""
    async with (
        serving(slow_reader_timeout=0.001) as server,
        await Connection.open(server.port, receive_buffer=4096) as reader,
    ):
        reader.writer.transport.pause_reading()
        reader.send(request_bytes("GET", "/metrics"))
        await until(lambda: server.connections == 1)
        (held,) = server._listener._open
        while not held.unsent:
            reader.send(request_bytes("GET", "/metrics") * 6)
            for _ in range(3):
                assert (await ask(server.port, "GET", "/health")).status == 200
        reader.send(request_bytes("GET", "/health", Connection="close"))
        await until(lambda: server.connections == 0)


@pytest.mark.parametrize(
    "junk",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"],
    ids=["TLS", "no path", "no colon"],
)
async def test_what_is_no_http_gets_an_error_object(junk: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        async with await Connection.open(server.port) as connection:
            connection.send(junk)
            answer = await connection.answer()
            assert answer.status == 400
            assert answer.error()["message"].startswith("the request could not be read: ")
            assert await connection.is_closed()
        assert not [record for record in caplog.records if record.exc_info]
        assert (await infer(server.port, max_tokens=1)).status == 200


def counts(server: InferenceServer) -> dict[str, int]:
    return server.model_registry.get_model("null").worker.stats()["pump"]


async def stalled_reader(server: InferenceServer) -> Connection:
    """A client with a small buffer that asks for a long answer and reads nothing of it."""
    reader = await Connection.open(server.port, receive_buffer=4096)
    body = {"model": "null", "prompt": "x", "max_tokens": 60_000}
    reader.send(request_bytes("POST", "/infer", body))
    reader.writer.transport.pause_reading()
    return reader


async def test_a_reader_that_never_reads_is_slowed_paused_and_cut_and_nobody_else_notices() -> None:
    async with serving(null_model(max_seq_length=100_000), slow_reader_timeout=0.2, isolation="process") as server:
        async with await stalled_reader(server):
            await until(lambda: counts(server)["slowed"] == 1)
            worker = server.model_registry.get_model("null").worker
            await until(lambda: worker.stats()["worker"]["stalls"] >= 1)
            events = (await infer(server.port, max_tokens=500)).events()
            assert len(events) == 501
            await until(lambda: counts(server)["cut"] == 1)
            await until(lambda: server.stream_manager.open_count() == 0)
            await until(lambda: server.connections == 0)
        text = (await ask(server.port, "GET", "/metrics")).body.decode()
        assert 'rts_cut_readers_total{model="null",version="1.0.0"} 1.0' in text


async def test_a_reader_that_comes_back_in_time_gets_everything() -> None:
    async with serving(null_model(max_seq_length=100_000), slow_reader_timeout=DEADLINE_S) as server:
        async with await stalled_reader(server) as reader:
            await until(lambda: counts(server)["slowed"] >= 1)
            reader.writer.transport.resume_reading()
            answer = await reader.answer()
            assert len(answer.events()) == 60_001
        assert counts(server)["cut"] == 0


async def test_others_run_to_their_end_while_a_reader_is_behind() -> None:
    async with serving(null_model(max_seq_length=100_000), slow_reader_timeout=DEADLINE_S) as server:
        async with await stalled_reader(server):
            worker = server.model_registry.get_model("null").worker
            # Its connection takes no more, then its ring is full, then its sequence waits.
            await until(lambda: counts(server)["slowed"] == 1)
            await until(lambda: worker.stats()["worker"]["stalls"] >= 1)
            steps = worker.client.channel.steps
            assert len((await infer(server.port, max_tokens=3000)).events()) == 3001
            assert worker.client.channel.steps >= steps + 3000
            assert counts(server)["coalesced"] > 0
            text = (await ask(server.port, "GET", "/metrics")).body.decode()
            paused = re.search(r'^rts_paused_sequences_total{model="null",version="1.0.0"} (\d+)', text, re.MULTILINE)
            assert int(paused[1]) >= 1
            assert (counts(server)["cut"], server.stream_manager.open_count()) == (0, 1)
        await until(lambda: server.stream_manager.open_count() == 0)
        await until(lambda: worker.stats()["worker"]["running"] == 0)


async def test_step_and_gap_metrics() -> None:
    async with serving(null_model(step_ms=1)) as server:
        await asyncio.gather(*(infer(server.port, max_tokens=20) for _ in range(3)))
        worker = server.model_registry.get_model("null").worker
        await until(lambda: worker.stats()["worker"]["running"] == 0)
        stats = worker.stats()
        assert sum(stats["worker"]["step_us"][0]) == worker.client.channel.steps
        assert stats["worker"]["batch_sequences"][1] > 60  # the warm-up's are among them
        assert stats["worker"]["kv_blocks_used"] == stats["worker"]["waiting"] == 0
        assert stats["worker"]["kv_blocks"] > 0
        gaps, _ = stats["pump"]["token_gaps_us"]
        assert sum(gaps) == 3 * 19
        status = (await ask(server.port, "GET", "/status")).json()
        assert json.dumps(status)
