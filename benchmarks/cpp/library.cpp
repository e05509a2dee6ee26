#include "library.hpp"

#include <gnu/libc-version.h>

#include <string>
#include <string_view>

using rts::bench::request_stages;
using rts::bench::Stage;
using rts::bench::StageEntry;
using rts::bench::token_stages;

namespace {

const StageEntry* find(std::string_view name) {
  for (const auto& stages : {request_stages(), token_stages()}) {
    for (const StageEntry& entry : stages) {
      if (entry.name == name) return &entry;
    }
  }
  return nullptr;
}

const char* instruction_set() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "AVX-512";
  if (__builtin_cpu_supports("avx2")) return "AVX2";
  return "x86-64-v2";
#else
  return "baseline";
#endif
}

}  // namespace

Stage* rts_stage_new(const char* name) {
  const StageEntry* entry = find(name);
  return entry == nullptr ? nullptr : entry->make().release();
}

void rts_stage_free(Stage* stage) {
  delete stage;
}

std::uint64_t rts_stage_operations(const char* name) {
  const StageEntry* entry = find(name);
  return entry == nullptr ? 0 : entry->operations;
}

void rts_stage_prepare(Stage* stage) {
  stage->prepare();
}

// callgrind counts what this function calls, by its name.
__attribute__((noinline)) void rts_stage_run(Stage* stage) {
  stage->run();
}

const char* rts_stage_names() {
  static const std::string names = [] {
    std::string lines;
    for (const auto& stages : {request_stages(), token_stages()}) {
      for (const StageEntry& entry : stages) lines.append(entry.name).append("\n");
    }
    return lines;
  }();
  return names.c_str();
}

const char* rts_environment() {
  static const std::string environment = std::string(
#ifdef __clang__
                                             "clang " __clang_version__
#else
                                             "gcc " __VERSION__
#endif
                                             ", glibc ") +
                                         gnu_get_libc_version() + ", " + instruction_set();
  return environment.c_str();
}
