"""Servers of callable models, and a model that a test holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from client import Answer, ask
from support import DEADLINE_S, serving

from realtime_serve import BatchConfig, InferenceServer, ModelConfig


@contextlib.asynccontextmanager
async def calling(
    batching: BatchConfig | None = None, settings: dict[str, Any] | None = None, **loaders: Callable[[ModelConfig], Any]
) -> AsyncIterator[InferenceServer]:
    """A server of a model for each loader, by its name."""
    models = [ModelConfig(name, device="cpu", warmup_tokens=0) for name in loaders]
    async with serving(*models, loaders=loaders, batching=batching, **(settings or {})) as server:
        yield server


async def predict(port: int, **body: Any) -> Answer:
    return await ask(port, "POST", "/predict", body)


class Held:
    """Predicts its inputs once it is let; keeps what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()

    def load(self, config: ModelConfig) -> Held:
        return self

    def predict(self, inputs: list[Any]) -> list[Any]:
        self.batches.append(list(inputs))
        assert self.gate.wait(DEADLINE_S)
        return inputs
