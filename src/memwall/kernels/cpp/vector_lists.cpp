#include "vector_lists.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "threads.h"

namespace mw {

void closure_assign(const ClosureTask& task) {
  std::vector<std::vector<float>> queries(static_cast<std::size_t>(num_threads()));
  parallel_for(static_cast<std::size_t>(task.count), 64, [&](std::size_t begin, std::size_t end, int worker) {
    auto& query = queries[static_cast<std::size_t>(worker)];
    query.resize(static_cast<std::size_t>(task.heads.padded()));
    std::vector<float> between(static_cast<std::size_t>(task.replicas));
    for (std::size_t x = begin; x < end; ++x) {
      const std::int32_t* candidate = task.candidates + static_cast<std::int64_t>(x) * task.num_candidates;
      const float* distance = task.distances + static_cast<std::int64_t>(x) * task.num_candidates;
      std::int32_t* taken = task.taken + static_cast<std::int64_t>(x) * task.replicas;
      float* apart = task.apart + static_cast<std::int64_t>(x) * task.replicas;
      int count = 0;
      for (std::int64_t j = 0; j < task.num_candidates && candidate[j] >= 0 && count < task.replicas; ++j) {
        bool takes = true;
        if (!task.nearest_only && count > 0) {
          if (distance[j] > task.closure * distance[0]) break;
          decode_vector(task.heads, candidate[j], query.data());
          squared_distances(task.heads, query.data(), taken, count, between.data());
          for (int i = 0; i < count && takes; ++i) takes = task.rng_factor * between[static_cast<std::size_t>(i)] >= distance[j];
        }
        if (!takes) continue;
        taken[count] = candidate[j];
        apart[count++] = distance[j];
      }
      for (; count < task.replicas; ++count) {
        taken[count] = -1;
        apart[count] = std::numeric_limits<float>::infinity();
      }
    }
  });
}

std::int64_t scan_lists(const ListScan& scan, std::int32_t most_id) {
  using Near = std::pair<float, std::int32_t>;
  thread_local SeenIds seen;
  thread_local std::vector<float> distances;
  std::int64_t total = 0;
  for (std::int64_t l = 0; l < scan.num_lists; ++l) total += scan.counts[l];
  seen.begin(static_cast<std::size_t>(total + scan.top));
  std::vector<Near> best;  // a heap, the farthest first
  for (std::int64_t i = 0; i < scan.top && scan.ids[i] >= 0; ++i)
    if (seen.add(scan.ids[i])) best.emplace_back(scan.distances[i], scan.ids[i]);
  std::make_heap(best.begin(), best.end());
  const std::int64_t vector_bytes = scan.size * static_cast<std::int64_t>(element_bytes(scan.element));
  std::int64_t compared = 0;
  for (std::int64_t l = 0; l < scan.num_lists; ++l) {
    const std::uint8_t* list = scan.bytes + scan.starts[l];
    const std::int64_t count = scan.counts[l], stride = scan.apart ? vector_bytes : vector_bytes + 4;
    const VectorRows rows{scan.apart ? list : list + 4, stride, count, scan.size, scan.element};
    const std::uint8_t* ids = scan.apart ? list + count * vector_bytes : list;
    distances.resize(static_cast<std::size_t>(count));
    squared_distances(rows, scan.query, nullptr, count, distances.data());
    for (std::int64_t i = 0; i < count; ++i) {
      std::int32_t id;
      std::memcpy(&id, ids + i * (scan.apart ? 4 : stride), sizeof id);
      if (id < 0 || id > most_id) return -1;
      if (!seen.add(id)) continue;
      ++compared;
      const Near near{distances[static_cast<std::size_t>(i)], id};
      if (static_cast<std::int64_t>(best.size()) < scan.top) {
        best.push_back(near);
        std::push_heap(best.begin(), best.end());
      } else if (near < best.front()) {
        std::pop_heap(best.begin(), best.end());
        best.back() = near;
        std::push_heap(best.begin(), best.end());
      }
    }
  }
  std::sort_heap(best.begin(), best.end());
  for (std::int64_t i = 0; i < scan.top; ++i) {
    const bool there = i < static_cast<std::int64_t>(best.size());
    scan.ids[i] = there ? best[static_cast<std::size_t>(i)].second : -1;
    scan.distances[i] = there ? best[static_cast<std::size_t>(i)].first : std::numeric_limits<float>::infinity();
  }
  return compared;
}

}  // namespace mw
