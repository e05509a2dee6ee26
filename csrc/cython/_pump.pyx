# cython: language_level=3, boundscheck=False, wraparound=False
"""The event-loop side of the token path: drains a channel's token rings and writes to transports.

One pass a wake-up: every stream that has records is framed into its connection's buffer, then each connection gets one
write. No Python object is made per token, except for readers that ask for StreamTokens.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.math cimport NAN, isnan
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.optional cimport optional
from libcpp.string cimport string
from libcpp.utility cimport move
from rts cimport (
    Channel,
    CoreTopLogprob,
    EndExtension,
    FrameBuffer,
    PayloadKind,
    Priority,
    SteadyClock,
    StreamError,
    StreamFormat,
    StreamSpec,
    StreamTable,
    TokenBias,
    TokenGaps,
    TokenView,
    TopLogprobReader,
    TopLogprobView,
    append_error_event,
    append_top_logprob,
    kIgnoreEos,
    kLogprobs,
    kMaxPushedTextBytes,
    kMaxTopLogprobs,
    string_view,
    uint32_span,
)

import logging

from realtime_serve.errors import stream_error
from realtime_serve.types import TopLogprob

log = logging.getLogger("realtime_serve.pump")

# A connection whose transport holds more than this is behind: its streams stay in their rings until it has caught up.
cdef Py_ssize_t HIGH_WATER = 64 * 1024
cdef Py_ssize_t LOW_WATER = 16 * 1024
# What a connection may be behind by before it is cut off, unless the pump is told otherwise.
cdef double CUT_AFTER_S = 30.0
# How often a connection that is behind is looked at, and how often streams are checked for their timeouts.
cdef double CATCH_UP_S = 0.01
cdef double TIMEOUT_CHECK_S = 0.05
# Rounds of one pass; then the event loop gets its turn before the next.
cdef int MAX_ROUNDS = 2

_FINISH_REASONS = (None, "stop", "length", "cancelled", "timeout", "error")
_ERRORS = ("", "invalid_logits", "model_failed", "worker_died", "invalid_request", "timeout")


cdef SteadyClock CLOCK


cdef string to_extension(top_logprobs) except *:
    """What a token's record has of them."""
    cdef string extension
    cdef CoreTopLogprob top
    cdef bytes encoded
    if top_logprobs is None:
        return extension
    if len(top_logprobs) > kMaxTopLogprobs:
        raise ValueError(f"a token may have at most {kMaxTopLogprobs} top logprobs; it has {len(top_logprobs)}")
    for text, token_id, logprob in top_logprobs:
        encoded = (<str?>text).encode()
        top.token = token_id
        top.logprob = logprob
        append_top_logprob(extension, top, string_view(<const char*>encoded, len(encoded)))
    return extension


cdef tuple from_extension(string_view extension):
    cdef TopLogprobReader reader = TopLogprobReader(extension)
    cdef optional[TopLogprobView] top
    cdef TopLogprobView* value
    cdef list tops = []
    while True:
        top = reader.next()
        if not top.has_value():
            return tuple(tops)
        value = &top.value()
        tops.append(TopLogprob(value.text.data()[:value.text.size()].decode(), value.token_id, value.logprob))


cdef append_error(FrameBuffer* out, str code, str detail):
    """An error event in the words of the exception that a caller without HTTP would get."""
    error = stream_error(code, detail)
    cdef bytes message = str(error).encode(), kind = error.type.encode(), name = error.code.encode()
    append_error_event(
        out[0],
        string_view(<const char*>message, len(message)),
        string_view(<const char*>kind, len(kind)),
        string_view(<const char*>name, len(name)),
        optional[string_view](),
    )


