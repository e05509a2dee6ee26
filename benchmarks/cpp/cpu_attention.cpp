// What attention takes on one thread, with every instruction set of this processor: `cpu_attention [ISA]`. The shape is
// a KV head of SmolLM2-135M. "Cold" goes through more caches than a processor holds, as a step with many sequences or
// layers does; "warm" keeps to one.
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
#include <vector>

#include "cpu/kernels.hpp"
#include "rts/half.hpp"

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

class Context {
 public:
  Context(std::size_t length, std::size_t caches)
      : length_(length),
        caches_(caches),
        blocks_((length + kBlockPositions - 1) / kBlockPositions),
        numbers_(blocks_ * kBlockPositions * kShape.head_dim),
        memory_(aligned<std::uint16_t>(2 * caches_ * numbers_)),
        scratch_(aligned<float>(rts::cpu::attention_scratch(kShape))),
        table_(blocks_),
        query_(rts::cpu::kMaxQueries * kColumns),
        out_(query_.size()) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : query_) x = normal(random);
    std::vector<std::uint16_t> some(4096);
    for (std::uint16_t& x : some) x = rts::to_half(normal(random));
    for (std::size_t i = 0; i < 2 * caches_ * numbers_; ++i) memory_[i] = some[i % some.size()];
    std::iota(table_.begin(), table_.end(), 0);
    std::shuffle(table_.begin(), table_.end(), random);
  }

  std::size_t caches() const { return caches_; }

  // The last `queries` positions.
  void attend(const Kernels& kernels, std::size_t cache, std::size_t queries) {
    kernels.attend(kShape, {keys(cache), keys(cache) + numbers_, kBlockPositions * kShape.head_dim},
                   {.block_table = table_.data(),
                    .kv_head = 0,
                    .first_position = length_ - queries,
                    .queries = queries,
                    .query = query_.data(),
                    .query_stride = kColumns,
                    .out = out_.data(),
                    .out_stride = kColumns,
                    .scratch = scratch_.get()});
  }

  // The least that reading a cache can take.
  std::uint64_t read(std::size_t cache) const {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < 2 * numbers_; i += 4) {
      std::uint64_t word;
      std::memcpy(&word, keys(cache) + i, sizeof word);
      sum += word;
    }
    return sum;
  }

 private:
  std::uint16_t* keys(std::size_t cache) const { return memory_.get() + 2 * cache * numbers_; }

  std::size_t length_, caches_, blocks_, numbers_;
  std::unique_ptr<std::uint16_t[], AlignedDelete> memory_;
  std::unique_ptr<float[], AlignedDelete> scratch_;
  std::vector<std::int32_t> table_;
  std::vector<float> query_, out_;
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

void measure(std::string_view isa, std::size_t length, std::size_t queries, std::size_t caches) {
  Context context(length, caches);
  // Two products of a multiplication and an addition, over what each query sees.
  const std::size_t seen = queries * length - queries * (queries - 1) / 2;
  const double operations = 4.0 * static_cast<double>(kColumns * seen);
  const double bytes = 2.0 * static_cast<double>(length * kShape.head_dim * sizeof(std::uint16_t));
  std::printf("%zu queries, context %zu, %s\n", queries, length, caches == 1 ? "warm" : "cold");
  const auto report = [=](std::string_view name, double seconds) {
    std::printf("  %-10s %8.2f us %6.1f GB/s %6.1f GFLOP/s\n", std::string(name).c_str(), seconds * 1e6,
                bytes / seconds / kBillion, operations / seconds / kBillion);
  };
  std::uint64_t sum = 0;
  report("plain read", seconds_of(caches, [&](std::size_t cache) { sum += context.read(cache); }));
  if (sum == 0) std::puts("");
  for (const Kernels* const kernels : rts::cpu::available_kernels()) {
    if (!isa.empty() && kernels->name != isa) continue;
    report(kernels->name, seconds_of(caches, [&](std::size_t cache) { context.attend(*kernels, cache, queries); }));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view isa = argc > 1 ? argv[1] : "";
  for (const std::size_t length : {64, 200, 1000, 8000}) {
    measure(isa, length, 1, 1);
    measure(isa, length, 1, kColdBytes / (length * kShape.head_dim * 4));
  }
  for (const std::size_t length : {16, 128, 512, 2000}) measure(isa, length, rts::cpu::kMaxQueries, 1);
}
