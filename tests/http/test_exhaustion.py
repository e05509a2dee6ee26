"""Out of file descriptors: who is served goes on, who waits is served once some are free, and the log says it once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from client import Connection, infer, request_bytes
from support import null_model, serving, until

from realtime_serve import InferenceServer
from realtime_serve.http import bind, listener


class Descriptors:
    """Takes all file descriptors of this process but `left`, until told to give them back."""

    _AT_LEAST = 16  # are taken, however few are free below the highest in use

    def __init__(self, left: int) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + left + self._AT_LEAST, self._limits[1]))
        self._taken = []
        with contextlib.suppress(OSError):
            while True:
                self._taken.append(os.dup(0))
        self.give_back(left)

    def give_back(self, count: int) -> None:
        for _ in range(count):
            os.close(self._taken.pop())

    def give_all_back(self) -> None:
        self.give_back(len(self._taken))
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


@contextlib.contextmanager
def descriptors(left: int) -> Iterator[Descriptors]:
    taken = Descriptors(left)
    try:
        yield taken
    finally:
        taken.give_all_back()


def connect(port: int, count: int) -> list[socket.socket]:
    """Clients that the kernel has connected and that the server has not seen yet."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for client in clients:
        client.setblocking(False)
    return clients


async def taken_over(clients: list[socket.socket]) -> list[Connection]:
    return [Connection(*await asyncio.open_connection(sock=client, limit=4096)) for client in clients]


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each time that the listener went to take connections."""
    made: list[None] = []
    accept = listener.Listener._accept

    def counted(self: listener.Listener) -> None:
        made.append(None)
        accept(self)

    monkeypatch.setattr(listener.Listener, "_accept", counted)
    return made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_those_that_wait_are_served_as_others_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_RETRY_S", 3600.0)
    async with serving(null_model(max_seq_length=100_000)) as server:
        running = await Connection.open(server.port)
        running.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 20_000}))
        head = await running.head()
        waiting = connect(server.port, 12)
        with descriptors(left=3):
            clients = await taken_over(waiting)
            for client in clients:
                client.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 2}))
            for client in clients:  # each that leaves makes room for one that waits
                assert len((await client.answer()).events()) == 3
                client.writer.transport.abort()
            head.chunks = [chunk async for chunk in running.body(head)]
            assert len(head.events()) == 20_001
            running.writer.transport.abort()
            await until(lambda: server.connections == 0)
        assert (await infer(server.port, max_tokens=2)).status == 200
    assert [message.split(" with ")[0] for message in warnings(caplog)] == ["no connection can be accepted"]
    assert "Too many open files" in warnings(caplog)[0]


async def test_what_others_in_the_process_give_back_is_used(
    tries: list[None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_RETRY_S", 0.01)
    async with serving() as server:
        waiting = connect(server.port, 5)
        with descriptors(left=0) as taken:
            clients = await taken_over(waiting)
            await until(lambda: len(tries) > 5)
            assert server.connections == 0
            taken.give_back(5)
            for client in clients:
                assert (await client.ask("GET", "/health")).status == 200
        for client in clients:
            client.writer.transport.abort()
    assert len(warnings(caplog)) == 1


async def test_it_does_not_spin(tries: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_RETRY_S", 3600.0)
    async with serving() as server:
        waiting = connect(server.port, 5)
        with descriptors(left=0):
            clients = await taken_over(waiting)
            await until(lambda: len(tries) == 1)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert len(tries) == 1
        server._listener._resume()
        for client in clients:
            assert (await client.ask("GET", "/health")).status == 200
            client.writer.transport.abort()


async def test_it_stops_while_connections_wait(tries: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_RETRY_S", 0.001)
    async with serving() as server:
        waiting = connect(server.port, 1)
        with descriptors(left=0):
            await until(lambda: tries)
            await server.stop()
        made = len(tries)
        await asyncio.sleep(0.01)
        assert len(tries) == made
        waiting[0].close()


async def refused(server: InferenceServer) -> Connection:
    connection = await Connection.open(server.port)
    connection.send(request_bytes("GET", "/health"))
    answer = await connection.answer()
    assert (answer.status, answer.error()["code"]) == (503, "too_many_connections")
    return connection


async def test_refused_clients_that_do_not_close_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_REFUSALS", 3)
    monkeypatch.setattr(listener, "_REFUSAL_LASTS_S", 3600.0)
    async with serving(max_connections=1) as server, await Connection.open(server.port) as held:
        assert (await held.ask("GET", "/health")).status == 200
        clients = [await refused(server)]
        first = next(iter(server._listener._refusals))
        clients += [await refused(server) for _ in range(19)]
        await until(lambda: first._transport is None)
        assert len(server._listener._refusals) == 3
        assert (server.connections, (await held.ask("GET", "/health")).status) == (1, 200)
        for client in clients:
            client.writer.transport.abort()
        await until(lambda: not server._listener._refusals)


async def test_a_refused_client_has_a_moment_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "_REFUSAL_LASTS_S", 0.01)
    async with serving(max_connections=1) as server, await Connection.open(server.port) as held:
        assert (await held.ask("GET", "/health")).status == 200
        client = await refused(server)
        await until(lambda: not server._listener._refusals)
        client.writer.transport.abort()


async def test_a_burst_of_connections_does_not_get_past_the_limit() -> None:
    async with serving(max_connections=3) as server:
        clients = await taken_over(connect(server.port, 30))
        for client in clients:
            client.send(request_bytes("GET", "/health"))
        statuses = [(await client.answer()).status for client in clients]
        assert sorted(statuses) == [200] * 3 + [503] * 27
        for client in clients:
            client.writer.transport.abort()
        await until(lambda: server.connections == 0)


# The limit of open files


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the limits are, the current ones last."""
    known = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: known[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: known.append(limit))
    return known


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised", "room"),
    [
        (1024, 4096, 256, 1024, 256),
        (1024, 4096, 768, 1024, 768),
        (1024, 4096, 769, 1025, 769),
        (1024, 4096, 20_000, 4096, 3840),
        (256, 1_000_000, 20_000, 20_256, 20_000),
        (256, resource.RLIM_INFINITY, 20_000, 20_256, 20_000),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 20_000, resource.RLIM_INFINITY, 20_000),
        (256, 256, 256, 256, 128),
        (64, 64, 256, 64, 32),
        (64, 64, 32, 64, 32),
        (1, 1, 256, 1, 1),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_needed(
    limits: list[tuple[int, int]], caplog: pytest.LogCaptureFixture,
    soft: int, hard: int, connections: int, raised: int, room: int,
) -> None:  # fmt: skip
    limits[:] = [(soft, hard)]
    assert bind.room_for(connections) == room
    assert limits[-1] == (raised, hard)
    assert len(warnings(caplog)) == (room < connections)


def test_a_limit_that_may_not_be_raised(
    limits: list[tuple[int, int]], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(which: int, limit: tuple[int, int]) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert bind.room_for(5000) == 768
    assert warnings(caplog) == [
        "max_connections is 5000, but the 1024 files that this process may have open (ulimit -n) leave room for 768"
    ]
