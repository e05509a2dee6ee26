"""A request's body, within the time that its sender has for it."""

from __future__ import annotations

import asyncio

from aiohttp import web

from realtime_serve.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from realtime_serve.types import shown

# A sender that needs longer than this is cut.
_WITHIN_S = 30.0


async def read_body(request: web.BaseRequest, max_bytes: int) -> bytes:
    """Raises RequestTimeoutError where it did not arrive in time, PayloadTooLargeError, UnsupportedMediaTypeError where
    it is compressed, and InvalidRequestError where it is not framed as its headers say."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"the body's Content-Encoding is {shown(coding)}: send it as it is, without one", "Content-Encoding"
        )
    try:
        if request.content.is_eof():  # it came with its headers, as most do: nothing is to be waited for
            body = request.content.read_nowait()
            if len(body) > max_bytes:
                raise web.HTTPRequestEntityTooLarge(max_bytes, len(body))
            return body
        async with asyncio.timeout(_WITHIN_S):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise PayloadTooLargeError(f"the body is larger than the {max_bytes} bytes that this server takes") from None
    except web.RequestPayloadError as error:
        raise InvalidRequestError(
            f"the body is not framed as its headers say: {' '.join(str(error).split())}", code="bad_request"
        ) from None
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive within {_WITHIN_S:.0f} seconds") from None
