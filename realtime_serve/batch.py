"""Requests of a callable model, gathered into batches."""

from __future__ import annotations

import asyncio
import contextlib
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
        self._ageing_ns = ageing_ms * 1_000_000
        self._queue = self._new_queue()
        self._requests: dict[int, _Waiting] = {}  # by number; the queue may have withdrawn ones as well
        self._earliest_deadline: float | None = None  # of those; None: it is to be found
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

    def enqueue_nowait(self, request: Batchable, *, arrival: float | None = None, deadline: float = math.inf) -> int:
        """The same for who cannot await; the number to withdraw it by. `arrival`, now if none is given, and `deadline`,
        by which the request's batch should be done, are seconds of the event loop's clock."""
        if len(self._requests) >= self._max_queue:
            raise QueueFullError(
                f"model {self.model!r} has {self._max_queue} requests waiting, which is all it takes",
                retry_after=max(1.0, self._step_s * self._max_queue / self.config.max_batch_size),
            )
        number = self._next_number
        self._next_number += 1
        waiting = _Waiting(request, self._clock() if arrival is None else arrival, deadline)
        self._requests[number] = waiting
        if not self._push(number, waiting):  # half of it and more has been withdrawn
            self._queue = self._new_queue()
            for known in self._requests.items():
                self._push(*known)
        if self._earliest_deadline is not None:
            self._earliest_deadline = min(self._earliest_deadline, deadline)
        self._total_requests += 1
        self._changed.set()
        return number

    def withdraw(self, number: int) -> None:
        """Takes a request out that nobody waits for any more; nothing where it is in a batch already."""
        gone = self._requests.pop(number, None)
        if gone is not None and gone.deadline == self._earliest_deadline:
            self._earliest_deadline = None
        self._changed.set()

    async def get_batch(self, limit: int | None = None) -> list[Any]:
        """Waits for a first request, then for others as the configuration says; 1 to `max_batch_size` requests, and no
        more than `limit`."""
        if self._released_at is not None:
            self._learn_step(self._clock() - self._released_at)
            self._released_at = None
        most = self.config.max_batch_size if limit is None else min(limit, self.config.max_batch_size)
        reason = None
        while reason is None:
            while not self._requests:
                await self._change(None)
            reason = await self._fill(most)
        self._last_release = reason
        return self._release(most)

    @property
    def last_release(self) -> str:
        """Why the last batch was released: full, timeout, idle or deadline."""
        return self._last_release

    def queue_length(self) -> int:
        return len(self._requests)

    def queue_depth(self) -> dict[str, int]:
        depth = Counter(waiting.request.priority for waiting in self._requests.values())
        return {priority.name: depth[priority] for priority in RequestPriority}

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

    async def _fill(self, most: int) -> str | None:
        """Waits until the batch is to be released; why it is, or None where all its requests were withdrawn."""
        if len(self._requests) >= most:
            return "full"
        config = self.config
        first = min(waiting.arrival for waiting in self._requests.values())
        latest = first + config.max_wait_ms / 1e3
        fewest = min(config.min_batch_size, most)
        wanted = max(fewest, min(most, self._last_size))  # as many as are worth waiting for
        patience = max(first, self._clock()) + _WAIT_SHARE * self._step_s
        while len(self._requests) < most:
            now = self._clock()
            start_by = self._find_earliest_deadline() - self._step_s
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
            if not self._requests:
                return None
        return "full"

    def _release(self, most: int) -> list[Any]:
        now = self._clock()
        batch: list[Any] = []
        while len(batch) < most and (number := self._queue.pop(int(now * 1e9))) is not None:
            if (waiting := self._requests.pop(number, None)) is None:
                continue  # withdrawn
            batch.append(waiting.request)
            self._total_wait_s += now - waiting.arrival
        self._earliest_deadline = None
        self._batches[self._last_release] += 1
        self._sizes[len(batch)] += 1
        self._last_size = len(batch)
        self._total_batched += len(batch)
        self._released_at = now
        return batch

    def _learn_step(self, seconds: float) -> None:
        self._step_s = seconds if self._step_s == 0.0 else _MEMORY * self._step_s + (1 - _MEMORY) * seconds

    def _new_queue(self) -> PriorityQueue:
        # Twice the size: what was withdrawn stays in it until it is popped, or the queue made anew.
        return PriorityQueue(capacity=2 * self._max_queue, ageing_ns=self._ageing_ns)

    def _push(self, number: int, waiting: _Waiting) -> bool:
        return self._queue.push(waiting.request.priority.value, int(waiting.arrival * 1e9), 0, number)

    def _find_earliest_deadline(self) -> float:
        if self._earliest_deadline is None:
            self._earliest_deadline = min(waiting.deadline for waiting in self._requests.values())
        return self._earliest_deadline

    @staticmethod
    def _clock() -> float:
        return asyncio.get_running_loop().time()

    async def _change(self, timeout_s: float | None) -> None:
        """Until a request comes, or the time is over."""
        self._changed.clear()
        if timeout_s is None or timeout_s == math.inf:
            await self._changed.wait()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
