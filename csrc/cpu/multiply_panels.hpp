#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "cpu/four_bits.hpp"
#include "cpu/kernels.hpp"
#include "cpu/vector_exp.hpp"
#include "rts/cache_line.hpp"

namespace rts::cpu {

inline constexpr std::size_t kPrefetchBytes = 4 * kCacheLine;

// The part of a product that is computed in registers: some rows of `input`, one panel or two neighbours, and the
// groups of a chunk.
struct Tile {
  const std::byte* weights;  // of the first panel's first group, in 8 bits
  std::size_t group_bytes;   // from one group to the next
  std::size_t panel_bytes;   // from one panel to the next
  const QuantizedRows* input;
  std::size_t first_row;
  std::size_t first_group;
  std::size_t groups;  // of the chunk
  // The chunk's, as floats: [groups][panels × kPanelOutputs].
  const float* scales;
  const float* minimums;
  // To be prefetched: so many times kPrefetchBytes with each group.
  const std::byte* next;
  std::size_t prefetches;
};

// To be called once a group, where it is expanded and in each tile.
static inline void prefetch_next(const Tile& tile, const std::byte*& next) noexcept {
  for (std::size_t i = 0; i < tile.prefetches; ++i, next += kPrefetchBytes) {
#pragma GCC unroll 4
    for (std::size_t at = 0; at < kPrefetchBytes; at += kCacheLine) __builtin_prefetch(next + at, 0, 2);
  }
}

// Adds to [rows][panels × kPanelOutputs] floats at a multiple of 64 bytes what is summed in PackedMatrix.
using MultiplyTile = void (*)(const Tile& tile, float* sums) noexcept;

// An instruction set's tiles: [n - 1] is for n rows.
using TileRows = std::span<const MultiplyTile>;
struct TileTable {
  TileRows one_panel;
  TileRows two_panels;  // none: panels are taken one by one
};

// x / (1 + e^-t)
template <typename Vector>
inline Vector sigmoid_product(Vector x, Vector t) {
  const Vector zero, one = Vector::broadcast(1.0F);
  const Vector power = exp_or_zero(select_less(t, zero, t, zero - t));
  return x * select_less(t, zero, power, one) / (one + power);
}

template <typename Vector>
inline Vector silu(Vector x) {
  return sigmoid_product(x, x);
}

// (1 + tanh z) / 2 is 1 / (1 + e^-2z), with z = sqrt(2 / π) (x + 0.044715 x³).
template <typename Vector>
inline Vector gelu(Vector x) {
  constexpr float kLinear = 1.5957691216F, kCubic = 0.0713548163F;  // of 2z
  return sigmoid_product(x, x * multiply_add(x * x, Vector::broadcast(kCubic), Vector::broadcast(kLinear)));
}

// What follows a panel's sums.
template <typename Vector>
class PanelOutputs {
 public:
  PanelOutputs(const PackedMatrix& matrix, std::size_t panel, Epilogue epilogue)
      : epilogue_(epilogue), multiplier_(Vector::broadcast(matrix.multiplier)), panel_(panel) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      const std::size_t output = panel * kPanelOutputs + v * kLanes;
      present_[v] = std::min(kLanes, matrix.shape.outputs - std::min(output, matrix.shape.outputs));
      if (matrix.bias != nullptr) bias_[v] = Vector::load_first(matrix.bias + output, present_[v]);
    }
  }

  void write_row(const float* sums, float* row) const {
    const Vector first = multiply_add(Vector::load(sums), multiplier_, bias_[0]);
    const Vector second = multiply_add(Vector::load(sums + kLanes), multiplier_, bias_[1]);
    float* const to = row + panel_ * kPanelOutputs;
    float* const gated = row + panel_ * kLanes;
    switch (epilogue_) {
      case Epilogue::kStore:
        first.store_first(to, present_[0]);
        second.store_first(to + kLanes, present_[1]);
        break;
      case Epilogue::kAdd:
        (Vector::load_first(to, present_[0]) + first).store_first(to, present_[0]);
        (Vector::load_first(to + kLanes, present_[1]) + second).store_first(to + kLanes, present_[1]);
        break;
      case Epilogue::kGelu:
        gelu(first).store_first(to, present_[0]);
        gelu(second).store_first(to + kLanes, present_[1]);
        break;
      case Epilogue::kSiluGate:
        (silu(first) * second).store_first(gated, present_[1]);
        break;
      case Epilogue::kGeluGate:
        (gelu(first) * second).store_first(gated, present_[1]);
        break;
    }
  }

 private:
  static constexpr std::size_t kVectors = kPanelOutputs / kLanes;

  Epilogue epilogue_;
  Vector multiplier_;
  Vector bias_[kVectors];
  std::size_t panel_;
  std::size_t present_[kVectors];
};

