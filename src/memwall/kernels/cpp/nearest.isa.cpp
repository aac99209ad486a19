// Lanes run along the centroids; a few points are compared with each block of them while it is at hand.
#include "nearest.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPoints = kWidth == 4 ? 2 : 4;

template <int Points>
void points_block(const NearestTask& task, std::int64_t first) {
  const float* x = task.points + first * task.size;
  Vf best[Points];
  Vi label[Points], at;
  for (int lane = 0; lane < kWidth; ++lane) at[lane] = lane;
  for (int p = 0; p < Points; ++p) {
    best[p] = splat(__builtin_inff());
    label[p] = at;
  }
  for (std::int64_t c = 0; c < task.num_centroids; c += kWidth, at += kWidth) {
    Vf score[Points];
    for (int p = 0; p < Points; ++p) score[p] = load<Vf>(task.half_norms + c);
    for (int d = 0; d < task.size; ++d) {
      const Vf coordinate = load<Vf>(task.table + d * task.num_centroids + c);
      for (int p = 0; p < Points; ++p) score[p] -= coordinate * splat(x[p * task.size + d]);
    }
    for (int p = 0; p < Points; ++p) {
      const Vi nearer = score[p] < best[p];
      best[p] = (Vf)(((Vi)score[p] & nearer) | ((Vi)best[p] & ~nearer));
      label[p] = (at & nearer) | (label[p] & ~nearer);
    }
  }
  for (int p = 0; p < Points; ++p) {
    float least = best[p][0];
    std::int32_t found = label[p][0];
    for (int lane = 1; lane < kWidth; ++lane)
      if (best[p][lane] < least || (best[p][lane] == least && label[p][lane] < found)) least = best[p][lane], found = label[p][lane];
    task.labels[first + p] = found;
    task.scores[first + p] = least;
  }
}

void nearest_points(const NearestTask& task, std::int64_t begin, std::int64_t end) {
  for (; begin + kPoints <= end; begin += kPoints) points_block<kPoints>(task, begin);
  for (; begin < end; ++begin) points_block<1>(task, begin);
}

}  // namespace

extern const NearestKernels nearest_kernels;
const NearestKernels nearest_kernels = {nearest_points};

}  // namespace mw::MW_ISA