cdef class Connection:
    """A transport that streams are written to. A connection may carry many streams."""

    cdef object transport
    cdef FrameBuffer buffer
    cdef bint chunked
    cdef bint chunk_is_open
    cdef bint behind
    cdef double behind_since
    cdef bint touched
    cdef bint broken

    cdef inline FrameBuffer* open(self):
        """The buffer, ready to take frames."""
        if self.chunked and not self.chunk_is_open:
            self.buffer.begin_chunk()
            self.chunk_is_open = True
        return &self.buffer

    cdef inline void end_body(self):
        if self.chunk_is_open:
            self.buffer.end_chunk()
            self.chunk_is_open = False
        if self.chunked:
            self.buffer.last_chunk()

    cdef flush(self):
        """Writes what has been framed, in one write."""
        if self.chunk_is_open:
            self.buffer.end_chunk()
            self.chunk_is_open = False
        try:
            if not self.broken and not self.transport.is_closing():  # else its handler is about to be told
                self.transport.write(PyBytes_FromStringAndSize(self.buffer.data(), self.buffer.size()))
                if self.transport.get_write_buffer_size() > HIGH_WATER:
                    self.behind = True
                    self.behind_since = CLOCK.now_ns() / 1e9
        except Exception:
            self.give_up()
        self.buffer.clear()

    cdef bint caught_up(self):
        if self.broken or self.transport.is_closing() or self.transport.get_write_buffer_size() <= LOW_WATER:
            self.behind = False
        return not self.behind

    cdef double behind_for(self):
        return CLOCK.now_ns() / 1e9 - self.behind_since

    cdef cut(self):
        """Ends a connection whose reader has not caught up in time."""
        log.warning("a client that could not keep up for %.0f s is cut off", self.behind_for())
        self.broken = True
        self.behind = False
        self.transport.abort()

    cdef give_up(self):
        """Ends a connection that cannot be written to, and it alone. For use where the exception is being handled."""
        log.exception("a connection could not be written to: it is closed")
        self.broken = True
        self.behind = False
        try:
            self.transport.abort()
        except Exception:
            log.debug("it could not be closed either", exc_info=True)


