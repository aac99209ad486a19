// Lists of vectors around heads: which of them a vector joins, and what a query finds in those that were read.
#pragma once

#include <cstdint>

#include "vector_distances.h"

namespace mw {

struct ClosureTask {
  VectorRows heads;
  const std::int32_t* candidates;  // [count, num_candidates]: heads from near to far, -1 behind the last
  const float* distances;          // [count, num_candidates], squared
  std::int64_t count, num_candidates;
  float closure;     // a head at more than so many times the nearest one's distance is not taken; infinity: no such rule
  float rng_factor;  // nor one that lies nearer to a taken one: rng_factor * d(head, taken) < d(vector, head)
  int replicas;
  bool nearest_only;  // neither rule: the nearest heads, as many as replicas
  std::int32_t* taken;  // [count, replicas], -1 behind the last
  float* apart;         // [count, replicas]
};

void closure_assign(const ClosureTask& task);

struct ListScan {
  const std::uint8_t* bytes;      // what was read
  const std::int64_t* starts;     // [num_lists]: where each list begins in it
  const std::int32_t* counts;     // [num_lists]: its vectors
  std::int64_t num_lists;
  int size;
  Element element;
  bool apart;  // all vectors first, then all ids; otherwise an id before each vector
  const float* query;
  std::int64_t top;
  std::int32_t* ids;    // [top]; in: the best so far, -1 behind the last; out: with those of the lists, each once
  float* distances;     // [top], infinity behind the last
};

// Gives how many vectors were compared; those seen before are left out. most_id: an id above it ends the scan with -1.
std::int64_t scan_lists(const ListScan& scan, std::int32_t most_id);

}  // namespace mw
