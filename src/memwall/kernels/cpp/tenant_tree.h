// An index of vectors that many tenants share: one tree of clusters and one copy of the vectors, in which every tenant's own tree
// lies as a part of it that ends earlier. A node knows by a Bloom filter which tenants have vectors below it, and holds the few
// that a tenant has there as a short list; the tenant's tree ends at such a node.
//
// For a tenant t and a vector v it may read, exactly one holds: v stands in one short list of t, at a node above v's leaf or there;
// or no node on the way from the root to v's leaf has a list of t, and v is found by a look at the leaf and at who may read what.
// Filters of the nodes on that way, down to the list, know t. Below a list they need not.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace mw {

constexpr std::int64_t kQueryPad = 16;  // queries have columns up to a multiple of this, those that are missing zero
constexpr int kMostHashes = 32;         // bits of a filter that one tenant sets
constexpr int kMostLevels = 64;

struct TenantKernels {
  // squared distances of the query to rows of `cols` numbers; the query is padded with zeros
  void (*distances)(const float* query, const float* const* rows, std::int64_t count, std::int64_t cols, float* out);
};

// Many small arrays of 32-bit words in a few large pieces. An array's room follows from its size, so it is told by 8 bytes.
class WordPool {
 public:
  struct Span {
    std::uint32_t at = 0, size = 0;
  };
  std::uint32_t* data(Span span) { return pieces_[span.at >> kShift].get() + (span.at & kMask); }
  const std::uint32_t* data(Span span) const { return pieces_[span.at >> kShift].get() + (span.at & kMask); }
  void insert(Span& span, std::uint32_t place, std::uint32_t value);
  void erase(Span& span, std::uint32_t place);
  void clear(Span& span);
  std::int64_t bytes() const;

 private:
  static constexpr int kShift = 14;
  static constexpr std::uint32_t kMask = (1u << kShift) - 1;
  void resize(Span& span, std::uint32_t size);
  std::uint32_t take(int kind);

  std::vector<std::unique_ptr<std::uint32_t[]>> pieces_;
  std::int64_t words_ = 0;
  std::uint32_t open_ = 0, used_ = kMask + 1;  // the piece that is being cut, and how far
  std::array<std::vector<std::uint32_t>, 64> free_;
};

struct TreeSettings {
  std::int64_t max_list = 128;          // ids of a short list
  std::int64_t filter_words = 0;        // of 64 bits
  int filter_hashes = 0;
  std::int64_t rebuild_interval = 100;  // tenants that left a leaf for good, after which filters are made anew
};

struct SearchStatistics {
  std::int64_t nodes = 0, centroid_distances = 0, vector_distances = 0, buckets = 0;
};
constexpr int kNumStatistics = 4;

struct SearchTask {
  const float* queries;          // [num_queries, padded cols]
  const std::uint32_t* tenants;  // [num_queries], or null: all are `tenant`
  std::uint32_t tenant;
  std::int64_t num_queries, top;
  std::int64_t found_most, scanned_most;  // vectors in buckets at which the search of the tree ends, and of those scanned
  float spread_weight;       // times a node's spread is taken off its distance
  float prune;               // the search of the tree ends where distances are so many times that of the nearest bucket
  std::int64_t most_buckets;
  std::int64_t beam;         // nodes of a level that are gone on from; 0: the nearest node first, whatever its level
  std::int64_t* labels;                   // [num_queries, top], -1 where there are no more
  float* distances;                       // squared; infinity there
  SearchStatistics* statistics;           // [num_queries]
};

// Vectors that a filter lets through, in the order in which the tree's leaves lie: what is below a node are neighbours in it, so the
// array is a tree of its own, made for one question.
struct Among {
  std::vector<std::uint32_t> leaves, slots;  // places of leaves from left to right, rising
};

// What a file has. Vectors stay where they are; all else is copied.
struct TreeState {
  const float* vectors;  // [count, cols]
  const std::int64_t* labels;
  const std::int32_t *owners, *leaves;
  const std::int64_t* access_ends;  // of the tenants of each vector, in `access`
  const std::uint32_t* access;
  std::int64_t count;
  const std::int32_t *list_nodes, *list_tenants;
  const std::int64_t* list_ends;
  const std::uint32_t* list_ids;  // places of vectors
  std::int64_t num_lists;
  const std::uint64_t* filters;  // [nodes that are no leaves, words]
};

class TenantTree {
 public:
  using Span = WordPool::Span;
  struct List {
    std::uint32_t tenant;
    Span ids;
  };
  // A leaf that has more of a tenant's vectors than `count` can say is counted when it must be. `known` is what the leaf's filter says:
  // it need not be stored, as the leaf has all its tenants here.
  struct Count {
    std::uint32_t tenant : 20, known : 1, count : 11;
  };
  static constexpr std::uint32_t kMostTenants = 1u << 20, kMany = (1u << 11) - 1;
  struct Node {
    std::int32_t parent = -1, first_child = 0, num_children = 0, level = 0;
    std::uint32_t first_leaf = 0, last_leaf = 0;  // below it: places from left to right, the last one excluded
    std::vector<List> lists;              // in the order of tenants
    std::vector<std::uint32_t> members;   // of a leaf
    std::vector<Count> counts;            // of a leaf, in the order of tenants: vectors that each may read there
    std::int32_t filter = -1;             // which of the filters; a leaf has none
    bool stale = false;                   // its filter may know tenants that it need not
    bool leaf() const { return num_children == 0; }
  };

  TenantTree(const TreeSettings& settings, const float* centroids, const float* spreads, const std::int32_t* parents, std::int64_t nodes, std::int64_t cols);

