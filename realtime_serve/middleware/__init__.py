"""What every request passes on its way to a model: what is built in, then the user's own."""

from realtime_serve.middleware.chain import Handler, Middleware, MiddlewareChain
from realtime_serve.middleware.client_priority import ClientPriorities
from realtime_serve.middleware.metrics_collector import MetricsCollector
from realtime_serve.middleware.rate_limiter import RateLimiter
from realtime_serve.middleware.request_logger import RequestLogger

__all__ = [
    "ClientPriorities",
    "Handler",
    "MetricsCollector",
    "Middleware",
    "MiddlewareChain",
    "RateLimiter",
    "RequestLogger",
]
