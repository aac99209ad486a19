// Rounding a weight matrix to packed tiles: the native twin of formats/integer.py, bit for bit.
#pragma once

#include "linear.h"

namespace mw {

struct EncodeTask {
  Form from;           // form of the numbers, not tiles
  const void* values;  // [rows, cols]
  std::int64_t rows, cols;
  int bits, group;
  std::uint8_t* codes;
  std::uint16_t* scales;
  std::uint16_t* mins;  // null when symmetric
};

struct EncodeKernels {
  // Row tiles [begin, end). False when a number is not finite, or a scale or minimum overflows float16.
  bool (*encode)(const EncodeTask& task, std::int64_t begin, std::int64_t end);
};

bool encode_tiles(const EncodeTask& task);

}  // namespace mw
