// Python face of tenant_tree.h: checks shapes, lets go of the interpreter's lock, takes the tree's own, calls. Many may search at once;
// what changes the tree waits for them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <utility>

#include "tenant_tree.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Labels = Array<const std::int64_t, 1>;
using Tenants = Array<const std::uint32_t, 1>;
// most vectors in buckets, and of those scanned; most buckets; nodes of a beam, 0 for none
using Limits = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

template <class T, std::size_t Dimensions = 1>
nb::object owned(std::vector<T>&& values, std::array<std::size_t, Dimensions> shape = {}) {
  auto* held = new std::vector<T>(std::move(values));
  nb::capsule owner(held, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  if constexpr (Dimensions == 1) shape[0] = held->size();
  return nb::ndarray<nb::numpy, T, nb::ndim<Dimensions>>(held->data(), Dimensions, shape.data(), owner).cast();
}

class PyTenantTree {
 public:
  PyTenantTree(Array<const float, 2> centroids, Array<const float, 1> spreads, Array<const std::int32_t, 1> parents, std::int64_t max_list, std::int64_t filter_words, int filter_hashes,
       std::int64_t rebuild_interval)
      : tree_(settings(max_list, filter_words, filter_hashes, rebuild_interval, centroids, spreads, parents), centroids.data(), spreads.data(), parents.data(),
              static_cast<std::int64_t>(centroids.shape(0)), static_cast<std::int64_t>(centroids.shape(1))) {}

  // Vectors, each with a label that no other has and an owner (-1: none), who may read it; all or none. cosine: they are brought to length 1.
  void insert(Array<const float, 2> x, Labels labels, Array<const std::int32_t, 1> owners, bool cosine) {
    require(static_cast<std::int64_t>(x.shape(1)) == tree_.cols(), "vectors and centroids differ in size");
    require(labels.shape(0) == x.shape(0) && owners.shape(0) == x.shape(0), "there is one label and one owner per vector");
    nb::gil_scoped_release release;
    const std::vector<float> rows = prepared(x.data(), x.shape(0), x.shape(1), x.shape(1), cosine);
    std::unique_lock guard(lock_);
    for (std::size_t i = 0; i < labels.shape(0); ++i) {
      require(labels.data()[i] >= 0 && tree_.slot_of(labels.data()[i]) < 0, "a label is negative or in use");
      require(owners.data()[i] < static_cast<std::int32_t>(kMostTenants), "there are too many tenants");
    }
    for (std::size_t i = 0; i < labels.shape(0); ++i) {
      const std::int64_t label = labels.data()[i];
      tree_.insert(rows.data() + i * x.shape(1), label, owners.data()[i]);
      if (owners.data()[i] >= 0) tree_.grant(static_cast<std::uint32_t>(tree_.slot_of(label)), static_cast<std::uint32_t>(owners.data()[i]));
    }
  }

  // How many pairs were changed. Labels that are not there, and permissions that are as they are to be, are passed over.
  std::int64_t grant(Labels labels, Tenants tenants) {
    return each_pair(labels, tenants, [&](std::uint32_t slot, std::uint32_t tenant) { return tree_.grant(slot, tenant); });
  }
  std::int64_t revoke(Labels labels, Tenants tenants) {
    return each_pair(labels, tenants, [&](std::uint32_t slot, std::uint32_t tenant) { return tree_.revoke(slot, tenant); });
  }
  std::int64_t remove(Labels labels) {
    nb::gil_scoped_release release;
    std::unique_lock guard(lock_);
    std::int64_t removed = 0;
    for (std::size_t i = 0; i < labels.shape(0); ++i)
      if (const std::int64_t slot = tree_.slot_of(labels.data()[i]); slot >= 0) tree_.remove(static_cast<std::uint32_t>(slot)), ++removed;
    return removed;
  }
  void rebuild_filters() {
    nb::gil_scoped_release release;
    std::unique_lock guard(lock_);
    tree_.rebuild_filters();
  }

  // Labels, scores and statistics. cosine: queries are brought to length 1, and scores are cosines; else squared distances, negative.
  nb::object search(Array<const float, 2> queries, std::uint32_t tenant, std::int64_t top, Limits limits, float spread_weight, float prune, bool cosine) const {
    return searched(queries, top, limits, spread_weight, prune, cosine, [&](mw::SearchTask task) {
      task.tenant = tenant;
      tree_.search(task);
    });
  }
  nb::object search_each(Array<const float, 2> queries, Tenants tenants, std::int64_t top, Limits limits, float spread_weight, float prune, bool cosine) const {
    require(tenants.shape(0) == queries.shape(0), "there is one tenant per query");
    return searched(queries, top, limits, spread_weight, prune, cosine, [&](mw::SearchTask task) {
      task.tenants = tenants.data();
      tree_.search(task);
    });
  }
  // among: labels of the vectors that are searched; those that are none are passed over
  nb::object search_among(Array<const float, 2> queries, Labels among, std::int64_t top, Limits limits, float spread_weight, float prune, bool cosine) const {
    return searched(queries, top, limits, spread_weight, prune, cosine, [&](const mw::SearchTask& task) {
      std::vector<std::uint32_t> slots;
      for (std::size_t i = 0; i < among.shape(0); ++i)
        if (const std::int64_t slot = tree_.slot_of(among.data()[i]); slot >= 0) slots.push_back(static_cast<std::uint32_t>(slot));
      tree_.search_among(task, tree_.among(std::move(slots)));
    });
  }

  std::int64_t count() const {
    std::shared_lock guard(lock_);
    return tree_.size();
  }
  std::int64_t count_of(std::uint32_t tenant) const {
    std::shared_lock guard(lock_);
    return tree_.count_of(tenant);
  }
  // -2: no such vector, -1: no owner
  nb::object owners_of(Labels labels) const {
    std::shared_lock guard(lock_);
    std::vector<std::int32_t> found;
    for (std::size_t i = 0; i < labels.shape(0); ++i) {
      const std::int64_t slot = tree_.slot_of(labels.data()[i]);
      found.push_back(slot < 0 ? -2 : tree_.owners()[static_cast<std::size_t>(slot)]);
    }
    return owned(std::move(found));
  }
  nb::object readers(std::int64_t label) const {
    std::shared_lock guard(lock_);
    const std::int64_t slot = tree_.slot_of(label);
    require(slot >= 0, "no such vector");
    const auto span = tree_.access(static_cast<std::uint32_t>(slot));
    std::vector<std::uint32_t> found;
    if (span.size) found.assign(tree_.pool().data(span), tree_.pool().data(span) + span.size);
    return owned(std::move(found));
  }
  nb::object readable(std::uint32_t tenant) const {
    std::shared_lock guard(lock_);
    std::vector<std::int64_t> found;
    for (const std::uint32_t slot : tree_.readable(tenant)) found.push_back(tree_.labels()[slot]);
    std::sort(found.begin(), found.end());
    return owned(std::move(found));
  }
  void rows(Labels labels, Array<float, 2> out) const {
    require(out.shape(0) == labels.shape(0) && static_cast<std::int64_t>(out.shape(1)) == tree_.cols(), "there is one row per label");
    std::shared_lock guard(lock_);
    for (std::size_t i = 0; i < labels.shape(0); ++i) {
      const std::int64_t slot = tree_.slot_of(labels.data()[i]);
      require(slot >= 0, "no such vector");
      std::memcpy(out.data() + i * out.shape(1), tree_.row(static_cast<std::uint32_t>(slot)), sizeof(float) * out.shape(1));
    }
  }

  // Everything but vectors and centroids, places counted among the vectors that are there; filters are made anew first.
  nb::dict state() {
    std::unique_lock guard(lock_);
    tree_.rebuild_filters();
    std::vector<std::int64_t> labels, access_ends, list_ends;
    std::vector<std::int32_t> owners, leaves, list_nodes, list_tenants;
    std::vector<std::uint32_t> access, list_ids, place(tree_.labels().size());
    for (std::uint32_t slot = 0; slot < place.size(); ++slot) {
      if (!tree_.live(slot)) continue;
      place[slot] = static_cast<std::uint32_t>(labels.size());
      labels.push_back(tree_.labels()[slot]);
      owners.push_back(tree_.owners()[slot]);
      leaves.push_back(static_cast<std::int32_t>(tree_.leaves()[slot]));
      const auto span = tree_.access(slot);
      if (span.size) access.insert(access.end(), tree_.pool().data(span), tree_.pool().data(span) + span.size);
      access_ends.push_back(static_cast<std::int64_t>(access.size()));
    }
    const auto& nodes = tree_.nodes();
    for (std::size_t i = 0; i < nodes.size(); ++i)
      for (const auto& list : nodes[i].lists) {
        list_nodes.push_back(static_cast<std::int32_t>(i));
        list_tenants.push_back(static_cast<std::int32_t>(list.tenant));
        for (std::uint32_t at = 0; at < list.ids.size; ++at) list_ids.push_back(place[tree_.pool().data(list.ids)[at]]);
        list_ends.push_back(static_cast<std::int64_t>(list_ids.size()));
      }
    nb::dict told;
    told["labels"] = owned(std::move(labels));
    told["owners"] = owned(std::move(owners));
    told["leaves"] = owned(std::move(leaves));
    told["access_ends"] = owned(std::move(access_ends));
    told["access"] = owned(std::move(access));
    told["list_nodes"] = owned(std::move(list_nodes));
    told["list_tenants"] = owned(std::move(list_tenants));
    told["list_ends"] = owned(std::move(list_ends));
    told["list_ids"] = owned(std::move(list_ids));
    told["filters"] = owned(std::vector<std::uint64_t>(tree_.filters()));
    return told;
  }

  // vectors: read where they lie, so they must outlive the tree
  void restore(Array<const float, 2> vectors, Labels labels, Array<const std::int32_t, 1> owners, Array<const std::int32_t, 1> leaves, Labels access_ends, Tenants access,
               Array<const std::int32_t, 1> list_nodes, Array<const std::int32_t, 1> list_tenants, Labels list_ends, Tenants list_ids, Array<const std::uint64_t, 1> filters) {
    const std::size_t count = labels.shape(0), lists = list_nodes.shape(0);
    require(static_cast<std::int64_t>(vectors.shape(1)) == tree_.cols() && vectors.shape(0) == count, "there is one label per vector");
    require(owners.shape(0) == count && leaves.shape(0) == count && access_ends.shape(0) == count, "there is one owner, leaf and end per vector");
    require(list_tenants.shape(0) == lists && list_ends.shape(0) == lists, "there is one tenant and end per short list");
    require(static_cast<std::int64_t>(access.shape(0)) == (count ? access_ends.data()[count - 1] : 0), "permissions end elsewhere");
    require(static_cast<std::int64_t>(list_ids.shape(0)) == (lists ? list_ends.data()[lists - 1] : 0), "short lists end elsewhere");
    require(filters.shape(0) == tree_.filters().size(), "filters differ in size");
    for (std::size_t i = 0; i < access.shape(0); ++i) require(access.data()[i] < kMostTenants, "a permission names no tenant");
    const mw::TreeState state{vectors.data(), labels.data(), owners.data(), leaves.data(), access_ends.data(), access.data(), static_cast<std::int64_t>(count),
                              list_nodes.data(), list_tenants.data(), list_ends.data(), list_ids.data(), static_cast<std::int64_t>(lists), filters.data()};
    nb::gil_scoped_release release;
    std::unique_lock guard(lock_);
    tree_.restore(state);
  }
  std::string check() const {
    nb::gil_scoped_release release;
    std::shared_lock guard(lock_);
    return tree_.check();
  }
  nb::dict bytes() const {
    std::shared_lock guard(lock_);
    const auto held = tree_.bytes();
    nb::dict told;
    told["vectors"] = held.vectors;
    told["mapped"] = held.mapped;
    told["tree"] = held.tree;
    told["filters"] = held.filters;
    told["lists"] = held.lists;
    told["access"] = held.access;
    told["labels"] = held.labels;
    return told;
  }

 private:
  static constexpr std::uint32_t kMostTenants = mw::TenantTree::kMostTenants;

  static mw::TreeSettings settings(std::int64_t max_list, std::int64_t filter_words, int filter_hashes, std::int64_t rebuild_interval, const Array<const float, 2>& centroids,
                                   const Array<const float, 1>& spreads, const Array<const std::int32_t, 1>& parents) {
    require(centroids.shape(0) == parents.shape(0) && spreads.shape(0) == parents.shape(0) && centroids.shape(0) > 0 && centroids.shape(1) > 0, "there is one parent per centroid");
    require(centroids.shape(0) < (1u << 31), "there are too many nodes");
    require(max_list > 0 && filter_words > 0 && filter_words < (1 << 24) && filter_hashes > 0 && filter_hashes <= mw::kMostHashes && rebuild_interval > 0, "settings out of range");
    return {max_list, filter_words, filter_hashes, rebuild_interval};
  }

  template <class F>
  nb::object searched(const Array<const float, 2>& queries, std::int64_t top, const Limits& limits, float spread_weight, float prune, bool cosine, F&& search) const {
    const std::size_t count = queries.shape(0), cols = queries.shape(1), each = static_cast<std::size_t>(top);
    require(static_cast<std::int64_t>(cols) == tree_.cols(), "queries and vectors differ in size");
    require(top > 0, "ask for one vector at least");
    std::vector<std::int64_t> labels(count * each);
    std::vector<float> scores(count * each);
    std::vector<mw::SearchStatistics> told(count);
    {
      nb::gil_scoped_release release;
      const std::vector<float> asked = prepared(queries.data(), count, cols, (cols + mw::kQueryPad - 1) / mw::kQueryPad * mw::kQueryPad, cosine);
      const auto& [found_most, scanned_most, most_buckets, beam] = limits;
      const mw::SearchTask task{asked.data(), nullptr, 0, static_cast<std::int64_t>(count), top, found_most, scanned_most, spread_weight, prune, most_buckets, beam,
                                labels.data(), scores.data(), told.data()};
      {
        std::shared_lock guard(lock_);
        if (count) search(task);
      }
      // |q - x|^2 = 2 - 2 q.x of vectors of length 1
      for (float& one : scores) one = cosine ? 1.0f - one / 2 : -one;
    }
    std::vector<std::int64_t> statistics;
    for (const auto& one : told) statistics.insert(statistics.end(), {one.nodes, one.centroid_distances, one.vector_distances, one.buckets});
    return nb::make_tuple(owned<std::int64_t, 2>(std::move(labels), {count, each}), owned<float, 2>(std::move(scores), {count, each}),
                          owned<std::int64_t, 2>(std::move(statistics), {count, std::size_t{mw::kNumStatistics}}));
  }

  // Rows with zeros up to so many columns, checked, and of length 1 where cosines are asked for.
  static std::vector<float> prepared(const float* queries, std::size_t count, std::size_t cols, std::size_t padded, bool cosine) {
    std::vector<float> asked(count * padded);
    for (std::size_t i = 0; i < count; ++i) {
      const float* from = queries + i * cols;
      float* to = asked.data() + i * padded;
      double squares = 0;
      for (std::size_t c = 0; c < cols; ++c) squares += static_cast<double>(from[c]) * from[c];
      require(std::isfinite(squares) && (!cosine || squares > 0), "a vector has numbers that are none, or no direction");
      const float scale = cosine ? static_cast<float>(1.0 / std::sqrt(squares)) : 1.0f;
      for (std::size_t c = 0; c < cols; ++c) to[c] = from[c] * scale;
    }
    return asked;
  }

  template <class F>
  std::int64_t each_pair(const Labels& labels, const Tenants& tenants, F&& f) {
    require(labels.shape(0) == tenants.shape(0), "there is one tenant per label");
    for (std::size_t i = 0; i < tenants.shape(0); ++i) require(tenants.data()[i] < kMostTenants, "there are too many tenants");
    nb::gil_scoped_release release;
    std::unique_lock guard(lock_);
    std::int64_t changed = 0;
    for (std::size_t i = 0; i < labels.shape(0); ++i)
      if (const std::int64_t slot = tree_.slot_of(labels.data()[i]); slot >= 0) changed += f(static_cast<std::uint32_t>(slot), tenants.data()[i]);
    return changed;
  }

  mw::TenantTree tree_;
  mutable std::shared_mutex lock_;
};

}  // namespace

