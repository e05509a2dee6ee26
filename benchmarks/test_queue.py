"""The priority queue. queues.py compares it with Python's."""

import pytest

_ITEMS = 1_000_000


def test_queue(measure_stage) -> None:
    measure_stage("queue")


@pytest.mark.parametrize("producers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_queue_from(core, measure, kind: str, producers: int) -> None:
    measure(
        lambda: core.produce("queue", producers=producers, items=_ITEMS, processes=kind == "processes"),
        operations=_ITEMS,
        rounds=5,
    )
