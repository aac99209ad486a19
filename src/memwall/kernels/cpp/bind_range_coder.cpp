// Python face of range_coder.h: checks shapes, sizes and distributions, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <string>
#include <vector>

#include "range_coder.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Symbols = nb::ndarray<const std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutSymbols = nb::ndarray<std::uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Starts = nb::ndarray<const std::uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Sizes = nb::ndarray<const std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutSizes = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

mw::Distributions tables_of(const Starts& starts, const mw::RangeTask& task) {
  require(starts.shape(0) == static_cast<std::size_t>(task.planes) && starts.shape(1) == static_cast<std::size_t>(task.channels),
          "distributions must be [planes, channels, symbols]");
  require(starts.shape(2) >= 1 && starts.shape(2) <= 256, "an alphabet has 1 to 256 symbols");
  const mw::Distributions tables{starts.data(), static_cast<int>(starts.shape(2))};
  require(mw::distributions_hold(tables, task.planes * task.channels), "cumulative counts must grow from 0");
  return tables;
}

template <class Array>
mw::RangeTask prepare(const Array& symbols, const Starts& starts, const std::optional<Starts>& anchors, int cut, int group) {
  mw::RangeTask task{};
  task.planes = static_cast<std::int64_t>(symbols.shape(0)), task.tokens = static_cast<std::int64_t>(symbols.shape(1));
  task.channels = static_cast<std::int64_t>(symbols.shape(2));
  require(cut >= 1 && cut <= mw::kMaxCut, "a stream has 1 to 4096 tokens");
  require(anchors ? group >= 1 : group == 0, "group must be positive with anchors, and 0 without");
  task.cut = cut, task.group = group;
  task.plain = tables_of(starts, task);
  if (anchors) task.anchors = tables_of(*anchors, task);
  return task;
}

void encode(const Symbols& symbols, const Starts& starts, const std::optional<Starts>& anchors, int cut, int group, const OutBytes& out,
            const OutSizes& sizes) {
  const mw::RangeTask task = prepare(symbols, starts, anchors, cut, group);
  const auto streams = static_cast<std::size_t>(task.num_streams());
  require(out.shape(0) == streams && out.shape(1) == task.most_bytes(), "out must be [streams, 2 * cut + 8]");
  require(sizes.shape(0) == streams, "sizes must be [streams]");
  bool good;
  {
    nb::gil_scoped_release release;
    good = mw::range_encode(task, symbols.data(), out.data(), sizes.data());
  }
  require(good, "a symbol lies outside its alphabet");
}

void decode(const Bytes& bytes, const Sizes& sizes, const Starts& starts, const std::optional<Starts>& anchors, int cut, int group,
            const OutSymbols& symbols) {
  const mw::RangeTask task = prepare(symbols, starts, anchors, cut, group);
  const auto streams = static_cast<std::size_t>(task.num_streams());
  require(sizes.shape(0) == streams, "sizes must be [streams]");
  std::vector<std::uint64_t> offsets(streams + 1, 0);
  for (std::size_t i = 0; i < streams; ++i) offsets[i + 1] = offsets[i] + sizes.data()[i];
  require(offsets[streams] == bytes.size(), "the streams' sizes must add up to the bytes");
  nb::gil_scoped_release release;
  mw::range_decode(task, bytes.data(), sizes.data(), offsets.data(), symbols.data());
}

}  // namespace

void bind_range_coder(nb::module_& m) {
  m.def("range_encode", &encode, "symbols"_a, "starts"_a, "anchors"_a.none(), "cut"_a, "group"_a, "out"_a.noconvert(), "sizes"_a.noconvert());
  m.def("range_decode", &decode, "bytes"_a, "sizes"_a, "starts"_a, "anchors"_a.none(), "cut"_a, "group"_a, "symbols"_a.noconvert());
}