void bind_tenant_tree(nb::module_& m) {
  nb::class_<PyTenantTree>(m, "TenantTree", "Vectors that many tenants share, in one tree of clusters")
      .def(nb::init<Array<const float, 2>, Array<const float, 1>, Array<const std::int32_t, 1>, std::int64_t, std::int64_t, int, std::int64_t>(), "centroids"_a.noconvert(),
           "spreads"_a.noconvert(), "parents"_a.noconvert(),
           "max_list"_a, "filter_words"_a, "filter_hashes"_a, "rebuild_interval"_a)
      .def("insert", &PyTenantTree::insert, "vectors"_a.noconvert(), "labels"_a.noconvert(), "owners"_a.noconvert(), "cosine"_a)
      .def("grant", &PyTenantTree::grant, "labels"_a.noconvert(), "tenants"_a.noconvert())
      .def("revoke", &PyTenantTree::revoke, "labels"_a.noconvert(), "tenants"_a.noconvert())
      .def("remove", &PyTenantTree::remove, "labels"_a.noconvert())
      .def("rebuild_filters", &PyTenantTree::rebuild_filters)
      .def("search", &PyTenantTree::search, "queries"_a.noconvert(), "tenant"_a, "top"_a, "limits"_a, "spread_weight"_a, "prune"_a, "cosine"_a)
      .def("search_each", &PyTenantTree::search_each, "queries"_a.noconvert(), "tenants"_a.noconvert(), "top"_a, "limits"_a, "spread_weight"_a, "prune"_a, "cosine"_a)
      .def("search_among", &PyTenantTree::search_among, "queries"_a.noconvert(), "among"_a.noconvert(), "top"_a, "limits"_a, "spread_weight"_a, "prune"_a, "cosine"_a)
      .def("count", &PyTenantTree::count)
      .def("count_of", &PyTenantTree::count_of, "tenant"_a)
      .def("owners_of", &PyTenantTree::owners_of, "labels"_a.noconvert())
      .def("readers", &PyTenantTree::readers, "label"_a)
      .def("readable", &PyTenantTree::readable, "tenant"_a)
      .def("rows", &PyTenantTree::rows, "labels"_a.noconvert(), "out"_a.noconvert())
      .def("state", &PyTenantTree::state)
      .def("restore", &PyTenantTree::restore, "vectors"_a.noconvert(), "labels"_a.noconvert(), "owners"_a.noconvert(), "leaves"_a.noconvert(), "access_ends"_a.noconvert(),
           "access"_a.noconvert(), "list_nodes"_a.noconvert(), "list_tenants"_a.noconvert(), "list_ends"_a.noconvert(), "list_ids"_a.noconvert(), "filters"_a.noconvert(),
           nb::keep_alive<1, 2>())
      .def("check", &PyTenantTree::check, "What is wrong in the tree; empty if nothing")
      .def("bytes", &PyTenantTree::bytes);
}
