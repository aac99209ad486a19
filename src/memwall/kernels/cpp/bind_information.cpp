// Python face of information.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "information.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

void best_shifts(Array<const float, 2> blocks, Array<const float, 1> steps, Array<const float, 1> thresholds, Array<const std::int64_t, 1> weights,
                 Array<float, 1> shifts) {
  require(blocks.shape(1) == mw::kInformationBlock, "blocks have 64 numbers");
  require(steps.shape(0) > 0 && thresholds.shape(0) < mw::kMostLevels, "there are steps, and at most 16 levels");
  require(weights.shape(0) == mw::kInformationBlock + 1, "there is a weight for each count from 0 to 64");
  require(shifts.shape(0) == blocks.shape(0), "there is one shift per block");
  const mw::ShiftSearch search{blocks.data(),     static_cast<std::int64_t>(blocks.shape(0)),  steps.data(),  static_cast<int>(steps.shape(0)),
                               thresholds.data(), static_cast<int>(thresholds.shape(0)), weights.data()};
  nb::gil_scoped_release release;
  mw::best_shifts(search, shifts.data());
}

}  // namespace

void bind_information(nb::module_& m) {
  m.def("best_shifts", &best_shifts, "blocks"_a.noconvert(), "steps"_a.noconvert(), "thresholds"_a.noconvert(), "weights"_a.noconvert(),
        "shifts"_a.noconvert());
}
