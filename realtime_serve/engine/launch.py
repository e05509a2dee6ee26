"""What a worker loads, in a form that can cross a process border, and the loading itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from realtime_serve.config import ModelConfig
from realtime_serve.engine.step_loop import EngineLimits
from realtime_serve.errors import ConfigError, UnsupportedModelError
from realtime_serve.runners.base import Runner

NULL_MODEL = "null"


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """A model version and the limits that it runs under."""

    model: ModelConfig
    limits: EngineLimits
    log_level: str = "INFO"
    path: str = field(default="")
    """Where the model's files are; resolved by the front end, which needs the tokenizer from there."""

    def to_message(self) -> dict[str, Any]:
        return {"op": "load", **asdict(self)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> LoadSpec:
        return cls(
            model=ModelConfig(**message["model"]),
            limits=EngineLimits(**message["limits"]),
            log_level=message["log_level"],
            path=message["path"],
        )


class FrontTokenizer(Protocol):
    """What the front end needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


def load_tokenizer(path: str) -> FrontTokenizer:
    if path == NULL_MODEL:
        from realtime_serve.runners.null import NullTokenizer

        return NullTokenizer()
    from realtime_serve.tokenizer import Tokenizer

    return Tokenizer.load(Path(path))


def load_runner(spec: LoadSpec) -> Runner:
    """Loads the model in this process. Raises ServeError with one line for a person where it cannot be served."""
    model, limits = spec.model, spec.limits
    options = dict(model.metadata)
    if spec.path == NULL_MODEL:
        from realtime_serve.runners.null import NullRunner

        step_ms = _number(options, "step_ms", 0.0)
        _refuse_unknown(options, model.name)
        return NullRunner(max_context=model.max_seq_length, max_batch_size=limits.max_batch_size, step_ms=step_ms)

    if model.quantized not in (None, False):
        raise UnsupportedModelError(
            f"model {model.name!r}: quantized={model.quantized!r} is not supported by the torch engine, which computes"
            " in dtype; leave it out"
        )
    from realtime_serve.runners.torch_lm import TorchLM
    from realtime_serve.tokenizer import Tokenizer

    kv_cache_mb = _number(options, "kv_cache_mb", 0.0)
    _refuse_unknown(options, model.name)
    path = Path(spec.path)
    return TorchLM.load(
        path,
        tokenizer=Tokenizer.load(path),
        device=model.device,
        dtype=model.dtype,
        max_context=model.max_seq_length,
        max_batch_size=limits.max_batch_size,
        kv_cache_mb=int(kv_cache_mb) or None,
    )


def _number(options: dict[str, Any], key: str, default: float) -> float:
    value = options.pop(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise ConfigError(f"model option {key} must be a number, 0 or more; it is {value!r}")
    return number


def _refuse_unknown(options: dict[str, Any], model: str) -> None:
    if options:
        raise ConfigError(f"model {model!r} has no option {sorted(options)[0]!r}")
