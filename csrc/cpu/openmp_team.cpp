#include "cpu/openmp_team.hpp"

#include <dlfcn.h>

#include <atomic>

namespace rts::cpu {
namespace {

struct Team {
  const std::function<void(std::size_t thread)>& work;
  std::atomic<std::size_t> joined{0};
};

void join(void* data) noexcept {
  Team& team = *static_cast<Team*>(data);
  team.work(team.joined.fetch_add(1, std::memory_order_relaxed));
}

}  // namespace

OpenMpTeam::OpenMpTeam(std::size_t threads)
    : region_(threads > 1 ? reinterpret_cast<Region>(::dlsym(RTLD_DEFAULT, "GOMP_parallel")) : nullptr),
      threads_(region_ == nullptr ? 1 : threads) {}

void OpenMpTeam::run(const std::function<void(std::size_t thread)>& work) const noexcept {
  if (region_ == nullptr) return work(0);
  Team team{work};
  region_(join, &team, static_cast<unsigned>(threads_), 0);
}

}  // namespace rts::cpu
