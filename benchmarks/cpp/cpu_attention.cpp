// What attention takes on one thread, with every instruction set of this processor, over half precision and 8 bits:
// `cpu_attention [ISA]`. The shape is a KV head of SmolLM2-135M. "Cold" goes through more caches than a processor
// holds, as a step with many sequences or layers does; "warm" keeps to one.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cpu/kernels.hpp"
#include "cpu/kv_kernels.hpp"

namespace {

using rts::cpu::AttentionShape;
using rts::cpu::kBlockPositions;
using rts::cpu::Kernels;

constexpr AttentionShape kShape{.heads = 3, .kv_heads = 1, .head_dim = 64, .scale = 0.125F, .window = 0};
constexpr std::size_t kColdBytes = std::size_t{256} << 20;
constexpr std::size_t kColumns = kShape.heads * kShape.head_dim;
constexpr double kBillion = 1e9;

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <typename Number>
std::unique_ptr<Number[], AlignedDelete> aligned(std::size_t numbers) {
  return std::unique_ptr<Number[], AlignedDelete>(
      static_cast<Number*>(::operator new(numbers * sizeof(Number), std::align_val_t{64})));
}

// Queries, and a sequence's block table.
class Context {
 public:
  explicit Context(std::size_t length)
      : length_(length),
        blocks_((length + kBlockPositions - 1) / kBlockPositions),
        scratch_(aligned<float>(rts::cpu::attention_scratch(kShape))),
        table_(blocks_),
        query_(rts::cpu::kMaxQueries * kColumns),
        out_(query_.size()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : query_) x = normal(random);
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), random);
  }

  std::size_t length() const { return length_; }
  std::size_t blocks() const { return blocks_; }

  // The last `queries` positions.
  rts::cpu::AttentionTask task(std::size_t queries) {
    return {.block_table = table_.data(),
            .kv_head = 0,
            .first_position = length_ - queries,
            .queries = queries,
            .query = query_.data(),
            .query_stride = kColumns,
            .out = out_.data(),
            .out_stride = kColumns,
            .scratch = scratch_.get()};
  }

 private:
  std::size_t length_, blocks_;
  std::unique_ptr<float[], AlignedDelete> scratch_;
  std::vector<std::int32_t> table_;
  std::vector<float> query_, out_;
};

// Many caches of a context, full.
template <typename Layer>
class Caches {
 public:
  Caches(const Kernels& kernels, const Context& context, std::size_t count)
      : bytes_(bytes_of(context)), memory_(aligned<std::byte>(count * bytes_)) {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<float> head(2 * kShape.head_dim);
    for (std::size_t cache = 0; cache < count; ++cache) {
      for (std::size_t position = 0; cache == 0 && position < context.blocks() * kBlockPositions; ++position) {
        for (float& x : head) x = normal(random);
        store_kv(kernels, kShape, of(0), static_cast<std::int64_t>(position), &head[0], &head[kShape.head_dim]);
      }
      if (cache > 0) std::memcpy(memory_.get() + cache * bytes_, memory_.get(), bytes_);
    }
  }

  Layer of(std::size_t cache) const {
    std::byte* const begin = memory_.get() + cache * bytes_;
    if constexpr (std::is_same_v<Layer, rts::cpu::KvLayerInt8>) {
      return {begin, kBlockBytes};
    } else {
      auto* const keys = reinterpret_cast<std::uint16_t*>(begin);
      return {keys, keys + kNumbers, 2 * kNumbers};
    }
  }
  // Of one.
  static std::size_t bytes_of(const Context& context) { return context.blocks() * kBlockBytes; }

  // The least that reading a cache can take.
  std::uint64_t read(std::size_t cache) const {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < bytes_; i += sizeof sum) {
      std::uint64_t word;
      std::memcpy(&word, memory_.get() + cache * bytes_ + i, sizeof word);
      sum += word;
    }
    return sum;
  }

 private:
  static constexpr std::size_t kNumbers = kBlockPositions * kShape.head_dim;
  static constexpr std::size_t kBlockBytes = std::is_same_v<Layer, rts::cpu::KvLayerInt8>
                                                 ? rts::cpu::kv_record_bytes(kShape.head_dim)
                                                 : 2 * kNumbers * sizeof(std::uint16_t);

  std::size_t bytes_;
  std::unique_ptr<std::byte[], AlignedDelete> memory_;
};

// Seconds for a cache: the least of many runs for each, as others disturb and nobody helps, and their mean.
template <typename Work>
double seconds_of(std::size_t caches, Work work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> least(caches, std::numeric_limits<double>::infinity());
  double total = 0;
  for (int run = 0; run < 10 || total < 0.5; ++run) {
    for (std::size_t cache = 0; cache < caches; ++cache) {
      const Clock::time_point start = Clock::now();
      work(cache);
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      least[cache] = std::min(least[cache], seconds);
      total += seconds;
    }
  }
  return std::accumulate(least.begin(), least.end(), 0.0) / static_cast<double>(caches);
}

template <typename Layer>
void measure(std::string_view format, std::string_view isa, Context& context, std::size_t queries, std::size_t bytes) {
  // Two products of a multiplication and an addition, over what each query sees.
  const std::size_t seen = queries * context.length() - queries * (queries - 1) / 2;
  const double operations = 4.0 * static_cast<double>(kColumns * seen);
  const auto report = [=](std::string_view name, double seconds, std::size_t read) {
    std::printf("  %-8s %-10s %8.2f us %6.1f GB/s %6.1f GFLOP/s\n", std::string(format).c_str(),
                std::string(name).c_str(), seconds * 1e6, static_cast<double>(read) / seconds / kBillion,
                operations / seconds / kBillion);
  };
  bool has_read = false;
  for (const Kernels* const kernels : rts::cpu::available_kernels()) {
    if (!isa.empty() && kernels->name != isa) continue;
    const std::size_t each = Caches<Layer>::bytes_of(context), count = std::max<std::size_t>(1, bytes / each);
    const Caches<Layer> caches(*kernels, context, count);
    if (!has_read) {
      std::uint64_t sum = 0;
      report("plain read", seconds_of(count, [&](std::size_t cache) { sum += caches.read(cache); }), each);
      if (sum == 0) std::puts("");
      has_read = true;
    }
    report(kernels->name,
           seconds_of(count,
                      [&](std::size_t cache) { attend(*kernels, kShape, caches.of(cache), context.task(queries)); }),
           each);
  }
}

void measure(std::string_view isa, std::size_t length, std::size_t queries, std::size_t bytes) {
  Context context(length);
  std::printf("%zu queries, context %zu, %s\n", queries, length, bytes == 0 ? "warm" : "cold");
  measure<rts::cpu::KvLayer>("float16", isa, context, queries, bytes);
  measure<rts::cpu::KvLayerInt8>("int8", isa, context, queries, bytes);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view isa = argc > 1 ? argv[1] : "";
  for (const std::size_t length : {64, 200, 1000, 8000}) {
    measure(isa, length, 1, 0);
    measure(isa, length, 1, kColdBytes);
  }
  for (const std::size_t length : {16, 128, 512, 2000}) measure(isa, length, rts::cpu::kMaxQueries, 0);
}
