// Python face of planes.h: checks shapes and ranges, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "planes.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Words = nb::ndarray<const std::uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutWords = nb::ndarray<std::uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutScales = nb::ndarray<float, nb::c_contig, nb::device::cpu>;  // of one or two dimensions
using Sums = nb::ndarray<std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using SumsApart = nb::ndarray<std::int32_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

mw::Planes planes_of(const Words& words, std::int64_t cols) {
  mw::Planes planes{words.data(), static_cast<std::int64_t>(words.shape(0)), cols, static_cast<int>(words.shape(1))};
  require(cols >= 1, "there must be columns");
  require(planes.bits >= 1 && planes.bits <= mw::kMaxPlanes, "there are 1 to 8 planes");
  require(static_cast<std::int64_t>(words.shape(2)) == planes.row_words(), "planes must be [rows, bits, ceil(cols / 64)]");
  return planes;
}

void check_range(const mw::Planes& w, const mw::Planes& x) {
  require(w.cols * ((1 << w.bits) - 1) * ((1 << x.bits) - 1) < (std::int64_t{1} << 31), "products of so many columns do not fit in 32 bits");
}

void products(const Words& w_words, const Words& x_words, std::int64_t cols, const Sums& out) {
  const mw::Planes w = planes_of(w_words, cols), x = planes_of(x_words, cols);
  check_range(w, x);
  require(out.shape(0) == x_words.shape(0) && out.shape(1) == w_words.shape(0), "out must be [rows of x, rows of w]");
  nb::gil_scoped_release release;
  mw::plane_products(w, x, out.data());
}

void products_apart(const Words& w_words, const Words& x_words, std::int64_t cols, const SumsApart& out) {
  const mw::Planes w = planes_of(w_words, cols), x = planes_of(x_words, cols);
  require(out.shape(0) == w_words.shape(1) && out.shape(1) == x_words.shape(1) && out.shape(2) == x_words.shape(0) &&
              out.shape(3) == w_words.shape(0),
          "out must be [planes of w, planes of x, rows of x, rows of w]");
  nb::gil_scoped_release release;
  mw::plane_products_apart(w, x, out.data());
}

bool pack(const Numbers& x, const OutWords& words, const OutScales& scales) {
  const auto rows = static_cast<std::int64_t>(x.shape(0)), cols = static_cast<std::int64_t>(x.shape(1));
  const bool grouped = scales.ndim() == 2;
  require(words.shape(0) == x.shape(0) && scales.shape(0) == x.shape(0), "rows differ");
  require(scales.ndim() == 1 || (grouped && scales.shape(1) == words.shape(2)), "scales must be [rows] or [rows, ceil(cols / 64)]");
  const int bits = planes_of(Words(words), cols).bits;
  nb::gil_scoped_release release;
  return mw::pack_planes(x.data(), rows, cols, bits, grouped, words.data(), scales.data());
}

}  // namespace

void bind_planes(nb::module_& m) {
  m.def("plane_products", &products, "w"_a, "x"_a, "cols"_a, "out"_a);
  m.def("plane_products_apart", &products_apart, "w"_a, "x"_a, "cols"_a, "out"_a);
  m.def("pack_planes", &pack, "x"_a, "words"_a, "scales"_a);
}
