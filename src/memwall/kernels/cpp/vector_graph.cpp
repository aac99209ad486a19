#include "vector_graph.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "threads.h"

namespace mw {
namespace {

using Near = std::pair<float, std::int32_t>;  // a distance and an id: equal distances go by id
constexpr std::int64_t kPivotsFollowed = 4, kBuildSeeds = 256, kBatch = 1024;

// What one thread needs for searches.
struct Walk {
  SeenIds seen;
  std::vector<Near> all, queue;
  std::vector<std::int32_t> ids;
  std::vector<float> distances;
  std::int64_t expanded = 0;

  void begin(std::int64_t budget) {
    seen.begin(static_cast<std::size_t>(budget) + 64);
    all.clear();
    queue.clear();
    ids.clear();
    expanded = 0;
  }
  // Compares `ids` with the query and queues them.
  void compare(const VectorRows& rows, const float* query) {
    distances.resize(ids.size());
    squared_distances(rows, query, ids.data(), static_cast<std::int64_t>(ids.size()), distances.data());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      all.emplace_back(distances[i], ids[i]);
      queue.emplace_back(distances[i], ids[i]);
      std::push_heap(queue.begin(), queue.end(), std::greater<>());
    }
    ids.clear();
  }
  // Follows edges from the nearest vector on, until so many are compared.
  template <class Edges>
  void run(const VectorRows& rows, const float* query, std::int64_t budget, Edges&& edges_of) {
    while (!queue.empty() && static_cast<std::int64_t>(all.size()) < budget) {
      std::pop_heap(queue.begin(), queue.end(), std::greater<>());
      const std::int32_t from = queue.back().second;
      queue.pop_back();
      ++expanded;
      edges_of(from, [&](std::int32_t to) {
        if (seen.add(to)) ids.push_back(to);
      });
      compare(rows, query);
    }
  }
  // Sorts the nearest `count` to the front of `all`.
  std::int64_t best(std::int64_t count) {
    count = std::min(count, static_cast<std::int64_t>(all.size()));
    std::partial_sort(all.begin(), all.begin() + count, all.end());
    return count;
  }
};

void begin_at_seeds(const VectorGraph& graph, const float* query, Walk& walk) {
  for (std::int64_t p = 0; p < graph.num_pivots; ++p)
    if (walk.seen.add(graph.pivots[p])) walk.ids.push_back(graph.pivots[p]);
  std::vector<std::pair<float, std::int64_t>> pivots;
  walk.distances.resize(static_cast<std::size_t>(graph.num_pivots));
  squared_distances(graph.rows, query, graph.pivots, graph.num_pivots, walk.distances.data());
  for (std::int64_t p = 0; p < graph.num_pivots; ++p) pivots.emplace_back(walk.distances[static_cast<std::size_t>(p)], p);
  walk.compare(graph.rows, query);
  const std::int64_t followed = std::min(kPivotsFollowed, graph.num_pivots);
  std::partial_sort(pivots.begin(), pivots.begin() + followed, pivots.end());
  for (std::int64_t i = 0; i < followed; ++i) {
    const std::int64_t p = pivots[static_cast<std::size_t>(i)].second;
    for (std::int32_t s = p ? graph.pivot_ends[p - 1] : 0; s < graph.pivot_ends[p]; ++s)
      if (walk.seen.add(graph.seeds[s])) walk.ids.push_back(graph.seeds[s]);
  }
  walk.compare(graph.rows, query);
}

// The relative-neighbourhood rule: of candidates from near to far, each one that is nearer to the vector than to all taken before.
// What is left over fills the rest of the edges.
void prune(const VectorRows& rows, std::vector<Near>& candidates, int degree, std::vector<std::int32_t>& kept, std::vector<float>& query) {
  std::sort(candidates.begin(), candidates.end());
  query.resize(static_cast<std::size_t>(rows.padded()));
  std::vector<float> apart(static_cast<std::size_t>(degree));
  std::vector<std::int32_t> spare;
  kept.clear();
  for (const auto& [distance, id] : candidates) {
    if (static_cast<int>(kept.size()) == degree) break;
    bool shadowed = false;
    if (!kept.empty()) {
      decode_vector(rows, id, query.data());
      squared_distances(rows, query.data(), kept.data(), static_cast<std::int64_t>(kept.size()), apart.data());
      for (std::size_t i = 0; i < kept.size() && !shadowed; ++i) shadowed = apart[i] <= distance;
    }
    (shadowed ? spare : kept).push_back(id);
  }
  for (std::size_t i = 0; i < spare.size() && static_cast<int>(kept.size()) < degree; ++i) kept.push_back(spare[i]);
}

}  // namespace

