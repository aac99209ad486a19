// Operations between the products: normalization, rotary position embedding, gated activation. All float32.
#pragma once

#include <cstdint>

namespace mw {

struct ElementwiseKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight, for `rows` rows of `width`; out may be x
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out);
  // rotates the first 2 * half numbers of each of `heads` heads: pairs are (i, i + half)
  void (*rope)(float* x, const float* cos, const float* sin, std::int64_t heads, std::int64_t width, std::int64_t half);
  // out = gate / (1 + exp(-gate)) * up; out may be gate or up
  void (*swiglu)(const float* gate, const float* up, std::int64_t count, float* out);
  // to e4m3 (bias 7, no infinities): to nearest, ties to even; beyond its range the largest number, 448
  void (*to_float8)(const float* x, std::int64_t count, std::uint8_t* out);
};

void rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out);
void rope(float* x, const float* cos, const float* sin, std::int64_t tokens, std::int64_t heads, std::int64_t width,
          std::int64_t half);
void swiglu(const float* gate, const float* up, std::int64_t count, float* out);
// row i of x goes to row places[i] of out
void store_float8(const float* x, const std::int64_t* places, std::int64_t rows, std::int64_t width, std::uint8_t* out);

}  // namespace mw
