// Python face of scan.h and static8.h: checks shapes and types, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

#include "scan.h"
#include "static8.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Of float or int8; the last axis lies close, the one before may have gaps.
using Any2 = nb::ndarray<nb::ndim<2>, nb::device::cpu>;
using Any3 = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <class T, int Dimensions>
using Maybe = std::optional<Array<T, Dimensions>>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

template <class A>
bool coded(const A& array) {
  if (array.dtype() == nb::dtype<std::int8_t>()) return true;
  require(array.dtype() == nb::dtype<float>(), "numbers are float32 or int8");
  return false;
}

std::int64_t length(std::size_t n) { return static_cast<std::int64_t>(n); }

void close(const Any2& array) { require(array.shape(1) <= 1 || array.stride(1) == 1, "the last axis must be contiguous"); }

void conv_silu(Any2 x, Any2 state, Array<const float, 2> weight, Maybe<const float, 1> bias, Maybe<const float, 1> in_scale,
               Maybe<const float, 1> out_inverse, Any2 out) {
  const std::size_t channels = x.shape(1), taps = weight.shape(1);
  const bool bytes = coded(x);
  for (const Any2* array : {&x, &state, &out}) close(*array);
  require(coded(state) == bytes && coded(out) == bytes, "conv: x, state and out must have one type");
  require(bytes == in_scale.has_value() && bytes == out_inverse.has_value(), "conv: scales go with int8, and with nothing else");
  require(taps >= 2 && taps <= mw::kMaxTaps, "conv: 2 to 8 taps");
  require(weight.shape(0) == channels && state.shape(1) == channels && out.shape(1) == channels, "conv: arrays differ in channels");
  require(state.shape(0) + 1 == taps, "conv: the state holds one input less than there are taps");
  require(out.shape(0) == x.shape(0), "conv: out must have as many tokens as x");
  require(length(channels) == state.stride(0) || taps <= 2, "conv: the state must be contiguous");
  require(length(channels) == out.stride(0) || out.shape(0) <= 1, "conv: out must be contiguous");
  for (const auto* scale : {&bias, &in_scale, &out_inverse})
    require(!scale->has_value() || (*scale)->shape(0) == channels, "conv: one number per channel in bias and scales");
  const mw::ConvTask task{x.data(), x.stride(0), state.data(), weight.data(), bias ? bias->data() : nullptr,
                          in_scale ? in_scale->data() : nullptr, out_inverse ? out_inverse->data() : nullptr, out.data(),
                          length(x.shape(0)), length(channels), static_cast<int>(taps)};
  nb::gil_scoped_release release;
  mw::conv_silu(task);
}

struct Tables {
  Maybe<const std::int32_t, 1> range;
  Maybe<const float, 1> x, b, c;
  Maybe<const float, 2> state;
};

void check_tables(mw::ScanTask& task, const Tables& tables) {
  require(tables.range && tables.x && tables.b && tables.c, "scan: int8 inputs need ranges and scales");
  const std::size_t rows = tables.x->shape(0);
  require(length(tables.range->shape(0)) == task.heads * task.head_size, "scan: one range per channel");
  require(length(tables.b->shape(0)) == task.groups && length(tables.c->shape(0)) == task.groups, "scan: one scale of B and C per group");
  for (std::size_t i = 0; i < tables.range->shape(0); ++i)
    require(tables.range->data()[i] >= 0 && static_cast<std::size_t>(tables.range->data()[i]) < rows, "scan: a range without a scale");
  task.range = tables.range->data();
  task.x_scale = tables.x->data(), task.b_scale = tables.b->data(), task.c_scale = tables.c->data();
  if (!tables.state) return;
  require(tables.state->shape(0) == rows && length(tables.state->shape(1)) == task.state_size, "scan: state scales are [ranges, N]");
  task.state_scale = tables.state->data();
}

