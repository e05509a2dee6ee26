"""The order in which middleware sees a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from realtime_serve.types import Outcome, Request

Handler = Callable[[Request], Awaitable[Outcome]]
"""Serves a request to its end: when it returns, the last token has been handed to the reader."""

Middleware = Callable[[Request, Handler], Awaitable[Outcome]]
"""`async def (request, next)`: awaits `next(request)`, or raises a ServeError, which becomes the answer.

The request is an InferenceRequest or a PredictRequest. It may pass on a changed copy of it (`dataclasses.replace`), and
sees how it ended: the Outcome that `next` returns, the ServeError that it raises, or asyncio.CancelledError where the
client left.
"""


class MiddlewareChain:
    """Middleware around a handler, the first one outermost. Belongs to the event loop's thread."""

    def __init__(self, middleware: Iterable[Middleware] = ()) -> None:
        self._middleware = list(middleware)

    def add(self, middleware: Middleware) -> None:
        """Appends one, inside those that are there; it takes part from the next request on."""
        self._middleware.append(middleware)

    async def run(self, request: Request, handler: Handler) -> Outcome:
        for middleware in reversed(self._middleware):
            handler = _around(middleware, handler)
        return await handler(request)


def _around(middleware: Middleware, handler: Handler) -> Handler:
    return lambda request: middleware(request, handler)
