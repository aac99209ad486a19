// Products of a feed-forward's neurons that lie one after another, each with all its weights in one row: [gate |] up | down.
#pragma once

#include <cstdint>

namespace mw {

enum class NeuronForm : int { float32, float16, bfloat16, count };

struct NeuronTask {
  NeuronForm form;
  bool gated;                // rows begin with the weights whose product is activated, and multiply it with that of `up`
  const std::uint8_t* rows;  // [num_rows, row_bytes]
  std::int64_t num_rows, row_bytes, width;
  const float* biases;  // [num_rows, 1 or 2], of what comes before `down`; null: none
  float threshold;      // activations up to it are zero
  const float* x;       // [num_tokens, width]
  std::int64_t num_tokens;
  float* active;  // [num_tokens, num_rows]: what each neuron multiplies its last weights with
  float* out;     // [num_tokens, width]: added to
};

inline std::int64_t neuron_number_bytes(NeuronForm form) { return form == NeuronForm::float32 ? 4 : 2; }

struct NeuronKernels {
  void (*activate)(const NeuronTask&, std::int64_t row_begin, std::int64_t row_end);
  void (*add)(const NeuronTask&, std::int64_t column_begin, std::int64_t column_end);
};

// The sum over rows goes in their order whatever the threads: the same rows give the same bits.
void neurons(const NeuronTask& task);

}  // namespace mw
