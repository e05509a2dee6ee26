"""Loading of what a user's loader makes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable
from typing import Any

from realtime_serve.batch import BatchScheduler
from realtime_serve.engine.call_loop import CallLoop
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.engine.step_loop import StepLoop
from realtime_serve.engine.worker_loop import WorkerLoop
from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.callable import CallableModel
from realtime_serve.runners.loader import Loader, as_runner


def load_callable(spec: LoadSpec, loader: Loader) -> WorkerLoop:
    loop = asyncio.new_event_loop()  # what an async loader opens belongs to the loop that the model is called in
    try:
        made = loader(spec.model)  # while no loop runs: it may run one of its own
        model = loop.run_until_complete(_value_of(made)) if inspect.isawaitable(made) else made
        if callable(getattr(model, "step", None)):
            loop.close()
            return StepLoop(as_runner(model), spec.limits)
        called = CallableModel(model)
        loop.run_until_complete(_prepare(called))
    except BaseException:
        loop.close()
        raise
    limits, name = spec.limits, spec.model.name
    scheduler = BatchScheduler(
        name,
        spec.batching,
        max_queue=limits.max_batch_size + limits.max_queue,  # as many as the channel has slots
        ageing_ms=limits.ageing_ms,
    )
    return CallLoop(called, loop, scheduler, max_context=spec.model.max_seq_length)


async def _value_of(made: Awaitable[Any]) -> Any:
    return await made


async def _prepare(model: CallableModel) -> None:
    await model.warmup()
    if not await model.is_well():
        raise ModelLoadError("the model's health_check says that it is not well")
