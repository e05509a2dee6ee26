"""What a request goes through, whichever way it came in: by HTTP or by a call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from realtime_serve._pump import Stream
from realtime_serve.config import ServerConfig
from realtime_serve.engine.step_loop import EngineLimits
from realtime_serve.errors import ShuttingDownError, stream_error
from realtime_serve.middleware import MetricsCollector, MiddlewareChain, RateLimiter, RequestLogger
from realtime_serve.models import Model, ModelRegistry
from realtime_serve.stream import StreamManager
from realtime_serve.telemetry import EngineMetrics
from realtime_serve.types import InferenceRequest, Outcome, Timings, Usage

# A worker with work that has made no step for this long is reported as stalled. The longest step that is normal, a
# full prefill chunk of a large model on a slow CPU, takes a few seconds.
_STALLED_AFTER_S = 30.0
_DRAIN_POLL_S = 0.02


Deliver = Callable[[Stream], Awaitable[None]]
"""Hands a stream to its reader, to its end."""


class InferenceService:
    """The registry, the streams and the middleware of one server, and whether it still takes requests."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.is_draining = False
        self.streams = StreamManager(
            config.request_timeout,
            config.stream_buffer_tokens,
            max_streams=config.max_batch_size + config.max_queue,
            slow_reader_timeout=config.slow_reader_timeout,
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
        self.rate_limiter = RateLimiter(config.rate_limit_per_minute)
        self.request_logger = RequestLogger(config.log_level)
        self.metrics = MetricsCollector(is_served=lambda name: self.registry.get_model(name) is not None)
        self.metrics.add_source(EngineMetrics(self.registry))
        self.middleware = MiddlewareChain((self.request_logger, self.metrics, self.rate_limiter))
        self._drain_ended = asyncio.Event()

    def open(self) -> None:
        """Takes requests, again where it has been closed."""
        self.is_draining = False
        self._drain_ended = asyncio.Event()

    async def serve(self, request: InferenceRequest, deliver: Deliver) -> Outcome:
        """Takes a request through the middleware and serves it to its end.

        Raises ServeError where it cannot be served, or where its stream fails: `deliver` has then handed on what there
        was. Cancelled, it cancels the sequence.
        """
        return await self.middleware.run(request, lambda admitted: self._serve(admitted, deliver))

    async def _serve(self, request: InferenceRequest, deliver: Deliver) -> Outcome:
        model, stream = await self._submit(request)
        try:
            await deliver(stream)
            if stream.error:
                raise stream_error(stream.error)
            return Outcome(
                model.name, model.version, stream.finish_reason, Usage(*stream.usage()), Timings(*stream.timings())
            )
        finally:
            model.record_inference(stream.token_count)
            stream.close()

    async def _submit(self, request: InferenceRequest) -> tuple[Model, Stream]:
        """Queues a request on its model's active version."""
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
