"""A low-latency streaming inference server for AI models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from realtime_serve._version import __version__
from realtime_serve.config import BatchConfig, ModelConfig, ServerConfig
from realtime_serve.errors import ServeError
from realtime_serve.types import (
    InferenceRequest,
    InferenceResponse,
    Outcome,
    PredictRequest,
    PredictResponse,
    RequestPriority,
    StreamToken,
    Timings,
    TopLogprob,
    Usage,
)

if TYPE_CHECKING:
    from realtime_serve.batch import BatchScheduler
    from realtime_serve.middleware import MetricsCollector, MiddlewareChain, RateLimiter, RequestLogger
    from realtime_serve.models import Model, ModelRegistry
    from realtime_serve.server import InferenceServer, run_server
    from realtime_serve.stream import StreamManager, TokenStream

__all__ = [
    "BatchConfig",
    "BatchScheduler",
    "InferenceRequest",
    "InferenceResponse",
    "InferenceServer",
    "MetricsCollector",
    "MiddlewareChain",
    "Model",
    "ModelConfig",
    "ModelRegistry",
    "Outcome",
    "PredictRequest",
    "PredictResponse",
    "RateLimiter",
    "RequestLogger",
    "RequestPriority",
    "ServeError",
    "ServerConfig",
    "StreamManager",
    "StreamToken",
    "Timings",
    "TokenStream",
    "TopLogprob",
    "Usage",
    "__version__",
    "run_server",
]

# Loaded when they are first asked for: a command line that only prints its version needs neither the core nor asyncio.
_LAZY = {
    "BatchScheduler": "batch",
    "InferenceServer": "server",
    "MetricsCollector": "middleware",
    "MiddlewareChain": "middleware",
    "RateLimiter": "middleware",
    "RequestLogger": "middleware",
    "Model": "models",
    "ModelRegistry": "models",
    "StreamManager": "stream",
    "TokenStream": "stream",
    "run_server": "server",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"realtime_serve.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'realtime_serve' has no attribute {name!r}")
