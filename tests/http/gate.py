"""The null model in a worker's thread, one step at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
from support import DEADLINE_S

from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.null import NullRunner


@dataclass(frozen=True)
class Step:
    prompt: str
    """Its tokens as text: the prompts of the sequences that it begins."""
    came_at: float
    """By the monotonic clock, after it had been scheduled."""


class Gate:
    """Every step of the null model passes it, while it is open or as `let` allows. At first it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Step] = []
        """All that passed, or wait to, since it was closed last."""
        self._changed = threading.Condition()
        self._is_open = True
        self._allowed = 0
        self._waiting = 0
        step = NullRunner.step

        def gated_step(runner: NullRunner, batch: StepBatch) -> None:
            self._pass(bytes(token for token in batch.tokens if token < 256).decode())
            step(runner, batch)

        monkeypatch.setattr(NullRunner, "native_model", None)
        monkeypatch.setattr(NullRunner, "step", gated_step)

    def close(self) -> None:
        with self._changed:
            self._is_open, self._allowed = False, 0
            self.steps.clear()

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def let(self, steps: int = 1) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    @property
    def holds(self) -> bool:
        """Whether a step waits, and may not pass."""
        return bool(self._waiting) and not self._allowed

    @property
    def prompts(self) -> list[str]:
        return [step.prompt for step in self.steps]

    def _pass(self, prompt: str) -> None:
        with self._changed:
            self.steps.append(Step(prompt, time.monotonic()))
            self._waiting += 1
            assert self._changed.wait_for(lambda: self._is_open or self._allowed, DEADLINE_S)
            self._waiting -= 1
            self._allowed -= not self._is_open
