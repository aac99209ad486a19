// A shift keeps the order of a block's numbers, so they are sorted once; of each shift only the places between levels are looked for.
#include "information.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "threads.h"

namespace mw {
namespace {

float best_shift(const ShiftSearch& s, const float* block) {
  float sorted[kInformationBlock], coded[kInformationBlock];
  std::copy(block, block + kInformationBlock, sorted);
  std::sort(sorted, sorted + kInformationBlock);
  const float centre = (sorted[kInformationBlock / 2 - 1] + sorted[kInformationBlock / 2]) / 2.0f;
  const float reach = std::max(std::fabs(sorted[0] - centre), std::fabs(sorted[kInformationBlock - 1] - centre));
  float best = centre;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (int i = 0; i < s.num_steps; ++i) {
    const float shift = centre + s.steps[i] * reach;
    const float scale = std::max({std::fabs(sorted[0] - shift), std::fabs(sorted[kInformationBlock - 1] - shift), 1e-30f});
    for (int c = 0; c < kInformationBlock; ++c) coded[c] = (sorted[c] - shift) / scale;
    std::int64_t sum = 0;
    int from = 0;
    for (int t = 0; t < s.num_thresholds; ++t) {
      int to = from;
      while (to < kInformationBlock && coded[to] < s.thresholds[t]) ++to;
      sum += s.weights[to - from];
      from = to;
    }
    sum += s.weights[kInformationBlock - from];
    if (sum < least) least = sum, best = shift;
  }
  return best;
}

}  // namespace

void best_shifts(const ShiftSearch& search, float* shifts) {
  parallel_for(static_cast<std::size_t>(search.count), 64, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t i = begin; i < end; ++i) shifts[i] = best_shift(search, search.blocks + i * kInformationBlock);
  });
}

}  // namespace mw
