// Python face of nearest.h and selection.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "nearest.h"
#include "selection.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

void nearest(Array<const float, 2> points, Array<const float, 2> table, Array<const float, 1> half_norms, Array<std::int32_t, 1> labels,
             Array<float, 1> scores) {
  require(points.shape(1) == table.shape(0), "points and centroids differ in size");
  require(table.shape(1) > 0 && table.shape(1) % mw::kNearestPad == 0, "the count of centroids must be a multiple of 16");
  require(half_norms.shape(0) == table.shape(1), "there is one length per centroid");
  require(labels.shape(0) == points.shape(0) && scores.shape(0) == points.shape(0), "there is one label and one score per point");
  const mw::NearestTask task{points.data(), table.data(), half_norms.data(), static_cast<std::int64_t>(points.shape(0)),
                             static_cast<std::int64_t>(table.shape(1)), static_cast<int>(points.shape(1)), labels.data(), scores.data()};
  nb::gil_scoped_release release;
  mw::nearest(task);
}

void selection_gram(Array<const std::int32_t, 3> slots, Array<const float, 2> hessian, Array<float, 2> gram) {
  require(hessian.shape(0) == hessian.shape(1) && hessian.shape(1) == slots.shape(2), "H has a row and a column per column of the weights");
  require(gram.shape(0) == gram.shape(1), "the form has a row and a column per entry");
  require(slots.shape(1) * slots.shape(2) < (std::size_t{1} << 32), "there are too many vectors");
  const mw::SelectionTask task{slots.data(), static_cast<std::int64_t>(slots.shape(0)), static_cast<std::int64_t>(slots.shape(1)),
                               static_cast<std::int64_t>(slots.shape(2)), hessian.data(), static_cast<std::int64_t>(gram.shape(0)), gram.data()};
  nb::gil_scoped_release release;
  bool within = true;
  for (std::size_t i = 0; i < slots.size(); ++i) within &= slots.data()[i] >= 0 && slots.data()[i] < task.entries;
  require(within, "a slot names no entry");
  mw::selection_gram(task);
}

}  // namespace

void bind_nearest(nb::module_& m) {
  m.def("selection_gram", &selection_gram, "slots"_a.noconvert(), "hessian"_a.noconvert(), "gram"_a.noconvert());
  m.def("nearest", &nearest, "points"_a.noconvert(), "table"_a.noconvert(), "half_norms"_a.noconvert(), "labels"_a.noconvert(), "scores"_a.noconvert());
}
