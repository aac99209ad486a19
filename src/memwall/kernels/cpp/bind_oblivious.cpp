// Python face of oblivious.h and path_tree.h: arrays are the caller's and held; shapes are checked here, once.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "oblivious.h"
#include "path_tree.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int dims>
using Array = nb::ndarray<T, nb::ndim<dims>, nb::c_contig, nb::device::cpu>;
using U8 = std::uint8_t;
using U32 = std::uint32_t;
using U64 = std::uint64_t;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

const char* name_of(mw::MapFailure failure) {
  switch (failure) {
    case mw::MapFailure::kPage: return "page";
    case mw::MapFailure::kFrames: return "frames";
    case mw::MapFailure::kTable: return "table";
    case mw::MapFailure::kLost: return "lost";
    default: return "";
  }
}

class PyObliviousCore {
 public:
  PyObliviousCore(U32 capacity, U32 private_bins, U32 page_slots, Array<U32, 3> table, Array<U32, 1> heads, Array<U8, 1> loads, Array<U32, 1> frame_keys,
       Array<U32, 1> frame_next, Array<U8, 2> frame_values, Array<std::int64_t, 1> counts, U64 seed)
      : table_(table), heads_(heads), loads_(loads), keys_(frame_keys), next_(frame_next), values_(frame_values), counts_(counts),
        shape_(checked(capacity, private_bins, page_slots)),
        core_(shape_, {reinterpret_cast<mw::MapEntry*>(table_.data()), heads_.data(), loads_.data(), keys_.data(), next_.data(), values_.data(), counts_.data()}, seed) {
  }

  nb::tuple plan(const Array<const U8, 1>& ops, const Array<const U32, 1>& keys, const Array<const U64, 2>& words, const Array<U32, 1>& pages,
                 const Array<U8, 1>& statuses) {
    const std::size_t n = keys.size();
    require(ops.size() == n && words.shape(0) == n && words.shape(1) == 4, "ops must be [n], words [n, 4]");
    require(pages.size() >= 2 * n && statuses.size() == n, "pages must be [2 n], statuses [n]");
    mw::MapFailure failure;
    const std::size_t found = core_.plan(ops.data(), keys.data(), words.data(), n, pages.data(), statuses.data(), failure);
    planned_ = found;
    return nb::make_tuple(found, name_of(failure));
  }

  const char* apply(const Array<const U8, 1>& ops, const Array<const U32, 1>& keys, const Array<U8, 2>& pages, const Array<U8, 2>& values) {
    require(ops.size() == keys.size() && values.shape(0) == keys.size() && values.shape(1) == shape_.value_bytes, "values must be [n, value bytes]");
    require(pages.shape(0) == planned_ && pages.shape(1) == shape_.page_bytes(), "pages must be those that were planned");
    return name_of(core_.apply(ops.data(), keys.data(), keys.size(), pages.data(), values.data()));
  }

  const char* place(const Array<const U32, 1>& keys, const Array<const U8, 2>& values, const Array<const U64, 2>& words, const Array<U32, 1>& bins) {
    const std::size_t n = keys.size();
    require(values.shape(0) == n && values.shape(1) == shape_.value_bytes, "values must be [n, value bytes]");
    require(words.shape(0) == n && words.shape(1) == 2 && bins.size() == n, "words must be [n, 2], bins [n]");
    return name_of(core_.place(keys.data(), values.data(), words.data(), n, bins.data()));
  }

  std::size_t private_items(const Array<U32, 1>& keys, const Array<U8, 2>& values) const {
    const std::size_t most = shape_.frames - static_cast<std::size_t>(counts_.data()[mw::kFreeFrames]);
    require(keys.size() >= most && values.shape(0) >= most && values.shape(1) == shape_.value_bytes, "room for all items in frames");
    return core_.private_items(keys.data(), values.data());
  }

  std::optional<U32> where(U32 key) const {
    const U32 bin = core_.where(key);
    return bin == mw::kNone ? std::nullopt : std::optional<U32>(bin);
  }

 private:
  mw::MapShape checked(U32 capacity, U32 private_bins, U32 page_slots) {
    require(heads_.size() == loads_.size() && heads_.size() >= 2, "heads and loads must be [bins], two at least");
    require(private_bins <= heads_.size() && heads_.size() < (1u << 31), "private bins must be among the bins");
    require(table_.shape(1) == mw::kBucketSlots && table_.shape(2) == 3 && table_.shape(0) >= 1, "table must be [buckets, 4, 3]");
    require(next_.size() == keys_.size() && values_.shape(0) == keys_.size() && keys_.size() < mw::kNone, "frames must agree");
    require(counts_.size() == mw::kNumMapCounts, "counts have a length of their own");
    require(page_slots >= 1 && page_slots <= 32, "a page has 1 to 32 slots");
    return {capacity, static_cast<U32>(heads_.size()), private_bins, page_slots, static_cast<U32>(values_.shape(1)),
            static_cast<U32>(table_.shape(0)), static_cast<U32>(keys_.size())};
  }

  Array<U32, 3> table_;
  Array<U32, 1> heads_;
  Array<U8, 1> loads_;
  Array<U32, 1> keys_, next_;
  Array<U8, 2> values_;
  Array<std::int64_t, 1> counts_;
  mw::MapShape shape_;
  mw::ObliviousCore core_;
  std::size_t planned_ = 0;
};

class PyPathTree {
 public:
  PyPathTree(U32 depth, U32 bucket_blocks, Array<U8, 2> stash, Array<std::int64_t, 1> count)
      : stash_(stash), count_(count), shape_(checked(depth, bucket_blocks)), tree_(shape_, stash_.data(), stash_.shape(0), count_.data()) {}

