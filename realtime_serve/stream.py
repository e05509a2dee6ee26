"""Token streams: the mechanism behind every answer, and the public StreamManager over it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

from realtime_serve._pump import Stream
from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.errors import QueueFullError, stream_error
from realtime_serve.types import InferenceResponse, StreamToken, Timings, Usage


class TokenStream(AsyncIterator[StreamToken]):
    """One stream's tokens, in order. Leaving it early, by `aclose` or `async with`, cancels the sequence.

    Iteration ends when the stream does; a stream that ends with an error raises it, as a ServeError.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

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
        while (token := self._stream.next_token()) is None:
            if self._stream.ended:
                self._stream.close()
                error = self._stream.error
                if error:
                    raise stream_error(error)
                raise StopAsyncIteration
            await self._stream.readable()
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


async def collect(stream: TokenStream, *, request_id: str, model: str, version: str) -> InferenceResponse:
    """Reads a stream to its end."""
    started = time.perf_counter()
    async with stream:
        tokens = [token async for token in stream]
    return InferenceResponse(
        request_id=request_id,
        model=model,
        tokens=tokens,
        total_tokens=len(tokens),
        latency_ms=(time.perf_counter() - started) * 1e3,
        finish_reason=stream.finish_reason,
        version=version,
        usage=stream.usage,
        timings=stream.timings,
    )


class StreamManager:
    """Makes the channels that streams live in: one for each worker, and one for streams fed by `push_token`.

    Both kinds use the same rings, stream table and pump; `push_token` and a worker's publishing are two doors to one
    ring. A stream holds at most `buffer_size` tokens that its reader has not taken; a channel has at most
    `max_streams` streams.
    """

    def __init__(self, default_timeout: float = 30.0, buffer_size: int = 100, *, max_streams: int = 1024) -> None:
        if not default_timeout > 0:
            raise ValueError(f"default_timeout must be more than 0 seconds; it is {default_timeout!r}")
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1 token; it is {buffer_size!r}")
        self._default_timeout = default_timeout
        self._shape = ChannelShape(slots=max_streams, buffer_tokens=buffer_size)
        self._channels: weakref.WeakSet[ChannelClient] = weakref.WeakSet()
        self._local: ChannelClient | None = None
        self._streams: dict[str, _NamedStream] = {}

    def open_channel(self, generation: int, *, shared: bool) -> ChannelClient:
        """A channel of this manager's bounds, for a worker; its pump belongs to the running event loop."""
        channel = ChannelClient(self._shape, generation, shared=shared)
        self._channels.add(channel)
        return channel

    def open_count(self) -> int:
        """Streams that are open in all channels."""
        return sum(channel.pump.open_streams for channel in self._channels)

    def create_stream(self, stream_id: str, timeout: float | None = None) -> AsyncIterator[StreamToken]:
        """A new stream; its iterator ends at `close_stream`, or after `timeout` seconds without a token.

        Raises ValueError where a stream of that name is open. Needs a running event loop.
        """
        if stream_id in self._streams:
            raise ValueError(f"stream {stream_id!r} already exists")
        if self._local is None:
            self._local = self.open_channel(1, shared=False)
        seconds = self._default_timeout if timeout is None else timeout
        stream = self._local.pump.open(stream_id, seconds)
        if stream is None:
            raise QueueFullError(f"{self._shape.slots} streams are open, which is all there is room for")
        named = self._streams[stream_id] = _NamedStream(stream, seconds)
        return self._read(stream_id, named)

    async def _read(self, stream_id: str, named: _NamedStream) -> AsyncIterator[StreamToken]:
        try:
            while True:
                while (token := named.stream.next_token()) is not None:
                    named.room.set()
                    yield StreamToken(*token)
                if named.stream.ended:
                    return
                await named.stream.readable()
        finally:
            named.stream.close()
            named.room.set()
            self._streams.pop(stream_id, None)

    async def push_token(self, stream_id: str, token: StreamToken) -> bool:
        """Appends a token; waits while the stream's buffer is full.

        False: there is no such open stream, or its reader made no room within the stream's timeout.
        """
        named = self._streams.get(stream_id)
        if named is None or named.closed:
            return False
        deadline = asyncio.get_running_loop().time() + named.timeout
        while not named.stream.push(token.token, token.token_id, token.logprob, token.is_special):
            if named.stream.ended or self._streams.get(stream_id) is not named:
                return False
            named.backpressure_events += 1
            named.room.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await named.room.wait()
            except TimeoutError:
                return False
        named.tokens += 1
        return True

    async def close_stream(self, stream_id: str) -> None:
        """Ends a stream: its reader gets what is buffered, then the end. Unknown names are ignored."""
        named = self._streams.get(stream_id)
        if named is not None and not named.closed:
            named.closed = True
            named.stream.push_end()

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
            "is_closed": named.closed,
        }

    def active_streams(self) -> list[str]:
        return [stream_id for stream_id, named in self._streams.items() if not named.closed]

    async def cleanup_idle_streams(self, idle_timeout: float = 60.0) -> int:
        """Closes the streams that had no token for `idle_timeout` seconds; how many those were."""
        idle = [name for name, named in self._streams.items() if named.stream.idle_seconds >= idle_timeout]
        for name in idle:
            await self.close_stream(name)
            self._streams.pop(name, None)
        return len(idle)

    async def shutdown(self) -> None:
        for name in list(self._streams):
            await self.close_stream(name)
        if self._local is not None:
            self._local.pump.stop()
            self._local = None


class _NamedStream:
    __slots__ = ("backpressure_events", "closed", "created_at", "room", "stream", "timeout", "tokens")

    def __init__(self, stream: Stream, timeout: float) -> None:
        self.stream = stream
        self.timeout = timeout
        self.created_at = time.time()
        self.room = asyncio.Event()
        self.tokens = 0
        self.backpressure_events = 0
        self.closed = False
