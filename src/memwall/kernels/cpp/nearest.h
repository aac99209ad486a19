// The nearest of many centroids, for clustering and for coding with codebooks.
#pragma once

#include <cstdint>

namespace mw {

constexpr int kNearestPad = 16;  // the count of centroids is a multiple of this, the last ones too far to be chosen

struct NearestTask {
  const float* points;      // [num_points, size]
  const float* table;       // [size, num_centroids]: centroids by coordinate
  const float* half_norms;  // [num_centroids]: half the squared length of each, infinity for padding
  std::int64_t num_points, num_centroids;
  int size;
  std::int32_t* labels;     // [num_points]; of several as near, the first
  float* scores;            // [num_points]: half the squared distance, less half the point's own squared length
};

struct NearestKernels {
  void (*nearest)(const NearestTask&, std::int64_t begin, std::int64_t end);
};

void nearest(const NearestTask& task);

}  // namespace mw
