"""Requests of a callable model, gathered into batches."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import Any, NamedTuple, Protocol

from realtime_serve._core import PriorityQueue
from realtime_serve.config import BatchConfig
from realtime_serve.errors import QueueFullError
from realtime_serve.types import RequestPriority

_MAX_QUEUE = 1024
_AGEING_MS = 5000
# How much of what it knew of a step's length the batcher keeps at each batch.
_MEMORY = 0.5
# A batch may wait for so much of a step for those that are expected: waiting longer costs more than they save.
_WAIT_SHARE = 0.5


class Batchable(Protocol):
    """What the scheduler needs of a request."""

    @property
    def priority(self) -> RequestPriority: ...


class _Waiting(NamedTuple):
    request: Batchable
    arrival: float
    deadline: float


class BatchScheduler:
    """A priority queue of one model's requests, and the batches that are taken from it.

    Inside a batch the highest priority comes first, within one the earliest arrival; a request that has waited for
    `ageing_ms` goes before all others, so none starves. Belongs to one event loop's thread; one batch is taken at a
    time, and taking the next one tells that the last is done.

    A batch is released when it is full, or `max_wait_ms` after its first request came ("timeout"), or when it could not
    be done in time any more for a request that has a deadline ("deadline"). With `dynamic_batching` it is also released
    as soon as it holds as many as the last batch had ("idle"): so a lone request on an idle server does not wait, and
    clients that send again when they are answered are waited for, for half a step at most.
    """

    def __init__(
        self,
        model: str,
        config: BatchConfig | None = None,
        *,
        max_queue: int = _MAX_QUEUE,
        ageing_ms: int = _AGEING_MS,
    ) -> None:
        self.model = model
        self.config = config or BatchConfig()
        self._max_queue = max_queue
        self._queue = PriorityQueue(capacity=max_queue, ageing_ns=ageing_ms * 1_000_000)
        self._requests: dict[int, _Waiting] = {}  # by number, so by arrival
        self._earliest_deadline = math.inf  # of those
        self._next_number = 0
        self._changed = asyncio.Event()
        # What is learned of batches: how many requests the last one had, and how long one is worked on.
        self._last_size = 1
        self._last_release = ""
        self._released_at: float | None = None
        self._step_s = 0.0
        self._batches: Counter[str] = Counter()
        self._sizes: Counter[int] = Counter()
        self._total_requests = 0
        self._total_batched = 0
        self._total_wait_s = 0.0

    async def enqueue(self, request: Batchable) -> None:
        """Queues a request. Raises QueueFullError, at once, where `max_queue` wait."""
        self.enqueue_nowait(request)

    def enqueue_nowait(self, request: Batchable, *, arrival: float | None = None, deadline: float = math.inf) -> None:
        """The same for who cannot await. `arrival`, now if none is given, and `deadline`, by which the request's batch
        should be done, are seconds of the event loop's clock."""
        now = self._clock() if arrival is None else arrival
        if not self._queue.push(request.priority.value, int(now * 1e9), 0, self._next_number):
            raise QueueFullError(
                f"model {self.model!r} has {self._max_queue} requests waiting, which is all it takes",
                retry_after=max(1.0, self._step_s * self._max_queue / self.config.max_batch_size),
            )
        self._requests[self._next_number] = _Waiting(request, now, deadline)
        self._earliest_deadline = min(self._earliest_deadline, deadline)
        self._next_number += 1
        self._total_requests += 1
        self._changed.set()

    async def get_batch(self, limit: int | None = None) -> list[Any]:
        """Waits for a first request, then for others as the configuration says; 1 to `max_batch_size` requests, and no
        more than `limit`."""
        if self._released_at is not None:
            self._learn_step(self._clock() - self._released_at)
            self._released_at = None
        while not self._requests:
            await self._change(None)
        most = self.config.max_batch_size if limit is None else min(limit, self.config.max_batch_size)
        self._last_release = await self._fill(most)
        return self._release(most)

    @property
    def last_release(self) -> str:
        """Why the last batch was released: full, timeout, idle or deadline."""
        return self._last_release

    def queue_length(self) -> int:
        return len(self._requests)

    def queue_depth(self) -> dict[str, int]:
        return {priority.name: self._queue.size_of(priority.value) for priority in RequestPriority}

    def stats(self) -> dict[str, Any]:
        batches = self._batches.total()
        return {
            "model": self.model,
            "total_requests": self._total_requests,
            "total_batches": batches,
            "avg_batch_size": self._total_batched / batches if batches else 0.0,
            "avg_wait_ms": self._total_wait_s * 1e3 / self._total_batched if self._total_batched else 0.0,
            "current_queue_length": self.queue_length(),
            "queue_depth": self.queue_depth(),
            "release_reasons": dict(self._batches),
            "batch_sizes": dict(self._sizes),
        }

    async def _fill(self, most: int) -> str:
        """Waits until the batch is to be released; why it is."""
        config = self.config
        first = self._oldest_arrival()
        latest = first + config.max_wait_ms / 1e3
        fewest = min(config.min_batch_size, most)
        wanted = max(fewest, min(most, self._last_size))  # as many as are worth waiting for
        patience = max(first, self._clock()) + _WAIT_SHARE * self._step_s
        while len(self._requests) < most:
            now = self._clock()
            start_by = self._earliest_deadline - self._step_s
            if now >= latest:
                return "timeout"
            if now >= start_by:
                return "deadline"
            until = min(latest, start_by)
            if config.dynamic_batching and len(self._requests) >= fewest:
                if len(self._requests) >= wanted or now >= patience:
                    return "idle"
                until = min(until, patience)
            await self._change(until - now)
        return "full"

    def _release(self, most: int) -> list[Any]:
        now = self._clock()
        batch: list[Any] = []
        while len(batch) < most and (number := self._queue.pop(int(now * 1e9))) is not None:
            waiting = self._requests.pop(number)
            batch.append(waiting.request)
            self._total_wait_s += now - waiting.arrival
        self._earliest_deadline = min((left.deadline for left in self._requests.values()), default=math.inf)
        self._batches[self._last_release] += 1
        self._sizes[len(batch)] += 1
        self._last_size = len(batch)
        self._total_batched += len(batch)
        self._released_at = now
        return batch

    def _learn_step(self, seconds: float) -> None:
        self._step_s = seconds if self._step_s == 0.0 else _MEMORY * self._step_s + (1 - _MEMORY) * seconds

    def _oldest_arrival(self) -> float:
        return next(iter(self._requests.values())).arrival

    @staticmethod
    def _clock() -> float:
        return asyncio.get_running_loop().time()

    async def _change(self, timeout_s: float | None) -> None:
        """Until a request comes, or the time is over."""
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