void selective_scan(Any2 x, Any2 b, Any2 c, Any2 dt, Array<const float, 1> dt_bias, Array<const float, 2> decay, Array<const float, 1> skip,
                    float dt_low, float dt_high, Any3 state, Array<float, 2> y, Array<float, 2> scratch, Maybe<float, 2> peak,
                    Maybe<const std::int32_t, 1> range, Maybe<const float, 1> x_scale, Maybe<const float, 1> b_scale,
                    Maybe<const float, 1> c_scale, float dt_scale, Maybe<const float, 2> state_scale) {
  mw::ScanTask task;
  task.heads = length(state.shape(0)), task.head_size = length(state.shape(1)), task.state_size = length(state.shape(2));
  task.tokens = length(x.shape(0));
  for (const Any2* array : {&x, &b, &c, &dt}) {
    close(*array);
    require(length(array->shape(0)) == task.tokens, "scan: inputs differ in tokens");
  }
  const bool bytes = coded(x);
  require(coded(b) == bytes && coded(c) == bytes && coded(dt) == bytes, "scan: x, b, c and dt must have one type");
  require(task.state_size >= 1 && task.state_size <= mw::kMaxState, "scan: 1 to 1024 numbers of state per channel");
  require(length(x.shape(1)) == task.heads * task.head_size, "scan: x must have heads * head_size channels");
  require(b.shape(1) == c.shape(1) && length(b.shape(1)) % task.state_size == 0, "scan: b and c have groups * state_size numbers");
  require(b.stride(0) == c.stride(0) || task.tokens <= 1, "scan: b and c must have one stride");
  task.groups = length(b.shape(1)) / task.state_size;
  require(task.groups >= 1 && task.heads % task.groups == 0, "scan: heads must divide into groups");
  require(length(dt.shape(1)) == task.heads && length(dt_bias.shape(0)) == task.heads && length(skip.shape(0)) == task.heads,
          "scan: dt, its bias and D have one number per head");
  task.vector_decay = decay.shape(1) != 1;
  require(length(decay.shape(0)) == task.heads && (!task.vector_decay || length(decay.shape(1)) == task.state_size),
          "scan: decay is [heads, 1] or [heads, state_size]");
  require(length(y.shape(0)) == task.tokens && y.shape(1) == x.shape(1), "scan: y must have the shape of x");
  require(length(scratch.shape(0)) >= mw::num_threads() && length(scratch.shape(1)) == task.scratch_size(),
          "scan: scratch is [threads, head_size * state_size padded to 16]");
  require(!peak || (peak->shape(0) == x.shape(1) && length(peak->shape(1)) == task.state_size), "scan: peak is [channels, state_size]");
  if (bytes) check_tables(task, {range, x_scale, b_scale, c_scale, state_scale});
  require(coded(state) == (task.state_scale != nullptr), "scan: the state is int8 where it has scales, else float32");
  task.x = x.data(), task.b = b.data(), task.c = c.data(), task.dt = dt.data();
  task.x_stride = x.stride(0), task.bc_stride = b.stride(0), task.dt_stride = dt.stride(0);
  task.dt_bias = dt_bias.data(), task.decay = decay.data(), task.skip = skip.data();
  task.dt_low = dt_low, task.dt_high = dt_high, task.dt_scale = dt_scale;
  task.state = state.data(), task.y = y.data(), task.scratch = scratch.data();
  task.peak = peak ? peak->data() : nullptr;
  nb::gil_scoped_release release;
  mw::selective_scan(task);
}

void gated_norm(Array<const float, 2> y, Any2 z, float z_scale, Maybe<const float, 1> weight, float eps, Array<float, 2> out,
                std::int64_t groups) {
  close(z);
  require(coded(z) == (z_scale != 0.0f), "gate: z has a scale where it is int8, else 0");
  for (int axis = 0; axis < 2; ++axis)
    require(z.shape(axis) == y.shape(axis) && out.shape(axis) == y.shape(axis), "gate: y, z and out must have one shape");
  require(!weight || weight->shape(0) == y.shape(1), "gate: weight must have as many numbers as a row of y");
  require(groups >= 1 && length(y.shape(1)) % groups == 0, "gate: rows must divide into groups");
  const mw::GateTask task{y.data(), z.data(), z.stride(0), z_scale, eps, weight ? weight->data() : nullptr, out.data(),
                          length(y.shape(0)), length(y.shape(1)), groups};
  nb::gil_scoped_release release;
  mw::gated_norm(task);
}

void hadamard(Array<float, 2> x, Array<const std::int8_t, 2> signs) {
  const std::int64_t mix = length(signs.shape(0)), width = length(x.shape(1));
  require(mix >= 1 && mix <= mw::kMaxMix && length(signs.shape(1)) == mix, "hadamard: signs are a square of 1 to 32");
  const std::int64_t power = width / mix;
  require(power >= 1 && power * mix == width && (power & (power - 1)) == 0, "hadamard: rows are signs times a power of two");
  nb::gil_scoped_release release;
  mw::hadamard(x.data(), length(x.shape(0)), width, static_cast<int>(mix), signs.data());
}

