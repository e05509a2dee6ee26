#pragma once

#include <cstddef>
#include <functional>

namespace rts::cpu {

// The threads that an OpenMP runtime of this process keeps for the calling thread, borrowed for a moment. For work
// between two parallel regions of another library: that library's threads spin for its next region meanwhile, and
// threads of one's own would have to share the processors with them. Two on two processors then gain nothing over one.
//
// The runtime is found by GOMP_parallel, with which GCC's code begins a region, and which LLVM's and Intel's runtimes
// have as well. A process without one has a team of one, the caller.
class OpenMpTeam {
 public:
  // `threads` with the caller, best as many as the other library uses: a runtime starts and ends threads where the
  // number changes. The runtime must have been loaded.
  explicit OpenMpTeam(std::size_t threads);

  std::size_t threads() const noexcept { return threads_; }

  // Calls work(0) to work(threads() - 1), or fewer where the runtime has fewer threads to give, each in a thread of its
  // own and one of them in the caller, and returns when all have returned. What `work` throws is std::terminate.
  // Blocks.
  void run(const std::function<void(std::size_t thread)>& work) const noexcept;

 private:
  using Region = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

  Region region_;
  std::size_t threads_;
};

}  // namespace rts::cpu
