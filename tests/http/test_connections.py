"""What clients do to connections: too many of them, silent ones, what is no HTTP, readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from client import Connection, ask, infer, request_bytes
from support import DEADLINE_S, null_model, serving, until

from realtime_serve import InferenceServer


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


async def test_a_silent_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_serve.http.listener._HEADERS_WITHIN_S", 0.05)
    async with serving() as server:
        async with await Connection.open(server.port) as silent:
            assert await silent.is_closed()
        async with await Connection.open(server.port) as dripping:
            dripping.send(b"POST /infer HTTP/1.1\r\nX-Slow: ")
            assert await dripping.is_closed()
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
