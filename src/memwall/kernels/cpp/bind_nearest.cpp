// Python face of nearest.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "nearest.h"

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

}  // namespace

void bind_nearest(nb::module_& m) {
  m.def("nearest", &nearest, "points"_a.noconvert(), "table"_a.noconvert(), "half_norms"_a.noconvert(), "labels"_a.noconvert(), "scores"_a.noconvert());
}
