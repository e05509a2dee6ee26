"""The HTTP application: routes, and the one place where errors become answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from aiohttp import web

from realtime_serve.errors import ServeError
from realtime_serve.http.admin import AdminHandlers
from realtime_serve.http.infer import InferHandlers
from realtime_serve.http.predict import PredictHandlers
from realtime_serve.http.responses import error_body, error_response
from realtime_serve.service import InferenceService

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(service: InferenceService) -> web.Application:
    app = web.Application(middlewares=[error_objects], client_max_size=service.config.max_body_bytes)
    infer, predict, admin = InferHandlers(service), PredictHandlers(service), AdminHandlers(service)
    app.router.add_post("/infer", infer.infer)
    app.router.add_post("/infer_stream", infer.infer_stream)
    app.router.add_post("/predict", predict.predict)
    app.router.add_get("/health", admin.health)
    app.router.add_get("/ready", admin.ready)
    app.router.add_get("/models", admin.models)
    app.router.add_get("/status", admin.status)
    if service.config.enable_metrics:
        app.router.add_get("/metrics", admin.metrics)
    return app


@web.middleware
async def error_objects(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error on every route is one JSON object; the traceback of one we did not foresee goes to the log alone."""
    try:
        return await handler(request)
    except ServeError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        message = _ROUTE_MESSAGES.get(error.status, "{reason}").format(
            method=request.method, path=request.path, reason=error.reason, limit=request.app._client_max_size
        )
        return web.json_response(error_body(message, error.status), status=error.status, headers=headers)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return web.json_response(error_body("internal error; the log has the details", 500), status=500)


_ROUTE_MESSAGES = {
    404: "there is no route {path}",
    405: "{path} does not take {method}",
    413: "the body is larger than the {limit} bytes that this server takes",
}
