#pragma once

#include "cpu/kernels.hpp"

// The kernels of each instruction set, a folder each. The folders of x86-64 are compiled with that set's flags, so
// nothing in them but these functions may be called or inlined elsewhere.
#define RTS_DECLARE_KERNELS(isa)                                                                                    \
  namespace rts::cpu::isa {                                                                                         \
  void quantize(const float* values, std::size_t columns, std::size_t stride, std::size_t rows,                     \
                const QuantizedRows& out, std::size_t first_row) noexcept;                                          \
  void multiply(const PackedMatrix& matrix, const PanelRange& panels, const QuantizedRows& input, std::size_t rows, \
                Epilogue epilogue, float* out, std::size_t stride) noexcept;                                        \
  void store_kv(const AttentionShape& shape, const KvLayer& cache, std::int64_t slot, const float* key,             \
                const float* value) noexcept;                                                                       \
  void attend(const AttentionShape& shape, const KvLayer& cache, const AttentionTask& task) noexcept;               \
  void store_kv_float(const AttentionShape& shape, const KvLayerFloat& cache, std::int64_t slot, const float* key,  \
                      const float* value) noexcept;                                                                 \
  void attend_float(const AttentionShape& shape, const KvLayerFloat& cache, const AttentionTask& task) noexcept;    \
  void store_kv_int8(const AttentionShape& shape, const KvLayerInt8& cache, std::int64_t slot, const float* key,    \
                     const float* value) noexcept;                                                                  \
  void attend_int8(const AttentionShape& shape, const KvLayerInt8& cache, const AttentionTask& task) noexcept;      \
  void rms_norm(const float* x, const float* weight, std::size_t size, float epsilon, float* out) noexcept;         \
  void layer_norm(const float* x, const float* weight, const float* bias, std::size_t size, float epsilon,          \
                  float* out) noexcept;                                                                             \
  void rotate_positions(float* x, std::size_t size, const float* cosines, const float* sines) noexcept;             \
  void add(float* x, const float* y, std::size_t size) noexcept;                                                    \
  }

RTS_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
RTS_DECLARE_KERNELS(avx2)    // AVX2, FMA, F16C
RTS_DECLARE_KERNELS(avx512)  // AVX-512 F, BW, DQ, VL and VNNI
#endif
