"""Makes a worker's loop: the model, loaded, and what serves it."""

from __future__ import annotations

from pathlib import Path

from realtime_serve.engine.language_model import ModelOptions, load_language_model
from realtime_serve.engine.load_spec import NULL_MODEL, LoadSpec
from realtime_serve.engine.step_loop import StepLoop
from realtime_serve.engine.worker_loop import WorkerLoop
from realtime_serve.runners.base import Runner


def load_worker(spec: LoadSpec) -> WorkerLoop:
    """Loads the model and makes the loop that serves it, in this process and thread.

    Raises ServeError with one line for a person where it cannot be served, and whatever a user's loader raises.
    """
    if spec.loader is None:
        return StepLoop(load_runner(spec), spec.limits)
    from realtime_serve.engine.load_callable import load_callable  # asyncio and more: 35 ms

    return load_callable(spec, spec.loader)


def load_runner(spec: LoadSpec) -> Runner:
    """Loads the model in this process. Raises ServeError with one line for a person where it cannot be served."""
    model, limits = spec.model, spec.limits
    if spec.path != NULL_MODEL:
        return load_language_model(model, limits, Path(spec.path))
    from realtime_serve.runners.null import NullRunner

    options = ModelOptions(model)
    step_ms = options.number("step_ms", 0.0)
    options.refuse_others()
    return NullRunner(max_context=model.max_seq_length, max_batch_size=limits.max_batch_size, step_ms=step_ms)
