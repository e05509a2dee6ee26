"""How fast a queue empties."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# Seconds over which the past loses its weight: a few answers long, and short enough to follow a change of load.
_MEMORY_S = 30.0


class DrainRate:
    """Estimates when those who wait will have been served, from the rate at which requests have lately ended.

    Only the time in which there was work counts: an idle server is no slow one. Until something has ended, the estimate
    is that each of those who wait takes as long as has passed so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._seen_at = clock()
        self._open = 0
        # Both fade alike: ends seen, and the seconds in which they were.
        self._ends = 0.0
        self._busy_s = 0.0

    def observe(self, open_now: int) -> None:
        """Requests that are open, before each one that comes: all that are fewer than last time and those that came
        meanwhile have ended."""
        now = self._clock()
        if open_now:  # else it was idle for a part of the time, and nobody knows which
            passed = now - self._seen_at
            keep = math.exp(-passed / _MEMORY_S)
            weight = _MEMORY_S * (1.0 - keep) / passed if passed > 0 else 1.0  # the mean over that time
            self._ends = self._ends * keep + (self._open - open_now) * weight
            self._busy_s = self._busy_s * keep + passed * weight
        self._seen_at = now
        self._open = open_now

    def took_one(self) -> None:
        """The one that came was taken: it is open now."""
        self._open += 1

    def seconds_to_drain(self, waiting: int) -> float:
        return waiting * self._busy_s / max(self._ends, 1.0)
