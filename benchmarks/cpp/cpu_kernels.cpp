// The CPU engine's matrix products as a step of SmolLM2-135M has them, over weights that are all in memory of their
// own. What is printed is the milliseconds of processor time of the thread that needs most, each layer's being the
// least of some runs: so a busy machine shows as little as can be.
//
// cpu_kernels [THREADS] [RUNS] [BITS]: 4 as the model is stored, or 8
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/kernels.hpp"

namespace rts::cpu {
namespace {

constexpr std::size_t kLayers = 30;
constexpr std::size_t kHidden = 576, kIntermediate = 1536, kVocabulary = 49152;
constexpr std::size_t kMaxRows = 512;

constexpr std::size_t rounded_up(std::size_t value, std::size_t to) {
  return (value + to - 1) / to * to;
}

// Zeroed memory, in huge pages where there are any.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(rounded_up(bytes, std::size_t{2} << 20)) {
    void* const at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    madvise(at, bytes_, MADV_HUGEPAGE);
    data_ = static_cast<std::byte*>(at);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { munmap(data_, bytes_); }

  // The next bytes that nobody has, at a multiple of 64.
  template <typename Number>
  Number* take(std::size_t count) {
    std::byte* const at = data_ + used_;
    used_ += rounded_up(count * sizeof(Number), 64);
    if (used_ > bytes_) throw std::bad_alloc();
    return reinterpret_cast<Number*>(at);
  }
  const std::byte* data() const { return data_; }
  std::size_t used() const { return used_; }

 private:
  std::size_t bytes_;
  std::size_t used_ = 0;
  std::byte* data_;
};

QuantizedRows rows_in(Memory& memory, std::size_t inputs) {
  QuantizedRows rows;
  rows.inputs = rounded_up(inputs, kGroup);
  rows.values = memory.take<std::int8_t>(kMaxRows * rows.inputs);
  rows.scales = memory.take<float>(kMaxRows * rows.groups());
  rows.corrections = memory.take<std::int32_t>(kMaxRows * rows.groups());
  rows.sums = memory.take<float>(kMaxRows * rows.groups());
  return rows;
}

struct Model {
  struct Layer {
    PackedMatrix attention, output, up, down;
  };

  explicit Model(std::size_t layer_bits) : weights(std::size_t{160} << 20), activations(std::size_t{64} << 20) {
    std::mt19937_64 random(1);
    const auto matrix = [&](std::size_t outputs, std::size_t inputs, std::size_t bits) {
      PackedMatrix made;
      made.shape = {.outputs = outputs, .inputs = inputs, .has_minimums = bits == 4, .value_bits = bits};
      auto* const bytes = weights.take<std::byte>(made.shape.bytes());
      for (std::size_t at = 0; at + 8 <= made.shape.bytes(); at += 8) {
        // As half precision, each is finite.
        const std::uint64_t number = random() & 0x3FFF3FFF3FFF3FFF;
        std::memcpy(bytes + at, &number, sizeof number);
      }
      made.bytes = bytes;
      made.multiplier = 0x1p-20F;
      return made;
    };
    for (Layer& layer : layers) {
      layer.attention = matrix(960, kHidden, layer_bits);
      layer.output = matrix(kHidden, kHidden, layer_bits);
      layer.up = matrix(2 * kIntermediate, kHidden, layer_bits);
      layer.down = matrix(kHidden, kIntermediate, layer_bits);
    }
    layer_bytes = weights.used();
    head = matrix(kVocabulary, kHidden, 8);
    hidden = rows_in(activations, kHidden);
    intermediate = rows_in(activations, kIntermediate);
    wide = activations.take<float>(kMaxRows * kIntermediate);
    residual = activations.take<float>(kMaxRows * kHidden);
    logits = std::make_unique<float[]>(32 * kVocabulary);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < kMaxRows * kIntermediate; ++i) wide[i] = normal(random);
  }

