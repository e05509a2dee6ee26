"""The native API: POST /infer and POST /infer_stream."""

from __future__ import annotations

import logging

from realtime_serve._pump import Stream
from realtime_serve.errors import ServeError
from realtime_serve.http.body import read_body
from realtime_serve.http.request import HttpRequest
from realtime_serve.http.responses import Answer, EventStreamResponse, Response, error_response
from realtime_serve.http.validation import parse_infer
from realtime_serve.randomness import new_request_id
from realtime_serve.service import InferenceService

log = logging.getLogger(__name__)


class InferHandlers:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def infer(self, request: HttpRequest) -> Answer:
        """Streams, unless the body's `stream` or the Accept header asks for one JSON object."""
        return await self._answer(request, streams=None)

    async def infer_stream(self, request: HttpRequest) -> Answer:
        return await self._answer(request, streams=True)

    async def _answer(self, request: HttpRequest, *, streams: bool | None) -> Answer:
        self._service.streams.serve_ready()  # many requests in one turn of the event loop are not to hold up streams
        request_id = new_request_id()
        headers = {"X-Request-Id": request_id}
        try:
            body = await read_body(request, self._service.config.max_body_bytes)
            parsed = parse_infer(body, request_id=request_id, defaults=self._service.config)
        except ServeError as error:
            self._service.metrics.count_unread(error)
            return error_response(error, headers)
        if streams is None:
            streams = parsed.stream
        if streams is None:
            streams = request.headers.get("Accept") != "application/json"
        if not parsed.request.client_id:
            parsed.request.client_id = request.client
        delivery = _EventStream(request, headers) if streams else _JsonObject(headers)
        try:
            await self._service.serve(parsed.request, delivery.deliver)
        except ServeError as error:
            if not delivery.has_begun:
                return error_response(error, headers)
            # The stream itself has told of it.
        except Exception:
            if not delivery.has_begun:
                raise
            log.exception("request %s failed behind its answer's beginning", request_id)
        assert delivery.answer is not None
        return delivery.answer


class _EventStream:
    """Delivers a stream as it comes."""

    def __init__(self, request: HttpRequest, headers: dict[str, str]) -> None:
        self._request = request
        self._headers = headers
        self.answer: EventStreamResponse | None = None

    async def deliver(self, stream: Stream) -> None:
        self.answer = EventStreamResponse(self._request, stream, self._headers)
        await self.answer.run()

    @property
    def has_begun(self) -> bool:
        return self.answer is not None and self.answer.started


class _JsonObject:
    """Delivers a stream as one JSON object, once it has ended."""

    has_begun = False

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers
        self.answer: Response | None = None

    async def deliver(self, stream: Stream) -> None:
        body = await stream.json()
        if not stream.error:
            self.answer = Response(body, headers=self._headers)