  bool access(const Array<U8, 2>& path, U32 leaf, U32 id, U32 new_leaf, const std::string& fate, const Array<U8, 1>& payload) {
    require(path.shape(0) == shape_.depth + 1 && path.shape(1) == shape_.bucket_bytes(), "path must be [depth + 1, bucket bytes]");
    require(payload.size() == shape_.payload_bytes, "a payload has a length of its own");
    require(shape_.depth == 32 || (leaf >> shape_.depth == 0 && new_leaf >> shape_.depth == 0), "a leaf lies outside the tree");
    require(fate == "keep" || fate == "write" || fate == "take", "keep, write or take");
    const auto what = fate == "keep" ? mw::PathTree::Fate::kKeep : fate == "write" ? mw::PathTree::Fate::kWrite : mw::PathTree::Fate::kTake;
    bool overflow;
    const bool found = tree_.access(path.data(), leaf, id, new_leaf, what, payload.data(), overflow);
    if (overflow) throw std::length_error("the stash is full");
    return found;
  }

  void give(U32 id, U32 leaf, const Array<const U8, 1>& payload) {
    require(payload.size() == shape_.payload_bytes, "a payload has a length of its own");
    if (!tree_.give(id, leaf, payload.data())) throw std::length_error("the stash is full");
  }

 private:
  mw::PathShape checked(U32 depth, U32 bucket_blocks) {
    require(depth < 32 && bucket_blocks >= 1, "a tree has 1 to 32 levels");
    require(stash_.shape(1) > 8 && count_.size() == 1, "stash must be [blocks, 8 + payload], count [1]");
    return {depth, bucket_blocks, static_cast<U32>(stash_.shape(1) - 8)};
  }

  Array<U8, 2> stash_;
  Array<std::int64_t, 1> count_;
  mw::PathShape shape_;
  mw::PathTree tree_;
};

nb::dict simulate(U32 items, U32 bins, U32 private_bins, std::int64_t accesses, U64 seed, const std::string& order,
                  const std::optional<Array<const U32, 1>>& keys, const std::optional<Array<const U64, 1>>& words) {
  require(items >= 1 && bins >= 2 && private_bins <= bins && accesses >= 0, "items, two bins at least, private ones among them");
  require(order == "uniform" || order == "sequential" || order == "one", "uniform, sequential or one");
  require(!keys || keys->size() == static_cast<std::size_t>(accesses), "keys must be [accesses]");
  if (keys)
    for (std::size_t i = 0; i < keys->size(); ++i) require(keys->data()[i] < items, "a key lies outside the items");
  require(!words || words->size() == 2 * static_cast<std::size_t>(items) + 4 * static_cast<std::size_t>(accesses), "two words an item, four an access");
  const auto how = order == "uniform" ? mw::KeyOrder::kUniform : order == "sequential" ? mw::KeyOrder::kSequential : mw::KeyOrder::kOneKey;
  mw::BinCounts found;
  {
    nb::gil_scoped_release release;
    found = mw::simulate_bins(items, bins, private_bins, accesses, seed, how, keys ? keys->data() : nullptr, words ? words->data() : nullptr);
  }
  nb::dict out;
  out["max_load"] = found.max_load, out["max_page_load"] = found.max_page_load, out["max_private"] = found.max_private;
  out["max_pending"] = found.max_pending, out["max_frames"] = found.max_frames;
  out["mean_pending"] = found.mean_pending, out["mean_private"] = found.mean_private;
  return out;
}

}  // namespace

void bind_oblivious(nb::module_& m) {
  nb::class_<PyObliviousCore>(m, "ObliviousCore", "The private half of an oblivious map; see oblivious.h")
      .def(nb::init<U32, U32, U32, Array<U32, 3>, Array<U32, 1>, Array<U8, 1>, Array<U32, 1>, Array<U32, 1>, Array<U8, 2>, Array<std::int64_t, 1>, U64>(),
           "capacity"_a, "private_bins"_a, "page_slots"_a, "table"_a.noconvert(), "heads"_a.noconvert(), "loads"_a.noconvert(),
           "frame_keys"_a.noconvert(), "frame_next"_a.noconvert(), "frame_values"_a.noconvert(), "counts"_a.noconvert(), "seed"_a)
      .def("plan", &PyObliviousCore::plan, "ops"_a, "keys"_a, "words"_a, "pages"_a.noconvert(), "statuses"_a.noconvert())
      .def("apply", &PyObliviousCore::apply, "ops"_a, "keys"_a, "pages"_a.noconvert(), "values"_a.noconvert())
      .def("place", &PyObliviousCore::place, "keys"_a, "values"_a, "words"_a, "bins"_a.noconvert())
      .def("private_items", &PyObliviousCore::private_items, "keys"_a.noconvert(), "values"_a.noconvert())
      .def("where", &PyObliviousCore::where, "key"_a);
  nb::class_<PyPathTree>(m, "PathTree", "A path of Path ORAM in plain bytes; see path_tree.h")
      .def(nb::init<U32, U32, Array<U8, 2>, Array<std::int64_t, 1>>(), "depth"_a, "bucket_blocks"_a, "stash"_a.noconvert(), "count"_a.noconvert())
      .def("access", &PyPathTree::access, "path"_a.noconvert(), "leaf"_a, "id"_a, "new_leaf"_a, "fate"_a, "payload"_a.noconvert())
      .def("give", &PyPathTree::give, "id"_a, "leaf"_a, "payload"_a);
  m.def("simulate_bins", &simulate, "items"_a, "bins"_a, "private_bins"_a, "accesses"_a, "seed"_a, "order"_a, "keys"_a.none(), "words"_a.none());
}
