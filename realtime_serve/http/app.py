"""The HTTP application: routes, and the one place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web

from realtime_serve.errors import ServeError
from realtime_serve.http.admin import AdminHandlers
from realtime_serve.http.infer import InferHandlers
from realtime_serve.http.predict import PredictHandlers
from realtime_serve.http.responses import error_body, error_response
from realtime_serve.service import InferenceService
from realtime_serve.types import shown

log = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class HttpApp:
    """What is done with a request, whatever it asks for.

    It stands on aiohttp's low-level server. All paths here are constants, so a dictionary finds a route; aiohttp's own
    router and middlewares took 19 µs of a request by time stamps in the handlers.
    """

    def __init__(self, service: InferenceService) -> None:
        self.max_body_bytes = service.config.max_body_bytes
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

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every error on every route is one JSON object; a traceback goes to the log alone."""
        try:
            waits = "Expect" in request.headers and _waits_to_continue(request)
            handler = self._find(request)
            if waits:
                await _continue(request)
            return await handler(request)
        except ServeError as error:
            return error_response(error)
        except web.HTTPException as error:
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            body = error_body(error.text or error.reason, error.status)
            return web.json_response(body, status=error.status, headers=headers)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return web.json_response(error_body("internal error; the log has the details", 500), status=500)

    def _find(self, request: web.BaseRequest) -> Handler:
        methods = self._routes.get(request.path)
        if methods is None:
            raise web.HTTPNotFound(text=f"there is no route {request.path}")
        handler = methods.get(request.method)
        if handler is None:
            raise web.HTTPMethodNotAllowed(
                request.method, methods, text=f"{request.path} does not take {request.method}"
            )
        return handler


def _get(handler: Handler) -> dict[str, Handler]:
    return {"GET": handler, "HEAD": handler}


def _waits_to_continue(request: web.BaseRequest) -> bool:
    """Whether the client sends its body once it is told to. Raises HTTPExpectationFailed where it expects else."""
    expectation = request.headers["Expect"]
    if request.version >= HttpVersion11 and expectation.lower() != "100-continue":
        raise web.HTTPExpectationFailed(text=f"Expect must be 100-continue; it is {shown(expectation)}")
    return request.version >= HttpVersion11


async def _continue(request: web.BaseRequest) -> None:
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun
    await request.writer.drain()
