"""BatchScheduler under a virtual clock: what is in a batch, in which order, and when it is released."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtual_loop import run

from realtime_serve import BatchConfig, BatchScheduler, RequestPriority
from realtime_serve.errors import QueueFullError


@dataclass(frozen=True)
class Request:
    name: str
    priority: RequestPriority = RequestPriority.NORMAL


LOW, NORMAL, HIGH = RequestPriority


def now() -> float:
    return asyncio.get_running_loop().time()


async def fill(scheduler: BatchScheduler, *names: str) -> None:
    for name in names:
        await scheduler.enqueue(Request(name))


def test_the_highest_priority_comes_first_and_the_earliest_arrival_within_one() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=4, max_wait_ms=0))
        for name, priority in [("a", LOW), ("b", NORMAL), ("c", HIGH), ("d", NORMAL), ("e", HIGH), ("f", LOW)]:
            await scheduler.enqueue(Request(name, priority))
        assert scheduler.queue_depth() == {"LOW": 2, "NORMAL": 2, "HIGH": 2}
        assert [request.name for request in await scheduler.get_batch()] == ["c", "e", "b", "d"]
        assert scheduler.queue_length() == 2
        assert [request.name for request in await scheduler.get_batch()] == ["a", "f"]

    run(main())


def test_nobody_starves() -> None:
    async def main() -> float:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=1, max_wait_ms=0), ageing_ms=1000)
        await scheduler.enqueue(Request("patient", LOW))
        for index in range(10_000):
            await scheduler.enqueue(Request(str(index), HIGH))
            (taken,) = await scheduler.get_batch()
            if taken.name == "patient":
                return now()
            await asyncio.sleep(0.01)
        raise AssertionError("it starved")

    assert run(main()) == pytest.approx(1.0, abs=0.011)


def test_a_full_batch_is_released_at_once() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=3, max_wait_ms=50, dynamic_batching=False))
        await fill(scheduler, "a", "b", "c", "d")
        assert len(await scheduler.get_batch()) == 3
        assert now() == 0.0
        assert scheduler.stats()["release_reasons"] == {"full": 1}

    run(main())


def test_a_partial_batch_waits_for_max_wait_ms_from_its_first_request() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=8, max_wait_ms=50, dynamic_batching=False))
        batch = asyncio.ensure_future(scheduler.get_batch())
        await asyncio.sleep(1.0)  # before the first request it waits for ever
        await fill(scheduler, "a")
        await asyncio.sleep(0.03)
        await fill(scheduler, "b")
        assert [request.name for request in await batch] == ["a", "b"]
        assert now() == pytest.approx(1.05)
        assert scheduler.stats()["release_reasons"] == {"timeout": 1}
        assert scheduler.stats()["avg_wait_ms"] == pytest.approx((50 + 20) / 2)

    run(main())


def test_filling_up_ends_the_wait() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=2, max_wait_ms=50, dynamic_batching=False))
        batch = asyncio.ensure_future(scheduler.get_batch())
        await fill(scheduler, "a")
        await asyncio.sleep(0.01)
        await fill(scheduler, "b")
        await batch
        assert now() == pytest.approx(0.01)

    run(main())


async def serve(scheduler: BatchScheduler, step_s: float, batches: int) -> list[int]:
    """A model with steps of that length, whose clients send again as soon as they are answered."""
    sizes = []
    for _ in range(batches):
        batch = await scheduler.get_batch()
        sizes.append(len(batch))
        await asyncio.sleep(step_s)
        for index, request in enumerate(batch):  # spread over less than half a step
            asyncio.get_running_loop().call_later(
                1e-5 * (1 + index), lambda r=request: asyncio.ensure_future(scheduler.enqueue(r))
            )
    return sizes


def test_a_lone_client_never_waits() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=32, max_wait_ms=50))
        await fill(scheduler, "alone")
        assert await serve(scheduler, 0.002, 100) == [1] * 100
        assert scheduler.stats()["avg_wait_ms"] == pytest.approx(0, abs=1e-6)
        assert scheduler.stats()["release_reasons"] == {"idle": 100}

    run(main())


@pytest.mark.parametrize("clients", [5, 20, 32, 64])
def test_clients_that_send_again_are_waited_for(clients: int) -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=32, max_wait_ms=50))
        await fill(scheduler, *map(str, range(clients)))
        sizes = await serve(scheduler, 0.002, 60)
        assert sizes[-20:] == [min(clients, 32)] * 20

    run(main())


def test_when_the_others_left_the_wait_ends_within_half_a_step_and_is_unlearned() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=32, max_wait_ms=1000))
        await fill(scheduler, *map(str, range(16)))
        await serve(scheduler, 0.01, 10)
        await asyncio.sleep(0.001)
        while scheduler.queue_length():
            await scheduler.get_batch()
            await asyncio.sleep(0.01)
        waits = []
        for _ in range(8):
            await fill(scheduler, "alone")
            before = now()
            await scheduler.get_batch()
            waits.append(now() - before)
            await asyncio.sleep(0.01)
        assert max(waits) <= 0.0055
        assert waits[-1] == pytest.approx(0, abs=1e-6)

    run(main())


def test_min_batch_size_is_waited_for_but_not_for_ever() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=8, max_wait_ms=50, min_batch_size=3))
        batch = asyncio.ensure_future(scheduler.get_batch())
        await fill(scheduler, "a", "b")
        await asyncio.sleep(0.02)
        assert not batch.done()
        await fill(scheduler, "c")
        assert len(await batch) == 3
        assert now() == pytest.approx(0.02)
        await fill(scheduler, "d")
        before = now()
        assert len(await scheduler.get_batch()) == 1
        assert now() - before == pytest.approx(0.05)

    run(main())


def test_a_full_queue_refuses_at_once() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=2), max_queue=3)
        await fill(scheduler, "a", "b", "c")
        with pytest.raises(QueueFullError, match="model 'm' has 3 requests waiting") as refused:
            await fill(scheduler, "d")
        assert refused.value.retry_after >= 1
        await scheduler.get_batch()
        await fill(scheduler, "d", "e")
        assert scheduler.queue_length() == 3

    run(main())


def test_stats() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=2, max_wait_ms=0))
        assert scheduler.stats()["avg_batch_size"] == 0.0
        await fill(scheduler, "a", "b", "c")
        await scheduler.get_batch()
        assert scheduler.stats() == {
            "model": "m",
            "total_requests": 3,
            "total_batches": 1,
            "avg_batch_size": 2.0,
            "avg_wait_ms": 0.0,
            "current_queue_length": 1,
            "queue_depth": {"LOW": 0, "NORMAL": 1, "HIGH": 0},
            "release_reasons": {"full": 1},
            "batch_sizes": {2: 1},
        }

    run(main())


@given(
    st.lists(st.tuples(st.sampled_from(RequestPriority), st.floats(0, 0.1)), min_size=1, max_size=40),
    st.integers(1, 8),
    st.booleans(),
)
def test_every_request_is_in_one_batch_and_none_waits_too_long(
    arrivals: list[tuple[RequestPriority, float]], size: int, dynamic: bool
) -> None:
    async def main() -> None:
        config = BatchConfig(max_batch_size=size, max_wait_ms=20, dynamic_batching=dynamic)
        scheduler = BatchScheduler("m", config)

        async def arrive() -> None:
            for index, (priority, pause) in enumerate(arrivals):
                await asyncio.sleep(pause)
                await scheduler.enqueue(Request(str(index), priority))

        arriving = asyncio.ensure_future(arrive())
        seen: list[str] = []
        while len(seen) < len(arrivals):
            batch = await scheduler.get_batch()
            assert 1 <= len(batch) <= size
            priorities = [request.priority.value for request in batch]
            assert priorities == sorted(priorities, reverse=True)
            seen += [request.name for request in batch]
        await arriving
        assert sorted(seen, key=int) == [str(index) for index in range(len(arrivals))]
        assert scheduler.stats()["avg_wait_ms"] <= 20 + 1e-3

    run(main())


def test_a_limit_is_a_full_batch() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=8, max_wait_ms=1000, dynamic_batching=False))
        await fill(scheduler, "a", "b", "c", "d")
        assert [request.name for request in await scheduler.get_batch(3)] == ["a", "b", "c"]
        assert (now(), scheduler.last_release) == (0.0, "full")
        # It bounds min_batch_size too, and is bounded by max_batch_size.
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=4, max_wait_ms=1000, min_batch_size=4))
        await fill(scheduler, *map(str, range(9)))
        assert len(await scheduler.get_batch(1)) == 1
        assert len(await scheduler.get_batch(100)) == 4
        assert now() == 0.0

    run(main())


def test_the_wait_counts_from_the_arrival_that_is_given() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=8, max_wait_ms=50, dynamic_batching=False))
        await asyncio.sleep(1.0)
        # Taken in the order of their priorities, not of their arrivals.
        scheduler.enqueue_nowait(Request("late", HIGH), arrival=0.99)
        scheduler.enqueue_nowait(Request("early", LOW), arrival=0.97)
        assert [request.name for request in await scheduler.get_batch()] == ["late", "early"]
        assert (now(), scheduler.last_release) == (pytest.approx(1.02), "timeout")
        assert scheduler.stats()["avg_wait_ms"] == pytest.approx((30 + 50) / 2)
        scheduler.enqueue_nowait(Request("long ago"), arrival=0.5)
        await scheduler.get_batch()
        assert now() == pytest.approx(1.02)

    run(main())


def test_within_a_priority_the_given_arrival_decides() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=2, max_wait_ms=0))
        await asyncio.sleep(1.0)
        for name, arrival in [("b", 0.2), ("c", 0.3), ("a", 0.1)]:
            scheduler.enqueue_nowait(Request(name), arrival=arrival)
        assert [request.name for request in await scheduler.get_batch()] == ["a", "b"]

    run(main())


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_deadline_releases_a_batch_a_step_before_it(dynamic: bool) -> None:
    async def main() -> None:
        config = BatchConfig(max_batch_size=8, max_wait_ms=10_000, min_batch_size=2, dynamic_batching=dynamic)
        scheduler = BatchScheduler("m", config)
        await fill(scheduler, *map(str, range(8)))
        await scheduler.get_batch()
        await asyncio.sleep(0.25)  # a step, which the next get_batch learns from
        scheduler.enqueue_nowait(Request("patient"), deadline=now() + 9.0)
        taking = asyncio.ensure_future(scheduler.get_batch())
        await asyncio.sleep(0)
        if not dynamic:
            scheduler.enqueue_nowait(Request("urgent"), deadline=now() + 1.0)
            assert [request.name for request in await taking] == ["patient", "urgent"]
            assert now() == pytest.approx(0.25 + 1.0 - 0.25)
        else:  # min_batch_size holds the first one back
            await taking
            assert now() == pytest.approx(0.25 + 9.0 - 0.25)
        assert scheduler.last_release == "deadline"
        # It is the deadline of those that wait that counts, and one that has passed does not wait at all.
        scheduler.enqueue_nowait(Request("too late"), deadline=now() - 1.0)
        before = now()
        await scheduler.get_batch()
        assert (now(), scheduler.last_release) == (before, "deadline")
        assert scheduler.stats()["release_reasons"] == {"full": 1, "deadline": 2}

    run(main())


def test_what_is_withdrawn_is_in_no_batch() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=2, max_wait_ms=50, dynamic_batching=False))
        numbers = [scheduler.enqueue_nowait(Request(name, HIGH)) for name in "abc"]
        scheduler.withdraw(numbers[0])
        scheduler.withdraw(numbers[0])
        scheduler.withdraw(-1)
        assert (scheduler.queue_length(), scheduler.queue_depth()["HIGH"]) == (2, 2)
        assert [request.name for request in await scheduler.get_batch()] == ["b", "c"]
        scheduler.withdraw(numbers[1])  # it is being served
        assert scheduler.stats()["batch_sizes"] == {2: 1}

    run(main())


def test_a_batch_that_is_withdrawn_as_a_whole_is_none() -> None:
    async def main() -> None:
        config = BatchConfig(max_batch_size=8, max_wait_ms=50, dynamic_batching=False)
        scheduler = BatchScheduler("m", config)
        number = scheduler.enqueue_nowait(Request("gone"), deadline=0.04)
        batch = asyncio.ensure_future(scheduler.get_batch())
        await asyncio.sleep(0.01)
        scheduler.withdraw(number)
        await asyncio.sleep(10)
        assert not batch.done()
        await fill(scheduler, "a")
        assert [request.name for request in await batch] == ["a"]
        assert (now(), scheduler.last_release) == (pytest.approx(10.06), "timeout")  # not at the deadline of the other
        assert scheduler.stats()["release_reasons"] == {"timeout": 1}

    run(main())


def test_what_is_withdrawn_leaves_its_place_in_the_queue() -> None:
    async def main() -> None:
        scheduler = BatchScheduler("m", BatchConfig(max_batch_size=4, max_wait_ms=0), max_queue=4)
        stay = [Request("low", LOW), Request("normal"), Request("high", HIGH)]
        for request in stay:
            await scheduler.enqueue(request)
        for _ in range(50):
            number = scheduler.enqueue_nowait(Request("fleeting", HIGH))
            with pytest.raises(QueueFullError):
                scheduler.enqueue_nowait(Request("too many"))
            scheduler.withdraw(number)
        assert scheduler.queue_depth() == {"LOW": 1, "NORMAL": 1, "HIGH": 1}
        assert [request.name for request in await scheduler.get_batch()] == ["high", "normal", "low"]

    run(main())
