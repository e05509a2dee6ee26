"""The token rings, and the door to them that Python has. queues.py compares both with Python's queues."""

import asyncio

import pytest
from queues import push_through_streams

_ITEMS = 1_000_000
_PUSHED = 10_000


def test_ring(measure_stage) -> None:
    measure_stage("ring")


@pytest.mark.parametrize("producers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_ring_from(core, measure, kind: str, producers: int) -> None:
    measure(
        lambda: core.produce("ring", producers=producers, items=_ITEMS, processes=kind == "processes"),
        operations=_ITEMS,
        rounds=5,
    )


@pytest.mark.parametrize("streams", [1, 4])
def test_push_token(measure, streams: int) -> None:
    measure(lambda: asyncio.run(push_through_streams(streams, _PUSHED)), operations=_PUSHED, rounds=10)
