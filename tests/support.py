"""What tests of the running system share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import uvloop

from realtime_serve import BatchConfig, InferenceServer, ModelConfig, ServerConfig
from realtime_serve.engine.handles import ProcessWorker

# Far beyond what anything here takes: a test that gets there hangs.
DEADLINE_S = 60.0

LOOP_FACTORIES = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Gives the event loop its turns until `condition()` holds."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"{what} did not come about") from None


def null_model(name: str = "null", *, max_seq_length: int = 4096, **options: float) -> ModelConfig:
    """The model that costs nothing; any name, as its path says what it is."""
    return ModelConfig(name, model_path="null", device="cpu", max_seq_length=max_seq_length, metadata=options)


def worker_pid(server: InferenceServer, model: str = "null") -> int:
    worker = server.model_registry.get_model(model).worker.worker
    assert isinstance(worker, ProcessWorker)
    return worker.pid


@contextlib.asynccontextmanager
async def serving(
    *models: ModelConfig,
    loaders: Mapping[str, Callable[[ModelConfig], Any]] | None = None,
    batching: BatchConfig | None = None,
    **settings: Any,
) -> AsyncIterator[InferenceServer]:
    """A server that listens on a free port of the loopback and has loaded its models; those with a loader by it."""
    server = InferenceServer(ServerConfig(**{"host": "127.0.0.1", "port": 0, "isolation": "thread", **settings}))
    for model in models or (null_model(),):
        server.register_model(model, (loaders or {}).get(model.name), batching)
    running = asyncio.ensure_future(server.start())
    try:
        await until(lambda: running.done() or len(server.model_registry.models()) >= max(1, len(models)), "readiness")
        if running.done():
            running.result()
        yield server
    finally:
        if not running.done():
            await server.stop()
        await running
