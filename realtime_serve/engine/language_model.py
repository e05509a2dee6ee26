"""Which of our own engines runs a model, and the options that it takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from realtime_serve.config import ModelConfig
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.errors import ConfigError, UnsupportedModelError
from realtime_serve.extras import torch_missing
from realtime_serve.runners.base import Runner

log = logging.getLogger(__name__)

_MOST_THREADS = 1024
_ENGINES = ("auto", "native", "torch")
_KV_FORMATS = ("auto", "int8", "float16")


class ModelOptions:
    """A model's own options, taken one by one. What is wrong with one is a ConfigError that names it."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model.name
        self._options = dict(model.metadata)

    def number(self, key: str, default: float) -> float:
        value = self._options.pop(key, default)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0.0 <= number < float("inf"):
            raise ConfigError(f"model option {key} must be a number, 0 or more; it is {value!r}")
        return number

    def whole(self, key: str, *, most: int = 1 << 40) -> int:
        number = self.number(key, 0.0)
        if not number.is_integer():
            raise ConfigError(f"model option {key} must be a whole number; it is {number:.15g}")
        if number > most:
            raise ConfigError(f"model option {key} must be at most {most}; it is {number:.15g}")
        return int(number)

    def optional(self, key: str) -> int | None:
        return self.whole(key) if key in self._options else None

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """The first of them is the default."""
        value = self._options.pop(key, choices[0])
        if value not in choices:
            raise ConfigError(f"model option {key} must be one of {', '.join(choices)}; it is {value!r}")
        return str(value)

    def refuse_others(self) -> None:
        if self._options:
            raise ConfigError(f"model {self._model!r} has no option {sorted(self._options)[0]!r}")


def load_language_model(model: ModelConfig, limits: EngineLimits, path: Path) -> Runner:
    """Raises ServeError with one line for a person where it cannot be served."""
    options = ModelOptions(model)
    engine = options.choice("engine", _ENGINES)
    threads = options.whole("threads", most=_MOST_THREADS)
    kv_format = options.choice("kv_cache_dtype", _KV_FORMATS)
    memory: dict[str, Any] = {
        "kv_cache_mb": options.whole("kv_cache_mb") or None,
        "prefix_cache_mb": options.optional("prefix_cache_mb"),
    }
    options.refuse_others()
    why = "engine=torch asks for it"
    if engine != "torch":
        native, lacks = _load_native(model, limits, path, threads, kv_format, memory)
        if native is not None:
            return native
        why = f"the native one does not support {lacks}"
        if engine == "native":
            raise UnsupportedModelError(f"model {model.name!r}: the native engine does not support {lacks}")
    if kv_format != "auto":
        raise UnsupportedModelError(
            f"model {model.name!r}: kv_cache_dtype={kv_format!r} is not supported by the torch engine, which keeps keys"
            f" and values in dtype ({why}); leave it out"
        )
    if engine != "torch":
        log.info("model %s runs on the torch engine: %s", model.name, why)
    return _load_torch(model, limits, path, memory, why)


def _load_native(
    model: ModelConfig, limits: EngineLimits, path: Path, threads: int, kv_format: str, memory: dict[str, Any]
) -> tuple[Runner | None, str]:
    """The runner, or what it lacks."""
    if model.device != "cpu":
        return None, f"device {model.device!r}"
    if model.quantized is False:
        return None, "weights that are not quantized"
    from realtime_serve.runners.cpu_lm import CpuLM, NeedsTorchEngine
    from realtime_serve.tokenizer import TokenVocabulary

    try:
        runner = CpuLM.load(
            path,
            tokenizer=TokenVocabulary.load(path),
            max_context=model.max_seq_length,
            max_batch_size=limits.max_batch_size,
            max_step_tokens=limits.max_step_tokens,
            threads=threads,
            value_bits=4 if model.quantized == "int4" else 8,
            kv_format="int8" if kv_format == "auto" else kv_format,
            **memory,
        )
    except NeedsTorchEngine as error:
        return None, str(error)
    return runner, ""


def _load_torch(model: ModelConfig, limits: EngineLimits, path: Path, memory: dict[str, Any], why: str) -> Runner:
    if model.quantized not in (None, False):
        raise UnsupportedModelError(
            f"model {model.name!r}: quantized={model.quantized!r} is not supported by the torch engine, which computes"
            " in dtype; leave it out"
        )
    try:
        from realtime_serve.runners.torch_lm import TorchLM
    except ImportError as error:
        raise torch_missing(model.name, why, error) from error
    from realtime_serve.tokenizer import TokenVocabulary

    return TorchLM.load(
        path,
        tokenizer=TokenVocabulary.load(path),
        device=model.device,
        dtype=model.dtype,
        max_context=model.max_seq_length,
        max_batch_size=limits.max_batch_size,
        **memory,
    )