cdef class Stream:
    """A stream as its reader sees it: tokens one by one, events to a transport, or one JSON object.

    `close` gives it up at any time, and must be called once it is done with.
    """

    cdef Pump pump
    cdef uint32_t slot
    cdef bint is_open
    cdef bint wrote
    cdef bint served  # to its end
    cdef Connection connection
    cdef object waiter
    # What is left of the stream once its slot is given back.
    cdef object final_reason
    cdef str final_error
    cdef str final_detail
    cdef uint32_t final_tokens
    cdef EndExtension final_end

    def next_token(self):
        """A StreamToken's values, or None where there is no token at the moment."""
        if not self.is_open:
            return None
        cdef optional[TokenView] taken = self.pump.table.get().next(self.slot)
        if not taken.has_value():
            return None
        self.pump.table.get().rings_read()
        cdef TokenView* token = &taken.value()
        text = token.text.data()[:token.text.size()].decode()
        logprob = None if isnan(token.logprob) else token.logprob
        top_logprobs = None if token.top_logprobs.size() == 0 else from_extension(token.top_logprobs)
        return text, token.token_id, logprob, bool(token.special), top_logprobs

    async def readable(self):
        """Waits until there may be a token, or the stream has ended."""
        if self.is_open and self.pump.table.get().buffered(self.slot) == 0 and not self.ended:
            await self._wait()

    async def write_to(self, transport, bytes head, bint chunked):
        """Writes the stream's events to a transport, to its end, behind `head`, which goes out with the first of them.

        Where the stream fails before its first token, nothing is written.
        """
        self.connection = Connection()
        self.connection.transport = transport
        self.connection.chunked = chunked
        self.connection.buffer.append(string_view(<const char*>head, len(head)))
        await self._run(StreamFormat.kEvents)

    async def json(self):
        """The whole answer as one JSON object; empty where the stream failed."""
        await self._run(StreamFormat.kJson)
        if self.error or not self.is_open:
            return b""
        cdef FrameBuffer body
        self.pump.table.get().finish_json(self.slot, body)
        return PyBytes_FromStringAndSize(body.data(), body.size())

    async def whole(self):
        """The answer of a model that predicts, as (what its bytes are, the bytes); empty where the stream failed."""
        await self._run(StreamFormat.kWhole)
        if self.error or not self.is_open:
            return 0, b""
        cdef string_view body = self.pump.table.get().whole(self.slot)
        return <uint8_t>self.pump.table.get().whole_kind(self.slot), PyBytes_FromStringAndSize(body.data(), body.size())

    async def _run(self, StreamFormat format):
        self.pump.table.get().set_format(self.slot, format)
        ended = self.pump.serve(self)
        self.pump.table.get().rings_read()
        self.pump._flush()
        if not ended:
            await self._wait()

    def _wait(self):
        self.waiter = self.pump.loop.create_future()
        return self.waiter

    cdef void wake(self):
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done() and not self.pump.loop.is_closed():
                waiter.set_result(None)

    def push(self, str text, int32_t token_id, logprob, bint special, top_logprobs=None):
        """Appends a token to a stream that Pump.open made. False: its buffer is full, or it has ended.

        Raises ValueError where the text is longer than any buffer takes, or there are too many top logprobs.
        """
        cdef bytes encoded = text.encode()
        cdef string extension = to_extension(top_logprobs)
        cdef size_t size = len(encoded) + extension.size()
        if size > kMaxPushedTextBytes:
            raise ValueError(f"a token's text may have at most {kMaxPushedTextBytes} bytes; it has {size}")
        cdef float value = NAN if logprob is None else logprob
        return self.is_open and self.pump.table.get().push(
            self.slot, string_view(<const char*>encoded, len(encoded)), token_id, value, special,
            string_view(extension.data(), extension.size())
        )

    def push_end(self):
        return self.is_open and self.pump.table.get().push_end(self.slot)

    def close(self):
        """Gives the stream up; what still runs for it is cancelled. May be called more than once."""
        if not self.is_open:
            return
        self.is_open = False
        cdef StreamTable* table = self.pump.table.get()
        self.final_reason = _FINISH_REASONS[<int>table.finish(self.slot)]
        self.final_error = _ERRORS[<int>table.error(self.slot)]
        self.final_detail = self._detail()
        self.final_tokens = table.generated(self.slot)
        self.final_end = table.end(self.slot)
        self.pump.streams[self.slot] = None
        table.close(self.slot)
        self.connection = None
        self.wake()

    @property
    def started(self):
        """Whether anything has been written to its transport."""
        return self.wrote

    @property
    def ended(self):
        return not self.is_open or self.pump.table.get().ended(self.slot)

    @property
    def error(self):
        """Why the stream failed, as a code; empty where it did not."""
        return _ERRORS[<int>self.pump.table.get().error(self.slot)] if self.is_open else self.final_error

    @property
    def error_detail(self):
        """What its worker says more of the error."""
        return self._detail() if self.is_open else self.final_detail

    cdef str _detail(self):
        cdef string_view detail = self.pump.table.get().error_detail(self.slot)
        return detail.data()[:detail.size()].decode("utf-8", "replace")

    @property
    def finish_reason(self):
        return _FINISH_REASONS[<int>self.pump.table.get().finish(self.slot)] if self.is_open else self.final_reason

    @property
    def token_count(self):
        return self.pump.table.get().generated(self.slot) if self.is_open else self.final_tokens

    @property
    def buffered(self):
        """Tokens that its reader has not taken."""
        return self.pump.table.get().buffered(self.slot) if self.is_open else 0

    @property
    def idle_seconds(self):
        if not self.is_open:
            return 0.0
        return (CLOCK.now_ns() - self.pump.table.get().last_progress_ns(self.slot)) / 1e9

    def usage(self):
        """(prompt tokens, completion tokens, cached tokens)."""
        cdef EndExtension end = self._end()
        return end.prompt_tokens, self.token_count, end.cached_tokens

    def timings(self):
        """(queue, prefill, decode, stalled), in milliseconds."""
        cdef EndExtension end = self._end()
        return end.queue_ns / 1e6, end.prefill_ns / 1e6, end.decode_ns / 1e6, end.stalled_ns / 1e6

    cdef EndExtension _end(self):
        return self.pump.table.get().end(self.slot) if self.is_open else self.final_end


