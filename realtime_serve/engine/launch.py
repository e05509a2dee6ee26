"""What a worker loads, in a form that can cross a process border, and the loading itself."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from realtime_serve._core import Channel
from realtime_serve.batch import BatchScheduler
from realtime_serve.config import BatchConfig, ModelConfig
from realtime_serve.engine.call_loop import CallLoop
from realtime_serve.engine.language_model import ModelOptions, load_language_model
from realtime_serve.engine.step_loop import EngineLimits, StepLoop
from realtime_serve.errors import ModelLoadError
from realtime_serve.machine import return_freed_memory
from realtime_serve.runners.base import Runner
from realtime_serve.runners.callable import CallableModel
from realtime_serve.runners.loader import Loader, as_runner, import_loader, import_name

NULL_MODEL = "null"


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A model version and the limits that it runs under."""

    model: ModelConfig
    limits: EngineLimits
    log_level: str = "INFO"
    path: str = field(default="")
    """Where the model's files are; resolved by the front end, which needs the tokenizer from there."""
    loader: Loader | None = None
    """Makes the model's object, in place of our own engines."""
    batching: BatchConfig = field(default_factory=BatchConfig)
    """How the requests of an object that is called are batched."""

    def to_message(self) -> dict[str, Any]:
        """Raises ValueError where the loader cannot be imported by name."""
        loader = import_name(self.loader) if self.loader is not None else None
        if self.loader is not None and loader is None:
            raise ValueError(f"its loader {self.loader!r} cannot be imported by name")
        return {
            "op": "load",
            "model": asdict(self.model),
            "limits": asdict(self.limits),
            "log_level": self.log_level,
            "path": self.path,
            "loader": loader,
            "batching": asdict(self.batching),
        }

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> LoadSpec:
        """Raises ModelLoadError where the loader cannot be imported here."""
        loader = message["loader"]
        return cls(
            model=ModelConfig(**message["model"]),
            limits=EngineLimits(**message["limits"]),
            log_level=message["log_level"],
            path=message["path"],
            loader=import_loader(loader) if loader is not None else None,
            batching=BatchConfig(**message["batching"]),
        )


class FrontTokenizer(Protocol):
    """What the front end needs of a tokenizer."""

    @property
    def size(self) -> int:
        """One more than the largest token id."""

    def encode(self, text: str) -> list[int]: ...


def load_tokenizer(path: str) -> FrontTokenizer:
    if path == NULL_MODEL:
        from realtime_serve.runners.null import NullTokenizer

        return NullTokenizer()
    from realtime_serve.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(Path(path))
    return_freed_memory()
    return tokenizer


class WorkerLoop(Protocol):
    """What a worker runs: StepLoop or CallLoop."""

    kind: str
    """What requests its model takes: tokens, generate or predict."""
    max_context: int

    def attach(self, channel: Channel) -> None: ...
    def detach(self, channel: Channel) -> None: ...
    def check_health(self, tell: Callable[[bool], None]) -> None: ...
    def stop(self) -> None: ...
    def run(self) -> None: ...


def load_worker(spec: LoadSpec) -> WorkerLoop:
    """Loads the model and makes the loop that serves it, in this process and thread.

    Raises ServeError with one line for a person where it cannot be served, and whatever a user's loader raises.
    """
    if spec.loader is None:
        return StepLoop(load_runner(spec), spec.limits)
    return _load_callable(spec, spec.loader)


def _load_callable(spec: LoadSpec, loader: Loader) -> WorkerLoop:
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
