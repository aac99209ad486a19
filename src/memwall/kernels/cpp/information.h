// Shifts of blocks of numbers under which their codes tell the most (compress/ir_qlora.py says which are tried).
#pragma once

#include <cstdint>

namespace mw {

constexpr int kInformationBlock = 64, kMostLevels = 16;

struct ShiftSearch {
  const float* blocks = nullptr;  // [count, 64], finite
  std::int64_t count = 0;
  const float* steps = nullptr;  // parts of the largest distance from the median, in the order in which they are preferred
  int num_steps = 0;
  const float* thresholds = nullptr;  // between levels, ascending
  int num_thresholds = 0;
  const std::int64_t* weights = nullptr;  // [65], by how often a code comes: the less in sum, the more the codes tell
};

// shifts [count]
void best_shifts(const ShiftSearch& search, float* shifts);

}  // namespace mw
