"""What requests cost, for Prometheus and for a program that asks."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.registry import Collector

from realtime_serve.errors import ServeError
from realtime_serve.middleware.chain import Handler
from realtime_serve.types import Outcome, Request

# Seconds: from a null model's token to a long answer.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(slots=True)
class _Window:
    """A model's totals, and its last requests."""

    recent: deque[tuple[float, float, int]]  # when it ended, latency in ms, tokens
    request_count: int = 0
    error_count: int = 0
    total_tokens: int = 0


class _Labelled:
    """A model's own children of the metrics, looked up once: a lookup takes as long as a count."""

    def __init__(self, collector: MetricsCollector, model: str) -> None:
        self._requests, self._model = collector.requests, model
        self._by_outcome: dict[str, Counter] = {}
        self.prompt_tokens = collector.prompt_tokens.labels(model)
        self.tokens = collector.tokens.labels(model)
        self.latency = collector.latency.labels(model)
        self.queue = collector.queue.labels(model)
        self.first_token = collector.first_token.labels(model)

    def ended(self, outcome: str) -> Counter:
        counter = self._by_outcome.get(outcome)
        if counter is None:
            counter = self._by_outcome[outcome] = self._requests.labels(self._model, outcome)
        return counter


class MetricsCollector:
    """Counts requests as middleware, and by `record_request`.

    Every label comes from a fixed set: the models that are served ("" for a request that named none of them), and the
    finish reasons and errors that there are.
    """

    def __init__(
        self,
        window_size: int = 1000,
        *,
        is_served: Callable[[str], bool] = lambda model: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Percentiles and throughput are of the last `window_size` requests of a model. `is_served` says which names
        may become labels where a request failed."""
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1; it is {window_size!r}")
        self._window_size = window_size
        self._is_served = is_served
        self._clock = clock
        self._windows: dict[str, _Window] = {}
        self._labelled: dict[str, _Labelled] = {}
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "rts_requests", "Requests by how they ended.", ("model", "outcome"), registry=self._registry
        )
        self.refused_connections = Counter(
            "rts_refused_connections", "Connections refused as one too many.", registry=self._registry
        )
        self.prompt_tokens = Counter(
            "rts_prompt_tokens", "Tokens of answered prompts.", ("model",), registry=self._registry
        )
        self.tokens = Counter("rts_generated_tokens", "Tokens of answers.", ("model",), registry=self._registry)
        self.latency = self._histogram("rts_request_seconds", "From a request's arrival to its last token.")
        self.queue = self._histogram("rts_queue_seconds", "From a request's arrival to its place in a step.")
        self.first_token = self._histogram("rts_first_token_seconds", "From a request's arrival to its first token.")

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, ("model",), buckets=_BUCKETS, registry=self._registry)

    async def __call__(self, request: Request, next: Handler) -> Outcome:
        started = self._clock()
        try:
            outcome = await next(request)
        except asyncio.CancelledError:
            self._record(self._label(request), self._ms_since(started), 0, "cancelled", is_error=False)
            raise
        except Exception as error:
            label = error.label if isinstance(error, ServeError) else "internal"
            self._record(self._label(request), self._ms_since(started), 0, label, is_error=True)
            raise
        self._record(
            outcome.model,
            self._ms_since(started),
            outcome.usage.completion_tokens,
            outcome.finish_reason or "none",
            is_error=False,
        )
        labelled, timings = self._labelled[outcome.model], outcome.timings
        labelled.prompt_tokens.inc(outcome.usage.prompt_tokens)
        labelled.queue.observe(timings.queue_ms / 1e3)
        if outcome.usage.completion_tokens:
            labelled.first_token.observe((timings.queue_ms + timings.prefill_ms) / 1e3)
        return outcome

    async def record_request(self, model: str, latency_ms: float, tokens: int = 0, error: str | None = None) -> None:
        """Counts a request that did not pass the chain. `model` and `error` become labels: keep their number small."""
        self._record(model, latency_ms, tokens, error or "ok", is_error=error is not None)

    def count_unread(self, error: ServeError) -> None:
        """A request that could not be read: it never gets to the chain, and has no model."""
        self.requests.labels("", error.label).inc()

    async def get_metrics(self, model: str) -> dict[str, Any]:
        """Zeros for a model that had no request. Latencies in milliseconds."""
        window = self._windows.get(model) or self._new_window()
        latencies = sorted(latency for _, latency, _ in window.recent)
        return {
            "request_count": window.request_count,
            "error_count": window.error_count,
            "error_rate": window.error_count / window.request_count if window.request_count else 0.0,
            "total_tokens": window.total_tokens,
            "latency_ms": {
                "p50": _percentile(latencies, 0.50),
                "p95": _percentile(latencies, 0.95),
                "p99": _percentile(latencies, 0.99),
                "min": latencies[0] if latencies else 0.0,
                "max": latencies[-1] if latencies else 0.0,
                "mean": sum(latencies) / len(latencies) if latencies else 0.0,
            },
            "throughput_tokens_per_sec": self._throughput(window),
        }

    async def get_all_metrics(self) -> dict[str, dict[str, Any]]:
        return {model: await self.get_metrics(model) for model in self._windows}

    def add_source(self, source: Collector) -> None:
        """Something that `render` asks for its metrics each time."""
        self._registry.register(source)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _record(self, model: str, latency_ms: float, tokens: int, outcome: str, *, is_error: bool) -> None:
        window = self._windows.get(model)
        if window is None:
            window = self._windows[model] = self._new_window()
            self._labelled[model] = _Labelled(self, model)
        window.request_count += 1
        window.error_count += is_error
        window.total_tokens += tokens
        window.recent.append((self._clock(), latency_ms, tokens))
        labelled = self._labelled[model]
        labelled.ended(outcome).inc()
        labelled.tokens.inc(tokens)
        labelled.latency.observe(latency_ms / 1e3)

    def _label(self, request: Request) -> str:
        return request.model if request.model is not None and self._is_served(request.model) else ""

    def _new_window(self) -> _Window:
        return _Window(deque(maxlen=self._window_size))

    def _throughput(self, window: _Window) -> float:
        """Tokens a second, from the start of the window's first request until now."""
        if not window.recent:
            return 0.0
        ended, latency_ms, _ = window.recent[0]
        seconds = self._clock() - (ended - latency_ms / 1e3)
        return sum(tokens for _, _, tokens in window.recent) / seconds if seconds > 0 else 0.0

    def _ms_since(self, started: float) -> float:
        return (self._clock() - started) * 1e3


def _percentile(ordered: list[float], q: float) -> float:
    """By linear interpolation between the two nearest of the ordered values; 0 where there are none."""
    if not ordered:
        return 0.0
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
