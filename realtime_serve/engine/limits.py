"""What bounds an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What bounds a worker's engine, whatever the model."""

    max_batch_size: int
    max_step_tokens: int
    max_queue: int
    ageing_ms: int
    target_step_ms: float = 0.0
