"""The native API: POST /infer and POST /infer_stream."""

from __future__ import annotations

import asyncio
import uuid

from aiohttp import web

from realtime_serve.errors import RequestTimeoutError, stream_error
from realtime_serve.http.responses import EventStreamResponse
from realtime_serve.http.validation import parse_infer
from realtime_serve.service import InferenceService

# A sender that needs longer than this for its body is cut.
_BODY_TIMEOUT_S = 30.0


class InferHandlers:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def infer(self, request: web.Request) -> web.StreamResponse:
        """Streams, unless the body's `stream` or the Accept header asks for one JSON object."""
        return await self._answer(request, streams=None)

    async def infer_stream(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, streams=True)

    async def _answer(self, request: web.Request, *, streams: bool | None) -> web.StreamResponse:
        request_id = uuid.uuid4().hex
        parsed = parse_infer(await _read_body(request), request_id=request_id, defaults=self._service.config)
        if streams is None:
            streams = parsed.stream
        if streams is None:
            streams = request.headers.get("Accept") != "application/json"
        model, stream = await self._service.submit(parsed.request)
        headers = {"X-Request-Id": request_id}
        try:
            if streams:
                response = EventStreamResponse(request, stream, headers)
                await response.run()
                return response
            body = await stream.json()
            if stream.error:
                raise stream_error(stream.error)
            return web.Response(body=body, content_type="application/json", headers=headers)
        finally:
            model.record_inference(stream.token_count)
            stream.close()


async def _read_body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} seconds") from None