  Memory weights, activations;
  Layer layers[kLayers];
  PackedMatrix head;
  std::size_t layer_bytes = 0;
  QuantizedRows hidden, intermediate;
  float* wide;
  float* residual;
  std::unique_ptr<float[]> logits;
};

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Runs work(thread, part) for each part, in that order. A thread's seconds are the sum of its parts', each the least of
// `runs`; returned are those of the thread that needs most.
template <typename Work>
double seconds_of(std::size_t threads, int runs, std::size_t parts, const Work& work) {
  std::vector<std::vector<double>> least(threads, std::vector<double>(parts, std::numeric_limits<double>::infinity()));
  for (int run = 0; run < runs; ++run) {
    std::atomic<std::size_t> ready{0};
    const auto body = [&](std::size_t thread) {
      ready.fetch_add(1);
      while (ready.load() < threads) std::this_thread::yield();
      for (std::size_t part = 0; part < parts; ++part) {
        const double begin = thread_seconds();
        work(thread, part);
        least[thread][part] = std::min(least[thread][part], thread_seconds() - begin);
      }
    };
    std::vector<std::thread> others;
    for (std::size_t thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
    body(0);
    for (std::thread& other : others) other.join();
  }
  double most = 0;
  for (const std::vector<double>& of_thread : least) {
    most = std::max(most, std::accumulate(of_thread.begin(), of_thread.end(), 0.0));
  }
  return most;
}

std::uint64_t sum_of(const std::byte* from, std::size_t bytes) {
  std::uint64_t sums[16] = {};
  for (std::size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums) {
    std::uint64_t numbers[16];
    std::memcpy(numbers, from + at, sizeof numbers);
    for (std::size_t i = 0; i < 16; ++i) sums[i] ^= numbers[i];
  }
  std::uint64_t all = 0;
  for (const std::uint64_t sum : sums) all ^= sum;
  return all;
}

void measure(const Kernels& kernels, const Model& model, std::size_t threads, int runs) {
  const auto multiply = [&](const PackedMatrix& matrix, const QuantizedRows& input, std::size_t thread,
                            std::size_t rows, Epilogue epilogue, float* out, std::size_t stride) {
    const std::size_t panels = matrix.shape.panels();
    kernels.multiply(matrix, {panels * thread / threads, panels * (thread + 1) / threads}, input, rows, epilogue, out,
                     stride);
  };
  constexpr double kMegabyte = 1e6;
  std::printf("%s, threads %zu\n", std::string(kernels.name).c_str(), threads);
  std::printf("%5s %10s %10s %10s %12s %10s %10s\n", "rows", "layers ms", "GMAC/s", "GB/s", "head ms", "GB/s",
              "quantize");
  for (const std::size_t rows : {1, 2, 4, 8, 16, 32, 64, 512}) {
    const double quantizing = seconds_of(threads, runs, kLayers, [&](std::size_t thread, std::size_t) {
      const std::size_t first = rows * thread / threads, count = rows * (thread + 1) / threads - first;
      for (int i = 0; i < 3; ++i) {
        kernels.quantize(model.wide + first * kHidden, kHidden, kHidden, count, model.hidden, first);
      }
      kernels.quantize(model.wide + first * kIntermediate, kIntermediate, kIntermediate, count, model.intermediate,
                       first);
    });
    kernels.quantize(model.wide, kHidden, kHidden, rows, model.hidden, 0);
    kernels.quantize(model.wide, kIntermediate, kIntermediate, rows, model.intermediate, 0);
    std::vector<float> out(kMaxRows * kIntermediate);
    const double layers = seconds_of(threads, runs, kLayers, [&](std::size_t thread, std::size_t i) {
      const Model::Layer& layer = model.layers[i];
      multiply(layer.attention, model.hidden, thread, rows, Epilogue::kStore, out.data(), 960);
      multiply(layer.output, model.hidden, thread, rows, Epilogue::kAdd, model.residual, kHidden);
      multiply(layer.up, model.hidden, thread, rows, Epilogue::kSiluGate, out.data(), kIntermediate);
      multiply(layer.down, model.intermediate, thread, rows, Epilogue::kAdd, model.residual, kHidden);
    });
    const std::size_t head_rows = rows == kMaxRows ? 1 : std::min<std::size_t>(rows, 32);
    const double head = seconds_of(threads, runs, 1, [&](std::size_t thread, std::size_t) {
      multiply(model.head, model.hidden, thread, head_rows, Epilogue::kStore, model.logits.get(), kVocabulary);
    });
    std::size_t products = 0;
    for (const Model::Layer& layer : model.layers) {
      for (const PackedMatrix* matrix : {&layer.attention, &layer.output, &layer.up, &layer.down}) {
        products += matrix->shape.outputs * matrix->shape.inputs;
      }
    }
    std::printf("%5zu %10.2f %10.1f %10.2f %12.2f %10.2f %10.2f\n", rows, layers * 1e3,
                static_cast<double>(products * rows) / layers / 1e9,
                static_cast<double>(model.layer_bytes) / layers / 1e3 / kMegabyte, head * 1e3,
                static_cast<double>(model.head.shape.bytes()) / head / 1e3 / kMegabyte, quantizing * 1e3);
  }
  std::atomic<std::uint64_t> sink{0};
  const double reading = seconds_of(threads, runs, kLayers, [&](std::size_t thread, std::size_t layer) {
    const std::size_t bytes = model.layer_bytes / kLayers / threads / 64 * 64;
    sink ^= sum_of(model.weights.data() + (layer * threads + thread) * bytes, bytes);
  });
  std::printf("reading the layers' weights: %.2f ms, %.2f GB/s (%llu)\n", reading * 1e3,
              static_cast<double>(model.layer_bytes) / reading / 1e3 / kMegabyte,
              static_cast<unsigned long long>(sink & 1));
}

}  // namespace
}  // namespace rts::cpu

int main(int argc, char** argv) {
  const std::size_t threads = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1;
  const int runs = argc > 2 ? std::atoi(argv[2]) : 20;
  const rts::cpu::Model model(argc > 3 ? std::strtoul(argv[3], nullptr, 10) : 4);
  rts::cpu::measure(rts::cpu::kernels(), model, threads, runs);
  return 0;
}
