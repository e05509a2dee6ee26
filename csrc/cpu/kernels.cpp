#include "cpu/kernels.hpp"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/instruction_sets.hpp"

namespace rts::cpu {
namespace {

#define RTS_KERNELS_OF(isa) \
  {#isa,                    \
   isa::quantize,           \
   isa::multiply,           \
   isa::store_kv,           \
   isa::attend,             \
   isa::store_kv_float,     \
   isa::attend_float,       \
   isa::store_kv_int8,      \
   isa::attend_int8,        \
   isa::rms_norm,           \
   isa::layer_norm,         \
   isa::rotate_positions,   \
   isa::add}

constexpr Kernels kPortable = RTS_KERNELS_OF(portable);
#if defined(__x86_64__)
constexpr Kernels kAvx2 = RTS_KERNELS_OF(avx2);
constexpr Kernels kAvx512 = RTS_KERNELS_OF(avx512);

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (has_avx512()) found.push_back(&kAvx512);
  if (has_avx2()) found.push_back(&kAvx2);
#endif
  found.push_back(&kPortable);
  return found;
}

}  // namespace

std::span<const Kernels* const> available_kernels() noexcept {
  static const std::vector<const Kernels*> available = find_available();
  return available;
}

const Kernels& kernels() {
  const char* const wanted = std::getenv("RTS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available_kernels().front();
  std::string names;
  for (const Kernels* const candidate : available_kernels()) {
    if (candidate->name == wanted) return *candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate->name);
  }
  throw std::invalid_argument("RTS_CPU_ISA=" + std::string(wanted) + " cannot be had here; there is " + names);
}

}  // namespace rts::cpu