void round_static(Array<const float, 2> x, float inverse, Array<std::int8_t, 2> out) {
  require(x.shape(0) == out.shape(0) && x.shape(1) == out.shape(1), "round: out must have the shape of x");
  nb::gil_scoped_release release;
  mw::round_static(x.data(), length(x.shape(0) * x.shape(1)), inverse, out.data());
}

void static_product(Array<const std::int8_t, 2> x, float x_scale, Array<const std::uint8_t, 4> codes, Maybe<const std::uint16_t, 3> groups,
                    Array<const float, 1> channels, Maybe<float, 2> out, bool accumulate, Maybe<std::int8_t, 2> out_bytes,
                    Maybe<const float, 1> out_inverse) {
  mw::StaticProduct product;
  product.rows = length(channels.shape(0)), product.cols = length(x.shape(1)), product.tokens = length(x.shape(0));
  product.bits = groups ? 4 : 8;
  const std::int64_t tiles = (product.rows + 15) / 16, units = length(codes.shape(1) * codes.shape(2));
  require(product.tokens <= mw::kStaticTokens, "static: at most 256 tokens at a time");
  require(product.cols % 32 == 0 && units * 32 == product.cols, "static: x must have the columns of the weights, a multiple of 32");
  require(length(codes.shape(0)) == tiles && length(codes.shape(3)) == 64 * product.bits, "static: codes do not fit the rows");
  if (groups) {
    product.group = static_cast<int>(32 * codes.shape(2));
    require(length(groups->shape(0)) == tiles && groups->shape(1) == codes.shape(1) && groups->shape(2) == 16, "static: group scales do not fit");
    product.groups = groups->data();
  }
  require(out.has_value() != out_bytes.has_value(), "static: one result, float or int8");
  require(out_bytes.has_value() == out_inverse.has_value(), "static: int8 results need scales");
  require(!out || (length(out->shape(0)) == product.tokens && length(out->shape(1)) == product.rows), "static: out is [tokens, rows]");
  require(!out_bytes || (length(out_bytes->shape(0)) == product.tokens && length(out_bytes->shape(1)) == product.rows),
          "static: out is [tokens, rows]");
  require(!out_inverse || length(out_inverse->shape(0)) == product.rows, "static: one scale per row of the weights");
  product.codes = codes.data(), product.channels = channels.data(), product.x = x.data(), product.x_scale = x_scale;
  product.out = out ? out->data() : nullptr, product.accumulate = accumulate;
  product.out_bytes = out_bytes ? out_bytes->data() : nullptr, product.out_inverse = out_inverse ? out_inverse->data() : nullptr;
  nb::gil_scoped_release release;
  mw::static_product(product);
}

}  // namespace

void bind_scan(nb::module_& m) {
  m.def("conv_silu", &conv_silu, "x"_a.noconvert(), "state"_a.noconvert(), "weight"_a.noconvert(), "bias"_a.noconvert().none(),
        "in_scale"_a.noconvert().none(), "out_inverse"_a.noconvert().none(), "out"_a.noconvert());
  m.def("selective_scan", &selective_scan, "x"_a.noconvert(), "b"_a.noconvert(), "c"_a.noconvert(), "dt"_a.noconvert(),
        "dt_bias"_a.noconvert(), "decay"_a.noconvert(), "skip"_a.noconvert(), "dt_low"_a, "dt_high"_a, "state"_a.noconvert(),
        "y"_a.noconvert(), "scratch"_a.noconvert(), "peak"_a.noconvert().none() = nb::none(), "range"_a.noconvert().none() = nb::none(),
        "x_scale"_a.noconvert().none() = nb::none(), "b_scale"_a.noconvert().none() = nb::none(),
        "c_scale"_a.noconvert().none() = nb::none(), "dt_scale"_a = 1.0f, "state_scale"_a.noconvert().none() = nb::none());
  m.def("gated_norm", &gated_norm, "y"_a.noconvert(), "z"_a.noconvert(), "z_scale"_a, "weight"_a.noconvert().none(), "eps"_a,
        "out"_a.noconvert(), "groups"_a = 1);
  m.def("hadamard", &hadamard, "x"_a.noconvert(), "signs"_a.noconvert());
  m.def("round_static", &round_static, "x"_a.noconvert(), "inverse"_a, "out"_a.noconvert());
  m.def("static_product", &static_product, "x"_a.noconvert(), "x_scale"_a, "codes"_a.noconvert(), "groups"_a.noconvert().none(),
        "channels"_a.noconvert(), "out"_a.noconvert().none(), "accumulate"_a, "out_bytes"_a.noconvert().none(),
        "out_inverse"_a.noconvert().none());
}
