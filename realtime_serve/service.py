"""What a request goes through, whichever way it came in: by HTTP or by a call."""

from __future__ import annotations

import asyncio
import contextlib
import time

from realtime_serve._pump import Stream
from realtime_serve.config import ServerConfig
from realtime_serve.engine.step_loop import EngineLimits
from realtime_serve.errors import ShuttingDownError
from realtime_serve.models import Model, ModelRegistry
from realtime_serve.stream import StreamManager
from realtime_serve.types import InferenceRequest

# A worker with work that has made no step for this long is reported as stalled. The longest step that is normal, a
# full prefill chunk of a large model on a slow CPU, takes a few seconds.
_STALLED_AFTER_S = 30.0
_DRAIN_POLL_S = 0.02


class InferenceService:
    """The registry and the streams of one server, and whether it still takes requests."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.is_draining = False
        self.streams = StreamManager(
            config.request_timeout,
            config.stream_buffer_tokens,
            max_streams=config.max_batch_size + config.max_queue,
        )
        self.registry = ModelRegistry(
            self.streams,
            EngineLimits(
                max_batch_size=config.max_batch_size,
                max_step_tokens=max(config.max_step_tokens, config.max_batch_size),
                max_queue=config.max_queue,
                ageing_ms=config.ageing_ms,
            ),
            isolation=config.isolation,
            log_level=config.log_level,
        )
        self._drain_ended = asyncio.Event()

    def open(self) -> None:
        """Takes requests, again where it has been closed."""
        self.is_draining = False
        self._drain_ended = asyncio.Event()

    async def submit(self, request: InferenceRequest) -> tuple[Model, Stream]:
        """Queues a request on its model's active version. Raises ServeError where it cannot be served."""
        if self.is_draining:
            raise ShuttingDownError("the server is shutting down; it takes no new requests")
        model = self.registry.require_model(request.model)
        return model, await model.submit(request)

    def not_ready(self) -> list[str]:
        """What stands between this server and serving: empty when it is ready."""
        if self.is_draining:
            return ["shutdown"]
        models = self.registry.models()
        waiting = [f"{config.name} {config.version}" for config in self.registry.loading()]
        waiting += [f"{m.name} {m.version}" for m in models if not m.worker.is_ready]
        return waiting or ([] if models else ["a model"])

    def stalled_models(self) -> list[str]:
        now = time.monotonic()
        return [f"{m.name} {m.version}" for m in self.registry.models() if m.worker.stalled_for(now) > _STALLED_AFTER_S]

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for those that run; how many were left at the end of the time."""
        self.is_draining = True
        deadline = time.monotonic() + timeout_s
        while (left := self.streams.open_count()) and time.monotonic() < deadline and not self._drain_ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drain_ended.wait(), _DRAIN_POLL_S)
        return left

    def end_drain(self) -> None:
        """Lets `drain` return at once."""
        self._drain_ended.set()

    async def close(self) -> None:
        await self.registry.shutdown()
        await self.streams.shutdown()
