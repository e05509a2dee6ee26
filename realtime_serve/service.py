"""What a request goes through, whichever way it came in: by HTTP or by a call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import cast

from realtime_serve._core import PayloadKind
from realtime_serve._pump import Stream
from realtime_serve.config import BatchConfig, ServerConfig
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.errors import ModelUnavailableError, ShuttingDownError, bounded_retry_after, stream_error
from realtime_serve.middleware import (
    ClientPriorities,
    MetricsCollector,
    Middleware,
    MiddlewareChain,
    RateLimiter,
    RequestLogger,
)
from realtime_serve.models import Model, ModelRegistry
from realtime_serve.payload import Payload
from realtime_serve.stream import StreamManager
from realtime_serve.telemetry import EngineMetrics
from realtime_serve.types import InferenceRequest, Outcome, PredictRequest, Request, RequestPriority, Timings, Usage

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
            max_payload_bytes=config.max_body_bytes,
        )
        self.registry = ModelRegistry(
            self.streams,
            EngineLimits(
                max_batch_size=config.max_batch_size,
                max_step_tokens=max(config.max_step_tokens, config.max_batch_size),
                max_queue=config.max_queue,
                ageing_ms=config.ageing_ms,
                target_step_ms=config.target_step_ms,
            ),
            isolation=config.isolation,
            log_level=config.log_level,
            batching=BatchConfig(max_batch_size=config.max_batch_size, max_wait_ms=config.max_batch_wait_ms),
        )
        self.rate_limiter = RateLimiter(config.rate_limit_per_minute)
        self.request_logger = RequestLogger(config.log_level)
        self.metrics = MetricsCollector(is_served=lambda name: self.registry.get_model(name) is not None)
        self.metrics.add_source(EngineMetrics(self.registry))
        chain: list[Middleware] = [self.request_logger, self.metrics, self.rate_limiter]
        if config.client_priorities:
            bound = {client: RequestPriority[name] for client, name in dict(config.client_priorities).items()}
            chain.insert(0, ClientPriorities(bound))  # outermost: the log then has the priority that counts
        self.middleware = MiddlewareChain(chain)
        self.drain_ended = asyncio.Event()
        """Set by who cannot wait for streams any longer."""
        self._drain_until = 0.0

    def open(self) -> None:
        """Takes requests, again where it has been closed."""
        self.is_draining = False
        self.drain_ended = asyncio.Event()

    async def serve(self, request: InferenceRequest, deliver: Deliver) -> Outcome:
        """Takes a request through the middleware and serves it to its end.

        Raises ServeError where it cannot be served, or where its stream fails: `deliver` has then handed on what there
        was. Cancelled, it cancels the sequence.
        """
        return await self.middleware.run(
            request, lambda admitted: self._serve(cast(InferenceRequest, admitted), deliver)
        )

    async def _serve(self, request: InferenceRequest, deliver: Deliver) -> Outcome:
        model = self._model_for(request)
        stream = await model.submit(request)
        try:
            await deliver(stream)
            if stream.error:
                raise stream_error(stream.error, stream.error_detail)
            return Outcome(
                model.name, model.version, stream.finish_reason, Usage(*stream.usage()), Timings(*stream.timings())
            )
        finally:
            model.record_inference(stream.token_count)
            _end(stream, model)

    async def predict(self, request: PredictRequest) -> tuple[list[Payload], Outcome]:
        """Takes a request for a model that predicts through the middleware; its outputs, in the order of its inputs.

        Raises ServeError where it cannot be served or one of its inputs fails. Cancelled, it cancels the others.
        """
        outputs: list[Payload] = []
        outcome = await self.middleware.run(
            request, lambda admitted: self._predict(cast(PredictRequest, admitted), outputs)
        )
        return outputs, outcome

    async def _predict(self, request: PredictRequest, outputs: list[Payload]) -> Outcome:
        model = self._model_for(request)
        streams = model.submit_inputs(request)
        try:
            for index, stream in enumerate(streams):
                kind, data = await stream.whole()
                if stream.error:
                    where = f"inputs[{index}]: " if len(streams) > 1 else ""
                    raise stream_error(stream.error, stream.error_detail and where + stream.error_detail)
                if stream.finish_reason == "cancelled":  # its worker was stopped: no answer, or a part of one
                    raise ModelUnavailableError(f"model {model.name!r} was stopped before it answered")
                outputs.append(Payload(PayloadKind(kind), data))
            return Outcome(model.name, model.version, "stop", Usage(), Timings(*streams[-1].timings()))
        finally:
            model.record_inference(0)
            for stream in streams:
                _end(stream, model)

    def _model_for(self, request: Request) -> Model:
        """Its model's active version."""
        if self.is_draining:
            # By then this process is gone, and what takes its place may serve.
            raise ShuttingDownError(
                "the server is shutting down; it takes no new requests", retry_after=self.ready_after()
            )
        return self.registry.require_model(request.model)

    def not_ready(self) -> list[str]:
        """What stands between this server and serving: empty when it is ready."""
        if self.is_draining:
            return ["shutdown"]
        models = self.registry.models()
        waiting = [f"{config.name} {config.version}" for config in self.registry.loading()]
        waiting += [f"{m.name} {m.version}" for m in models if not m.worker.is_ready]
        return waiting or ([] if models else ["a model"])

    def ready_after(self) -> float:
        """Seconds after which it may be ready, as far as anybody can tell."""
        if self.is_draining:
            return bounded_retry_after(self.drain_left())
        waits = [model.worker.ready_in() for model in self.registry.models() if not model.worker.is_ready]
        return max([self.registry.loaded_in(), *waits])

    def stalled_models(self) -> list[str]:
        now = time.monotonic()
        return [f"{m.name} {m.version}" for m in self.registry.models() if m.worker.stalled_for(now) > _STALLED_AFTER_S]

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests and waits for those that run; how many were left at the end of the time."""
        self.is_draining = True
        self._drain_until = time.monotonic() + timeout_s
        while (left := self.streams.open_count()) and self.drain_left() and not self.drain_ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.drain_ended.wait(), _DRAIN_POLL_S)
        return left

    def drain_left(self) -> float:
        """Seconds that are left of the time that `drain` was given."""
        return max(0.0, self._drain_until - time.monotonic())

    async def close(self) -> None:
        await self.registry.shutdown()
        await self.streams.shutdown()


def _end(stream: Stream, model: Model) -> None:
    if stream.error == "timeout":
        model.worker.suspect()
    stream.close()
