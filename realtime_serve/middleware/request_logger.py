"""One line of JSON for each request."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec

from realtime_serve.errors import ServeError
from realtime_serve.middleware.chain import Handler
from realtime_serve.types import Outcome, PredictRequest, Request

LOGGER = "realtime_serve.requests"
# Of what a client sent: a line stays a line, however long an id is.
_MAX_SHOWN = 128


class RequestLogger:
    """Writes structured events to the logger `realtime_serve.requests`: the message is one JSON object.

    `request_received` is logged at DEBUG, `request_completed`, with where the time went, at INFO; a request that the
    server could not serve at WARNING. Prompts and answers are not logged.
    """

    def __init__(self, log_level: str = "INFO") -> None:
        level = logging.getLevelNamesMapping().get(log_level.upper())
        if level is None:
            raise ValueError(f"log_level must be the name of a logging level; it is {log_level!r}")
        self._log = logging.getLogger(LOGGER)
        self._level = level

    async def __call__(self, request: Request, next: Handler) -> Outcome:
        self.log_request(request)
        started = time.perf_counter()
        try:
            outcome = await next(request)
        except asyncio.CancelledError:
            self.log_completion(request, latency_ms=_ms_since(started), status="cancelled")
            raise
        except ServeError as error:
            level = logging.WARNING if error.status >= 500 else logging.INFO
            self.log_completion(request, latency_ms=_ms_since(started), status=error.code, level=level)
            raise
        except Exception as error:
            self.log_completion(
                request, latency_ms=_ms_since(started), status=type(error).__name__, level=logging.WARNING
            )
            raise
        self.log_completion(request, latency_ms=_ms_since(started), outcome=outcome)
        return outcome

    def log_request(self, request: Request) -> None:
        if self._shows(logging.DEBUG):
            asked = (
                {"inputs": len(request.inputs)}
                if isinstance(request, PredictRequest)
                else {"max_tokens": request.max_tokens}
            )
            self._write(logging.DEBUG, "request_received", request, **asked)

    def log_completion(
        self,
        request: Request,
        *,
        latency_ms: float,
        outcome: Outcome | None = None,
        status: str | None = None,
        level: int = logging.INFO,
    ) -> None:
        """`status` is why there is no outcome."""
        if not self._shows(level):
            return
        details: dict[str, Any] = {"status": status or "ok", "latency_ms": round(latency_ms, 3)}
        if outcome is not None:
            timings, usage = outcome.timings, outcome.usage
            details |= {
                "version": outcome.version,
                "finish_reason": outcome.finish_reason,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "queue_ms": round(timings.queue_ms, 3),
                "prefill_ms": round(timings.prefill_ms, 3),
                "decode_ms": round(timings.decode_ms, 3),
                "stalled_ms": round(timings.stalled_ms, 3),
            }
        self._write(level, "request_completed", request, **details)

    def _shows(self, level: int) -> bool:
        return level >= self._level and self._log.isEnabledFor(level)

    def _write(self, level: int, event: str, request: Request, **details: Any) -> None:
        line = {
            "event": event,
            "time": round(time.time(), 3),
            "request_id": request.request_id[:_MAX_SHOWN],
            "model": request.model and request.model[:_MAX_SHOWN],
            "client_id": request.client_id[:_MAX_SHOWN],
            "priority": request.priority.name,
            **details,
        }
        message = msgspec.json.encode(line).decode()
        # Made by hand: looking for the caller in the source takes a quarter of what a line costs.
        self._log.handle(self._log.makeRecord(LOGGER, level, __file__, 0, message, (), None))


def _ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
