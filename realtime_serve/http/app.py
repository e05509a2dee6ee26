"""The HTTP application: routes, and the one place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from realtime_serve.errors import ServeError
from realtime_serve.http.admin import AdminHandlers
from realtime_serve.http.infer import InferHandlers
from realtime_serve.http.predict import PredictHandlers
from realtime_serve.http.request import HttpRequest
from realtime_serve.http.responses import Answer, error_body, error_response, json_response
from realtime_serve.service import InferenceService
from realtime_serve.types import shown

log = logging.getLogger(__name__)

Handler = Callable[[HttpRequest], Awaitable[Answer]]


class HttpApp:
    """What is done with a request, whatever it asks for. All paths are constants: a dictionary finds a route."""

    def __init__(self, service: InferenceService) -> None:
        infer, predict, admin = InferHandlers(service), PredictHandlers(service), AdminHandlers(service)
        self._routes: dict[str, dict[str, Handler]] = {
            "/infer": {"POST": infer.infer},
            "/infer_stream": {"POST": infer.infer_stream},
            "/predict": {"POST": predict.predict},
            "/health": _get(admin.health),
            "/ready": _get(admin.ready),
            "/models": _get(admin.models),
            "/status": _get(admin.status),
        }
        if service.config.enable_metrics:
            self._routes["/metrics"] = _get(admin.metrics)

    async def __call__(self, request: HttpRequest) -> Answer:
        """Every error on every route is one JSON object; a traceback goes to the log alone."""
        try:
            expected = request.headers.get("Expect")
            if expected is not None and request.is_http_1_1 and expected.lower() != "100-continue":
                return _refusal(417, f"Expect must be 100-continue; it is {shown(expected)}")
            methods = self._routes.get(request.path)
            if methods is None:
                return _refusal(404, f"there is no route {shown(request.path)}; there are {', '.join(self._routes)}")
            handler = methods.get(request.method)
            if handler is None:
                message = f"{request.path} does not take {request.method}: it takes {' and '.join(methods)}"
                return _refusal(405, message, {"Allow": ", ".join(methods)})
            if expected is not None and request.is_http_1_1:  # the client sends its body once it is told to
                request.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return await handler(request)
        except ServeError as error:
            return error_response(error)
        except ConnectionError:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return _refusal(500, "internal error; the log has the details")


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    return json_response(error_body(message, status), status, headers)


def _get(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}
