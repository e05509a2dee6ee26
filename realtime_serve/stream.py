"""Token streams: the mechanism behind every answer, and the public StreamManager over it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any

from realtime_serve._pump import Stream
from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.errors import QueueFullError, stream_error
from realtime_serve.types import MAX_SECONDS, StreamToken, Timings, Usage, number_problem

# A reader whose model is faster than itself would never give the event loop its turn.
_TOKENS_A_TURN = 64


class TokenStream(AsyncIterator[StreamToken]):
    """One stream's tokens, in order. Leaving it early, by `aclose` or `async with`, cancels the sequence.

    Iteration ends when the stream does; a stream that ends with an error raises it, as a ServeError, unless it is told
    not to.
    """

    def __init__(self, stream: Stream, *, raises: bool = True) -> None:
        self._stream = stream
        self._raises = raises
        self._taken = 0  # since the event loop had its turn

    @property
    def finish_reason(self) -> str | None:
        """Why the stream ended: "stop", "length" or "cancelled"; None while it runs."""
        return self._stream.finish_reason

    @property
    def usage(self) -> Usage:
        return Usage(*self._stream.usage())

    @property
    def timings(self) -> Timings:
        return Timings(*self._stream.timings())

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> StreamToken:
        if self._taken == _TOKENS_A_TURN:
            self._taken = 0
            await asyncio.sleep(0)
        while (token := self._stream.next_token()) is None:
            self._taken = 0
            if self._stream.ended:
                self._stream.close()
                error = self._stream.error
                if error and self._raises:
                    raise stream_error(error, self._stream.error_detail)
                raise StopAsyncIteration
            await self._stream.readable()
        self._taken += 1
        return StreamToken(*token)

    async def aclose(self) -> None:
        self._stream.close()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()

    def __del__(self) -> None:
        self._stream.close()


class StreamManager:
    """Makes the channels that streams live in: one for each worker, and one for streams fed by `push_token`.

    Both kinds use the same rings, stream table and pump; `push_token` and a worker's publishing are two doors to one
    ring. A stream holds at most `buffer_size` tokens that its reader has not taken; a channel has at most
    `max_streams` streams.
    """

    def __init__(
        self,
        default_timeout: float = 30.0,
        buffer_size: int = 100,
        *,
        max_streams: int = 1024,
        slow_reader_timeout: float = 30.0,
        max_payload_bytes: int = 4 << 20,
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1 token; it is {buffer_size!r}")
        self.default_timeout = _checked_timeout("default_timeout", default_timeout)
        self._shape = ChannelShape(max_streams, buffer_size, slow_reader_timeout, max_payload_bytes)
        self._channels: list[weakref.ref[ChannelClient]] = []  # one that nobody uses gives its memory back
        self._local: ChannelClient | None = None
        self._streams: dict[str, _NamedStream] = {}

    def open_channel(self, generation: int, *, shared: bool, carries_payloads: bool = False) -> ChannelClient:
        """A channel of this manager's bounds, for a worker; its pump belongs to the running event loop."""
        channel = ChannelClient(self._shape, generation, shared=shared, carries_payloads=carries_payloads)
        self._channels = [known for known in self._channels if known() is not None]
        self._channels.append(weakref.ref(channel))
        return channel

    def serve_ready(self) -> None:
        """Hands on what streams have got meanwhile: for whoever keeps the event loop busy. Where nothing has come, it
        costs 0.13 µs a channel."""
        for known in self._channels:
            if (channel := known()) is not None:
                channel.pump.serve_ready()

    def open_count(self) -> int:
        """Streams that are open in all channels."""
        return sum(channel.pump.open_streams for known in self._channels if (channel := known()) is not None)

    def create_stream(self, stream_id: str, timeout: float | None = None) -> AsyncIterator[StreamToken]:
        """A new stream; its iterator ends at `close_stream`, or after `timeout` seconds without a token.

        Raises ValueError where a stream of that name is open, QueueFullError where there is no room for one more. Needs
        a running event loop.
        """
        seconds = _checked_timeout("timeout", self.default_timeout if timeout is None else timeout)
        existing = self._streams.get(stream_id)
        if existing is not None and not existing.is_closed:
            raise ValueError(f"stream {stream_id!r} already exists")
        if self._local is None:
            self._local = self.open_channel(1, shared=False)
        stream = self._local.pump.open(stream_id, seconds)
        if stream is None:
            raise QueueFullError(f"{self._shape.slots} streams are open, which is all there is room for")
        named = self._streams[stream_id] = _NamedStream(stream, seconds)
        return _NamedReader(named, lambda: self._forget(stream_id, named))

    def _forget(self, stream_id: str, named: _NamedStream) -> None:
        named.close()
        if self._streams.get(stream_id) is named:
            del self._streams[stream_id]

    async def push_token(self, stream_id: str, token: StreamToken) -> bool:
        """Appends a token; waits while the stream's buffer is full.

        False: there is no such open stream, or its reader made no room within the stream's timeout. Raises ValueError
        where the token's text, with its top logprobs, is longer than 8,000 bytes, or there are more than 20
        of these.
        """
        named = self._streams.get(stream_id)
        if named is None or named.is_closed:
            return False
        if not named.push(token):
            named.backpressure_events += 1
            try:
                async with asyncio.timeout(named.timeout):
                    while not named.push(token):
                        if named.is_closed:
                            return False
                        named.room.clear()
                        await named.room.wait()
            except TimeoutError:
                return False
        named.tokens += 1
        return True

    async def close_stream(self, stream_id: str) -> None:
        """Ends a stream: its reader gets what is buffered, then the end. Unknown names are ignored."""
        named = self._streams.get(stream_id)
        if named is not None:
            named.end()

    async def stream_stats(self, stream_id: str) -> dict[str, Any]:
        """Raises KeyError where there is no such stream."""
        named = self._streams[stream_id]
        elapsed = time.time() - named.created_at
        return {
            "stream_id": stream_id,
            "created_at": named.created_at,
            "elapsed_seconds": elapsed,
            "token_count": named.tokens,
            "tokens_per_second": named.tokens / elapsed if elapsed > 0 else 0.0,
            "backpressure_events": named.backpressure_events,
            "queue_size": named.stream.buffered,
            "is_closed": named.is_closed,
        }

    def active_streams(self) -> list[str]:
        return [stream_id for stream_id, named in self._streams.items() if not named.is_closed]

    async def cleanup_idle_streams(self, idle_timeout: float = 60.0) -> int:
        """Gives up the streams that had no token for `idle_timeout` seconds; how many those were."""
        idle = [(name, named) for name, named in self._streams.items() if named.stream.idle_seconds >= idle_timeout]
        for name, named in idle:
            self._forget(name, named)
        return len(idle)

    async def shutdown(self) -> None:
        """Ends every stream, as `close_stream` does."""
        for named in self._streams.values():
            named.end()
        self._streams.clear()
        if self._local is not None:
            self._local.pump.stop()
            self._local = None


