// Products of 8-bit activations, whose scale is known beforehand, with 8-bit weights or with 4-bit weights of two-level scales.
//
// Weights lie in tiles of 16 rows as in linear.h. Of 8 bits a code is the integer + 128. Of 4 bits a code q stands for the integer
// ((q - 8) * 16 * f + 2^14) >> 15 in [-127, 127], where f is 2048 times the float16 scale of its group, rounded: the scale of the
// group as a share of the row's. All sums are integers; a row's scale times the input's makes floats of them.
#pragma once

#include <cstdint>

namespace mw {

constexpr std::int64_t kStaticTokens = 256;  // most tokens of one call

struct StaticProduct {
  std::int64_t rows = 0, cols = 0, tokens = 0;
  int bits = 8, group = 0;
  const std::uint8_t* codes = nullptr;
  const std::uint16_t* groups = nullptr;  // [row tiles, cols / group, 16] float16, of 4 bits
  const float* channels = nullptr;        // [rows]
  const std::int8_t* x = nullptr;         // [tokens, cols]
  const std::int32_t* sums = nullptr;     // [tokens]: of x
  // of one token and 4 bits: x as 16-bit numbers, columns 0 and 2 of every four, then columns 1 and 3, [cols / 4, 2]; else null
  const std::int32_t* pairs = nullptr;
  float x_scale = 1.0f;
  float* out = nullptr;                   // [tokens, rows] ...
  bool accumulate = false;
  std::int8_t* out_bytes = nullptr;       // ... or this, rounded
  const float* out_inverse = nullptr;     // [rows] one over the scales of out_bytes
};

struct StaticKernels {
  void (*rows)(const StaticProduct&, std::int64_t begin, std::int64_t end);  // tiles
};

void static_product(StaticProduct product);

}  // namespace mw
