// How the shared tree changes: where vectors lie, who may read them, lists that split and merge, filters that are made anew.
#include "tenant_tree.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "tenant_parts.h"

MW_KERNEL_TABLE(TenantKernels, tenant_kernels)

namespace mw {

void tenant_distances(const float* query, const float* const* rows, std::int64_t count, std::int64_t cols, float* out) {
  tenant_kernels_in_use().distances(query, rows, count, cols, out);
}

namespace {

constexpr std::size_t kChunkBytes = 2 << 20;  // a large page
constexpr std::uint32_t kNone = 0xffffffffu;

// Sizes of rooms: 1, 2, 3, 4, 6, 8, 12, 16, ...
std::uint32_t room_of(int kind) {
  if (kind == 0) return 1;
  const std::uint32_t power = 1u << ((kind + 1) / 2);
  return kind % 2 == 1 ? power : power / 2 * 3;
}
int room_kind(std::uint32_t size) {
  int kind = 0;
  while (room_of(kind) < size) ++kind;
  return kind;
}

std::uint64_t mixed(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <class Entry>
auto by_tenant(std::vector<Entry>& entries, std::uint32_t tenant) {
  return std::lower_bound(entries.begin(), entries.end(), tenant, [](const Entry& one, std::uint32_t t) { return one.tenant < t; });
}
template <class Entry>
auto by_tenant(const std::vector<Entry>& entries, std::uint32_t tenant) {
  return std::lower_bound(entries.begin(), entries.end(), tenant, [](const Entry& one, std::uint32_t t) { return one.tenant < t; });
}

// Inserts; room grows by an eighth, as these are many and short.
template <class Entry>
auto put(std::vector<Entry>& entries, typename std::vector<Entry>::iterator at, const Entry& entry) {
  const auto place = at - entries.begin();
  if (entries.size() == entries.capacity()) entries.reserve(entries.size() + entries.size() / 8 + 2);
  return entries.insert(entries.begin() + place, entry);
}

}  // namespace

// ---- small arrays ----

std::uint32_t WordPool::take(int kind) {
  auto& free = free_[static_cast<std::size_t>(kind)];
  if (!free.empty()) {
    const std::uint32_t at = free.back();
    free.pop_back();
    return at;
  }
  const std::uint32_t room = room_of(kind);
  const bool alone = room > kMask + 1;
  if (alone || used_ + room > kMask + 1) {
    if (pieces_.size() >= (std::size_t{1} << (32 - kShift))) throw std::length_error("too many short lists and permissions for one index");
    const std::uint32_t size = alone ? room : kMask + 1;
    pieces_.push_back(std::make_unique<std::uint32_t[]>(size));
    words_ += size;
    const auto piece = static_cast<std::uint32_t>(pieces_.size() - 1);
    if (alone) return piece << kShift;
    open_ = piece;
    used_ = 0;
  }
  const std::uint32_t at = (open_ << kShift) + used_;
  used_ += room;
  return at;
}

void WordPool::resize(Span& span, std::uint32_t size) {
  const int before = span.size ? room_kind(span.size) : -1, after = size ? room_kind(size) : -1;
  if (before != after) {
    Span next{after < 0 ? 0 : take(after), size};
    if (span.size && size) std::memcpy(data(next), data(span), sizeof(std::uint32_t) * std::min(span.size, size));
    if (before >= 0) free_[static_cast<std::size_t>(before)].push_back(span.at);
    span = next;
  }
  span.size = size;
}

void WordPool::insert(Span& span, std::uint32_t place, std::uint32_t value) {
  const std::uint32_t size = span.size;
  resize(span, size + 1);
  std::uint32_t* words = data(span);
  std::memmove(words + place + 1, words + place, sizeof *words * (size - place));
  words[place] = value;
}

void WordPool::erase(Span& span, std::uint32_t place) {
  std::uint32_t* words = data(span);
  std::memmove(words + place, words + place + 1, sizeof *words * (span.size - place - 1));
  resize(span, span.size - 1);
}

void WordPool::clear(Span& span) { resize(span, 0); }

std::int64_t WordPool::bytes() const {
  std::int64_t all = 4 * words_;
  for (const auto& free : free_) all += static_cast<std::int64_t>(4 * free.capacity());
  return all;
}

// ---- the tree ----

TenantTree::TenantTree(const TreeSettings& settings, const float* centroids, const float* spreads, const std::int32_t* parents, std::int64_t nodes, std::int64_t cols)
    : settings_(settings), cols_(cols), nodes_(static_cast<std::size_t>(nodes)), centroids_(centroids, centroids + nodes * cols),
      spreads_(spreads, spreads + nodes),
      table_(16, kNone) {
  if (nodes < 1 || parents[0] != -1) throw std::invalid_argument("the first node of a tree is its root");
  for (std::int64_t i = 1; i < nodes; ++i) {
    const std::int32_t parent = parents[i];
    if (parent < 0 || parent >= i || parent < parents[i - 1]) throw std::invalid_argument("nodes lie level by level, children side by side");
    Node& above = nodes_[static_cast<std::size_t>(parent)];
    Node& node = nodes_[static_cast<std::size_t>(i)];
    if (above.num_children == 0) above.first_child = static_cast<std::int32_t>(i);
    ++above.num_children;
    node.parent = parent;
    node.level = above.level + 1;
    if (node.level > kMostLevels) throw std::invalid_argument("the tree has too many levels");
  }
  std::int32_t filters = 0;
  for (Node& node : nodes_)
    if (!node.leaf()) node.filter = filters++;
  filters_.resize(static_cast<std::size_t>(filters * settings.filter_words));
  // leaves from left to right: children lie behind their parent, so sizes are summed from the last node and places given from the first
  for (std::size_t i = nodes_.size(); i-- > 0;) {
    Node& node = nodes_[i];
    if (node.leaf()) node.last_leaf = 1;
    if (node.parent >= 0) nodes_[static_cast<std::size_t>(node.parent)].last_leaf += node.last_leaf;
  }
  for (Node& node : nodes_) {
    node.last_leaf += node.first_leaf;
    std::uint32_t at = node.first_leaf;
    for (std::int32_t i = 0; i < node.num_children; ++i) {
      Node& child = nodes_[static_cast<std::size_t>(node.first_child + i)];
      child.first_leaf = at;
      at += child.last_leaf;
    }
  }
  chunk_rows_ = static_cast<std::uint32_t>(std::max<std::size_t>(kChunkBytes / (sizeof(float) * static_cast<std::size_t>(cols)), 1));
}

// f(word, bit) for the bits of a filter that a tenant sets: two hashes make all (Kirsch and Mitzenmacher 2006). They are the same in
// every node, so that filters can be united.
template <class F>
void TenantTree::each_bit(std::uint32_t tenant, F&& f) const {
  std::uint64_t h = mixed(tenant);
  const std::uint64_t step = mixed(h) | 1;
  const auto bits = static_cast<unsigned __int128>(settings_.filter_words * 64);
  for (int i = 0; i < settings_.filter_hashes; ++i, h += step) {
    const auto at = static_cast<std::uint64_t>(bits * h >> 64);
    f(static_cast<std::uint32_t>(at / 64), std::uint64_t{1} << at % 64);
  }
}

TenantTree::Probe TenantTree::probe(std::uint32_t tenant) const {
  Probe found;
  found.tenant = tenant;
  std::size_t i = 0;
  each_bit(tenant, [&](std::uint32_t word, std::uint64_t bit) { found.word[i] = word, found.bit[i++] = bit; });
  return found;
}

bool TenantTree::knows(std::uint32_t at, const Probe& probe) const {
  const Node& node = nodes_[at];
  if (node.leaf()) {
    const auto one = by_tenant(node.counts, probe.tenant);
    return one != node.counts.end() && one->tenant == probe.tenant && one->known;
  }
  const std::uint64_t* words = filter(node);
  for (std::size_t i = 0; i < static_cast<std::size_t>(settings_.filter_hashes); ++i)
    if (!(words[probe.word[i]] & probe.bit[i])) return false;
  return true;
}

void TenantTree::learn(std::uint32_t at, const Probe& probe) {
  Node& node = nodes_[at];
  if (node.leaf()) {
    by_tenant(node.counts, probe.tenant)->known = 1;
    return;
  }
  std::uint64_t* words = filter(node);
  for (std::size_t i = 0; i < static_cast<std::size_t>(settings_.filter_hashes); ++i) words[probe.word[i]] |= probe.bit[i];
}

const TenantTree::List* TenantTree::find_list(std::uint32_t node, std::uint32_t tenant) const {
  const auto& lists = nodes_[node].lists;
  const auto at = by_tenant(lists, tenant);
  return at != lists.end() && at->tenant == tenant ? &*at : nullptr;
}
TenantTree::List* TenantTree::find_list(std::uint32_t node, std::uint32_t tenant) {
  return const_cast<List*>(static_cast<const TenantTree*>(this)->find_list(node, tenant));
}

void TenantTree::drop_list(std::uint32_t node, List* list) {
  pool_.clear(list->ids);
  nodes_[node].lists.erase(nodes_[node].lists.begin() + (list - nodes_[node].lists.data()));
}

std::uint32_t TenantTree::child_towards(std::uint32_t node, std::uint32_t leaf) const {
  while (nodes_[leaf].parent != static_cast<std::int32_t>(node)) leaf = static_cast<std::uint32_t>(nodes_[leaf].parent);
  return leaf;
}

std::uint32_t TenantTree::nearest_leaf(const float* x) const {
  std::vector<float> query(static_cast<std::size_t>((cols_ + kQueryPad - 1) / kQueryPad * kQueryPad));
  std::memcpy(query.data(), x, sizeof(float) * static_cast<std::size_t>(cols_));
  std::vector<const float*> rows;
  std::vector<float> distances;
  std::uint32_t node = 0;
  while (!nodes_[node].leaf()) {
    const auto count = static_cast<std::size_t>(nodes_[node].num_children);
    const auto first = static_cast<std::size_t>(nodes_[node].first_child);
    rows.resize(count);
    distances.resize(count);
    for (std::size_t i = 0; i < count; ++i) rows[i] = centroids_.data() + (first + i) * static_cast<std::size_t>(cols_);
    tenant_distances(query.data(), rows.data(), static_cast<std::int64_t>(count), cols_, distances.data());
    node = static_cast<std::uint32_t>(first + static_cast<std::size_t>(std::min_element(distances.begin(), distances.end()) - distances.begin()));
  }
  return node;
}

// ---- vectors ----

void TenantTree::Freed::operator()(float* held) const { std::free(held); }

// In pages as large as there are: rows of a list lie anywhere, and small pages would have to be looked up for each.
std::unique_ptr<float[], TenantTree::Freed> TenantTree::new_chunk() const {
  const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(cols_) * chunk_rows_;
  void* held = nullptr;
  if (posix_memalign(&held, kChunkBytes, (bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes)) throw std::bad_alloc();
#if defined(__linux__)
  madvise(held, (bytes + kChunkBytes - 1) / kChunkBytes * kChunkBytes, MADV_HUGEPAGE);
#endif
  return std::unique_ptr<float[], Freed>(static_cast<float*>(held));
}

void TenantTree::add_chunk() {
  owned_.push_back(new_chunk());
  chunks_.push_back(owned_.back().get());
}

// A file's memory is not written to: the chunk of a slot that is used again is copied first.
void TenantTree::own_chunk(std::uint32_t slot) {
  const std::size_t chunk = slot / chunk_rows_;
  if (owned_[chunk]) return;
  const auto size = chunk_rows_ * static_cast<std::size_t>(cols_);
  auto copy = new_chunk();
  std::memcpy(copy.get(), chunks_[chunk], sizeof(float) * size);
  owned_[chunk] = std::move(copy);
  chunks_[chunk] = owned_[chunk].get();
}

std::size_t TenantTree::table_place(std::int64_t label) const {
  std::size_t at = mixed(static_cast<std::uint64_t>(label)) & (table_.size() - 1);
  while (table_[at] != kNone && labels_[table_[at]] != label) at = (at + 1) & (table_.size() - 1);
  return at;
}

std::int64_t TenantTree::slot_of(std::int64_t label) const {
  if (label < 0) return -1;
  const std::uint32_t slot = table_[table_place(label)];
  return slot == kNone ? -1 : static_cast<std::int64_t>(slot);
}

void TenantTree::grow_table() {
  std::vector<std::uint32_t> before(2 * table_.size(), kNone);
  before.swap(table_);
  for (const std::uint32_t slot : before)
    if (slot != kNone) table_[table_place(labels_[slot])] = slot;
}

void TenantTree::table_add(std::uint32_t slot) {
  if (static_cast<std::size_t>(live_ + 1) * 4 > table_.size() * 3) grow_table();
  table_[table_place(labels_[slot])] = slot;
}

void TenantTree::table_remove(std::int64_t label) {
  const std::size_t mask = table_.size() - 1;
  std::size_t hole = table_place(label);
  table_[hole] = kNone;
  // those behind the hole that were pushed over it move back
  for (std::size_t at = (hole + 1) & mask; table_[at] != kNone; at = (at + 1) & mask) {
    const std::size_t home = mixed(static_cast<std::uint64_t>(labels_[table_[at]])) & mask;
    if (((at - home) & mask) < ((at - hole) & mask)) continue;
    table_[hole] = table_[at];
    table_[at] = kNone;
    hole = at;
  }
}

void TenantTree::insert(const float* x, std::int64_t label, std::int32_t owner) {
  std::uint32_t slot;
  if (free_.empty()) {
    if (labels_.size() >= kNone - 1) throw std::length_error("an index holds 2^32 - 2 vectors at most");
    slot = static_cast<std::uint32_t>(labels_.size());
    if (slot / chunk_rows_ == chunks_.size()) add_chunk();
    labels_.push_back(-1);
    owners_.push_back(-1);
    leaf_of_.push_back(0);
    access_.push_back({});
  } else {
    slot = free_.back();
    free_.pop_back();
    own_chunk(slot);
  }
  std::memcpy(owned_[slot / chunk_rows_].get() + slot % chunk_rows_ * static_cast<std::size_t>(cols_), x, sizeof(float) * static_cast<std::size_t>(cols_));
  labels_[slot] = label;
  owners_[slot] = owner;
  leaf_of_[slot] = nearest_leaf(x);
  auto& members = nodes_[leaf_of_[slot]].members;
  put(members, members.end(), slot);
  table_add(slot);
  ++live_;
}

void TenantTree::remove(std::uint32_t slot) {
  while (access_[slot].size) revoke(slot, pool_.data(access_[slot])[access_[slot].size - 1]);
  auto& members = nodes_[leaf_of_[slot]].members;
  members.erase(std::find(members.begin(), members.end(), slot));
  table_remove(labels_[slot]);
  labels_[slot] = -1;
  owners_[slot] = -1;
  free_.push_back(slot);
  --live_;
}

// ---- permissions ----

bool TenantTree::may_read(std::uint32_t slot, std::uint32_t tenant) const {
  const Span span = access_[slot];
  if (!span.size) return false;
  const std::uint32_t* tenants = pool_.data(span);
  return std::binary_search(tenants, tenants + span.size, tenant);
}

bool TenantTree::grant(std::uint32_t slot, std::uint32_t tenant) {
  Span& span = access_[slot];
  std::uint32_t place_in = 0;
  if (span.size) {
    const std::uint32_t* tenants = pool_.data(span);
    const std::uint32_t* at = std::lower_bound(tenants, tenants + span.size, tenant);
    if (at != tenants + span.size && *at == tenant) return false;
    place_in = static_cast<std::uint32_t>(at - tenants);
  }
  pool_.insert(span, place_in, tenant);
  if (tenant >= totals_.size()) totals_.resize(tenant + 1);
  ++totals_[tenant];
  auto& counts = nodes_[leaf_of_[slot]].counts;
  const auto at = by_tenant(counts, tenant);
  if (at != counts.end() && at->tenant == tenant) at->count = std::min(at->count + 1u, kMany);
  else put(counts, at, Count{tenant, 0, 1});
  place(slot, tenant, probe(tenant), 0);
  return true;
}

void TenantTree::place(std::uint32_t slot, std::uint32_t tenant, const Probe& probe, std::uint32_t node) {
  for (;; node = child_towards(node, leaf_of_[slot])) {
    if (!knows(node, probe)) {
      learn(node, probe);
      auto& lists = nodes_[node].lists;
      const auto list = put(lists, by_tenant(lists, tenant), List{tenant, {}});
      return pool_.insert(list->ids, 0, slot);
    }
    if (List* list = find_list(node, tenant)) {
      pool_.insert(list->ids, list->ids.size, slot);
      if (list->ids.size > settings_.max_list) split(node, list, probe);
      return;
    }
    if (nodes_[node].leaf()) return;  // found by a look at the leaf
  }
}

void TenantTree::split(std::uint32_t node, List* list, const Probe& probe) {
  const std::uint32_t tenant = list->tenant;
  const std::vector<std::uint32_t> ids(pool_.data(list->ids), pool_.data(list->ids) + list->ids.size);
  drop_list(node, list);
  if (nodes_[node].leaf()) return;
  for (const std::uint32_t slot : ids) place(slot, tenant, probe, child_towards(node, leaf_of_[slot]));
}

bool TenantTree::revoke(std::uint32_t slot, std::uint32_t tenant) {
  if (!may_read(slot, tenant)) return false;
  const std::uint32_t* tenants = pool_.data(access_[slot]);
  pool_.erase(access_[slot], static_cast<std::uint32_t>(std::lower_bound(tenants, tenants + access_[slot].size, tenant) - tenants));
  --totals_[tenant];
  const std::uint32_t leaf = leaf_of_[slot];
  auto& counts = nodes_[leaf].counts;
  const auto count = by_tenant(counts, tenant);
  const std::int64_t left = count->count < kMany ? count->count - 1 : counted(nodes_[leaf], tenant);
  count->count = static_cast<std::uint32_t>(std::min<std::int64_t>(left, kMany)) & kMany;
  if (left == 0) {
    counts.erase(count);
    gone_.push_back({leaf, tenant});
    mark_stale(leaf);
  }
  const Probe found = probe(tenant);
  bool held = false;
  for (std::int32_t node = static_cast<std::int32_t>(leaf); node >= 0 && !held; node = nodes_[static_cast<std::size_t>(node)].parent) {
    const auto at = static_cast<std::uint32_t>(node);
    List* list = find_list(at, tenant);
    if (!list) continue;
    held = true;
    const std::uint32_t* ids = pool_.data(list->ids);
    pool_.erase(list->ids, static_cast<std::uint32_t>(std::find(ids, ids + list->ids.size, slot) - ids));
    if (!list->ids.size) drop_list(at, list);
    merge(at, tenant, found);
  }
  if (left == 0 || (!held && relist(leaf, tenant, found))) merge(leaf, tenant, found);
  if (static_cast<std::int64_t>(gone_.size()) >= settings_.rebuild_interval) rebuild_filters();
  return true;
}

// A leaf whose list had overflowed, so that no list holds its vectors, gets one again once half of it would do; else no merge could come from there.
bool TenantTree::relist(std::uint32_t leaf, std::uint32_t tenant, const Probe& probe) {
  const std::int64_t count = leaf_count(nodes_[leaf], tenant);
  if (count == 0 || 2 * count > settings_.max_list) return false;
  auto& lists = nodes_[leaf].lists;
  const auto list = put(lists, by_tenant(lists, tenant), List{tenant, {}});
  for (const std::uint32_t slot : nodes_[leaf].members)
    if (may_read(slot, tenant)) pool_.insert(list->ids, list->ids.size, slot);
  learn(leaf, probe);
  return true;
}

// The lists of a tenant at a node and its siblings become one at their parent if that has room, and so on upwards. The node itself
// has a list, or nothing of the tenant below it.
void TenantTree::merge(std::uint32_t node, std::uint32_t tenant, const Probe& probe) {
  for (; node != 0; node = static_cast<std::uint32_t>(nodes_[node].parent)) {
    const auto parent = static_cast<std::uint32_t>(nodes_[node].parent);
    const auto first = static_cast<std::uint32_t>(nodes_[parent].first_child);
    const std::uint32_t stop = first + static_cast<std::uint32_t>(nodes_[parent].num_children);
    std::int64_t total = 0;
    for (std::uint32_t child = first; child < stop; ++child) {
      if (const List* list = find_list(child, tenant)) total += list->ids.size;
      else if (child != node && knows(child, probe) && (!nodes_[child].leaf() || leaf_count(nodes_[child], tenant) > 0)) return;
      if (total > settings_.max_list) return;
    }
    if (total == 0) continue;
    Span ids;
    for (std::uint32_t child = first; child < stop; ++child)
      if (List* list = find_list(child, tenant)) {
        for (std::uint32_t i = 0; i < list->ids.size; ++i) pool_.insert(ids, ids.size, pool_.data(list->ids)[i]);
        drop_list(child, list);
        mark_stale(child);  // it need not know the tenant any longer
      }
    auto& lists = nodes_[parent].lists;
    put(lists, by_tenant(lists, tenant), List{tenant, ids});
  }
}

// ---- filters ----

std::int64_t TenantTree::leaf_count(const Node& node, std::uint32_t tenant) const {
  const auto at = by_tenant(node.counts, tenant);
  if (at == node.counts.end() || at->tenant != tenant) return 0;
  return at->count < kMany ? at->count : counted(node, tenant);
}

std::int64_t TenantTree::counted(const Node& node, std::uint32_t tenant) const {
  return std::count_if(node.members.begin(), node.members.end(), [&](std::uint32_t slot) { return may_read(slot, tenant); });
}

void TenantTree::mark_stale(std::uint32_t node) {
  if (nodes_[node].stale) return;
  nodes_[node].stale = true;
  stale_.push_back(node);
}

// Of a leaf from its counts, of others from their children's and their own lists.
void TenantTree::rebuild_filter(std::uint32_t at) {
  Node& node = nodes_[at];
  for (Count& one : node.counts) {
    // below a list no filter knows the tenant: the first vector that comes down when the list splits must find it absent
    bool above = false;
    for (std::int32_t up = node.parent; up >= 0 && !above; up = nodes_[static_cast<std::size_t>(up)].parent)
      above = find_list(static_cast<std::uint32_t>(up), one.tenant) != nullptr;
    one.known = !above;
  }
  if (node.leaf()) return;
  const auto words = static_cast<std::size_t>(settings_.filter_words);
  std::uint64_t* held = filter(node);
  const auto set = [&](std::uint32_t word, std::uint64_t bit) { held[word] |= bit; };
  std::fill_n(held, words, 0);
  for (std::int32_t i = 0; i < node.num_children; ++i) {
    const Node& child = nodes_[static_cast<std::size_t>(node.first_child + i)];
    if (child.leaf()) {
      for (const Count& one : child.counts)
        if (one.known) each_bit(one.tenant, set);
    } else {
      const std::uint64_t* below = filter(child);
      for (std::size_t w = 0; w < words; ++w) held[w] |= below[w];
    }
  }
  for (const List& list : node.lists) each_bit(list.tenant, set);
}

void TenantTree::rebuild_filters() {
  std::vector<std::uint32_t> nodes;
  std::vector<Gone> gone;
  nodes.swap(stale_);
  gone.swap(gone_);
  for (const std::uint32_t node : nodes) nodes_[node].stale = false;
  for (std::size_t i = 0, count = nodes.size(); i < count; ++i)
    for (std::int32_t up = nodes_[nodes[i]].parent; up >= 0; up = nodes_[static_cast<std::size_t>(up)].parent) nodes.push_back(static_cast<std::uint32_t>(up));
  std::sort(nodes.begin(), nodes.end(), [](std::uint32_t a, std::uint32_t b) { return a > b; });  // children before their parents
  nodes.erase(std::unique(nodes.begin(), nodes.end()), nodes.end());
  for (const std::uint32_t node : nodes) rebuild_filter(node);
  // what filters over-reported may have kept lists apart
  for (const Gone& one : gone) {
    const Probe found = probe(one.tenant);
    if (knows(one.leaf, found)) continue;
    std::uint32_t node = one.leaf;
    while (node != 0 && !knows(static_cast<std::uint32_t>(nodes_[node].parent), found)) node = static_cast<std::uint32_t>(nodes_[node].parent);
    merge(node, one.tenant, found);
  }
}

TenantTree::Bytes TenantTree::bytes() const {
  const auto of = [](const auto& held) { return static_cast<std::int64_t>(held.capacity() * sizeof held[0]); };
  Bytes told{};
  const std::int64_t chunk = 4 * cols_ * chunk_rows_;
  for (const auto& one : owned_) (one ? told.vectors : told.mapped) += chunk;
  told.tree = of(centroids_) + of(spreads_) + of(nodes_);
  told.filters = of(filters_) + of(stale_) + of(gone_);
  for (const Node& node : nodes_) {
    told.lists += of(node.lists);
    told.access += of(node.counts);
    told.tree += of(node.members);
  }
  told.access += of(access_) + of(owners_) + of(totals_) + pool_.bytes();
  told.labels = of(labels_) + of(leaf_of_) + of(free_) + of(table_);
  for (const Node& node : nodes_)
    for (const List& list : node.lists) {
      const std::int64_t words = 4 * room_of(room_kind(list.ids.size));
      told.lists += words;
      told.access -= words;
    }
  return told;
}

}  // namespace mw
