"""What runs in a worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from realtime_serve._core import Channel


class WorkerLoop(Protocol):
    """What a worker runs: StepLoop or CallLoop."""

    kind: str
    """What requests its model takes: tokens, generate or predict."""
    max_context: int
    weights: str
    """As what the model's weights are computed with, for a person; empty where that is not known."""

    def attach(self, channel: Channel) -> None: ...
    def detach(self, channel: Channel) -> None: ...
    def check_health(self, tell: Callable[[bool], None]) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...
