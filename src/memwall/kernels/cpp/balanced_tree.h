// A tree of balanced clusters over vectors, and the choice of heads from it.
#pragma once

#include <cstdint>
#include <vector>

#include "vector_distances.h"

namespace mw {

struct TreeSettings {
  int children = 32;          // of a node, at most
  int leaf = 8;               // a node of so many vectors is not split
  std::int64_t samples = 1000;  // that a node's clusters are learned from
  double range = 1;           // of the numbers: 1 of floats, 127 or 255 of bytes
  double factor = -1;         // of the penalty on sizes; -1: the best of seven at the root; infinity: no penalty
  std::uint64_t seed = 0;
};

// Nodes from the root on; children stand behind their parent and beside each other. A node stands for a vector, the root for none.
struct BalancedTree {
  std::vector<std::int32_t> points, begins, ends;
  double factor = 0;
};

BalancedTree balanced_tree(const VectorRows& rows, const TreeSettings& settings);

struct HeadRule {
  std::int64_t select, split, factor;
};

// heads[point] = 1 where a node's vector is chosen; returns how many are.
std::int64_t pick_heads(const std::int32_t* points, const std::int32_t* begins, const std::int32_t* ends, std::int64_t nodes,
                        const HeadRule& rule, std::uint8_t* heads, std::int64_t num_points);

}  // namespace mw