void graph_search(const VectorGraph& graph, const float* queries, std::int64_t num_queries, std::int64_t found, std::int64_t budget,
                  std::int32_t* ids, float* distances, std::int32_t* checked, std::int32_t* expanded) {
  std::vector<Walk> walks(static_cast<std::size_t>(num_threads()));
  const std::int64_t width = graph.rows.padded();
  parallel_for(static_cast<std::size_t>(num_queries), 1, [&](std::size_t begin, std::size_t end, int worker) {
    Walk& walk = walks[static_cast<std::size_t>(worker)];
    for (std::size_t q = begin; q < end; ++q) {
      const float* query = queries + static_cast<std::int64_t>(q) * width;
      walk.begin(budget);
      begin_at_seeds(graph, query, walk);
      walk.run(graph.rows, query, budget, [&](std::int32_t from, auto&& visit) {
        const std::int32_t* edge = graph.edges + static_cast<std::int64_t>(from) * graph.degree;
        for (int i = 0; i < graph.degree && edge[i] >= 0; ++i) visit(edge[i]);
      });
      const std::int64_t best = walk.best(found);
      std::int32_t* id = ids + static_cast<std::int64_t>(q) * found;
      float* distance = distances + static_cast<std::int64_t>(q) * found;
      for (std::int64_t i = 0; i < found; ++i) {
        id[i] = i < best ? walk.all[static_cast<std::size_t>(i)].second : -1;
        distance[i] = i < best ? walk.all[static_cast<std::size_t>(i)].first : std::numeric_limits<float>::infinity();
      }
      checked[q] = static_cast<std::int32_t>(walk.all.size());
      expanded[q] = static_cast<std::int32_t>(walk.expanded);
    }
  });
}