// The order of the tiles:
//   blocks of rows whose activations stay in the second-level cache,
//   one or two panels, so that weights come from memory once a block,
//   strips of rows, whose sums are kept on the stack,
//   chunks of groups, whose weights stay in the first-level cache for all of a strip's tiles.
// 4-bit weights are expanded chunk by chunk for the first strip, and kept for others where there is room. Meanwhile the
// next panels are prefetched, a part with each tile.
template <typename Vector>
class PanelMultiplier {
 public:
  PanelMultiplier(const TileTable& tiles, const PackedMatrix& matrix, const QuantizedRows& input, Epilogue epilogue,
                  float* out, std::size_t stride)
      : tiles_(tiles), matrix_(matrix), input_(input), epilogue_(epilogue), out_(out), stride_(stride) {}

  void multiply(const PanelRange& range, std::size_t rows) const noexcept {
    const std::size_t widest = tiles_.two_panels.empty() ? 1 : kMaxPanels;
    const std::size_t block_rows = std::max<std::size_t>(1, kBlockBytes / input_.inputs);
    for (std::size_t row = 0; row < rows; row += block_rows) {
      const std::size_t end = std::min(rows, row + block_rows);
      for (std::size_t panel = range.begin; panel < range.end; panel += widest) {
        const std::size_t panels = std::min(widest, range.end - panel), left = range.end - panel - panels;
        const std::byte* const behind = panel_at(panel + panels);
        const std::span<const std::byte> next =
            left > 0 ? std::span(behind, left * matrix_.shape.panel_bytes()) : range.next;
        multiply_rows(panel, panels, next.first(std::min(next.size(), widest * matrix_.shape.panel_bytes())), row, end);
      }
    }
  }

 private:
  static constexpr std::size_t kBlockBytes = 512 << 10;  // of values; scales and sums are a third more
  static constexpr std::size_t kStripRows = 48;          // 12 KB of sums
  static constexpr std::size_t kChunkGroups = 9;         // 20 KB of weights
  static constexpr std::size_t kMaxPanels = 2;
  static constexpr std::size_t kHalfBytes = kPanelOutputs * sizeof(std::uint16_t);
  static constexpr std::size_t kExpandedBytes = MatrixShape().value_bytes();  // of a panel's group
  static constexpr std::size_t kMostExpanded = 64;  // groups of a panel: 128 KB of the second-level cache for two

  static std::size_t parts_of(std::size_t whole, std::size_t most) { return (whole + most - 1) / most; }
  const std::byte* panel_at(std::size_t panel) const { return matrix_.bytes + panel * matrix_.shape.panel_bytes(); }

  // Once for all tiles of a strip: of a tile's arithmetic it would be a tenth.
  void convert_halves(const std::byte* chunk, std::size_t groups, std::size_t panels, std::size_t offset,
                      float* out) const noexcept {
    for (std::size_t group = 0; group < groups; ++group) {
      for (std::size_t panel = 0; panel < panels; ++panel) {
        const std::byte* const from =
            chunk + panel * matrix_.shape.panel_bytes() + group * matrix_.shape.group_bytes() + offset;
        for (std::size_t i = 0; i < kPanelOutputs; i += kLanes, out += kLanes) {
          Vector::load(reinterpret_cast<const std::uint16_t*>(from) + i).store(out);
        }
      }
    }
  }

  // A chunk of `panels`, each kMostExpanded groups apart in `out`.
  void expand(Tile& tile, const std::byte* chunk, std::size_t panels, std::byte* out) const noexcept {
    for (std::size_t panel = 0; panel < panels; ++panel) {
      for (std::size_t group = 0; group < tile.groups; ++group) {
        prefetch_next(tile, tile.next);
        expand_four_bits(chunk + panel * matrix_.shape.panel_bytes() + group * matrix_.shape.group_bytes(),
                         out + (panel * kMostExpanded + group) * kExpandedBytes);
      }
    }
  }

