"""The front end's side of a channel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from realtime_serve._core import Channel
from realtime_serve._pump import Pump, Stream
from realtime_serve.engine.drain_rate import DrainRate
from realtime_serve.errors import PayloadTooLargeError, QueueFullError, bounded_retry_after
from realtime_serve.payload import Payload
from realtime_serve.randomness import new_seed
from realtime_serve.types import InferenceRequest, PredictRequest

# Room for the longest prompts that may wait at once; a lane that is full refuses like a queue that is full.
_LANE_BYTES = 4 << 20
# What a ring and a lane need at least where payloads go through them: an answer of many pieces then takes few
# wake-ups, and two of the largest bodies fit into a lane.
_PAYLOAD_RING_BYTES = 64 << 10
_MAX_LANE_BYTES = 1 << 31
# A submit record's own bytes, beside its payload.
_RECORD_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class ChannelShape:
    """How large a channel is made."""

    slots: int
    """Streams that may be open at once: those of a step and those that wait."""
    buffer_tokens: int
    """Tokens that a stream may be ahead of its reader before its sequence is paused."""
    cut_after_s: float = 30.0
    """Seconds that a connection may be behind before it is cut off."""
    payload_bytes: int = 4 << 20
    """Of the largest input, where the channel carries payloads."""


class ChannelClient:
    """A channel with its pump, for one incarnation of a worker. Belongs to the event loop's thread."""

    def __init__(self, shape: ChannelShape, generation: int, *, shared: bool, carries_payloads: bool = False) -> None:
        lane_bytes = _lane_bytes(shape.payload_bytes) if carries_payloads else _LANE_BYTES
        self.channel = Channel.create(
            slots=shape.slots,
            ring_records=shape.buffer_tokens,
            lane_bytes=lane_bytes,
            generation=generation,
            shared=shared,
            least_ring_bytes=_PAYLOAD_RING_BYTES if carries_payloads else 0,
        )
        self._max_payload_bytes = lane_bytes // 2 - _RECORD_BYTES
        self._loop = asyncio.get_running_loop()
        self.pump = Pump(self.channel, self._loop, shape.cut_after_s)
        self.pump.start()
        self._rate = DrainRate()

    def submit(self, request: InferenceRequest, prompt: list[int] | Payload, *, model: str, version: str) -> Stream:
        """Queues the request, whose prompt is token ids, or text for a model that is called.

        Raises QueueFullError, at once, where the channel has no room for one more.
        """
        self._rate.observe(self.pump.open_streams)
        stream = self.pump.submit(
            request_id=request.request_id,
            model=model,
            version=version,
            prompt_ids=[] if isinstance(prompt, Payload) else prompt,
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
            seed=new_seed() if request.seed is None else request.seed,
            stop=request.stop,
            logit_bias=request.logit_bias,
            min_tokens=request.min_tokens,
            stop_token_ids=request.stop_token_ids,
            top_logprobs=request.top_logprobs,
            priority=request.priority._value_,  # `value` is a property written in Python
            timeout_s=request.timeout,
            **(self._payload(prompt) if isinstance(prompt, Payload) else {}),
        )
        return self._opened(stream, model)

    def submit_input(self, request: PredictRequest, payload: Payload, *, model: str, version: str) -> Stream:
        """Queues one of the request's inputs.

        Raises QueueFullError, at once, where the channel has no room for one more; PayloadTooLargeError.
        """
        self._rate.observe(self.pump.open_streams)
        stream = self.pump.submit(
            request_id=request.request_id,
            model=model,
            version=version,
            prompt_ids=[],
            priority=request.priority._value_,  # `value` is a property written in Python
            timeout_s=request.timeout,
            answer_kind=0 if request.output_kind is None else int(request.output_kind),
            **self._payload(payload),
        )
        return self._opened(stream, model)

    def check_room(self, count: int, model: str) -> None:
        """Raises QueueFullError where so many requests would not all be taken; no slot is then touched."""
        if self.pump.open_streams + count > self.channel.slots:
            raise self._full(model)

    def _full(self, model: str) -> QueueFullError:
        return QueueFullError(
            f"model {model!r} has {self.pump.open_streams} requests running or waiting, which is all it takes",
            retry_after=self._drained_after(),
        )

    def _payload(self, payload: Payload) -> dict[str, Any]:
        if len(payload.data) > self._max_payload_bytes:
            raise PayloadTooLargeError(
                f"an input has {len(payload.data)} bytes; this server takes {self._max_payload_bytes} at most"
            )
        return {"payload_kind": int(payload.kind), "payload": payload.data}

    def _opened(self, stream: Stream | None, model: str) -> Stream:
        if stream is None:
            raise self._full(model)
        self._rate.took_one()
        return stream

    def _drained_after(self) -> float:
        """Seconds until those who wait now have been served: who comes back sooner finds the queue hardly shorter."""
        waiting = self.pump.open_streams - self.channel.stats()["running"]
        return bounded_retry_after(self._rate.seconds_to_drain(max(1, waiting)))

    def worker_died(self) -> None:
        """Ends every open stream with a typed error and leaves the channel."""
        self.pump.fail()
        self.pump.stop()


def _lane_bytes(payload_bytes: int) -> int:
    """A power of two of which half takes a record with such a payload."""
    return min(_MAX_LANE_BYTES, 1 << (2 * (payload_bytes + _RECORD_BYTES) - 1).bit_length())
