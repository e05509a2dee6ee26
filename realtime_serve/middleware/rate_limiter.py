"""How many requests a client may make."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from realtime_serve.errors import RateLimitedError
from realtime_serve.middleware.chain import Handler
from realtime_serve.types import Outcome, Request

# A bucket takes about 200 bytes.
_MAX_CLIENTS = 100_000


class RateLimiter:
    """A token bucket for each client, full at first and refilled continuously.

    A bucket that is full again is as if it had never been, so only clients that asked within the last minute take
    memory; of more than `max_clients` the one that asked longest ago is forgotten first.
    """

    def __init__(
        self,
        tokens_per_minute: float = 1000,
        tokens_per_request: float = 1.0,
        *,
        max_clients: int = _MAX_CLIENTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tokens_per_minute` is a bucket's size as well; 0: no limit. `clock` gives seconds.

        Raises ValueError for a number that is negative, and for requests that no bucket could ever pay for.
        """
        if not tokens_per_minute >= 0:
            raise ValueError(f"tokens_per_minute must be 0 or more; it is {tokens_per_minute!r}")
        if not tokens_per_request > 0:
            raise ValueError(f"tokens_per_request must be more than 0; it is {tokens_per_request!r}")
        if 0 < tokens_per_minute < tokens_per_request:
            raise ValueError(
                f"tokens_per_request must be at most tokens_per_minute, {tokens_per_minute!r};"
                f" it is {tokens_per_request!r}"
            )
        if max_clients < 1:
            raise ValueError(f"max_clients must be at least 1; it is {max_clients!r}")
        self._size = float(tokens_per_minute)
        self._per_second = tokens_per_minute / 60.0
        self._cost = float(tokens_per_request)
        self._max_clients = max_clients
        self._clock = clock
        # By client, the one that asked longest ago first: the tokens it had left, and when.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, request: Request, next: Handler) -> Outcome:
        if not self._take(request.client_id):
            wait = self.retry_after(request.client_id)
            raise RateLimitedError(
                f"client {request.client_id!r} has made more than {self._size / self._cost:g} requests a minute;"
                f" the next is welcome in {wait:.1f} s",
                retry_after=wait,
            )
        return await next(request)

    async def check_rate_limit(self, client_id: str) -> bool:
        """Whether the client may make a request now; if so, it is counted."""
        return self._take(client_id)

    def retry_after(self, client_id: str) -> float:
        """Seconds until the client may make a request."""
        missing = self._cost - self._available(client_id)
        return missing / self._per_second if missing > 0 else 0.0

    def get_client_stats(self, client_id: str) -> dict[str, float]:
        return {"available_tokens": self._available(client_id), "tokens_per_minute": self._size}

    @property
    def clients(self) -> int:
        """Whose buckets are in memory."""
        return len(self._buckets)

    def _available(self, client_id: str) -> float:
        bucket = self._buckets.get(client_id)
        if bucket is None:
            return self._size
        left, since = bucket
        return min(self._size, left + (self._clock() - since) * self._per_second)

    def _take(self, client_id: str) -> bool:
        if self._size == 0:
            return True
        available = self._available(client_id)
        allowed = available >= self._cost
        self._buckets[client_id] = (available - self._cost if allowed else available, self._clock())
        self._buckets.move_to_end(client_id)
        self._forget()
        return allowed

    def _forget(self) -> None:
        """Drops who has a full bucket again, two at a time so that no request pays for many, and who is too many."""
        now = self._clock()
        for _ in range(2):
            client_id, (left, since) = next(iter(self._buckets.items()))
            is_full = left + (now - since) * self._per_second >= self._size
            if not is_full and len(self._buckets) <= self._max_clients:
                return
            del self._buckets[client_id]
            if not self._buckets:
                return