  // While `panels` are multiplied, `next` is prefetched.
  void multiply_rows(std::size_t panel, std::size_t panels, std::span<const std::byte> next, std::size_t first_row,
                     std::size_t last_row) const noexcept {
    const TileRows tiles = panels == 1 ? tiles_.one_panel : tiles_.two_panels;
    const bool expands = matrix_.shape.value_bits == 4;
    const std::size_t strips = parts_of(last_row - first_row, kStripRows);
    const bool keeps = strips > 1 && input_.groups() <= kMostExpanded;  // what is expanded
    const std::size_t steps = (parts_of(last_row - first_row, tiles.size()) + (expands ? panels : 0)) * input_.groups();
    alignas(kCacheLine) std::byte expanded[kMaxPanels * kMostExpanded * kExpandedBytes];
    alignas(kCacheLine) float scales[kChunkGroups * kMaxPanels * kPanelOutputs];
    alignas(kCacheLine) float minimums[kChunkGroups * kMaxPanels * kPanelOutputs];
    const std::size_t prefetches = parts_of(next.size(), kPrefetchBytes);
    Tile tile{.weights = nullptr,
              .group_bytes = expands ? kExpandedBytes : matrix_.shape.group_bytes(),
              .panel_bytes = expands ? kMostExpanded * kExpandedBytes : matrix_.shape.panel_bytes(),
              .input = &input_,
              .first_row = first_row,
              .first_group = 0,
              .groups = 0,
              .scales = scales,
              .minimums = minimums,
              .next = next.data(),
              .prefetches = parts_of(prefetches, steps)};
    for (std::size_t strip = 0, row = first_row; strip < strips; ++strip) {
      // As equal as can be, as are the tiles of a strip: those of few rows are slow.
      const std::size_t strip_rows = parts_of(last_row - row, strips - strip);
      alignas(kCacheLine) float sums[kStripRows * kMaxPanels * kPanelOutputs];
      const std::size_t outputs = panels * kPanelOutputs;
      std::memset(sums, 0, strip_rows * outputs * sizeof(float));
      for (tile.first_group = 0; tile.first_group < input_.groups(); tile.first_group += tile.groups) {
        tile.groups = std::min(kChunkGroups, input_.groups() - tile.first_group);
        const std::byte* const chunk = panel_at(panel) + tile.first_group * matrix_.shape.group_bytes();
        const std::size_t value_bytes = matrix_.shape.value_bytes();
        convert_halves(chunk, tile.groups, panels, value_bytes, scales);
        if (matrix_.shape.has_minimums) convert_halves(chunk, tile.groups, panels, value_bytes + kHalfBytes, minimums);
        if (expands) {
          std::byte* const own = expanded + (keeps ? tile.first_group * kExpandedBytes : 0);
          if (!keeps || strip == 0) expand(tile, chunk, panels, own);
          tile.weights = own;
        } else {
          tile.weights = chunk;
        }
        for (std::size_t done = 0, left = parts_of(strip_rows, tiles.size()); left > 0; --left) {
          const std::size_t tile_rows = parts_of(strip_rows - done, left);
          tile.first_row = row + done;
          tiles[tile_rows - 1](tile, sums + done * outputs);
          tile.next += tile.groups * tile.prefetches * kPrefetchBytes;
          if (tile.next >= next.data() + next.size()) tile.prefetches = 0;
          done += tile_rows;
        }
      }
      for (std::size_t i = 0; i < panels; ++i) {
        const PanelOutputs<Vector> to(matrix_, panel + i, epilogue_);
        for (std::size_t done = 0; done < strip_rows; ++done) {
          to.write_row(sums + done * outputs + i * kPanelOutputs, out_ + (row + done) * stride_);
        }
      }
      row += strip_rows;
    }
  }

  TileTable tiles_;
  const PackedMatrix& matrix_;
  const QuantizedRows& input_;
  Epilogue epilogue_;
  float* out_;
  std::size_t stride_;
};

}  // namespace rts::cpu