void graph_build(const VectorRows& rows, const std::int32_t* order, int degree, std::int64_t budget, std::int64_t candidates,
                 std::int32_t* edges) {
  const std::size_t count = static_cast<std::size_t>(rows.count);
  const std::size_t slack = 2 * static_cast<std::size_t>(degree);  // edges that come back gather before they are pruned
  std::vector<std::vector<std::int32_t>> out(count);
  std::vector<Walk> walks(static_cast<std::size_t>(num_threads()));
  std::vector<std::vector<float>> queries(walks.size()), scratch(walks.size());
  const auto pruned = [&](std::int32_t at, int worker) {
    std::vector<float>&query = queries[static_cast<std::size_t>(worker)], apart;
    query.resize(static_cast<std::size_t>(rows.padded()));
    auto& list = out[static_cast<std::size_t>(at)];
    apart.resize(list.size());
    decode_vector(rows, at, query.data());
    squared_distances(rows, query.data(), list.data(), static_cast<std::int64_t>(list.size()), apart.data());
    std::vector<Near> near;
    for (std::size_t i = 0; i < list.size(); ++i) near.emplace_back(apart[i], list[i]);
    prune(rows, near, degree, list, scratch[static_cast<std::size_t>(worker)]);
  };
  for (std::size_t done = 0; done < count;) {
    const std::size_t batch = std::min({count - done, std::max<std::size_t>(done, 1), static_cast<std::size_t>(kBatch)});
    parallel_for(batch, 1, [&](std::size_t begin, std::size_t end, int worker) {
      Walk& walk = walks[static_cast<std::size_t>(worker)];
      std::vector<float>& query = queries[static_cast<std::size_t>(worker)];
      query.resize(static_cast<std::size_t>(rows.padded()));
      for (std::size_t b = begin; b < end; ++b) {
        const std::int32_t at = order[done + b];
        decode_vector(rows, at, query.data());
        walk.begin(budget + static_cast<std::int64_t>(batch));
        walk.seen.add(at);
        const std::size_t seeds = std::min(done, static_cast<std::size_t>(kBuildSeeds));
        for (std::size_t i = 0; i < seeds; ++i)
          if (walk.seen.add(order[i])) walk.ids.push_back(order[i]);
        walk.compare(rows, query.data());
        walk.run(rows, query.data(), budget, [&](std::int32_t from, auto&& visit) {
          for (const std::int32_t to : out[static_cast<std::size_t>(from)]) visit(to);
        });
        // those of the batch that came before are not in the graph yet
        for (std::size_t i = 0; i < b; ++i)
          if (walk.seen.add(order[done + i])) walk.ids.push_back(order[done + i]);
        walk.compare(rows, query.data());
        std::vector<Near> near(walk.all.begin(), walk.all.begin() + walk.best(candidates));
        prune(rows, near, degree, out[static_cast<std::size_t>(at)], scratch[static_cast<std::size_t>(worker)]);
      }
    });
    std::vector<std::pair<std::int32_t, std::int32_t>> back;  // (to whom, from whom)
    for (std::size_t b = 0; b < batch; ++b)
      for (const std::int32_t to : out[static_cast<std::size_t>(order[done + b])]) back.emplace_back(to, order[done + b]);
    std::sort(back.begin(), back.end());
    std::vector<std::size_t> starts;
    for (std::size_t i = 0; i < back.size(); ++i)
      if (i == 0 || back[i].first != back[i - 1].first) starts.push_back(i);
    parallel_for(starts.size(), 16, [&](std::size_t begin, std::size_t end, int worker) {
      for (std::size_t s = begin; s < end; ++s) {
        auto& list = out[static_cast<std::size_t>(back[starts[s]].first)];
        for (std::size_t i = starts[s]; i < back.size() && back[i].first == back[starts[s]].first; ++i)
          if (std::find(list.begin(), list.end(), back[i].second) == list.end()) list.push_back(back[i].second);
        if (list.size() > slack) pruned(back[starts[s]].first, worker);
      }
    });
    done += batch;
  }
  parallel_for(count, 16, [&](std::size_t begin, std::size_t end, int worker) {
    for (std::size_t at = begin; at < end; ++at) {
      pruned(static_cast<std::int32_t>(at), worker);
      for (int i = 0; i < degree; ++i)
        edges[at * static_cast<std::size_t>(degree) + static_cast<std::size_t>(i)] = i < static_cast<int>(out[at].size()) ? out[at][static_cast<std::size_t>(i)] : -1;
    }
  });
}

std::int64_t graph_connect(const VectorGraph& graph, std::int32_t* edges, std::int64_t budget) {
  const std::int64_t count = graph.rows.count, degree = graph.degree;
  std::vector<char> reached(static_cast<std::size_t>(count));
  std::vector<std::int32_t> stack;
  const auto reach = [&](std::int32_t at) {
    if (reached[static_cast<std::size_t>(at)]) return;
    reached[static_cast<std::size_t>(at)] = 1;
    stack.push_back(at);
  };
  const auto spread = [&] {
    while (!stack.empty()) {
      const std::int32_t* edge = edges + stack.back() * degree;
      stack.pop_back();
      for (int i = 0; i < degree && edge[i] >= 0; ++i) reach(edge[i]);
    }
  };
  std::vector<float> query(static_cast<std::size_t>(graph.rows.padded())), distances(64);
  std::vector<std::int32_t> ids(64);
  std::int64_t missing = 0;
  for (int round = 0; round < 4; ++round) {  // an edge that makes room may have been somebody's only one
    std::fill(reached.begin(), reached.end(), 0);
    for (std::int64_t p = 0; p < graph.num_pivots; ++p) reach(graph.pivots[p]);
    spread();
    missing = 0;
    for (std::int32_t at = 0; at < count; ++at) {
      if (reached[static_cast<std::size_t>(at)]) continue;
      ++missing;
      decode_vector(graph.rows, at, query.data());
      std::int32_t checked, expanded;
      graph_search(graph, query.data(), 1, 64, budget, ids.data(), distances.data(), &checked, &expanded);
      for (const std::int32_t from : ids) {
        if (from < 0 || from == at) continue;
        std::int32_t* edge = edges + from * degree;
        int last = 0;
        while (last < degree - 1 && edge[last] >= 0) ++last;
        edge[last] = at;
        break;
      }
      reach(at);
      spread();
    }
    if (!missing) break;
  }
  return missing;
}

}  // namespace mw
