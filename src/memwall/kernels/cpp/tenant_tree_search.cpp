// How the shared tree is searched for a tenant, read from a file's arrays and checked.
#include "tenant_tree.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <queue>
#include <stdexcept>
#include <utility>

#include "tenant_parts.h"
#include "threads.h"

namespace mw {

namespace {

constexpr std::size_t kShare = 16;         // vectors of a chunk, where threads share one query
constexpr std::size_t kLeastShared = 256;  // fewer are not worth waking a thread

struct Near {
  float distance;
  std::uint32_t node;
  // the least first in a heap whose top is the greatest; of equal distances the node that comes first
  bool operator<(const Near& other) const { return distance != other.distance ? distance > other.distance : node > other.node; }
};
struct Bucket {
  float distance;
  std::uint32_t node;
  std::int64_t size;
};
using Best = std::pair<float, std::int64_t>;  // distance, label

}  // namespace

struct TenantTree::Scratch {
  std::vector<Near> heap;
  std::vector<Bucket> buckets;
  std::vector<std::uint32_t> slots, children;
  std::vector<const float*> rows;
  std::vector<float> distances;
  std::vector<Best> best;
};

// Where a search looks: at what a tenant may read, or at what a filter lets through.
struct TenantTree::OfTenant {
  const TenantTree& tree;
  std::uint32_t tenant;
  Probe found;

  bool below(std::uint32_t node) const { return tree.knows(node, found); }
  // vectors of a node that is to be gone no further down from; -1: of one that is
  std::int64_t ends(std::uint32_t at) const {
    if (const List* list = tree.find_list(at, tenant)) return list->ids.size;
    return tree.nodes_[at].leaf() ? tree.leaf_count(tree.nodes_[at], tenant) : -1;
  }
  void gather(std::uint32_t at, std::vector<std::uint32_t>& slots) const {
    if (const List* list = tree.find_list(at, tenant)) {
      const std::uint32_t* ids = tree.pool_.data(list->ids);
      slots.insert(slots.end(), ids, ids + list->ids.size);
      return;
    }
    for (const std::uint32_t slot : tree.nodes_[at].members)
      if (tree.may_read(slot, tenant)) slots.push_back(slot);
  }
};

struct TenantTree::OfFilter {
  const TenantTree& tree;
  const Among& among;

