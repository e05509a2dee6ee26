#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "rts/batch_assembler.hpp"

namespace rts {

// What a step's assembled batch measures.
struct StepShape {
  std::uint32_t tokens = 0;
  std::uint32_t sequences = 0;
  std::uint32_t samples = 0;
};

// One step, as a model in C++ gets it. All of it is valid until step() returns.
struct NativeStep {
  StepShape shape;
  const StepBuffers& batch;         // to be read only
  std::span<std::int32_t> sampled;  // [samples] out: the token for each of logits_at; -1: its logits were not finite
  std::span<float> logprobs;        // [samples] out: its log-probability before temperature
  const std::function<void(std::span<const float>)>& sample;  // fills both from logits, [samples × vocabulary]
};

// A batched token model whose steps EngineCore::run() runs without Python. It is called by the worker's thread only.
class NativeModel {
 public:
  virtual ~NativeModel() = default;
  // Runs the model over the batch and fills what is sampled, by step.sample or by itself. What it throws ends the
  // step's sequences with kModelFailed, and no others. The step is the longest that EngineCore::interrupt() waits for.
  virtual void step(const NativeStep& step) = 0;
};

// What a model threw.
struct ModelFailure {
  std::uint32_t sequences = 0;  // of the step; they have ended
  std::string message;
};

}  // namespace rts
