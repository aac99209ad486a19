// Python face of elementwise.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "elementwise.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <int Dimensions>
using In = nb::ndarray<const float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Out = nb::ndarray<float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

mw::Step rms_norm(In<2> x, In<1> weight, float eps, Out<2> out) {
  require(weight.shape(0) == x.shape(1), "rms_norm: weight must have as many numbers as a row of x");
  require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "rms_norm: out must have the shape of x");
  return [=] { mw::rms_norm(x.data(), weight.data(), eps, x.shape(0), x.shape(1), out.data()); };
}

mw::Step layer_norm(In<2> x, In<1> weight, In<1> bias, float eps, Out<2> out) {
  require(weight.shape(0) == x.shape(1) && bias.shape(0) == x.shape(1), "layer_norm: weight and bias must have as many numbers as a row of x");
  require(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(1), "layer_norm: out must have the shape of x");
  return [=] { mw::layer_norm(x.data(), weight.data(), bias.data(), eps, x.shape(0), x.shape(1), out.data()); };
}

mw::Step rope(Out<3> x, In<2> cos, In<2> sin) {
  require(cos.shape(0) == x.shape(0) && sin.shape(0) == x.shape(0), "rope: cos and sin need one row per token of x");
  require(cos.shape(1) == sin.shape(1) && 2 * cos.shape(1) <= x.shape(2), "rope: cos and sin hold at most half a head's numbers");
  return [=] { mw::rope(x.data(), cos.data(), sin.data(), x.shape(0), x.shape(1), x.shape(2), cos.shape(1)); };
}

mw::Step swiglu(In<2> gate, In<2> up, Out<2> out) {
  require(gate.shape(0) == up.shape(0) && gate.shape(1) == up.shape(1), "swiglu: gate and up must have one shape");
  require(gate.shape(0) == out.shape(0) && gate.shape(1) == out.shape(1), "swiglu: out must have the shape of gate");
  return [=] { mw::swiglu(gate.data(), up.data(), static_cast<std::int64_t>(gate.shape(0) * gate.shape(1)), out.data()); };
}

mw::Step gelu(In<2> x, bool near, Out<2> out) {
  require(x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1), "gelu: out must have the shape of x");
  return [=] { mw::gelu(x.data(), static_cast<std::int64_t>(x.shape(0) * x.shape(1)), near, out.data()); };
}

mw::Step relu(In<2> x, float threshold, Out<2> out) {
  require(x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1), "relu: out must have the shape of x");
  return [=] { mw::relu(x.data(), nullptr, threshold, static_cast<std::int64_t>(x.shape(0) * x.shape(1)), out.data()); };
}

mw::Step reglu(In<2> gate, In<2> up, float threshold, Out<2> out) {
  require(gate.shape(0) == up.shape(0) && gate.shape(1) == up.shape(1), "reglu: gate and up must have one shape");
  require(gate.shape(0) == out.shape(0) && gate.shape(1) == out.shape(1), "reglu: out must have the shape of gate");
  return [=] { mw::relu(gate.data(), up.data(), threshold, static_cast<std::int64_t>(gate.shape(0) * gate.shape(1)), out.data()); };
}

mw::Step add(In<2> x, Out<2> out) {
  require(x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1), "add: out must have the shape of x");
  return [=] {
    float* to = out.data();
    for (std::size_t i = 0; i < x.size(); ++i) to[i] += x.data()[i];
  };
}

void store_int8(In<3> x, nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> places,
                nb::ndarray<std::int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> out) {
  require(x.shape(1) == out.shape(1) && x.shape(2) + 2 == out.shape(2), "store_int8: out must have the heads of x, each two bytes longer");
  require(places.shape(0) == x.shape(0), "store_int8: every row of x needs a place");
  for (std::size_t i = 0; i < places.shape(0); ++i)
    require(places.data()[i] >= 0 && places.data()[i] < static_cast<std::int64_t>(out.shape(0)), "store_int8: a place lies outside out");
  nb::gil_scoped_release free;
  const auto size = [&](int axis) { return static_cast<std::int64_t>(x.shape(axis)); };
  mw::store_int8(x.data(), places.data(), size(0), size(1), size(2), out.data());
}

}  // namespace

void bind_elementwise(nb::module_& m, nb::class_<Program>& program) {
  bind_step(m, program, "add", &add, "x"_a.noconvert(), "out"_a.noconvert());
  bind_step(m, program, "rms_norm", &rms_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "eps"_a, "out"_a.noconvert());
  bind_step(m, program, "layer_norm", &layer_norm, "x"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert(), "eps"_a,
            "out"_a.noconvert());
  bind_step(m, program, "rope", &rope, "x"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert());
  m.def("store_int8", &store_int8, "x"_a.noconvert(), "places"_a.noconvert(), "out"_a.noconvert());
  bind_step(m, program, "swiglu", &swiglu, "gate"_a.noconvert(), "up"_a.noconvert(), "out"_a.noconvert());
  bind_step(m, program, "gelu", &gelu, "x"_a.noconvert(), "near"_a, "out"_a.noconvert());
  bind_step(m, program, "relu", &relu, "x"_a.noconvert(), "threshold"_a, "out"_a.noconvert());
  bind_step(m, program, "reglu", &reglu, "gate"_a.noconvert(), "up"_a.noconvert(), "threshold"_a, "out"_a.noconvert());
}
