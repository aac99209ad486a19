// A relative-neighbourhood graph over vectors in memory, and best-first search in it.
#pragma once

#include <cstdint>

#include "vector_distances.h"

namespace mw {

struct VectorGraph {
  VectorRows rows;
  const std::int32_t* edges;  // [count, degree]; -1 behind a vector's last one
  int degree;
  // Where a search begins: pivots, and under each the vectors seeds[pivot_ends[p - 1]] to seeds[pivot_ends[p]]
  const std::int32_t* pivots;
  const std::int32_t* pivot_ends;
  const std::int32_t* seeds;
  std::int64_t num_pivots;
};

// The `found` nearest of each query among at most about `budget` vectors that are compared with it; -1 and infinity where fewer
// were reached. checked: how many were compared; expanded: vectors whose edges were followed.
void graph_search(const VectorGraph& graph, const float* queries, std::int64_t num_queries, std::int64_t found, std::int64_t budget,
                  std::int32_t* ids, float* distances, std::int32_t* checked, std::int32_t* expanded);

// Writes edges [count, degree]. Vectors come in the order `order`, in batches that double, so that threads change no bit of it.
void graph_build(const VectorRows& rows, const std::int32_t* order, int degree, std::int64_t budget, std::int64_t candidates,
                 std::int32_t* edges);

// Gives vectors that no path from the pivots leads to an edge from a near one; returns how many stay without.
std::int64_t graph_connect(const VectorGraph& graph, std::int32_t* edges, std::int64_t budget);

}  // namespace mw
