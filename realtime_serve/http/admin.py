"""What operators and load balancers ask: GET /health, /ready, /models, /status and /metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

from realtime_serve._version import __version__
from realtime_serve.http.request import HttpRequest
from realtime_serve.http.responses import Response, json_response, retry_headers
from realtime_serve.service import InferenceService


class AdminHandlers:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def health(self, request: HttpRequest) -> Response:
        """Liveness: 200 while steps make progress; 503 where a model has work and has made no step for too long."""
        stalled = self._service.stalled_models()
        if not stalled:
            return json_response({"status": "ok", "stalled": []})
        # The step that is awaited may end at any moment.
        return json_response({"status": "stalled", "stalled": stalled}, status=503, headers=retry_headers(1.0))

    async def ready(self, request: HttpRequest) -> Response:
        """Readiness: 200 while every model can serve and no shutdown has begun."""
        waiting = self._service.not_ready()
        body = {"ready": not waiting, "waiting_for": waiting}
        if not waiting:
            return json_response(body)
        return json_response(body, status=503, headers=retry_headers(self._service.ready_after()))

    async def models(self, request: HttpRequest) -> Response:
        return json_response({"models": self._models()})

    async def status(self, request: HttpRequest) -> Response:
        """All of it in one object, for a person."""
        service = self._service
        return json_response(
            {
                "version": __version__,
                "ready": not service.not_ready(),
                "waiting_for": service.not_ready(),
                "open_streams": service.streams.open_count(),
                "models": self._models(),
                "requests": await service.metrics.get_all_metrics(),
            }
        )

    async def metrics(self, request: HttpRequest) -> Response:
        """Prometheus' text format."""
        return Response(self._service.metrics.render(), CONTENT_TYPE_LATEST)

    def _models(self) -> list[dict[str, Any]]:
        registry = self._service.registry
        return [
            {
                "name": model.name,
                "version": model.version,
                "active": registry.active_version(model.name) == model.version,
                "state": model.worker.state.value,
                "kind": model.kind,
                "device": model.config.device,
                "max_context": model.max_context,
                "inference_count": model.inference_count,
                "total_tokens_generated": model.total_tokens_generated,
                "restarts": model.worker.restarts,
                "uptime_seconds": round(model.uptime_seconds(), 3),
            }
            for model in registry.models()
        ]
