#pragma once

#include <cstdint>

#include "stage.hpp"

#define RTS_EXPORT extern "C" __attribute__((visibility("default")))

// What Python calls. Many operations a call, so that the call itself counts for nothing.

RTS_EXPORT rts::bench::Stage* rts_stage_new(const char* name);  // nullptr: there is no such stage
RTS_EXPORT void rts_stage_free(rts::bench::Stage* stage);
RTS_EXPORT std::uint64_t rts_stage_operations(const char* name);  // of one run; 0: there is no such stage
RTS_EXPORT void rts_stage_prepare(rts::bench::Stage* stage);
RTS_EXPORT void rts_stage_run(rts::bench::Stage* stage);
// The names, one a line.
RTS_EXPORT const char* rts_stage_names();
// What instruction counts depend on besides the source: the compiler, the C library and what the processor can do.
RTS_EXPORT const char* rts_environment();

// Seconds that `items` from each of `producers` take to one consumer, this thread, or -1 where one was lost or came
// twice or out of its producer's order. The producers are threads, or processes that share only the ring's memory.
RTS_EXPORT double rts_produce_to_rings(std::uint32_t producers, std::uint64_t items, bool processes);
RTS_EXPORT double rts_produce_to_queue(std::uint32_t producers, std::uint64_t items, bool processes);
