"""The event-loop side of the token path (csrc/cython/_pump.pyx)."""

from asyncio import AbstractEventLoop, Transport
from collections.abc import Mapping, Sequence
from typing import Any, final

from realtime_serve._core import Channel
from realtime_serve.types import TopLogprob

@final
class Stream:
    """A stream as its reader sees it: tokens one by one, events to a transport, or one JSON object.

    `close` gives it up at any time, and must be called once it is done with.
    """

    def next_token(self) -> tuple[str, int, float | None, bool, tuple[TopLogprob, ...] | None] | None:
        """A StreamToken's values, or None where there is no token at the moment."""
    async def readable(self) -> None:
        """Waits until there may be a token, or the stream has ended."""
    async def write_to(self, transport: Transport, head: bytes, chunked: bool) -> None:
        """Writes the stream's events to a transport, to its end, behind `head`, which goes out with the first of them.

        Where the stream fails before its first token, nothing is written.
        """
    async def whole(self) -> tuple[int, bytes]:
        """The answer of a model that predicts, as (what its bytes are, the bytes); empty where the stream failed."""
    async def json(self) -> bytes:
        """The whole answer as one JSON object; empty where the stream failed."""
    def push(
        self,
        text: str,
        token_id: int,
        logprob: float | None,
        special: bool,
        top_logprobs: Sequence[tuple[str, int, float]] | None = None,
    ) -> bool:
        """Appends a token to a stream that Pump.open made. False: its buffer is full, or it has ended.

        Raises ValueError where the text is longer than any buffer takes, or there are too many top logprobs.
        """
    def push_end(self) -> bool: ...
    def close(self) -> None:
        """Gives the stream up; what still runs for it is cancelled. May be called more than once."""
    @property
    def started(self) -> bool:
        """Whether anything has been written to its transport."""
    @property
    def ended(self) -> bool: ...
    @property
    def error(self) -> str:
        """Why the stream failed, as a code; empty where it did not."""
    @property
    def error_detail(self) -> str:
        """What its worker says more of the error."""
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def token_count(self) -> int: ...
    @property
    def buffered(self) -> int:
        """Tokens that its reader has not taken."""
    @property
    def idle_seconds(self) -> float: ...
    def usage(self) -> tuple[int, int, int]:
        """(prompt tokens, completion tokens, cached tokens)."""
    def timings(self) -> tuple[float, float, float, float]:
        """(queue, prefill, decode, stalled), in milliseconds."""

@final
class Pump:
    """Serves the streams of one channel. Everything of it belongs to the event loop's thread."""

    def __init__(self, channel: Channel, loop: AbstractEventLoop, cut_after_s: float = 30.0) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None:
        """Ends every open stream, as `fail` does, and leaves the channel."""
    def fail(self) -> None:
        """Ends every open stream behind what it was given: with the error that its worker died, if not properly."""
    def stats(self) -> dict[str, Any]:
        """What readers see: gaps between tokens as (counts by significant bits of microseconds, their sum), and counts.

        writes; coalesced, tokens that shared a write with the one before; slowed, times that a connection fell behind
        and its streams were held in their rings; cut, connections that were behind for too long.
        """
    def serve_ready(self) -> None:
        """Serves what has come, where something has, before the event loop's turn for it."""
    @property
    def open_streams(self) -> int: ...
    @property
    def longest_wait_s(self) -> float:
        """How long the stream that has waited longest for its worker has done so; 0 where none waits."""
    @property
    def longest_timeout_s(self) -> float:
        """The longest that a stream which is open now may be without a token."""
    def submit(
        self,
        *,
        request_id: str,
        model: str,
        version: str,
        prompt_ids: list[int],
        priority: int,
        timeout_s: float,
        max_tokens: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        ignore_eos: bool = False,
        logprobs: bool = False,
        seed: int = 0,
        stop: Sequence[str] = (),
        logit_bias: Mapping[int, float] = {},
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        top_logprobs: int = 0,
        payload_kind: int = 0,
        answer_kind: int = 0,
        payload: bytes = b"",
    ) -> Stream | None:
        """Queues a request; its Stream, or None where there is no room for one more."""
    def open(self, name: str, timeout_s: float) -> Stream | None:
        """A stream that is fed by its own push; None where there is no room for one more."""
