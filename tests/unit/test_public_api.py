"""The names that users of the published package rely on: where they are, and how they are called."""

import asyncio
import inspect
from dataclasses import fields
from enum import Enum
from typing import Any

import pytest

import realtime_serve

REQUIRED = inspect.Parameter.empty

DATACLASSES: dict[str, dict[str, object]] = {
    "InferenceRequest": {
        "request_id": REQUIRED,
        "model": REQUIRED,
        "prompt": REQUIRED,
        "max_tokens": 100,
        "temperature": 1.0,
        "top_p": 0.95,
        "priority": realtime_serve.RequestPriority.NORMAL,
        "timeout": 30.0,
        "client_id": "",
        "metadata": {},
    },
    "StreamToken": {"token": REQUIRED, "token_id": REQUIRED, "logprob": None, "is_special": False},
    "InferenceResponse": {
        "request_id": REQUIRED,
        "model": REQUIRED,
        "tokens": REQUIRED,
        "total_tokens": REQUIRED,
        "latency_ms": REQUIRED,
        "error": None,
    },
    "BatchConfig": {"max_batch_size": 32, "max_wait_ms": 50, "min_batch_size": 1, "dynamic_batching": True},
    "ModelConfig": {
        "name": REQUIRED,
        "version": "1.0.0",
        "model_path": "",
        "device": "cuda",
        "dtype": "float32",
        "quantized": None,
        "max_seq_length": 2048,
        "warmup_tokens": 100,
        "metadata": {},
    },
    "ServerConfig": {
        "host": "0.0.0.0",
        "port": 8000,
        "max_connections": 256,
        "request_timeout": 30.0,
        "max_batch_size": 32,
        "max_batch_wait_ms": 50,
        "enable_metrics": True,
        "log_level": "INFO",
        "rate_limit_per_minute": 10_000,
        "graceful_shutdown_timeout": 30.0,
    },
}

# How each is called, `self` left out. Further parameters of ours may follow; they have defaults.
CALLS: dict[str, dict[str, dict[str, object]]] = {
    "InferenceServer": {
        "__init__": {
            "config": None,
            "max_connections": None,
            "request_timeout": None,
            "max_batch_size": None,
            "max_batch_wait_ms": None,
        },
        "register_model": {"config": REQUIRED, "loader": None},
        "start": {"host": None, "port": None},
        "stop": {},
        "stream": {"request": REQUIRED},
        "infer": {"request": REQUIRED},
    },
    "BatchScheduler": {
        "enqueue": {"request": REQUIRED},
        "get_batch": {},
        "queue_length": {},
        "queue_depth": {},
        "stats": {},
    },
    "StreamManager": {
        "__init__": {"default_timeout": 30.0, "buffer_size": 100},
        "create_stream": {"stream_id": REQUIRED, "timeout": None},
        "push_token": {"stream_id": REQUIRED, "token": REQUIRED},
        "close_stream": {"stream_id": REQUIRED},
        "stream_stats": {"stream_id": REQUIRED},
        "active_streams": {},
        "cleanup_idle_streams": {"idle_timeout": 60.0},
        "shutdown": {},
    },
    "Model": {"record_inference": {"tokens": REQUIRED}, "uptime_seconds": {}},
    "ModelRegistry": {
        "register_loader": {"name": REQUIRED, "loader": REQUIRED},
        "load_model": {"config": REQUIRED},
        "unload_model": {"name": REQUIRED, "version": None},
        "get_model": {"name": REQUIRED, "version": None},
        "list_models": {},
        "set_active_version": {"name": REQUIRED, "version": REQUIRED},
        "health_check": {"name": REQUIRED},
        "model_stats": {"name": REQUIRED},
        "shutdown": {},
    },
}
AWAITED = {
    "BatchScheduler": {"enqueue", "get_batch"},
    "InferenceServer": {"start", "stop", "infer"},
    "StreamManager": {"push_token", "close_stream", "stream_stats", "cleanup_idle_streams", "shutdown"},
    "Model": set(),
    "ModelRegistry": {"load_model", "unload_model", "health_check", "shutdown"},
}


def parameters(function: Any) -> dict[str, object]:
    """By name, with their defaults, without self."""
    found = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in found.items() if name != "self"}


def test_everything_that_is_announced_is_there() -> None:
    for name in realtime_serve.__all__:
        assert getattr(realtime_serve, name) is not None
    assert set(DATACLASSES) | set(CALLS) | {"RequestPriority", "run_server"} <= set(realtime_serve.__all__)


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'realtime_serve' has no attribute 'Server'"):
        _ = realtime_serve.Server


def test_priorities() -> None:
    assert issubclass(realtime_serve.RequestPriority, Enum)
    assert {p.name: p.value for p in realtime_serve.RequestPriority} == {"LOW": 0, "NORMAL": 1, "HIGH": 2}


@pytest.mark.parametrize("name", DATACLASSES)
def test_dataclasses(name: str) -> None:
    kind: Any = getattr(realtime_serve, name)
    contract = DATACLASSES[name]
    names = [field.name for field in fields(kind)]
    # By position as well: the published fields come first, in their order.
    assert names[: len(contract)] == list(contract)
    needed = {key: "x" for key, default in contract.items() if default is REQUIRED}
    made = kind(**needed)
    for key, default in contract.items():
        if default is not REQUIRED:
            value = getattr(made, key)
            assert (type(value), value) == (type(default), default)


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, methods in CALLS.items() for method in methods])
def test_calls(name: str, method: str) -> None:
    function = getattr(getattr(realtime_serve, name), method)
    contract, found = CALLS[name][method], parameters(function)
    assert list(found)[: len(contract)] == list(contract)
    for key, default in found.items():
        if key in contract:
            assert default is contract[key] or default == contract[key]
        else:
            assert default is not REQUIRED, f"{key} is new, and has no default"
    assert inspect.iscoroutinefunction(function) == (method in AWAITED[name])


def test_run_server() -> None:
    found = parameters(realtime_serve.run_server)
    assert next(iter(found)) == "config"
    assert all(default is not REQUIRED for name, default in found.items() if name != "config")
    assert inspect.iscoroutinefunction(realtime_serve.run_server)


def test_a_server_has_its_parts_before_it_starts() -> None:
    async def make() -> None:
        server = realtime_serve.InferenceServer(
            realtime_serve.ServerConfig(port=1, max_queue=3), max_connections=2, request_timeout=1.5, max_batch_size=4
        )
        # What is given by itself wins over the configuration; the rest of that stays.
        assert server.config == realtime_serve.ServerConfig(
            port=1, max_queue=3, max_connections=2, request_timeout=1.5, max_batch_size=4
        )
        assert isinstance(server.model_registry, realtime_serve.ModelRegistry)
        assert isinstance(server.stream_manager, realtime_serve.StreamManager)
        assert server.model_registry.list_models() == {}
        await server.stop()  # it was never started: nothing to do

    asyncio.run(make())


def test_a_server_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match="max_connections must be at least 1"):
        realtime_serve.InferenceServer(max_connections=0)
