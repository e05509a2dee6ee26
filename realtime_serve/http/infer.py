"""The native API: POST /infer and POST /infer_stream."""

from __future__ import annotations

from aiohttp import web

from realtime_serve._pump import Stream
from realtime_serve.errors import ServeError
from realtime_serve.http.body import read_body
from realtime_serve.http.responses import EventStreamResponse, WholeResponse
from realtime_serve.http.validation import parse_infer
from realtime_serve.randomness import new_request_id
from realtime_serve.service import InferenceService


class InferHandlers:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def infer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Streams, unless the body's `stream` or the Accept header asks for one JSON object."""
        return await self._answer(request, streams=None)

    async def infer_stream(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self._answer(request, streams=True)

    async def _answer(self, request: web.BaseRequest, *, streams: bool | None) -> web.StreamResponse:
        self._service.streams.serve_ready()  # many requests in one turn of the event loop are not to hold up streams
        request_id = new_request_id()
        try:
            body = await read_body(request, self._service.config.max_body_bytes)
            parsed = parse_infer(body, request_id=request_id, defaults=self._service.config)
        except ServeError as error:
            self._service.metrics.count_unread(error)
            raise
        if streams is None:
            streams = parsed.stream
        if streams is None:
            streams = request.headers.get("Accept") != "application/json"
        if not parsed.request.client_id:
            parsed.request.client_id = request.remote or ""
        answer = _EventStream(request, request_id) if streams else _JsonAnswer(request, request_id)
        try:
            await self._service.serve(parsed.request, answer.deliver)
        except ServeError:
            # Once the head is out, the stream itself has told of it.
            if answer.response is None or not answer.response.prepared:
                raise
        assert answer.response is not None
        return answer.response


class _EventStream:
    def __init__(self, request: web.BaseRequest, request_id: str) -> None:
        self._request = request
        self._headers = {"X-Request-Id": request_id}
        self.response: web.StreamResponse | None = None

    async def deliver(self, stream: Stream) -> None:
        self.response = response = EventStreamResponse(self._request, stream, self._headers)
        await response.run()


class _JsonAnswer:
    def __init__(self, request: web.BaseRequest, request_id: str) -> None:
        self._request = request
        self._headers = {"X-Request-Id": request_id}
        self.response: web.StreamResponse | None = None

    async def deliver(self, stream: Stream) -> None:
        body = await stream.json()
        if not stream.error:
            self.response = WholeResponse(self._request, body, "application/json", self._headers)
