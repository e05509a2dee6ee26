"""Items a second from one to four producers to one consumer: our rings and queue beside Python's queues.

Two tables. The first is the mechanism: our C++ with threads and with processes that share memory, and queue.Queue
(threads), asyncio.Queue (tasks), multiprocessing.Queue (processes). The second is what a Python program meets: a stream
fed by `StreamManager.push_token` beside an asyncio.Queue, the same StreamToken each time. All in one sitting, the
rounds in turn, forwards and backwards; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.queues import Queue as ProcessQueue
from multiprocessing.synchronize import Barrier

from core_stages import CoreStages, build

from realtime_serve import StreamManager, StreamToken

PRODUCERS = (1, 2, 4)
_CAPACITY = 1024
_STREAM_CAPACITY = 100
_TOKEN = StreamToken(" Paris", 7042, None, False)

# (producers, items in all) → seconds
Contender = Callable[[int, int], float]


def through_queue(producers: int, items: int) -> float:
    """queue.Queue: producers are threads."""
    shared: queue.Queue[StreamToken] = queue.Queue(_CAPACITY)
    each = items // producers
    ready = threading.Barrier(producers + 1)

    def produce() -> None:
        ready.wait()
        for _ in range(each):
            shared.put(_TOKEN)

    threads = [threading.Thread(target=produce) for _ in range(producers)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for _ in range(each * producers):
        shared.get()
    seconds = time.perf_counter() - started
    for thread in threads:
        thread.join()
    return seconds


async def push_through_queue(producers: int, items: int, capacity: int = _CAPACITY) -> float:
    """asyncio.Queue: producers are tasks."""
    shared: asyncio.Queue[StreamToken] = asyncio.Queue(capacity)
    each = items // producers

    async def produce() -> None:
        for _ in range(each):
            await shared.put(_TOKEN)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(producers):
            tasks.create_task(produce())
        for _ in range(each * producers):
            await shared.get()
    return time.perf_counter() - started


def _put(shared: ProcessQueue[tuple[str, int]], ready: Barrier, items: int) -> None:
    ready.wait()
    for _ in range(items):
        shared.put((" Paris", 7042))


def through_process_queue(producers: int, items: int) -> float:
    """multiprocessing.Queue: producers are processes; they have started when the clock does."""
    context = multiprocessing.get_context("spawn")
    shared = context.Queue(_CAPACITY)
    ready = context.Barrier(producers + 1)
    each = items // producers
    processes = [context.Process(target=_put, args=(shared, ready, each)) for _ in range(producers)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    for _ in range(each * producers):
        shared.get()
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


async def push_through_streams(streams: int, items: int) -> float:
    """StreamManager.push_token: a stream has one producer, so as many streams, each read by a task of its own."""
    manager = StreamManager(buffer_size=_STREAM_CAPACITY, max_streams=streams)
    each = items // streams

    async def produce(name: str) -> None:
        for _ in range(each):
            await manager.push_token(name, _TOKEN)
        await manager.close_stream(name)

    async def consume(name: str) -> None:
        tokens = 0
        async for _ in manager.create_stream(name):
            tokens += 1
        if tokens != each:
            raise AssertionError(f"stream {name} had {tokens} tokens of {each}")

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for index in range(streams):
            tasks.create_task(consume(str(index)))
        for index in range(streams):
            tasks.create_task(produce(str(index)))
    seconds = time.perf_counter() - started
    await manager.shutdown()
    return seconds


async def push_through_queues(streams: int, items: int) -> float:
    """The same with an asyncio.Queue a stream."""
    async with asyncio.TaskGroup() as tasks:
        started = time.perf_counter()
        for _ in range(streams):
            tasks.create_task(push_through_queue(1, items // streams, _STREAM_CAPACITY))
    return time.perf_counter() - started


def mechanism(core: CoreStages) -> dict[str, tuple[Contender, int]]:
    """Contenders with the items of a round: about as long for each."""

    def ours(to: str, *, processes: bool) -> Contender:
        return lambda producers, items: core.produce(to, producers=producers, items=items, processes=processes)

    return {
        "queue.Queue, threads": (through_queue, 40_000),
        "asyncio.Queue, tasks": (lambda *load: asyncio.run(push_through_queue(*load)), 80_000),
        "multiprocessing.Queue, processes": (through_process_queue, 20_000),
        "priority queue, threads": (ours("queue", processes=False), 1_000_000),
        "priority queue, processes": (ours("queue", processes=True), 1_000_000),
        "token rings, threads": (ours("ring", processes=False), 2_000_000),
        "token rings, processes": (ours("ring", processes=True), 2_000_000),
    }


def python_door() -> dict[str, tuple[Contender, int]]:
    return {
        "asyncio.Queue, a stream each": (lambda *load: asyncio.run(push_through_queues(*load)), 40_000),
        "StreamManager.push_token": (lambda *load: asyncio.run(push_through_streams(*load)), 40_000),
    }


def compare(contenders: dict[str, tuple[Contender, int]], rounds: int) -> dict[str, list[float]]:
    """Items a second, the median, by contender; one value for each of PRODUCERS."""
    runs = [
        (name, producers, partial(contender, producers, items), items)
        for producers in PRODUCERS
        for name, (contender, items) in contenders.items()
    ]
    rates: dict[tuple[str, int], list[float]] = {}
    for round_ in range(rounds):
        for name, producers, run, items in runs if round_ % 2 == 0 else reversed(runs):
            rates.setdefault((name, producers), []).append(items / run())
    return {name: [statistics.median(rates[name, producers]) for producers in PRODUCERS] for name in contenders}


def print_table(title: str, rates: dict[str, list[float]], against: Sequence[str]) -> None:
    width = max(map(len, rates))
    print(f"\n{title}")
    print(f"{'':{width}}" + "".join(f"  {f'{n} producers' if n > 1 else '1 producer':>12}" for n in PRODUCERS))
    for name, values in rates.items():
        print(f"{name:{width}}" + "".join(f"  {_rate(value):>12}" for value in values))
        if name in against:
            continue
        for other in against:
            factors = (mine / theirs for mine, theirs in zip(values, rates[other], strict=True))
            print(f"{'  × ' + other:{width}}" + "".join(f"  {factor:>12.2f}" for factor in factors))


def _rate(per_second: float) -> str:
    return f"{per_second / 1e6:.2f} M/s" if per_second >= 1e6 else f"{per_second / 1e3:.0f} k/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    contenders = mechanism(CoreStages(build()))
    print_table("items a second, the mechanism", compare(contenders, rounds), list(contenders)[:3])
    print_table("items a second, from Python", compare(python_door(), rounds), list(python_door())[:1])


if __name__ == "__main__":
    main()
