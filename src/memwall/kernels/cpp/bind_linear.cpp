// Python face of linear.h: the class Matrix, which keeps the arrays it reads alive, and the functions on it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "encode.h"
#include "linear.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Codes = nb::ndarray<const std::uint8_t, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // float16 seen as integers
template <class T>
using Rows = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

struct PyMatrix {
  mw::Matrix view;
  std::string spec;
  nb::object owners[3];  // the arrays behind view
};

PyMatrix dense_matrix(const std::string& spec, nb::object array) {
  PyMatrix m;
  m.spec = spec;
  m.owners[0] = array;
  const auto fill = [&](mw::Form form, const auto& data) {
    m.view.form = form;
    m.view.rows = static_cast<std::int64_t>(data.shape(0));
    m.view.cols = static_cast<std::int64_t>(data.shape(1));
    m.view.data = data.data();
  };
  if (spec == "float32") {
    fill(mw::Form::float32, nb::cast<Rows<const float>>(array, false));
  } else {
    require(spec == "float16" || spec == "bfloat16", "a dense matrix is float32, float16 or bfloat16, not " + spec);
    fill(spec == "float16" ? mw::Form::float16 : mw::Form::bfloat16, nb::cast<Rows<const std::uint16_t>>(array, false));
  }
  return m;
}

void check_statistics(const Halves& values, const mw::Matrix& view, const char* name) {
  require(static_cast<std::int64_t>(values.shape(0)) == view.row_tiles && static_cast<std::int64_t>(values.shape(1)) == view.groups &&
              values.shape(2) == mw::kTileRows,
          std::string(name) + " must have shape [row tiles, groups, 16] to go with the codes");
}

PyMatrix tile_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, int group, Codes codes, Halves scales,
                     std::optional<Halves> mins) {
  require(bits >= 2 && bits <= 8, "tiles hold 2 to 8 bits, got " + std::to_string(bits));
  require(group == 32 || group == 64 || group == 128, "the group of tiles is 32, 64 or 128, got " + std::to_string(group));
  PyMatrix m;
  m.spec = spec;
  mw::Matrix& view = m.view;
  view.form = mw::Form::tiles;
  view.rows = rows;
  view.cols = cols;
  view.bits = bits;
  view.group = group;
  view.row_tiles = (rows + mw::kTileRows - 1) / mw::kTileRows;
  view.groups = (cols + group - 1) / group;
  const std::size_t wanted[4] = {static_cast<std::size_t>(view.row_tiles), static_cast<std::size_t>(view.groups),
                                 static_cast<std::size_t>(group / mw::kUnitColumns), static_cast<std::size_t>(bits * mw::kLaneVectorBytes)};
  for (int i = 0; i < 4; ++i)
    require(rows >= 0 && cols >= 0 && codes.shape(i) == wanted[i], "the shape of the codes does not fit " + spec + " of these rows and columns");
  check_statistics(scales, view, "scales");
  if (mins) check_statistics(*mins, view, "mins");
  view.data = codes.data();
  view.scales = scales.data();
  view.mins = mins ? mins->data() : nullptr;
  m.owners[0] = nb::cast(codes);
  m.owners[1] = nb::cast(scales);
  if (mins) m.owners[2] = nb::cast(*mins);
  return m;
}

mw::Product product_of(const PyMatrix& m, nb::handle out, nb::handle bias, std::size_t tokens, std::size_t cols, bool accumulate) {
  require(static_cast<std::size_t>(m.view.cols) == cols,
          "linear: x has " + std::to_string(cols) + " columns, a matrix has " + std::to_string(m.view.cols));
  const auto to = nb::cast<Rows<float>>(out, false);
  require(to.shape(0) == tokens && static_cast<std::int64_t>(to.shape(1)) == m.view.rows,
          "linear: out must have shape [" + std::to_string(tokens) + ", " + std::to_string(m.view.rows) + "]");
  mw::Product product{&m.view, {to.data(), m.view.rows, nullptr, accumulate}};
  if (!bias.is_none()) {
    const auto values = nb::cast<Vector>(bias, false);
    require(static_cast<std::int64_t>(values.shape(0)) == m.view.rows, "linear: a bias needs one number per row of its matrix");
    product.output.bias = values.data();
  }
  return product;
}

// One call's products, and the Python objects whose buffers they point into.
struct Products {
  std::vector<mw::Product> products;
  std::vector<nb::object> owners;

  Products() = default;
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;
  ~Products() {
    nb::gil_scoped_acquire held;  // a step may end where the GIL is not held
    owners.clear();
  }
};

