// One stage, run a number of times, for tools that watch a process: `stages NAME RUNS`. Without arguments, the names.
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "library.hpp"

int main(int argc, char** argv) {
  if (argc == 1) {
    std::fputs(rts_stage_names(), stdout);
    return 0;
  }
  const std::unique_ptr<rts::bench::Stage> stage(rts_stage_new(argv[1]));
  const long runs = argc == 3 ? std::strtol(argv[2], nullptr, 10) : 0;
  if (stage == nullptr || runs < 1) {
    std::fprintf(stderr, "usage: stages NAME RUNS, with a NAME of:\n%s", rts_stage_names());
    return 2;
  }
  for (long run = 0; run < runs; ++run) {
    rts_stage_prepare(stage.get());
    rts_stage_run(stage.get());
  }
  std::printf("%s\n%llu\n", rts_environment(), static_cast<unsigned long long>(rts_stage_operations(argv[1])));
}
