// Python face of neurons.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "neurons.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

mw::NeuronForm form_of(const std::string& name) {
  const char* const names[] = {"float32", "float16", "bfloat16"};
  static_assert(sizeof names / sizeof *names == static_cast<std::size_t>(mw::NeuronForm::count));
  for (int i = 0; i < static_cast<int>(mw::NeuronForm::count); ++i)
    if (name == names[i]) return static_cast<mw::NeuronForm>(i);
  throw nb::value_error(("neurons are float32, float16 or bfloat16, not " + name).c_str());
}

void neurons(const std::string& form, bool gated, float threshold, Array<const std::uint8_t, 2> rows, Array<const float, 2> x, nb::object biases,
             Array<float, 2> active, Array<float, 2> out) {
  mw::NeuronTask task{};
  task.form = form_of(form);
  task.gated = gated;
  task.threshold = threshold;
  task.rows = rows.data();
  task.num_rows = static_cast<std::int64_t>(rows.shape(0));
  task.row_bytes = static_cast<std::int64_t>(rows.shape(1));
  task.width = static_cast<std::int64_t>(x.shape(1));
  task.num_tokens = static_cast<std::int64_t>(x.shape(0));
  task.x = x.data();
  task.active = active.data();
  task.out = out.data();
  const std::int64_t parts = gated ? 2 : 1;
  require(threshold >= 0.0f, "neurons: the threshold must be zero or more");
  require((parts + 1) * task.width * mw::neuron_number_bytes(task.form) <= task.row_bytes, "neurons: rows are shorter than a neuron's weights");
  require(task.row_bytes % mw::neuron_number_bytes(task.form) == 0, "neurons: rows must have a whole number of weights");
  require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "neurons: out must have the shape of x");
  require(active.shape(0) == x.shape(0) && active.shape(1) == rows.shape(0), "neurons: active must have shape [tokens, rows]");
  if (!biases.is_none()) {
    Array<const float, 2> numbers;
    require(nb::try_cast(biases, numbers, false) && numbers.shape(0) == rows.shape(0) && static_cast<std::int64_t>(numbers.shape(1)) == parts,
            "neurons: biases must be float32 [rows, 1], or [rows, 2] of gated ones");
    task.biases = numbers.data();
  }
  nb::gil_scoped_release release;
  if (task.num_rows > 0 && task.num_tokens > 0) mw::neurons(task);
}

}  // namespace

void bind_neurons(nb::module_& m) {
  m.def("neurons", &neurons, "form"_a, "gated"_a, "threshold"_a, "rows"_a.noconvert(), "x"_a.noconvert(), "biases"_a.none(), "active"_a.noconvert(),
        "out"_a.noconvert());
}
