#pragma once

#include <atomic>

namespace rts {

// Where what is shared without locks takes its atomics from. A template parameter, so that tests run the very same code
// under a deterministic scheduler, or in a process that dies at a chosen operation.
struct StdAtomics {
  template <class T>
  using atomic = std::atomic<T>;
};

}  // namespace rts