  std::pair<std::size_t, std::size_t> range(std::uint32_t node) const {
    const auto& leaves = among.leaves;
    const auto first = std::lower_bound(leaves.begin(), leaves.end(), tree.nodes_[node].first_leaf);
    return {first - leaves.begin(), std::lower_bound(first, leaves.end(), tree.nodes_[node].last_leaf) - leaves.begin()};
  }
  bool below(std::uint32_t node) const {
    const auto [first, last] = range(node);
    return first < last;
  }
  std::int64_t ends(std::uint32_t node) const {
    const auto [first, last] = range(node);
    const auto size = static_cast<std::int64_t>(last - first);
    return size <= tree.settings_.max_list || tree.nodes_[node].leaf() ? size : -1;
  }
  void gather(std::uint32_t node, std::vector<std::uint32_t>& slots) const {
    const auto [first, last] = range(node);
    slots.insert(slots.end(), among.slots.begin() + static_cast<std::ptrdiff_t>(first), among.slots.begin() + static_cast<std::ptrdiff_t>(last));
  }
};

Among TenantTree::among(std::vector<std::uint32_t> slots) const {
  const auto place = [&](std::uint32_t slot) { return nodes_[leaf_of_[slot]].first_leaf; };
  std::sort(slots.begin(), slots.end(), [&](std::uint32_t a, std::uint32_t b) { return std::pair(place(a), a) < std::pair(place(b), b); });
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  Among made;
  for (const std::uint32_t slot : slots) made.leaves.push_back(place(slot));
  made.slots = std::move(slots);
  return made;
}

// Children with something below them go on the heap. Those without would be skipped later: their distances are not worth computing.
template <class Source>
void TenantTree::expand(const float* query, const Node& node, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const {
  scratch.children.clear();
  scratch.rows.clear();
  for (std::int32_t i = 0; i < node.num_children; ++i) {
    const auto child = static_cast<std::uint32_t>(node.first_child + i);
    if (!source.below(child)) continue;
    scratch.children.push_back(child);
    scratch.rows.push_back(centroids_.data() + child * static_cast<std::size_t>(cols_));
  }
  const std::size_t count = scratch.children.size();
  scratch.distances.resize(count);
  tenant_distances(query, scratch.rows.data(), static_cast<std::int64_t>(count), cols_, scratch.distances.data());
  told.centroid_distances += static_cast<std::int64_t>(count);
  for (std::size_t i = 0; i < count; ++i) {
    // the vectors of a node that is spread wide may lie nearer than its middle
    const float distance = std::max(scratch.distances[i] - task.spread_weight * spreads_[scratch.children[i]], 0.0f);
    scratch.heap.push_back({distance, scratch.children[i]});
    std::push_heap(scratch.heap.begin(), scratch.heap.end());
  }
}

template <class Source>
void TenantTree::best_first(const float* query, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const {
  std::int64_t total = 0;
  while (!scratch.heap.empty() && total < task.found_most && static_cast<std::int64_t>(scratch.buckets.size()) < task.most_buckets) {
    std::pop_heap(scratch.heap.begin(), scratch.heap.end());
    const Near near = scratch.heap.back();
    scratch.heap.pop_back();
    // buckets come in the order of their distances, or near it: a child may lie nearer than its parent
    if (total >= task.top && near.distance > task.prune * scratch.buckets.front().distance) break;
    ++told.nodes;
    const std::int64_t size = source.ends(near.node);
    if (size < 0) expand(query, nodes_[near.node], source, task, scratch, told);
    else if (size > 0) scratch.buckets.push_back({near.distance, near.node, size}), total += size;
  }
}

template <class Source>
void TenantTree::level_by_level(const float* query, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const {
  std::vector<Near> level;
  while (!scratch.heap.empty()) {
    level.swap(scratch.heap);
    scratch.heap.clear();
    // a heap orders by greatest distance last in this order: the nearest of the level are first after sorting backwards
    std::sort(level.begin(), level.end(), [](const Near& a, const Near& b) { return b < a; });
    std::int64_t inner = 0;
    for (const Near& near : level) {
      const std::int64_t size = source.ends(near.node);
      if (size < 0 && ++inner > task.beam) continue;
      ++told.nodes;
      if (size < 0) expand(query, nodes_[near.node], source, task, scratch, told);
      else if (size > 0) scratch.buckets.push_back({near.distance, near.node, size});
    }
  }
}

template <class Source>
void TenantTree::search_one(const SearchTask& task, std::int64_t query, const Source& source, Scratch& scratch, bool share) const {
  SearchStatistics& told = task.statistics[query];
  told = {};
  const std::int64_t padded = (cols_ + kQueryPad - 1) / kQueryPad * kQueryPad;
  const float* x = task.queries + query * padded;
  auto& buckets = scratch.buckets;
  scratch.heap.clear();
  buckets.clear();
  if (source.below(0)) scratch.heap.push_back({0.0f, 0});
  if (task.beam > 0) level_by_level(x, source, task, scratch, told);
  else best_first(x, source, task, scratch, told);
  std::sort(buckets.begin(), buckets.end(), [](const Bucket& a, const Bucket& b) { return a.distance != b.distance ? a.distance < b.distance : a.node < b.node; });
  std::int64_t total = 0;
  for (const Bucket& bucket : buckets) total += bucket.size;
  while (!buckets.empty() && (total > task.scanned_most || static_cast<std::int64_t>(buckets.size()) > task.most_buckets) && total - buckets.back().size >= task.top) {
    total -= buckets.back().size;
    buckets.pop_back();
  }
  told.buckets = static_cast<std::int64_t>(buckets.size());

  scratch.slots.clear();
  scratch.rows.clear();
  for (const Bucket& bucket : buckets) source.gather(bucket.node, scratch.slots);
  for (const std::uint32_t slot : scratch.slots) scratch.rows.push_back(row(slot));
  const std::size_t count = scratch.slots.size();
  told.vector_distances = static_cast<std::int64_t>(count);
  scratch.distances.resize(count);
  const auto measure = [&](std::size_t begin, std::size_t end, int) {
    tenant_distances(x, scratch.rows.data() + begin, static_cast<std::int64_t>(end - begin), cols_, scratch.distances.data() + begin);
  };
  if (share && count >= kLeastShared) parallel_for(count, kShare, measure);
  else measure(0, count, 0);
  const auto top = static_cast<std::size_t>(task.top);
  auto& best = scratch.best;  // a heap whose top is the worst
  best.clear();
  for (std::size_t i = 0; i < count; ++i) {
    const float distance = scratch.distances[i];
    if (best.size() == top && distance > best.front().first) continue;
    const Best one{distance, labels_[scratch.slots[i]]};
    if (best.size() == top) {
      if (!(one < best.front())) continue;
      std::pop_heap(best.begin(), best.end());
      best.pop_back();
    }
    best.push_back(one);
    std::push_heap(best.begin(), best.end());
  }
  std::sort_heap(best.begin(), best.end());
  for (std::size_t i = 0; i < top; ++i) {
    const auto at = static_cast<std::size_t>(query) * top + i;
    task.labels[at] = i < best.size() ? best[i].second : -1;
    task.distances[at] = i < best.size() ? best[i].first : std::numeric_limits<float>::infinity();
  }
}

template <class Make>
void TenantTree::search_all(const SearchTask& task, Make&& make) const {
  if (task.num_queries == 1) {
    Scratch scratch;
    return search_one(task, 0, make(0), scratch, true);
  }
  std::vector<Scratch> scratches(static_cast<std::size_t>(num_threads()));
  parallel_for(static_cast<std::size_t>(task.num_queries), 1, [&](std::size_t begin, std::size_t end, int worker) {
    for (std::size_t query = begin; query < end; ++query)
      search_one(task, static_cast<std::int64_t>(query), make(query), scratches[static_cast<std::size_t>(worker)], false);
  });
}

void TenantTree::search(const SearchTask& task) const {
  search_all(task, [&](std::size_t query) {
    const std::uint32_t tenant = task.tenants ? task.tenants[query] : task.tenant;
    return OfTenant{*this, tenant, probe(tenant)};
  });
}

void TenantTree::search_among(const SearchTask& task, const Among& among) const {
  search_all(task, [&](std::size_t) { return OfFilter{*this, among}; });
}

std::vector<std::uint32_t> TenantTree::readable(std::uint32_t tenant) const {
  const Probe found = probe(tenant);
  std::vector<std::uint32_t> slots, nodes;
  if (knows(0, found)) nodes.push_back(0);
  while (!nodes.empty()) {
    const std::uint32_t at = nodes.back();
    nodes.pop_back();
    const Node& node = nodes_[at];
    if (const List* list = find_list(at, tenant)) {
      slots.insert(slots.end(), pool_.data(list->ids), pool_.data(list->ids) + list->ids.size);
    } else if (node.leaf()) {
      for (const std::uint32_t slot : node.members)
        if (may_read(slot, tenant)) slots.push_back(slot);
    } else {
      for (std::int32_t i = 0; i < node.num_children; ++i)
        if (knows(static_cast<std::uint32_t>(node.first_child + i), found)) nodes.push_back(static_cast<std::uint32_t>(node.first_child + i));
    }
  }
  return slots;
}

// ---- reading ----

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_ends(const std::int64_t* ends, std::int64_t count, std::int64_t least, const char* what) {
  for (std::int64_t i = 0; i < count; ++i) require(ends[i] >= (i ? ends[i - 1] : 0) + least, what);
}

}  // namespace

void TenantTree::restore(const TreeState& state) {
  require(live_ == 0 && labels_.empty(), "only an empty tree is filled from a file");
  const auto count = static_cast<std::size_t>(state.count);
  require(count < 0xfffffffeu, "an index holds 2^32 - 2 vectors at most");
  require_ends(state.access_ends, state.count, 0, "the ends of permissions do not rise");
  require_ends(state.list_ends, state.num_lists, 1, "the ends of short lists do not rise");
  const auto nodes = static_cast<std::int32_t>(nodes_.size());
  for (std::size_t i = 0; i < count; ++i) {
    require(state.labels[i] >= 0 && state.owners[i] >= -1, "a vector has a label or an owner that is none");
    require(state.leaves[i] >= 0 && state.leaves[i] < nodes && nodes_[static_cast<std::size_t>(state.leaves[i])].leaf(), "a vector lies in a node that is no leaf");
  }
  std::copy_n(state.filters, filters_.size(), filters_.begin());
  labels_.assign(state.labels, state.labels + count);
  owners_.assign(state.owners, state.owners + count);
  leaf_of_.assign(state.leaves, state.leaves + count);
  access_.assign(count, {});
  const std::size_t each = chunk_rows_;
  for (std::size_t start = 0; start < count; start += each) {
    if (start + each <= count) {
      owned_.push_back(nullptr);
      chunks_.push_back(state.vectors + start * static_cast<std::size_t>(cols_));
    } else {  // the last one has room for others
      add_chunk();
      std::memcpy(owned_.back().get(), state.vectors + start * static_cast<std::size_t>(cols_), sizeof(float) * (count - start) * static_cast<std::size_t>(cols_));
    }
  }
  while (count * 4 > table_.size() * 3) table_.assign(2 * table_.size(), 0xffffffffu);
  std::vector<std::pair<std::uint32_t, std::uint32_t>> pairs;  // leaf, tenant
  for (std::uint32_t slot = 0; slot < count; ++slot) {
    const std::size_t place_in = table_place(labels_[slot]);
    require(table_[place_in] == 0xffffffffu, "two vectors have one label");
    table_[place_in] = slot;
    ++live_;
    nodes_[leaf_of_[slot]].members.push_back(slot);
    for (std::int64_t at = slot ? state.access_ends[slot - 1] : 0; at < state.access_ends[slot]; ++at) {
      const std::uint32_t tenant = state.access[at];
      Span& span = access_[slot];
      require(!span.size || pool_.data(span)[span.size - 1] < tenant, "the tenants of a vector do not rise");
      pool_.insert(span, span.size, tenant);
      if (tenant >= totals_.size()) totals_.resize(tenant + 1);
      ++totals_[tenant];
      pairs.emplace_back(leaf_of_[slot], tenant);
    }
  }
  std::sort(pairs.begin(), pairs.end());
  for (const auto& [leaf, tenant] : pairs) {
    auto& counts = nodes_[leaf].counts;
    if (counts.empty() || counts.back().tenant != tenant) counts.push_back({tenant, 0, 0});
    counts.back().count = std::min(counts.back().count + 1u, kMany);
  }
  for (Node& node : nodes_) node.counts.shrink_to_fit(), node.members.shrink_to_fit();
  for (std::int64_t i = 0; i < state.num_lists; ++i) {
    const std::int32_t node = state.list_nodes[i], tenant = state.list_tenants[i];
    require(node >= 0 && node < nodes && tenant >= 0, "a short list has a node or a tenant that is none");
    auto& lists = nodes_[static_cast<std::size_t>(node)].lists;
    require(lists.empty() || lists.back().tenant < static_cast<std::uint32_t>(tenant), "the tenants of a node's short lists do not rise");
    lists.push_back({static_cast<std::uint32_t>(tenant), {}});
    for (std::int64_t at = i ? state.list_ends[i - 1] : 0; at < state.list_ends[i]; ++at) {
      require(state.list_ids[at] < count, "a short list names no vector");
      pool_.insert(lists.back().ids, lists.back().ids.size, state.list_ids[at]);
    }
  }
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    nodes_[i].lists.shrink_to_fit();
    if (nodes_[i].leaf()) rebuild_filter(static_cast<std::uint32_t>(i));
  }
  const std::string wrong = check();
  if (!wrong.empty()) throw std::invalid_argument(wrong);
}

std::string TenantTree::check() const {
  std::vector<std::vector<std::int64_t>> reached(nodes_.size());  // pairs that lead to each list
  for (std::size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    reached[i].resize(node.lists.size());
    for (const List& list : node.lists) {
      std::vector<std::uint32_t> ids(pool_.data(list.ids), pool_.data(list.ids) + list.ids.size);
      if (ids.empty() || list.ids.size > settings_.max_list) return "a short list is empty or too long";
      std::sort(ids.begin(), ids.end());
      if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) return "a short list names a vector twice";
      for (const std::uint32_t slot : ids) {
        if (!live(slot) || !may_read(slot, list.tenant)) return "a short list names a vector that its tenant may not read";
        std::int32_t above = static_cast<std::int32_t>(leaf_of_[slot]);
        while (above > static_cast<std::int32_t>(i)) above = nodes_[static_cast<std::size_t>(above)].parent;
        if (above != static_cast<std::int32_t>(i)) return "a short list names a vector of another part of the tree";
      }
    }
  }
  for (std::uint32_t slot = 0; slot < labels_.size(); ++slot) {
    if (!live(slot)) continue;
    std::array<std::uint32_t, kMostLevels + 1> way{};
    int length = 0;
    for (std::int32_t node = static_cast<std::int32_t>(leaf_of_[slot]); node >= 0; node = nodes_[static_cast<std::size_t>(node)].parent) way[static_cast<std::size_t>(length++)] = static_cast<std::uint32_t>(node);
    for (std::uint32_t i = 0; i < access_[slot].size; ++i) {
      const std::uint32_t tenant = pool_.data(access_[slot])[i];
      const Probe found = probe(tenant);
      if (leaf_count(nodes_[leaf_of_[slot]], tenant) == 0) return "a leaf does not count a tenant";
      for (int at = length - 1; at >= 0; --at) {
        const std::uint32_t node = way[static_cast<std::size_t>(at)];
        if (!knows(node, found)) return "a filter does not know a tenant";
        if (const List* list = find_list(node, tenant)) {
          ++reached[node][static_cast<std::size_t>(list - nodes_[node].lists.data())];
          break;
        }
      }
    }
  }
  // ids of a list are different vectors that its tenant may read below its node: as many as lead there, then they are those
  for (std::size_t i = 0; i < nodes_.size(); ++i)
    for (std::size_t at = 0; at < reached[i].size(); ++at)
      if (reached[i][at] != nodes_[i].lists[at].ids.size) return "a short list lacks vectors of its tenant, or lies below another one";
  return {};
}

}  // namespace mw