  std::int64_t cols() const { return cols_; }
  std::int64_t size() const { return live_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  const std::vector<std::int64_t>& labels() const { return labels_; }
  const std::vector<std::int32_t>& owners() const { return owners_; }
  const std::vector<std::uint32_t>& leaves() const { return leaf_of_; }
  const std::vector<std::uint64_t>& filters() const { return filters_; }
  const WordPool& pool() const { return pool_; }
  Span access(std::uint32_t slot) const { return access_[slot]; }
  bool live(std::uint32_t slot) const { return labels_[slot] >= 0; }
  const float* row(std::uint32_t slot) const { return chunks_[slot / chunk_rows_] + slot % chunk_rows_ * static_cast<std::size_t>(cols_); }
  bool may_read(std::uint32_t slot, std::uint32_t tenant) const;
  std::int64_t count_of(std::uint32_t tenant) const { return tenant < totals_.size() ? totals_[tenant] : 0; }
  std::int64_t slot_of(std::int64_t label) const;  // -1: no such vector

  // label: not in use; owner: -1 for none
  void insert(const float* x, std::int64_t label, std::int32_t owner);
  bool grant(std::uint32_t slot, std::uint32_t tenant);   // false: it may already
  bool revoke(std::uint32_t slot, std::uint32_t tenant);  // false: it may not
  void remove(std::uint32_t slot);
  void rebuild_filters();  // of nodes that are stale, and of those above
  void search(const SearchTask& task) const;
  void search_among(const SearchTask& task, const Among& among) const;
  Among among(std::vector<std::uint32_t> slots) const;
  std::vector<std::uint32_t> readable(std::uint32_t tenant) const;  // slots, as the tree leads to them
  void restore(const TreeState& state);
  std::string check() const;  // what is wrong in the tree, empty if nothing

  struct Bytes {
    std::int64_t vectors, mapped, tree, filters, lists, access, labels;
  };
  Bytes bytes() const;

 private:
  struct Probe {
    std::uint32_t tenant;
    std::array<std::uint32_t, kMostHashes> word;
    std::array<std::uint64_t, kMostHashes> bit;
  };
  struct Scratch;
  struct Gone {
    std::uint32_t leaf, tenant;
  };

  struct Freed {
    void operator()(float* held) const;
  };

  Probe probe(std::uint32_t tenant) const;
  bool knows(std::uint32_t node, const Probe& probe) const;
  void learn(std::uint32_t node, const Probe& probe);
  std::uint64_t* filter(const Node& node) { return filters_.data() + static_cast<std::size_t>(node.filter * settings_.filter_words); }
  const std::uint64_t* filter(const Node& node) const { return filters_.data() + static_cast<std::size_t>(node.filter * settings_.filter_words); }
  template <class F>
  void each_bit(std::uint32_t tenant, F&& f) const;
  List* find_list(std::uint32_t node, std::uint32_t tenant);
  const List* find_list(std::uint32_t node, std::uint32_t tenant) const;
  void drop_list(std::uint32_t node, List* list);
  std::uint32_t child_towards(std::uint32_t node, std::uint32_t leaf) const;
  std::uint32_t nearest_leaf(const float* x) const;
  void place(std::uint32_t slot, std::uint32_t tenant, const Probe& probe, std::uint32_t node);
  void split(std::uint32_t node, List* list, const Probe& probe);
  void merge(std::uint32_t node, std::uint32_t tenant, const Probe& probe);
  bool relist(std::uint32_t leaf, std::uint32_t tenant, const Probe& probe);
  void mark_stale(std::uint32_t node);
  void rebuild_filter(std::uint32_t node);
  std::int64_t leaf_count(const Node& node, std::uint32_t tenant) const;
  std::int64_t counted(const Node& node, std::uint32_t tenant) const;
  std::unique_ptr<float[], Freed> new_chunk() const;
  void add_chunk();
  void own_chunk(std::uint32_t slot);
  void table_add(std::uint32_t slot);
  void table_remove(std::int64_t label);
  std::size_t table_place(std::int64_t label) const;
  void grow_table();
  struct OfTenant;
  struct OfFilter;
  template <class Source>
  void expand(const float* query, const Node& node, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const;
  template <class Source>
  void best_first(const float* query, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const;
  template <class Source>
  void level_by_level(const float* query, const Source& source, const SearchTask& task, Scratch& scratch, SearchStatistics& told) const;
  template <class Source>
  void search_one(const SearchTask& task, std::int64_t query, const Source& source, Scratch& scratch, bool share) const;
  template <class Make>
  void search_all(const SearchTask& task, Make&& make) const;

  TreeSettings settings_;
  std::int64_t cols_;
  std::vector<Node> nodes_;
  std::vector<float> centroids_, spreads_;
  std::vector<std::uint64_t> filters_;
  WordPool pool_;
  std::vector<std::uint32_t> stale_;  // nodes
  std::vector<Gone> gone_;            // since filters were made anew
  std::vector<std::int64_t> totals_;  // vectors by tenant

  std::uint32_t chunk_rows_ = 1;
  std::vector<const float*> chunks_;
  std::vector<std::unique_ptr<float[], Freed>> owned_;  // null: the chunk lies in memory of someone else
  std::vector<std::int64_t> labels_;             // -1: the slot is free
  std::vector<std::int32_t> owners_;
  std::vector<std::uint32_t> leaf_of_;
  std::vector<Span> access_;  // tenants, rising
  std::vector<std::uint32_t> free_;
  std::vector<std::uint32_t> table_;  // slots by a hash of their labels
  std::int64_t live_ = 0;
};

}  // namespace mw
