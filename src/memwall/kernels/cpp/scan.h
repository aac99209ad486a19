// The parts of a selective state space layer (Mamba) between its two products: causal depthwise convolution, the scan over tokens,
// the gated norm, a fast Hadamard transform and rounding to 8-bit integers with scales that are known beforehand.
//
// Numbers are float, or 8-bit integers that stand for integer * scale. Arithmetic is float throughout.
#pragma once

#include <cstdint>

namespace mw {

constexpr int kMaxTaps = 8;      // of the convolution
constexpr int kMaxState = 1024;  // numbers of state per channel
constexpr int kMaxMix = 32;      // size of the small matrix of a Hadamard transform

// out[t] = silu(bias + sum over j of weight[j] * x[t - taps + 1 + j]); the inputs before the first token are in `state`.
struct ConvTask {
  const void* x = nullptr;  // [tokens, channels] with `stride` numbers between tokens; float, or int8 where there are scales
  std::int64_t stride = 0;
  void* state = nullptr;    // [taps - 1, channels] like x, oldest first; afterwards the newest inputs
  const float* weight = nullptr;  // [channels, taps]
  const float* bias = nullptr;    // [channels] or null
  const float* in_scale = nullptr;     // [channels] of int8 inputs, else null
  const float* out_inverse = nullptr;  // [channels] one over the scale of int8 outputs, else null
  void* out = nullptr;                 // [tokens, channels]
  std::int64_t tokens = 0, channels = 0;
  int taps = 0;
};

// h = exp(d * A) h + d x B and y = C h + D x for every channel of every head, with d = softplus(dt + bias) kept in bounds.
struct ScanTask {
  std::int64_t tokens = 0, heads = 0, head_size = 0, state_size = 0, groups = 0;
  const void *x = nullptr, *b = nullptr, *c = nullptr;  // [tokens, heads * head_size] and [tokens, groups * state_size]
  std::int64_t x_stride = 0, bc_stride = 0;
  const void* dt = nullptr;  // [tokens, heads]
  std::int64_t dt_stride = 0;
  const float* dt_bias = nullptr;  // [heads]
  const float* decay = nullptr;    // A, negative: [heads], or [heads, state_size] where `vector_decay`
  const float* skip = nullptr;     // D [heads]
  float dt_low = 0.0f, dt_high = 0.0f;
  bool vector_decay = false;
  void* state = nullptr;   // [heads, head_size, state_size], float or int8
  float* y = nullptr;      // [tokens, heads * head_size]
  float* peak = nullptr;   // [heads * head_size, state_size]: largest |h| so far, or null
  float* scratch = nullptr;  // per thread head_size * padded state_size
  // of int8 inputs; else null
  const std::int32_t* range = nullptr;  // [heads * head_size]: the row of the tables that a channel belongs to
  const float *x_scale = nullptr, *b_scale = nullptr, *c_scale = nullptr;  // [rows], [groups], [groups]
  float dt_scale = 1.0f;
  const float* state_scale = nullptr;  // [rows, state_size]; null where the state is float

  std::int64_t padded_state() const { return (state_size + 15) / 16 * 16; }
  std::int64_t scratch_size() const { return head_size * padded_state(); }
};

// out = y * silu(z), then, where there is a weight, out / sqrt(mean(out^2) + eps) * weight, the mean over each of `groups` parts.
struct GateTask {
  const float* y = nullptr;  // [tokens, width]
  const void* z = nullptr;   // the same with `stride`; int8 where z_scale is not zero
  std::int64_t stride = 0;
  float z_scale = 0.0f, eps = 0.0f;
  const float* weight = nullptr;
  float* out = nullptr;
  std::int64_t tokens = 0, width = 0, groups = 1;
};

struct ScanKernels {
  void (*conv)(const ConvTask&, std::int64_t begin, std::int64_t end);  // channels [begin, end)
  void (*scan)(const ScanTask&, std::int64_t begin, std::int64_t end, float* scratch);  // heads [begin, end)
  void (*gate)(const GateTask&, std::int64_t begin, std::int64_t end);  // tokens
  // rows of mix * (power of two) numbers, in place; signs [mix, mix], row-major, of the small matrix (unused where mix is 1)
  void (*hadamard)(float* x, std::int64_t rows, std::int64_t width, int mix, const std::int8_t* signs);
  void (*round_static)(const float* x, std::int64_t count, float inverse, std::int8_t* out);
};

void conv_silu(const ConvTask& task);
void selective_scan(const ScanTask& task);
void gated_norm(const GateTask& task);
void hadamard(float* x, std::int64_t rows, std::int64_t width, int mix, const std::int8_t* signs);
void round_static(const float* x, std::int64_t count, float inverse, std::int8_t* out);

}  // namespace mw
