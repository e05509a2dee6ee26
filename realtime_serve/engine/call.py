"""A request to a model that is called, from its channel to the end of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from realtime_serve._core import ChannelServer, FinishReason, StreamError, Submission
from realtime_serve.batch import BatchScheduler
from realtime_serve.errors import ServeError
from realtime_serve.payload import Payload
from realtime_serve.types import RequestPriority, StreamToken

log = logging.getLogger(__name__)

_PRIORITIES = tuple(RequestPriority)
MAX_PIECE_BYTES = ChannelServer.max_piece_bytes


class Port:
    """A channel, and the calls of its open slots."""

    def __init__(self, server: ChannelServer, scheduler: BatchScheduler, take_in: Callable[[], None]) -> None:
        self.server = server
        self.scheduler = scheduler
        self.calls: dict[int, Call] = {}
        self.take_in = take_in


class Call:
    """A request from the channel to the end of its answer."""

    def __init__(self, port: Port, submission: Submission) -> None:
        self.submission = submission
        self.slot = submission.slot
        self.priority = _PRIORITIES[submission.priority]
        self.server = port.server
        self.task: asyncio.Task[None] | None = None
        self.is_open = True
        self.queued_as: int | None = None
        """Its number in the scheduler, while it is there."""
        self._port = port
        self._room: asyncio.Event | None = None  # while it waits for some

    def end(self, reason: FinishReason, error: StreamError = StreamError.NONE, detail: str = "") -> None:
        if self.is_open:
            self.is_open = False
            del self._port.calls[self.slot]
            if self.queued_as is not None:
                self._port.scheduler.withdraw(self.queued_as)
            # Names and messages are the model's: they may hold what UTF-8 has no bytes for.
            self.server.end(self.slot, reason, error, detail.encode(errors="replace").decode())

    def cancel(self) -> None:
        """Its reader has left."""
        if self.task is not None:
            self.task.cancel()
        self.end(FinishReason.CANCELLED)

    def refuse(self, detail: str) -> None:
        self.end(FinishReason.ERROR, StreamError.INVALID_REQUEST, detail)

    def fail(self, detail: str) -> None:
        """The model gave no answer that could be sent."""
        if not self.is_open:
            return
        log.error("request %s: %s", self.submission.request_id, detail)
        self.end(FinishReason.ERROR, StreamError.MODEL_FAILED, detail)

    def raised(self, error: BaseException) -> None:
        """What the model raised goes to the log; its caller is told the type. A ServeError of its own which says that
        the request is wrong is the answer."""
        if isinstance(error, ServeError) and error.status < 500:
            self.refuse(f"{error.param or 'input'}: {error}")
            return
        if isinstance(error, asyncio.CancelledError) and not self.is_open:
            return  # it was given up
        request_id = self.submission.request_id
        log.error("request %s: the model raised", request_id, exc_info=error)
        detail = f"the model raised {type(error).__name__} for request {request_id}; the log has the traceback"
        self.end(FinishReason.ERROR, StreamError.MODEL_FAILED, detail)

    async def write_token(self, token: StreamToken) -> None:
        self._check_open()
        top_logprobs = token.top_logprobs
        for text in _pieces(token.token):
            while not self.server.write_token(
                self.slot, text, token.token_id, token.logprob, token.is_special, top_logprobs
            ):
                await self._wait_for_room()
            top_logprobs = None
        self.server.flush()

    async def write_payload(self, payload: Payload) -> None:
        self._check_open()
        for start in range(0, len(payload.data), MAX_PIECE_BYTES):
            piece = payload.data[start : start + MAX_PIECE_BYTES]
            while not self.server.write_payload(self.slot, payload.kind, piece):
                await self._wait_for_room()
        self.end(FinishReason.STOP)
        self.server.flush()

    def _check_open(self) -> None:
        """A model can outlive its cancellation, and the slot be another request's by then."""
        if not self.is_open:
            raise asyncio.CancelledError

    async def _wait_for_room(self) -> None:
        self._room = asyncio.Event()
        self._port.take_in()  # its bell then rings for room as well
        await self._room.wait()
        self._check_open()

    def has_room(self) -> None:
        """There is room for a piece again."""
        if self._room is not None:
            self._room.set()


def _pieces(text: str) -> list[str]:
    """A text in parts that a token record takes; of itself where it is short."""
    size = MAX_PIECE_BYTES // 4  # characters: UTF-8 has at most 4 bytes for one
    if len(text) <= size:
        return [text]
    return [text[start : start + size] for start in range(0, len(text), size)]
