"""A request's body, within the time that its sender has for it."""

from __future__ import annotations

import asyncio

from realtime_serve.errors import (
    InvalidRequestError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from realtime_serve.http.request import HttpRequest
from realtime_serve.types import shown

# A sender that needs longer than this is cut.
_WITHIN_S = 30.0


class UnreadableBodyError(Exception):
    """A body is not framed as its headers say."""


async def read_body(request: HttpRequest, max_bytes: int) -> bytes:
    """Raises RequestTimeoutError where it did not arrive in time, PayloadTooLargeError, UnsupportedMediaTypeError where
    it is compressed, and InvalidRequestError where it is not framed as its headers say."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding.lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"the body's Content-Encoding is {shown(coding)}: send it as it is, without one", "Content-Encoding"
        )
    body = request.body
    try:
        if body.is_eof():  # it came with its headers, as most do: nothing is to be waited for
            data = body.read_nowait()
            _check_size(len(data), max_bytes)
            return data
        _check_size(int(request.headers.get("Content-Length", 0)), max_bytes)  # nothing is gained by its arrival
        parts: list[bytes] = []
        size = 0
        async with asyncio.timeout(_WITHIN_S):
            while part := await body.readany():
                size += len(part)
                _check_size(size, max_bytes)
                parts.append(part)
        return b"".join(parts)
    except UnreadableBodyError as error:
        raise InvalidRequestError(
            f"the body is not framed as its headers say: {' '.join(str(error).split())}", code="bad_request"
        ) from None
    except TimeoutError:
        raise RequestTimeoutError(f"the body did not arrive within {_WITHIN_S:.0f} seconds") from None


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PayloadTooLargeError(f"the body is larger than the {max_bytes} bytes that this server takes")
