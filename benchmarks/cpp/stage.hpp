#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace rts::bench {

// A stage of the request's or the token's path, on the core's own classes. Only run() is measured; prepare() undoes
// what the last run() left behind.
class Stage {
 public:
  virtual ~Stage() = default;
  virtual void prepare() {}
  virtual void run() = 0;
};

struct StageEntry {
  const char* name;
  std::uint64_t operations;  // of one run()
  std::unique_ptr<Stage> (*make)();
};

std::span<const StageEntry> request_stages();  // submit, queue, schedule, assemble, step
std::span<const StageEntry> token_stages();    // sampling, detokenize, stop_match, publish, ring, frame

// The compiler takes the value as used, and any memory as changed.
template <class T>
void keep(const T& value) {
  asm volatile("" : : "r"(&value) : "memory");
}

}  // namespace rts::bench
