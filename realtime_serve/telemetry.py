"""What workers and pumps count, as Prometheus metrics: read from their counters when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from realtime_serve.models import Model, ModelRegistry

_LABELS = ("model", "version")
_Counts = tuple[list[int], int]

# name, help, where it is counted, its key there, and how many of its units a unit of the metric has
_HISTOGRAMS = (
    (
        "rts_step_seconds",
        "A step, assembly to commit; a call of a callable model.",
        "worker",
        "step_us",
        1e6,
    ),
    ("rts_batch_sequences", "Sequences of a step, or inputs of a batch.", "worker", "batch_sequences", 1),
    ("rts_batch_tokens", "Positions of a step.", "worker", "batch_tokens", 1),
    ("rts_token_gap_seconds", "Between two tokens of a stream, as its reader gets them.", "pump", "token_gaps_us", 1e6),
)
_GAUGES = (
    ("rts_running_sequences", "Sequences that hold a place in the steps.", "worker", "running"),
    ("rts_waiting_requests", "Requests that wait for one.", "worker", "waiting"),
    ("rts_kv_blocks", "KV blocks that there are.", "worker", "kv_blocks"),
    ("rts_kv_blocks_used", "KV blocks that sequences hold.", "worker", "kv_blocks_used"),
)
_COUNTERS = (
    ("rts_paused_sequences", "Times that a sequence waited for its reader.", "worker", "stalls"),
    ("rts_preempted_sequences", "Times that a sequence gave up its place to another.", "worker", "preemptions"),
    ("rts_slowed_readers", "Times that a connection fell behind.", "pump", "slowed"),
    ("rts_cut_readers", "Connections cut off because they stayed behind.", "pump", "cut"),
    ("rts_writes", "Writes to connections.", "pump", "writes"),
    ("rts_coalesced_tokens", "Tokens that shared a write with the one before.", "pump", "coalesced"),
)


class EngineMetrics(Collector):
    """Of the loaded models; a worker that starts anew starts from zero."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        models = self._registry.models()
        yield _gauge("rts_model_ready", "Whether the model has a worker that serves.", models)
        restarts = CounterMetricFamily(
            "rts_worker_restarts", "Workers started in place of one that died.", labels=_LABELS
        )
        for model in models:
            restarts.add_metric(_labels(model), model.worker.restarts)
        yield restarts

        all_stats = [(model, stats) for model in models if (stats := model.worker.stats()) is not None]
        counts = [(_labels(model), stats) for model, stats in all_stats]
        called = [(model, stats) for model, stats in all_stats if model.kind != "tokens"]
        for name, help, source, key, per_unit in _HISTOGRAMS:
            histogram = HistogramMetricFamily(name, help, labels=_LABELS)
            for labels, stats in counts:
                buckets, total = _buckets(stats[source][key], per_unit)
                histogram.add_metric(labels, buckets, total)
            yield histogram
        for name, help, source, key in _GAUGES:
            gauge = GaugeMetricFamily(name, help, labels=_LABELS)
            for labels, stats in counts:
                gauge.add_metric(labels, stats[source][key])
            yield gauge
        for name, help, source, key in _COUNTERS:
            counter = CounterMetricFamily(name, help, labels=_LABELS)
            for labels, stats in counts:
                counter.add_metric(labels, stats[source][key])
            yield counter
        releases = CounterMetricFamily(
            "rts_batches", "Batches of callable models by why they were released.", labels=(*_LABELS, "release")
        )
        for model, stats in called:
            for release, count in stats["worker"]["batch_releases"].items():
                releases.add_metric((*_labels(model), release), count)
        yield releases


def _gauge(name: str, help: str, models: Iterable[Model]) -> Metric:
    gauge = GaugeMetricFamily(name, help, labels=_LABELS)
    for model in models:
        gauge.add_metric(_labels(model), float(model.worker.is_ready))
    return gauge


def _labels(model: Model) -> tuple[str, str]:
    return model.name, model.version


def _buckets(counts: _Counts, per_unit: float) -> tuple[list[tuple[str, float]], float]:
    """Cumulative, by upper bound: a bucket of n significant bits holds what is below 2 ** n."""
    by_bits, total = counts
    buckets, below = [], 0
    for bits, count in enumerate(by_bits[:-1]):
        below += count
        buckets.append((repr((2**bits - (per_unit == 1)) / per_unit), float(below)))
    return [*buckets, ("+Inf", float(below + by_bits[-1]))], total / per_unit
