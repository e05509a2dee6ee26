"""Configuration: frozen, checked when it is made, and put together from file, environment and flags."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from realtime_serve.devices import default_device
from realtime_serve.errors import ConfigError, did_you_mean
from realtime_serve.types import (
    MAX_ID_BYTES,
    MAX_SECONDS,
    MAX_TOKEN_COUNT,
    RequestPriority,
    flag_problem,
    integer_problem,
    number_problem,
    shown,
    text_problem,
)

DEFAULT_MODEL = "smollm2-135m-instruct"

_ENVIRONMENT_PREFIX = "REALTIME_SERVE_"
# Variables of ours that are no setting: the model cache is the user's, not a server's.
_OTHER_VARIABLES = frozenset({"REALTIME_SERVE_CACHE"})
# What Kubernetes puts into a container's environment where a service is called realtime-serve.
_SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT(_\w+)?)|PORT_\d+_(TCP|UDP)(_\w+)?)=.*|PORT=(tcp|udp)://.*", re.DOTALL)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_DEVICE = re.compile(r"cpu|mps|cuda(:\d{1,4})?", re.ASCII)

T = TypeVar("T")


def _setting(
    default: T,
    help: str,
    *,
    low: float = 0,
    high: float = MAX_TOKEN_COUNT,
    choices: tuple[object, ...] | None = None,
    option: str | None = None,
) -> T:
    """A field with what checks it and what the command line says of it. Its type decides how text becomes its value.

    `option` is what flags and environment call it where the field's own name would be ambiguous there.
    """
    return field(
        default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "option": option}
    )


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How a callable model's requests are batched."""

    max_batch_size: int = _setting(32, "requests of a batch", low=1)
    max_wait_ms: int = _setting(50, "milliseconds that a batch waits to fill up")
    min_batch_size: int = _setting(1, "requests that a batch waits for", low=1)
    dynamic_batching: bool = _setting(True, "whether requests are batched as they arrive")

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.min_batch_size > self.max_batch_size:
            raise ConfigError(
                f"min_batch_size must be at most max_batch_size, {self.max_batch_size}; it is {self.min_batch_size}",
                "min_batch_size",
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model version: which, and how it is to be loaded."""

    name: str = field(metadata={"help": "what requests call the model (default: from MODEL)"})
    version: str = _setting("1.0.0", "the model's version", option="model_version")
    model_path: str = _setting("", "a GGUF file or a Hugging Face folder; empty: looked up by its name")
    device: str = _setting("cuda", "cpu, mps, cuda or cuda:N")
    dtype: str = _setting("float32", "what the torch engine computes in", choices=("float32", "float16", "bfloat16"))
    quantized: bool | str | None = _setting(
        None, "weights: none (as stored), false (never), int8 or int4", choices=(None, False, True, "int8", "int4")
    )
    max_seq_length: int = _setting(2048, "tokens of a sequence, prompt included", low=1, high=1 << 24)
    warmup_tokens: int = _setting(100, "prompt tokens of the inference that warms it up", high=1 << 24)
    metadata: dict[str, Any] = field(default_factory=dict)
    """The model's own options."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if _DEVICE.fullmatch(self.device) is None:
            raise ConfigError(f"device must be cpu, mps, cuda or cuda:N; it is {shown(self.device)}", "device")
        if not isinstance(self.metadata, dict) or not all(isinstance(key, str) for key in self.metadata):
            raise ConfigError("metadata must be a dict with string keys", "metadata")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = _setting("0.0.0.0", "address to listen on")
    port: int = _setting(8000, "port to listen on; 0: any free one", high=65535)
    max_connections: int = _setting(256, "connections that may be open at once", low=1, high=1_000_000)
    request_timeout: float = _setting(
        30.0, "seconds that a request may be without a token", low=0.001, high=MAX_SECONDS
    )
    max_batch_size: int = _setting(32, "sequences of a step", low=1, high=65_536)
    max_batch_wait_ms: int = _setting(50, "milliseconds that a batch of a callable model waits to fill up")
    enable_metrics: bool = _setting(True, "serve /metrics")
    log_level: str = _setting("INFO", "least severe log lines to show", choices=_LOG_LEVELS)
    rate_limit_per_minute: int = _setting(10_000, "requests of a client a minute; 0: no limit")
    graceful_shutdown_timeout: float = _setting(
        30.0, "seconds that running streams get at a shutdown", high=MAX_SECONDS
    )
    max_queue: int = _setting(1024, "requests that may wait for a place in a step", low=1, high=65_536)
    ageing_ms: int = _setting(5000, "milliseconds after which a waiting request goes first", low=1)
    stream_buffer_tokens: int = _setting(100, "tokens that a stream may be ahead of its reader", low=1, high=65_536)
    max_step_tokens: int = _setting(
        512, "tokens of a step; longer prompts are prefilled in chunks", low=1, high=1 << 20
    )
    isolation: str = _setting(
        "process", "where a worker runs: process (one of its own) or thread", choices=("process", "thread")
    )
    max_body_bytes: int = _setting(4 << 20, "bytes of a request's body", low=1024, high=1 << 30)
    slow_reader_timeout: float = _setting(
        30.0, "seconds that a client may be behind before it is cut off", low=0.001, high=MAX_SECONDS
    )
    client_priorities: Mapping[str, str] | tuple[tuple[str, str], ...] = _setting(
        (), "clients whose priority is fixed, as batch=LOW,vip=HIGH"
    )
    """By client id, the name of a priority, or a RequestPriority; kept as pairs, in order, which cannot change."""
    target_step_ms: float = _setting(
        0.0, "milliseconds that prompts may make a step of running streams take; 0: by what steps cost", high=60_000
    )

    def __post_init__(self) -> None:
        if isinstance(self.log_level, str):
            object.__setattr__(self, "log_level", self.log_level.upper())
        if isinstance(self.client_priorities, Mapping):
            object.__setattr__(self, "client_priorities", _in_order(self.client_priorities))
        _check_fields(self)


ConfigType = TypeVar("ConfigType", ModelConfig, ServerConfig)

_TABLES: dict[str, type[ModelConfig] | type[ServerConfig]] = {"server": ServerConfig, "model": ModelConfig}


def option_name(setting: Field[Any]) -> str:
    """What flags and environment call a field."""
    return setting.metadata.get("option") or setting.name


def load_server_config(
    file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> tuple[ServerConfig, ModelConfig]:
    """What a server and its model are to be: defaults, then the file, then the environment, then the flags.

    `file` is TOML with the tables [server] and [model]; in `environ` only REALTIME_SERVE_* counts; `flags` has fields
    by name, and text in it is converted as the environment's is. Options of the model add up, one by one, and so do
    clients' priorities. Raises
    ConfigError naming the field and where it was given.
    """
    given: _Settings = {}
    for layer in (_from_file(file) if file is not None else {}, _from_environment(environ), _from_flags(flags)):
        for name, setting in layer.items():
            given[name] = _merged(given[name], setting) if name in given else setting
    return _build(ServerConfig, given), _build(ModelConfig, _with_model_defaults(given))


class _Given(NamedTuple):
    value: object
    where: str


_Settings = dict[str, _Given]


def _merged(before: _Given, after: _Given) -> _Given:
    if isinstance(before.value, dict) and isinstance(after.value, dict):
        return _Given({**before.value, **after.value}, after.where)
    return after


def _from_file(path: Path) -> _Settings:
    import tomllib  # 5 ms that a start without a file need not spend

    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    given: _Settings = {}
    for table, content in document.items():
        if table not in _TABLES:
            raise ConfigError(f"{path}: unknown key {table!r}{did_you_mean(table, _TABLES)}", table)
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {table} must be a table", table)
        known = [setting.name for setting in fields(_TABLES[table])]
        for key, value in content.items():
            if key not in known:
                raise ConfigError(f"{path}: unknown key {key!r} in [{table}]{did_you_mean(key, known)}", key)
            given[key] = _Given(value, f"[{table}] of {path}")
    try:
        json.dumps(given["metadata"].value if "metadata" in given else None)
    except TypeError:
        # A worker gets its model's options as JSON.
        raise ConfigError(f"{path}: dates and times of [model.metadata] must be strings", "metadata") from None
    return given


def _from_environment(environ: Mapping[str, str]) -> _Settings:
    known = {
        _ENVIRONMENT_PREFIX + option_name(setting).upper(): setting.name
        for owner in _TABLES.values()
        for setting in fields(owner)
        if setting.name != "metadata"
    }
    given: _Settings = {}
    for variable, text in environ.items():
        if not variable.startswith(_ENVIRONMENT_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if _SERVICE_LINK.fullmatch(f"{variable.removeprefix(_ENVIRONMENT_PREFIX)}={text}"):
            continue
        if variable not in known:
            raise ConfigError(f"unknown variable {variable} in the environment{did_you_mean(variable, known)}")
        given[known[variable]] = _Given(_from_text(text, known[variable]), variable)
    return given


def _from_flags(flags: Mapping[str, object]) -> _Settings:
    return {
        name: _Given(_from_text(value, name) if isinstance(value, str) else value, "the command line")
        for name, value in flags.items()
    }


def _from_text(text: str, name: str) -> object:
    """A field's value written as text. Text that is none stays as it is: the field's check then refuses it."""
    kind = {**_field_types(ServerConfig), **_field_types(ModelConfig)}[name]  # no name is in both
    if kind is int or kind is float:
        try:
            return kind(text)
        except ValueError:
            return text
    if kind is str:
        return text
    if name == "client_priorities":
        return _priorities_from_text(text)
    word = text.strip().lower()
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    return None if word == "none" else word


def _priorities_from_text(text: str) -> object:
    priorities: dict[str, str] = {}
    for binding in filter(None, map(str.strip, text.split(","))):
        client, equals, priority = map(str.strip, binding.rpartition("="))
        if not equals or client in priorities:
            return text
        priorities[client] = priority
    return priorities


def _in_order(priorities: Mapping[Any, Any]) -> tuple[tuple[Any, Any], ...]:
    """As ServerConfig keeps them. What is wrong stays as it is: the field's check then refuses it."""
    return tuple(sorted(((client, _name_of_priority(given)) for client, given in priorities.items()), key=repr))


def _name_of_priority(given: object) -> object:
    if isinstance(given, RequestPriority):
        return given.name
    return given.upper() if isinstance(given, str) else given


def _priorities_problem(value: object) -> str | None:
    if not isinstance(value, tuple) or not all(isinstance(binding, tuple) and len(binding) == 2 for binding in value):
        return f"must give each client its priority once, as batch=LOW,vip=HIGH; it is {shown(value)}"
    for client, name in value:
        if problem := text_problem(client, MAX_ID_BYTES):
            return f"must name clients by their ids, each of which {problem}"
        if not isinstance(name, str) or name not in RequestPriority.__members__:
            known = ", ".join(RequestPriority.__members__)
            return f"must have one of {known} for each client; for {shown(client)} it is {shown(name)}"
    if len(dict(value)) < len(value):
        return "must give each client one priority"
    return None


def _with_model_defaults(given: _Settings) -> _Settings:
    """What a ModelConfig in code must name, and a command line need not."""
    defaults: _Settings = {}
    if "name" not in given:
        model = given.get("model_path") or _Given(DEFAULT_MODEL, "the default")
        defaults["model_path"] = model
        defaults["name"] = _Given(_name_of(model.value), model.where)
    if "device" not in given:
        defaults["device"] = _Given(default_device(), "the default")
    return given | defaults


def _name_of(model: object) -> object:
    """A known model's name as it is; a file's or folder's last part."""
    if not isinstance(model, str) or not model:
        return model
    return os.path.basename(os.path.abspath(model)).removesuffix(".gguf")


def _build(kind: type[ConfigType], given: _Settings) -> ConfigType:
    values: dict[str, Any] = {
        setting.name: given[setting.name].value for setting in fields(kind) if setting.name in given
    }
    try:
        return kind(**values)
    except ConfigError as error:
        if error.field not in given:
            raise
        raise ConfigError(f"{error} (from {given[error.field].where})", error.field) from None


def _check_fields(config: BatchConfig | ModelConfig | ServerConfig) -> None:
    kinds = _field_types(type(config))  # type: ignore[arg-type]  # mypy asks an instance's __hash__ of the class
    for setting in fields(config):
        problem = _problem(getattr(config, setting.name), kinds[setting.name], setting)
        if problem:
            raise ConfigError(f"{setting.name} {problem}", setting.name)


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _problem(value: object, kind: object, setting: Field[Any]) -> str | None:
    rules = setting.metadata
    choices = rules.get("choices")
    if choices is not None:
        # By type as well: 1 is not True here.
        if any(type(value) is type(choice) and value == choice for choice in choices):
            return None
        return f"must be one of {', '.join(map(str, choices))}; it is {shown(value)}"
    if kind is int:
        return integer_problem(value, rules["low"], rules["high"])
    if kind is float:
        return number_problem(value, rules["low"], rules["high"])
    if kind is bool:
        return flag_problem(value)
    if setting.name == "client_priorities":
        return _priorities_problem(value)
    if kind is str:
        return None if value == setting.default == "" else text_problem(value)
    return None
