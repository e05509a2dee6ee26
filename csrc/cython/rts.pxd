# cython: language_level=3
"""What the event-loop side uses of the core, as its headers in csrc/include/rts declare it."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.memory cimport shared_ptr
from libcpp.optional cimport optional
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "<string_view>" namespace "std" nogil:
    cdef cppclass string_view:
        string_view()
        string_view(const char*, size_t)
        const char* data()
        size_t size()

cdef extern from "<span>" namespace "std" nogil:
    cdef cppclass uint32_span "std::span<const std::uint32_t>":
        size_t size()
        const uint32_t& operator[](size_t)

cdef extern from "rts/request.hpp" namespace "rts" nogil:
    cdef enum class Priority(uint8_t):
        pass
    cdef enum class FinishReason(uint8_t):
        pass
    cdef enum class PayloadKind(uint8_t):
        pass
    cdef enum class StreamError(uint8_t):
        kTimeout
    cdef enum SamplingFlag "rts::SamplingParams::Flag":
        kIgnoreEos "rts::SamplingParams::kIgnoreEos"
        kLogprobs "rts::SamplingParams::kLogprobs"
    cdef cppclass TokenBias:
        int32_t token
        float bias
    const uint32_t kMaxTopLogprobs
    cdef cppclass SamplingParams:
        float temperature
        float top_p
        float min_p
        int32_t top_k
        float repetition_penalty
        float presence_penalty
        float frequency_penalty
        int32_t max_tokens
        int32_t min_tokens
        uint32_t flags
        uint32_t top_logprobs
        uint64_t seed
    cdef cppclass EndExtension:
        uint32_t prompt_tokens
        uint32_t cached_tokens
        int64_t queue_ns
        int64_t prefill_ns
        int64_t decode_ns
        int64_t stalled_ns

cdef extern from "rts/top_logprobs.hpp" namespace "rts" nogil:
    cdef cppclass CoreTopLogprob "rts::TopLogprob":
        int32_t token
        float logprob
    cdef cppclass TopLogprobView:
        string_view text
        int32_t token_id
        float logprob
    cdef cppclass TopLogprobReader:
        TopLogprobReader()
        TopLogprobReader(string_view)
        optional[TopLogprobView] next()
    void append_top_logprob(string&, CoreTopLogprob, string_view)

cdef extern from "rts/clock.hpp" namespace "rts" nogil:
    cdef cppclass Clock:
        int64_t now_ns()
    cdef cppclass SteadyClock(Clock):
        SteadyClock()

cdef extern from "rts/channel.hpp" namespace "rts" nogil:
    cdef cppclass Bell "rts::Doorbell":
        void consume()
    cdef cppclass Channel:
        int front_bell_fd()
        Bell front_bell()
        cbool any_ready()

cdef extern from "rts/sse_writer.hpp" namespace "rts" nogil:
    cdef cppclass FrameBuffer:
        FrameBuffer()
        const char* data()
        size_t size()
        void clear()
        void append(string_view)
        void begin_chunk()
        void end_chunk()
        void last_chunk()

    void append_error_event(FrameBuffer&, string_view, string_view, string_view, optional[string_view])

cdef extern from "rts/token_ring.hpp" namespace "rts" nogil:
    const uint32_t kMaxPushedTextBytes

cdef extern from "rts/histogram.hpp" namespace "rts" nogil:
    cdef cppclass TokenGaps "rts::Histogram<27>":
        uint64_t count(size_t)
        uint64_t sum()

cdef extern from "rts/stream_table.hpp" namespace "rts" nogil:
    cdef enum class StreamFormat(uint8_t):
        kTokens
        kEvents
        kJson
        kWhole
    cdef cppclass StreamSpec:
        string request_id
        string model
        string version
        vector[int32_t] prompt
        vector[string] stops
        vector[TokenBias] logit_bias
        vector[int32_t] stop_token_ids
        SamplingParams sampling
        Priority priority
        PayloadKind payload_kind
        PayloadKind answer_kind
        string payload
    cdef cppclass TokenView:
        string_view text
        string_view top_logprobs
        int32_t token_id
        uint32_t index
        float logprob
        cbool special
    cdef cppclass StreamTable:
        StreamTable(shared_ptr[Channel], const Clock&) except +
        optional[uint32_t] submit(StreamSpec, int64_t) except +
        optional[uint32_t] open(int64_t)
        cbool push(uint32_t, string_view, int32_t, float, cbool, string_view)
        cbool push_end(uint32_t)
        uint32_span collect()
        cbool arm()
        void disarm()
        void rings_read()
        uint32_t drain(uint32_t, FrameBuffer&)
        optional[TokenView] next(uint32_t)
        void finish_json(uint32_t, FrameBuffer&)
        string_view whole(uint32_t)
        PayloadKind whole_kind(uint32_t)
        uint32_t buffered(uint32_t)
        StreamFormat format(uint32_t)
        void set_format(uint32_t, StreamFormat)
        void close(uint32_t)
        void fail(uint32_t, StreamError)
        vector[uint32_t] fail_all()
        vector[uint32_t] overdue()
        cbool ended(uint32_t)
        StreamError error(uint32_t)
        string_view error_detail(uint32_t)
        FinishReason finish(uint32_t)
        uint32_t generated(uint32_t)
        const EndExtension& end(uint32_t)
        int64_t last_progress_ns(uint32_t)
        int64_t longest_wait_ns()
        int64_t longest_timeout_ns()
        const TokenGaps& token_gaps_us()
        uint32_t open_streams()
