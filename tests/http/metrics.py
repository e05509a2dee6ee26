"""What a server counts, as /metrics has it."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from realtime_serve import InferenceServer


def value(server: InferenceServer, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    text = server.metrics_collector.render().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