cdef class Pump:
    """Serves the streams of one channel. Everything of it belongs to the event loop's thread."""

    cdef object loop
    cdef object channel
    cdef shared_ptr[Channel] shared
    cdef unique_ptr[StreamTable] table
    cdef list streams
    cdef list touched
    cdef list behind
    cdef double cut_after_s
    # Since the pump was made.
    cdef uint64_t writes
    cdef uint64_t coalesced
    cdef uint64_t slowed
    cdef uint64_t cut
    cdef FrameBuffer unused
    cdef object catch_up_timer
    cdef object timeout_timer
    cdef bint running

    def __init__(self, channel, loop, double cut_after_s=CUT_AFTER_S):
        self.loop = loop
        self.channel = channel
        capsule = channel.capsule()  # it must outlive the copy
        self.shared = (<shared_ptr[Channel]*>PyCapsule_GetPointer(capsule, "rts.Channel"))[0]
        self.table.reset(new StreamTable(self.shared, CLOCK))
        self.streams = [None] * channel.slots
        self.touched = []
        self.behind = []
        self.cut_after_s = cut_after_s

    def start(self):
        self.running = True
        self.loop.add_reader(self.shared.get().front_bell_fd(), self._on_bell)
        self._on_bell()

    def stop(self):
        """Ends every open stream, as `fail` does, and leaves the channel."""
        if not self.running:
            return
        self.running = False
        if not self.loop.is_closed():
            self.loop.remove_reader(self.shared.get().front_bell_fd())
        if self.timeout_timer is not None:
            self.timeout_timer.cancel()
            self.timeout_timer = None
        self.fail()

    @property
    def open_streams(self):
        return self.table.get().open_streams()

    def stats(self):
        """What readers see: gaps between tokens as (counts by significant bits of microseconds, their sum), and counts.

        writes; coalesced, tokens that shared a write with the one before; slowed, times that a connection fell behind
        and its streams were held in their rings; cut, connections that were behind for too long.
        """
        cdef const TokenGaps* gaps = &self.table.get().token_gaps_us()
        return {
            "token_gaps_us": ([gaps.count(bucket) for bucket in range(27)], gaps.sum()),
            "writes": self.writes,
            "coalesced": self.coalesced,
            "slowed": self.slowed,
            "cut": self.cut,
        }

    @property
    def longest_wait_s(self):
        """How long the stream that has waited longest for its worker has done so; 0 where none waits."""
        return self.table.get().longest_wait_ns() / 1e9

    @property
    def longest_timeout_s(self):
        """The longest that a stream which is open now may be without a token."""
        return self.table.get().longest_timeout_ns() / 1e9

    def submit(self, *, str request_id, str model, str version, list prompt_ids, int priority, double timeout_s,
               int32_t max_tokens=1, float temperature=1.0, float top_p=1.0, int32_t top_k=0, float min_p=0.0,
               float repetition_penalty=1.0, float presence_penalty=0.0, float frequency_penalty=0.0,
               bint ignore_eos=False, bint logprobs=False, uint64_t seed=0, stop=(), logit_bias={},
               int32_t min_tokens=0, stop_token_ids=(), uint32_t top_logprobs=0, int payload_kind=0,
               int answer_kind=0, bytes payload=b""):
        """Queues a request; its Stream, or None where there is no room for one more."""
        cdef StreamSpec spec
        cdef TokenBias biased
        spec.request_id = request_id.encode()
        spec.model = model.encode()
        spec.version = version.encode()
        spec.prompt = prompt_ids
        for text in stop:
            spec.stops.push_back((<str>text).encode())
        for token, bias in logit_bias.items():
            biased.token = token
            biased.bias = bias
            spec.logit_bias.push_back(biased)
        for token in stop_token_ids:
            spec.stop_token_ids.push_back(token)
        spec.sampling.max_tokens = max_tokens
        spec.sampling.min_tokens = min_tokens
        spec.sampling.temperature = temperature
        spec.sampling.top_p = top_p
        spec.sampling.top_k = top_k
        spec.sampling.min_p = min_p
        spec.sampling.repetition_penalty = repetition_penalty
        spec.sampling.presence_penalty = presence_penalty
        spec.sampling.frequency_penalty = frequency_penalty
        spec.sampling.flags = (kIgnoreEos if ignore_eos else 0) | (kLogprobs if logprobs else 0)
        spec.sampling.top_logprobs = top_logprobs
        spec.sampling.seed = seed
        spec.priority = <Priority><uint8_t>priority
        spec.payload_kind = <PayloadKind><uint8_t>payload_kind
        spec.answer_kind = <PayloadKind><uint8_t>answer_kind
        spec.payload = payload
        return self._stream(self.table.get().submit(move(spec), <int64_t>(timeout_s * 1e9)))

    def open(self, str name, double timeout_s):
        """A stream that is fed by its own push; None where there is no room for one more."""
        return self._stream(self.table.get().open(<int64_t>(timeout_s * 1e9)))

    cdef _stream(self, optional[uint32_t] slot):
        if not slot.has_value():
            return None
        cdef Stream stream = Stream()
        stream.pump = self
        stream.slot = slot.value()
        stream.is_open = True
        self.streams[stream.slot] = stream
        if self.timeout_timer is None:
            self.timeout_timer = self.loop.call_later(TIMEOUT_CHECK_S, self._check_timeouts)
        return stream

    def fail(self):
        """Ends every open stream behind what it was given: with the error that its worker died, if not properly."""
        for slot in self.table.get().fail_all():
            self.serve(self.streams[slot])
        self._flush()

    def _on_bell(self):
        cdef StreamTable* table = self.table.get()
        cdef uint32_span ready
        cdef size_t i
        if not self.running:  # stopped since this was put off
            return
        self.shared.get().front_bell().consume()
        table.disarm()
        for _ in range(MAX_ROUNDS):
            ready = table.collect()
            for i in range(ready.size()):
                stream = self.streams[ready[i]]
                if stream is not None:
                    self.serve(<Stream>stream)
            table.rings_read()
            self._flush()
            if table.arm():
                return
        self.loop.call_soon(self._on_bell)

    def serve_ready(self):
        """Serves what has come, where something has, before the event loop's turn for it."""
        if self.running and self.shared.get().any_ready():
            self._on_bell()

    cdef bint serve(self, Stream stream):
        """Moves what a stream's ring holds towards its reader; whether the stream is served to its end.

        Raises nothing: what goes wrong for one stream must not keep the others from being served.
        """
        try:
            return self._serve(stream)
        except Exception:
            if stream.connection is None:
                log.exception("a stream could not be served")
            else:
                stream.connection.give_up()
            return False

    cdef bint _serve(self, Stream stream):
        cdef StreamTable* table = self.table.get()
        cdef Connection connection = stream.connection
        cdef uint32_t slot = stream.slot
        if connection is None:
            if table.format(slot) != StreamFormat.kTokens:
                table.drain(slot, self.unused)
                if table.ended(slot):
                    stream.wake()
            else:
                stream.wake()
            return table.ended(slot)
        if stream.served:  # its worker announced once more what an earlier look had taken
            return True
        # A pump that has stopped will not look again: its connections get all that is left, which the rings bound.
        if self.running and connection.behind and not connection.caught_up():
            if connection.behind_for() < self.cut_after_s:
                self._retry_later(stream)
                return False
            self.cut += 1
            connection.cut()
        return self._frame(stream, connection)

    cdef bint _frame(self, Stream stream, Connection connection):
        cdef StreamTable* table = self.table.get()
        cdef uint32_t slot = stream.slot
        cdef FrameBuffer* out = connection.open()
        cdef uint32_t tokens = table.drain(slot, out[0])
        cdef bint ended = table.ended(slot)
        stream.served = ended
        if tokens > 1:
            self.coalesced += tokens - 1
        if ended and not stream.wrote and tokens == 0 and table.error(slot) != <StreamError>0:
            connection.buffer.clear()
            stream.wake()
            return True
        if tokens or ended:
            stream.wrote = True
            if not connection.touched:
                connection.touched = True
                self.touched.append(connection)
        if ended:
            if table.error(slot) != <StreamError>0:
                append_error(out, _ERRORS[<int>table.error(slot)], stream._detail())
            connection.end_body()
            stream.wake()
        return ended

    cdef _flush(self):
        cdef Connection connection
        for connection in self.touched:
            connection.touched = False
            connection.flush()
            self.writes += 1
            self.slowed += connection.behind
        self.touched.clear()

    cdef _retry_later(self, Stream stream):
        self.behind.append(stream)
        if self.catch_up_timer is None:
            self.catch_up_timer = self.loop.call_later(CATCH_UP_S, self._catch_up)

    def _catch_up(self):
        self.catch_up_timer = None
        waiting, self.behind = self.behind, []
        for stream in waiting:
            if (<Stream>stream).is_open:
                self.serve(<Stream>stream)
        self.table.get().rings_read()
        self._flush()

    def _check_timeouts(self):
        self.timeout_timer = None
        for slot in self.table.get().overdue():
            self.table.get().fail(slot, StreamError.kTimeout)
            if self.streams[slot] is not None:
                self.serve(self.streams[slot])
        self._flush()
        if self.running and self.table.get().open_streams():
            self.timeout_timer = self.loop.call_later(TIMEOUT_CHECK_S, self._check_timeouts)