mw::Step linear(Rows<const float> x, nb::sequence matrices, nb::sequence outs, bool exact, bool accumulate, nb::object biases) {
  const std::size_t count = nb::len(matrices);
  require(nb::len(outs) == count && (biases.is_none() || nb::len(biases) == count), "linear: matrices, outs and biases differ in number");
  const auto held = std::make_shared<Products>();
  held->products.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const nb::object matrix(matrices[i]), out(outs[i]), bias = biases.is_none() ? nb::none() : nb::object(biases[i]);
    held->products.push_back(product_of(nb::cast<const PyMatrix&>(matrix), out, bias, x.shape(0), x.shape(1), accumulate));
    held->owners.insert(held->owners.end(), {matrix, out, bias});
  }
  return [held, x, exact] {
    mw::linear(x.data(), static_cast<std::int64_t>(x.shape(0)), static_cast<std::int64_t>(x.shape(1)), held->products.data(),
               held->products.size(), exact);
  };
}

void gather_rows(const PyMatrix& m, nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> ids, Rows<float> out) {
  require(out.shape(0) == ids.shape(0) && static_cast<std::int64_t>(out.shape(1)) == m.view.cols, "gather_rows: out must be [ids, cols]");
  for (std::size_t i = 0; i < ids.shape(0); ++i)
    require(ids.data()[i] >= 0 && ids.data()[i] < m.view.rows,
            "gather_rows: row " + std::to_string(ids.data()[i]) + " is outside a matrix of " + std::to_string(m.view.rows) + " rows");
  nb::gil_scoped_release release;
  mw::gather_rows(m.view, ids.data(), static_cast<std::int64_t>(ids.shape(0)), out.data());
}

// Encodes a dense matrix into tile buffers whose shapes tile_matrix() checks. False when the numbers cannot be encoded (not
// finite, or too large for a float16 scale).
template <class T, int Dimensions>
using Writable = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

bool encode_tiles(const PyMatrix& from, int bits, int group, Writable<std::uint8_t, 4> codes, Writable<std::uint16_t, 3> scales,
                  std::optional<Writable<std::uint16_t, 3>> mins) {
  require(from.view.form != mw::Form::tiles, "encode_tiles: the values must be a dense matrix");
  std::optional<Halves> read_mins;
  if (mins) read_mins = Halves(*mins);
  tile_matrix("tiles", from.view.rows, from.view.cols, bits, group, Codes(codes), Halves(scales), read_mins);
  const mw::EncodeTask task{from.view.form, from.view.data, from.view.rows, from.view.cols,          bits,
                            group,          codes.data(),   scales.data(),  mins ? mins->data() : nullptr};
  nb::gil_scoped_release release;
  return mw::encode_tiles(task);
}

}  // namespace

void bind_linear(nb::module_& m, nb::class_<Program>& program) {
  nb::class_<PyMatrix>(m, "Matrix", "A weight matrix in the form kernels read; keeps its buffers alive")
      .def_prop_ro("rows", [](const PyMatrix& self) { return self.view.rows; })
      .def_prop_ro("cols", [](const PyMatrix& self) { return self.view.cols; })
      .def_prop_ro("nbytes", [](const PyMatrix& self) { return self.view.nbytes(); })
      .def_prop_ro("spec", [](const PyMatrix& self) { return self.spec; })
      .def("__repr__", [](const PyMatrix& self) {
        return "Matrix(" + self.spec + ", rows=" + std::to_string(self.view.rows) + ", cols=" + std::to_string(self.view.cols) + ")";
      });
  m.def("dense_matrix", &dense_matrix, "spec"_a, "array"_a);
  m.def("tile_matrix", &tile_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
        "mins"_a.noconvert().none());
  bind_step(m, program, "linear", &linear, "x"_a.noconvert(), "matrices"_a, "outs"_a, nb::kw_only(), "exact"_a = false,
            "accumulate"_a = false, "biases"_a = nb::none());
  m.def("encode_tiles", &encode_tiles, "values"_a, "bits"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
        "mins"_a.noconvert().none());
  m.def("gather_rows", &gather_rows, "matrix"_a, "ids"_a.noconvert(), "out"_a.noconvert());
  m.def("linear_scratch_bytes", &mw::linear_scratch_bytes);
  m.def("linear_scratch_bytes_for", &mw::linear_scratch_bytes_for, "tokens"_a, "cols"_a, "group"_a, "threads"_a);
}
