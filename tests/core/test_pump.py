"""The pump over transports that a test holds: what is written to them, when, and what their failures do to others."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support import DEADLINE_S, until

from realtime_serve._pump import Stream
from realtime_serve.engine.client import ChannelClient, ChannelShape

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written to it; as slow and as broken as it is told to be."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.held = 0
        self.aborted = False
        self.raises: set[str] = set()

    def _may_raise(self, name: str) -> None:
        if name in self.raises:
            raise RuntimeError(f"{name} went wrong")

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._may_raise("write")
        assert data
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        self._may_raise("is_closing")
        return self.aborted

    def get_write_buffer_size(self) -> int:
        self._may_raise("get_write_buffer_size")
        return self.held

    def abort(self) -> None:
        self._may_raise("abort")
        self.aborted = True

    @property
    def written(self) -> bytes:
        return b"".join(self.writes)

    @property
    def indices(self) -> list[int]:
        return [int(index) for index in re.findall(rb"^id: (\d+)$", self.written, re.MULTILINE)]


@pytest_asyncio.fixture
async def client() -> AsyncIterator[ChannelClient]:
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
    client = ChannelClient(ChannelShape(slots=4, buffer_tokens=1000), 1, shared=False)
    yield client
    client.pump.stop()
    assert client.pump.open_streams == 0
    assert not failures, "a callback of the pump raised"


class Streaming:
    """A stream that is fed by the test and written to a transport."""

    def __init__(self, client: ChannelClient, *, timeout_s: float = 600.0) -> None:
        stream = client.pump.open("s", timeout_s)
        assert stream is not None
        self.stream: Stream = stream
        self.transport = Transport()
        self.pushed = 0
        self.task = asyncio.ensure_future(stream.write_to(self.transport, HEAD, True))

    def push(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.stream.push("x", self.pushed, None, False)
            self.pushed += 1

    async def end(self) -> None:
        self.stream.push_end()
        await asyncio.wait_for(self.task, DEADLINE_S)
        self.check_whole()
        self.stream.close()

    def check_whole(self) -> None:
        assert self.transport.indices == list(range(self.pushed))
        assert self.transport.written.startswith(HEAD)
        assert self.transport.written.count(b"event: done") == 1
        assert self.transport.written.count(b"\r\n0\r\n\r\n") == 1
        assert self.transport.written.endswith(b"\r\n0\r\n\r\n")


async def test_one_write_a_wake_up(client: ChannelClient) -> None:
    one, two = Streaming(client), Streaming(client)
    for streaming in (one, two):
        streaming.push(3)
    await until(lambda: one.transport.writes and two.transport.writes)
    assert (len(one.transport.writes), len(two.transport.writes)) == (1, 1)
    one.push(2)
    await until(lambda: len(one.transport.writes) == 2)
    assert len(two.transport.writes) == 1
    await one.end()
    await two.end()


async def test_a_connection_that_is_behind_is_left_alone_until_it_has_caught_up(client: ChannelClient) -> None:
    slow, other = Streaming(client), Streaming(client)
    slow.transport.held = 64 * 1024 + 1
    slow.push()
    await until(lambda: slow.transport.writes)
    for _ in range(20):
        slow.push(10)
        other.push()
        await until(lambda: len(other.transport.indices) == other.pushed)
    assert len(slow.transport.writes) == 1
    slow.transport.held = 16 * 1024 + 1  # not yet
    other.push()
    await until(lambda: len(other.transport.indices) == other.pushed)
    assert len(slow.transport.writes) == 1
    slow.transport.held = 16 * 1024
    await until(lambda: len(slow.transport.writes) == 2)
    assert slow.transport.indices == list(range(201))
    await slow.end()
    await other.end()


@pytest.mark.parametrize("method", ["write", "get_write_buffer_size", "is_closing"])
@pytest.mark.parametrize("abort_too", [False, True])
async def test_a_broken_transport_harms_nobody_else(client: ChannelClient, method: str, abort_too: bool) -> None:
    broken, other = Streaming(client), Streaming(client)
    broken.push()
    other.push()
    await until(lambda: broken.transport.writes and other.transport.writes)
    broken.transport.raises = {method, "abort"} if abort_too else {method}
    for _ in range(5):
        broken.push()
        other.push()
        await until(lambda: len(other.transport.indices) == other.pushed)
    assert broken.transport.aborted is not abort_too
    assert broken.stream.buffered == 0  # read, so that its producer goes on until its handler is told
    await other.end()
    broken.stream.push_end()
    await asyncio.wait_for(broken.task, DEADLINE_S)
    broken.stream.close()
    again = Streaming(client)
    again.push(3)
    await again.end()


async def test_a_transport_that_breaks_while_it_is_behind(client: ChannelClient) -> None:
    broken, other = Streaming(client), Streaming(client)
    broken.transport.held = 64 * 1024 + 1
    broken.push()
    await until(lambda: broken.transport.writes)
    broken.push(10)
    broken.transport.raises = {"get_write_buffer_size"}
    await until(lambda: broken.transport.aborted)
    other.push(3)
    await other.end()
    broken.stream.close()
    await asyncio.wait_for(broken.task, DEADLINE_S)


async def test_a_closed_transport_is_not_written_to(client: ChannelClient) -> None:
    left = Streaming(client)
    left.push()
    await until(lambda: left.transport.writes)
    left.transport.abort()
    left.push(50)
    await until(lambda: left.stream.buffered == 0)
    assert len(left.transport.writes) == 1
    left.stream.close()
    await asyncio.wait_for(left.task, DEADLINE_S)


async def test_a_stream_closed_in_the_same_turn_as_its_tokens(client: ChannelClient) -> None:
    closed, other = Streaming(client), Streaming(client)
    await asyncio.sleep(0)
    closed.push(3)
    other.push(3)
    closed.stream.close()
    await asyncio.wait_for(closed.task, DEADLINE_S)
    await other.end()
    assert closed.transport.writes == []
    assert client.pump.open_streams == 0


async def test_an_end_for_a_connection_that_is_behind_waits_for_it(client: ChannelClient) -> None:
    slow = Streaming(client)
    slow.transport.held = 64 * 1024 + 1
    slow.push()
    await until(lambda: slow.transport.writes)
    slow.push(5)
    client.worker_died()
    assert not slow.task.done()
    slow.transport.held = 0
    await asyncio.wait_for(slow.task, DEADLINE_S)
    assert slow.transport.indices == list(range(6))
    assert slow.stream.error == "worker_died"
    assert slow.transport.written.count(b"event: error") == 1
    assert slow.transport.written.endswith(b"\r\n0\r\n\r\n")
    slow.stream.close()


async def test_death_before_the_first_token_writes_nothing(client: ChannelClient) -> None:
    silent, ended = Streaming(client), Streaming(client)
    await asyncio.sleep(0)
    ended.push(2)
    ended.stream.push_end()
    client.worker_died()
    await asyncio.wait_for(asyncio.gather(silent.task, ended.task), DEADLINE_S)
    ended.check_whole()  # all of it was there
    assert (silent.transport.writes, silent.stream.started, silent.stream.error) == ([], False, "worker_died")
    for streaming in (silent, ended):
        streaming.stream.close()
    assert client.pump.open("late", 600.0) is None


async def test_a_look_that_was_put_off_past_the_stop_does_not_come_again() -> None:
    loop = asyncio.get_running_loop()
    turns = 0

    class Loop:
        """The loop, but that it counts what the pump puts off."""

        def __getattr__(self, name: str) -> object:
            return getattr(loop, name)

        def call_soon(self, callback: object) -> object:
            nonlocal turns
            turns += 1
            return loop.call_soon(callback)

    client = ChannelClient(ChannelShape(slots=1, buffer_tokens=8), 1, shared=False)
    pump = type(client.pump)(client.channel, Loop())
    pump.start()
    stream = pump.open("s", 600.0)

    class Busy(Transport):
        """There is more to read after each write."""

        def write(self, data: bytes | bytearray | memoryview) -> None:
            super().write(data)
            assert stream.push("x", 0, None, False)

    writing = asyncio.ensure_future(stream.write_to(Busy(), HEAD, True))
    await asyncio.sleep(0)
    stream.push("x", 0, None, False)
    await until(lambda: turns)
    pump.stop()
    after = turns
    for _ in range(20):
        await asyncio.sleep(0)
    assert turns == after
    stream.close()
    await asyncio.wait_for(writing, DEADLINE_S)
    client.pump.stop()


async def test_silence_ends_a_stream_behind_what_it_was_given(client: ChannelClient) -> None:
    silent, mute = Streaming(client, timeout_s=0.05), Streaming(client, timeout_s=0.05)
    silent.push(2)
    await asyncio.wait_for(asyncio.gather(silent.task, mute.task), DEADLINE_S)
    assert silent.transport.indices == [0, 1]
    assert b'"code":"timeout"' in silent.transport.written
    assert (mute.transport.writes, mute.stream.error) == ([], "timeout")
    for streaming in (silent, mute):
        streaming.stream.close()
