#pragma once

#include <cstdint>

#include "cpu/kernels.hpp"

// An instruction set's kernels by what the cache holds.
namespace rts::cpu {

inline void store_kv(const Kernels& kernels, const AttentionShape& shape, const KvLayer& cache, std::int64_t slot,
                     const float* key, const float* value) noexcept {
  kernels.store_kv(shape, cache, slot, key, value);
}
inline void store_kv(const Kernels& kernels, const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot,
                     const float* key, const float* value) noexcept {
  kernels.store_kv_float(shape, cache, slot, key, value);
}
inline void store_kv(const Kernels& kernels, const AttentionShape& shape, const KvLayerInt8& cache, std::int64_t slot,
                     const float* key, const float* value) noexcept {
  kernels.store_kv_int8(shape, cache, slot, key, value);
}

inline void attend(const Kernels& kernels, const AttentionShape& shape, const KvLayer& cache,
                   const AttentionTask& task) noexcept {
  kernels.attend(shape, cache, task);
}
inline void attend(const Kernels& kernels, const AttentionShape& shape, const KvLayerFloat& cache,
                   const AttentionTask& task) noexcept {
  kernels.attend_float(shape, cache, task);
}
inline void attend(const Kernels& kernels, const AttentionShape& shape, const KvLayerInt8& cache,
                   const AttentionTask& task) noexcept {
  kernels.attend_int8(shape, cache, task);
}

}  // namespace rts::cpu
