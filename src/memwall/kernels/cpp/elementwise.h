// Operations between the products: normalization, rotary position embedding, activations. All float32.
#pragma once

#include <cstdint>

namespace mw {

struct ElementwiseKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight, for `rows` rows of `width`; out may be x
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out);
  // out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, likewise
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t width, float* out);
  // rotates the first 2 * half numbers of each of `heads` heads: pairs are (i, i + half)
  void (*rope)(float* x, const float* cos, const float* sin, std::int64_t heads, std::int64_t width, std::int64_t half);
  // out = gate / (1 + exp(-gate)) * up; out may be gate or up
  void (*swiglu)(const float* gate, const float* up, std::int64_t count, float* out);
  // out = x * Phi(x), the share of a normal distribution below x; out may be x. near: with the tanh that comes near to Phi.
  void (*gelu)(const float* x, std::int64_t count, bool near, float* out);
  // `heads` rows of `dim` numbers to codes -127 .. 127 with, behind each row, its scale in half precision
  void (*to_int8)(const float* x, std::int64_t heads, std::int64_t dim, std::int8_t* out);
  // float16, ties to even, infinity beyond its range
  void (*to_half)(const float* x, std::int64_t count, std::uint16_t* out);
};

void rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out);
void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t width, float* out);
void rope(float* x, const float* cos, const float* sin, std::int64_t tokens, std::int64_t heads, std::int64_t width,
          std::int64_t half);
void swiglu(const float* gate, const float* up, std::int64_t count, float* out);
void gelu(const float* x, std::int64_t count, bool near, float* out);
// out = x where that is above the threshold, else 0; times up, if there is one. out may be x or up.
void relu(const float* x, const float* up, float threshold, std::int64_t count, float* out);
// Row i of x [rows, heads, dim] goes to row places[i] of out [.., heads, dim + 2]; codes are to nearest, ties to even, and a head with
// infinities or what is no number gets a scale that is none.
void store_int8(const float* x, const std::int64_t* places, std::int64_t rows, std::int64_t heads, std::int64_t dim, std::int8_t* out);
void store_half(const float* x, std::int64_t count, std::uint16_t* out);
void store_bfloat(const float* x, std::int64_t count, std::uint16_t* out);
// The same for heads in a row, on the calling thread.
void to_int8_rows(const float* x, std::int64_t heads, std::int64_t dim, std::int8_t* out);

}  // namespace mw