class _NamedStream:
    __slots__ = ("_is_ending", "backpressure_events", "created_at", "room", "stream", "timeout", "tokens")

    def __init__(self, stream: Stream, timeout: float) -> None:
        self.stream = stream
        self.timeout = timeout
        self.created_at = time.time()
        self.room = asyncio.Event()
        self.tokens = 0
        self.backpressure_events = 0
        self._is_ending = False

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more tokens; its reader may still have some to read."""
        return self._is_ending or self.stream.ended

    def push(self, token: StreamToken) -> bool:
        return self.stream.push(token.token, token.token_id, token.logprob, token.is_special, token.top_logprobs)

    def end(self) -> None:
        if not self._is_ending:
            self._is_ending = True
            self.stream.push_end()
            self.room.set()

    def close(self) -> None:
        self.stream.close()
        self.room.set()


class _NamedReader(AsyncIterator[StreamToken]):
    def __init__(self, named: _NamedStream, forget: Callable[[], None]) -> None:
        self._named = named
        self._forget = forget

    async def __anext__(self) -> StreamToken:
        stream = self._named.stream
        while (token := stream.next_token()) is None:
            if stream.ended:
                self._forget()
                raise StopAsyncIteration
            await stream.readable()
        self._named.room.set()
        return StreamToken(*token)

    async def aclose(self) -> None:
        self._forget()

    def __del__(self) -> None:
        self._forget()


def _checked_timeout(name: str, seconds: float) -> float:
    problem = number_problem(seconds, 0, MAX_SECONDS)
    if problem or seconds == 0:
        raise ValueError(f"{name} {problem or 'must be more than 0 seconds'}")
    return seconds
