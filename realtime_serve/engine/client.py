"""The front end's side of a channel."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from realtime_serve._core import Channel
from realtime_serve._pump import Pump, Stream
from realtime_serve.errors import QueueFullError
from realtime_serve.types import InferenceRequest

# Room for the longest prompts that may wait at once; a lane that is full refuses like a queue that is full.
_LANE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class ChannelShape:
    """How large a channel is made."""

    slots: int
    """Streams that may be open at once: those of a step and those that wait."""
    buffer_tokens: int
    """Tokens that a stream may be ahead of its reader before its sequence is paused."""
    cut_after_s: float = 30.0
    """Seconds that a connection may be behind before it is cut off."""


class ChannelClient:
    """A channel with its pump, for one incarnation of a worker. Belongs to the event loop's thread."""

    def __init__(self, shape: ChannelShape, generation: int, *, shared: bool) -> None:
        self.channel = Channel.create(
            slots=shape.slots,
            ring_records=shape.buffer_tokens,
            lane_bytes=_LANE_BYTES,
            generation=generation,
            shared=shared,
        )
        self._loop = asyncio.get_running_loop()
        self.pump = Pump(self.channel, self._loop, shape.cut_after_s)
        self.pump.start()

    def submit(self, request: InferenceRequest, prompt_ids: list[int], *, model: str, version: str) -> Stream:
        """Queues the request. Raises QueueFullError, at once, where the channel has no room for one more."""
        stream = self.pump.submit(
            request_id=request.request_id,
            model=model,
            version=version,
            prompt_ids=prompt_ids,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            ignore_eos=request.ignore_eos,
            logprobs=request.logprobs,
            seed=secrets.randbits(64) if request.seed is None else request.seed,
            stop=request.stop,
            priority=request.priority.value,
            timeout_s=request.timeout,
        )
        if stream is None:
            raise QueueFullError(
                f"model {model!r} has {self.pump.open_streams} requests running or waiting, which is all it takes"
            )
        return stream

    def worker_died(self) -> None:
        """Ends every open stream with a typed error and leaves the channel."""
        self.pump.fail()
        self.pump.stop()
