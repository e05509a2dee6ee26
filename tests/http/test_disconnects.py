"""Clients that leave, in every phase of a request, and those that have only stopped sending."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator

import pytest
from client import Answer, Connection, infer, request_bytes
from gate import Gate
from support import serving, until

from realtime_serve import InferenceRequest, InferenceServer


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


class Ended:
    """Counts requests whose streams are given up or at their end: the worker learns of it in its next step."""

    def __init__(self, server: InferenceServer) -> None:
        self.count = 0
        server.middleware_chain.add(self._count)

    async def _count(self, request: InferenceRequest, serve: Callable[[InferenceRequest], Awaitable[object]]) -> object:
        try:
            return await serve(request)
        finally:
            self.count += 1


def worker_counts(server: InferenceServer) -> tuple[int, int]:
    stats = server.model_registry.get_model("null").worker.stats()["worker"]
    return stats["running"], stats["waiting"]


def leave(connection: Connection, how: str) -> None:
    if how == "reset":
        linger = struct.pack("ii", 1, 0)
        connection.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.writer.transport.abort()


def ask_for(stream: bool, max_tokens: int = 1000) -> bytes:
    return request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": max_tokens, "stream": stream})


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /infer HTTP/1.1\r\nHost: t", ask_for(True)[:-5]],
    ids=["nothing", "half of the headers", "half of the body"],
)
async def test_a_client_that_leaves_while_it_sends(how: str, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        connection = await Connection.open(server.port)
        connection.send(sent)
        await until(lambda: server.connections == 1)
        assert (await infer(server.port, max_tokens=2)).status == 200  # what was sent has arrived
        leave(connection, how)
        await until(lambda: server.connections == 0)
        assert server.stream_manager.open_count() == 0
        assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["events", "JSON"])
@pytest.mark.parametrize("taken", [0, 3], ids=["before the first token", "between tokens"])
async def test_a_client_that_leaves_is_in_no_further_step(gate: Gate, how: str, stream: bool, taken: int) -> None:
    async with serving() as server:
        ended = Ended(server)
        gate.close()
        connection = await Connection.open(server.port)
        connection.send(ask_for(stream))
        gate.let(taken)
        await until(lambda: len(gate.steps) == taken + 1)  # and that one is held
        if stream and taken:
            await connection.head()
        leave(connection, how)
        await until(lambda: ended.count == 1)
        gate.let(1)
        await until(lambda: worker_counts(server) == (0, 0))
        assert len(gate.steps) == taken + 1
        await until(lambda: server.connections == server.stream_manager.open_count() == 0)
        gate.open()
        assert (await infer(server.port, max_tokens=2)).status == 200


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["events", "JSON"])
@pytest.mark.parametrize("is_known", [True, False], ids=["known to the worker", "on its way there"])
async def test_a_client_that_leaves_the_queue(gate: Gate, how: str, stream: bool, is_known: bool) -> None:
    async with serving(max_batch_size=1) as server, await Connection.open(server.port) as other:
        ended = Ended(server)
        gate.close()
        other.send(ask_for(True, 50))
        await until(lambda: len(gate.steps) == 1)
        connection = await Connection.open(server.port)
        connection.send(ask_for(stream))
        await until(lambda: server.stream_manager.open_count() == 2)
        if is_known:
            gate.let(1)
            await until(lambda: worker_counts(server) == (1, 1))
        leave(connection, how)
        await until(lambda: ended.count == server.connections == 1)
        begun = len(gate.steps)
        gate.let(1)
        await until(lambda: len(gate.steps) == begun + 1)
        await until(lambda: server.stream_manager.open_count() == 1)
        await until(lambda: worker_counts(server) == (1, 0))
        gate.open()
        assert len((await other.answer()).events()) == 51
        await until(lambda: worker_counts(server) == (0, 0))


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["events", "JSON"])
async def test_a_client_that_leaves_once_it_is_answered(how: str, stream: bool) -> None:
    async with serving() as server:
        connection = await Connection.open(server.port)
        connection.send(ask_for(stream, 5))
        assert (await connection.answer()).status == 200
        leave(connection, how)
        await until(lambda: server.connections == server.stream_manager.open_count() == 0)
        await until(lambda: worker_counts(server) == (0, 0))


async def half_closed(server: InferenceServer, *requests: bytes) -> Connection:
    """A client that sends all of it at once and says that it sends no more."""
    connection = await Connection.open(server.port)
    connection.writer.writelines(requests)
    connection.writer.write_eof()
    return connection


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_sends_no_more_gets_answers_that_are_there_at_once(version: str) -> None:
    async with serving() as server:
        async with await half_closed(server, request_bytes("GET", "/health", version=version)) as connection:
            assert (await connection.answer()).json()["status"] == "ok"
            assert await connection.is_closed()
        async with await half_closed(server, b"junk\r\n\r\n") as connection:
            assert (await connection.answer()).status == 400
            assert await connection.is_closed()
        async with await half_closed(server, b"GET /health HTTP/1.1\r\n") as connection:
            assert await connection.is_closed()
        await until(lambda: server.connections == 0)


async def test_a_client_that_sends_no_more_gets_all_such_answers_in_order() -> None:
    async with serving() as server:
        asked = [request_bytes("GET", path) for path in ("/health", "/ready", "/nothing")]
        async with await half_closed(server, *asked) as connection:
            answers: list[Answer] = [await connection.answer() for _ in asked]
            assert [answer.status for answer in answers] == [200, 200, 404]
            assert "stalled" in answers[0].json()
            assert await connection.is_closed()


@pytest.mark.parametrize("stream", [True, False], ids=["events", "JSON"])
async def test_a_client_that_sends_no_more_while_it_waits_for_tokens_has_left(gate: Gate, stream: bool) -> None:
    """A client that closes its connection sends nothing else than this."""
    async with serving() as server:
        ended = Ended(server)
        gate.close()
        async with await Connection.open(server.port) as connection:
            connection.send(ask_for(stream))
            await until(lambda: len(gate.steps) == 1)
            connection.writer.write_eof()
            await until(lambda: ended.count == 1)
            gate.let(1)
            await until(lambda: worker_counts(server) == (0, 0))
            await until(lambda: server.connections == server.stream_manager.open_count() == 0)
            assert await connection.is_closed()
        assert len(gate.steps) == 1
        gate.open()


async def test_many_clients_that_leave_at_once_leave_nothing(gate: Gate) -> None:
    async with serving(max_batch_size=8, max_queue=40) as server:
        gate.close()
        clients = [await Connection.open(server.port) for _ in range(40)]
        for number, client in enumerate(clients):
            client.send(ask_for(number % 2 == 0))
        await until(lambda: server.stream_manager.open_count() == 40)
        for number, client in enumerate(clients):
            leave(client, "reset" if number % 3 else "close")
        await until(lambda: server.connections == 0)
        gate.open()
        await until(lambda: server.stream_manager.open_count() == 0)
        await until(lambda: worker_counts(server) == (0, 0))
        answers = await asyncio.gather(*(infer(server.port, max_tokens=3) for _ in range(8)))
        assert [len(answer.events()) for answer in answers] == [4] * 8
