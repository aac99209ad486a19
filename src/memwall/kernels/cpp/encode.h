// Rounding a weight matrix to packed tiles: the native twin of formats/integer.py and formats/leveled.py, bit for bit.
#pragma once

#include "linear.h"

namespace mw {

// Level formats: a number times the inverse scale of its group takes the level that `thresholds` part (formats/levels.py). The
// scales are found in Python, a pass over the numbers that is soon made; the search is what takes time.
struct LevelSearch {
  const float* inverses;          // [rows, groups]
  const float* thresholds;        // [256], infinite from number num_levels - 1 on
  const std::uint8_t* codes;      // [num_levels], by the size of levels
  int num_levels;
  std::uint8_t zero_code;         // of padding
};

struct EncodeTask {
  Form from;           // form of the numbers, not tiles
  const void* values;  // [rows, cols]
  std::int64_t rows, cols;
  int bits, group;
  std::uint8_t* codes;
  std::uint16_t* scales;
  std::uint16_t* mins;  // null when symmetric
  const LevelSearch* levels = nullptr;  // null for integers; else scales and mins are not written
};

struct EncodeKernels {
  // Row tiles [begin, end). False when a number is not finite, or a scale or minimum overflows float16.
  bool (*encode)(const EncodeTask& task, std::int64_t begin, std::int64_t end);
};

bool encode_tiles(const EncodeTask& task);

}  // namespace mw
