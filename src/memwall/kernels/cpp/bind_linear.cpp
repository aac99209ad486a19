// Python face of linear.h: the class Matrix, which keeps the arrays it reads alive, and the functions on it.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind_matrix.h"
#include "encode.h"
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

// A matrix of tiles without scales, its codes checked.
PyMatrix codes_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, int group, const Codes& codes) {
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
  view.data = codes.data();
  m.owners[0] = nb::cast(codes);
  return m;
}

template <class T, int Dimensions>
const T* part_of(PyMatrix& m, int owner, const nb::object& array, std::initializer_list<std::int64_t> shape, const char* name) {
  const auto values = nb::cast<nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>>(array, false);
  int axis = 0;
  for (const std::int64_t wanted : shape)
    require(static_cast<std::int64_t>(values.shape(axis++)) == wanted, std::string(name) + " have another shape than the matrix asks for");
  m.owners[owner] = array;
  return values.data();
}

// order: the column at each stored place, of 32 bits above 65,536 columns, or None; the caller has checked that it names each once.
PyMatrix tile_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, int group, Codes codes, Halves scales,
                     std::optional<Halves> mins, nb::object order) {
  require(bits >= 2 && bits <= 8, "tiles hold 2 to 8 bits, got " + std::to_string(bits));
  PyMatrix m = codes_matrix(spec, rows, cols, bits, group, codes);
  check_statistics(scales, m.view, "scales");
  if (mins) check_statistics(*mins, m.view, "mins");
  m.view.scales = scales.data();
  m.view.mins = mins ? mins->data() : nullptr;
  m.owners[1] = nb::cast(scales);
  if (mins) m.owners[2] = nb::cast(*mins);
  m.view.wide = cols > 65536;
  if (!order.is_none())
    m.view.order = m.view.wide ? static_cast<const void*>(part_of<std::uint32_t, 1>(m, 3, order, {cols}, "order"))
                               : static_cast<const void*>(part_of<std::uint16_t, 1>(m, 3, order, {cols}, "order"));
  return m;
}

// scales: float32 [rows], or float16 [rows, words of a row].
PyMatrix plane_matrix(const std::string& spec, std::int64_t cols, int activation_bits, nb::ndarray<const std::uint64_t, nb::ndim<3>, nb::c_contig, nb::device::cpu> words,
                      nb::object scales) {
  PyMatrix m;
  m.spec = spec;
  mw::Matrix& view = m.view;
  view.form = mw::Form::planes;
  view.rows = static_cast<std::int64_t>(words.shape(0));
  view.cols = cols;
  view.bits = static_cast<int>(words.shape(1));
  view.activation_bits = activation_bits;
  require(view.bits >= 1 && view.bits <= mw::kMaxPlanes && activation_bits >= 1 && activation_bits <= mw::kMaxPlanes, "there are 1 to 8 planes");
  require(cols >= 1 && static_cast<std::int64_t>(words.shape(2)) == view.planes().row_words(), "planes must be [rows, bits, ceil(cols / 64)]");
  require(cols * ((1 << view.bits) - 1) * ((1 << activation_bits) - 1) < (std::int64_t{1} << 31), "products of so many columns do not fit in 32 bits");
  view.data = words.data();
  m.owners[0] = nb::cast(words);
  Vector by_row;
  view.scale_form = nb::try_cast(scales, by_row, false) ? mw::ScaleForm::single : mw::ScaleForm::half;
  view.scales = view.plane_groups() ? static_cast<const void*>(part_of<std::uint16_t, 2>(m, 1, scales, {view.rows, view.planes().row_words()}, "scales"))
                                    : static_cast<const void*>(part_of<float, 1>(m, 1, scales, {view.rows}, "scales"));
  return m;
}

// Bilevel tiles; order and the three arrays of outliers may be None. The caller has checked what the indices point at.
PyMatrix bilevel_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, nb::object codes, nb::object statistics,
                        nb::object order, nb::object row_offsets, nb::object columns, nb::object values) {
  require(bits >= 1 && bits <= 8 && rows >= 0 && cols >= 0, "bilevel tiles hold 1 to 8 bits");
  PyMatrix m;
  m.spec = spec;
  mw::Matrix& view = m.view;
  view.form = mw::Form::bilevel;
  view.rows = rows;
  view.cols = cols;
  view.bits = bits;
  view.group = mw::kUnitColumns;
  view.row_tiles = (rows + mw::kTileRows - 1) / mw::kTileRows;
  view.groups = (cols + mw::kUnitColumns - 1) / mw::kUnitColumns;
  view.wide = cols > 65536;
  view.data = part_of<std::uint8_t, 3>(m, 0, codes, {view.row_tiles, view.groups, bits * mw::kLaneVectorBytes}, "codes");
  view.scales = part_of<std::uint8_t, 3>(m, 1, statistics, {view.row_tiles, 2 * view.groups, mw::kBilevelStatisticBytes}, "statistics");
  const auto indices = [&](int owner, const nb::object& array, std::int64_t count, const char* name) -> const void* {
    if (view.wide) return part_of<std::uint32_t, 1>(m, owner, array, {count}, name);
    return part_of<std::uint16_t, 1>(m, owner, array, {count}, name);
  };
  if (!order.is_none()) view.order = indices(2, order, cols, "order");
  if (!row_offsets.is_none()) {
    view.row_offsets = part_of<std::uint32_t, 1>(m, 3, row_offsets, {rows + 1}, "row offsets");
    const std::int64_t count = view.row_offsets[rows];
    view.outlier_columns = indices(4, columns, count, "columns of outliers");
    view.outlier_values = part_of<std::uint16_t, 1>(m, 5, values, {count}, "values of outliers");
  }
  return m;
}

// Fills one part of a matrix of codebooks from its arrays; `owner` is the first of its three places.
void fill_codebooks(PyMatrix& m, mw::Codebooks& part, int owner, std::int64_t first_col, std::int64_t cols, const nb::tuple& sizes,
                    const nb::object& indices, const nb::object& centroids, const nb::object& residuals) {
  part.vector = nb::cast<int>(sizes[0]);
  part.main_bits = nb::cast<int>(sizes[1]);
  part.residual_bits = nb::cast<int>(sizes[2]);
  part.groups = nb::cast<std::int64_t>(sizes[3]);
  const auto block = nb::cast<std::int64_t>(sizes[4]);  // in rows
  require(part.vector >= 1 && part.vector <= mw::kMostVector && part.main_bits >= 0 && part.residual_bits >= 0 && part.bits() >= 1 && part.bits() <= 32 &&
              part.main_bits <= 24 && part.residual_bits <= 24 && part.groups >= 1,
          "codebooks have vectors of 1 to 16 rows and indices of 1 to 32 bits");
  require(block >= 0 && block % part.vector == 0, "blocks of rows that share codebooks are of whole vectors");
  part.block = block / part.vector;
  part.first_col = first_col;
  part.cols = cols;
  part.vector_rows = (m.view.rows + part.vector - 1) / part.vector;
  part.words = ((cols + part.groups - 1) / part.groups * part.bits() + 31) / 32;
  constexpr std::int64_t kIndexTail = mw::Codebooks::kIndexTailBytes / 4, kBookTail = mw::Codebooks::kBookTailBytes / 2;
  part.indices = part_of<std::uint32_t, 1>(m, owner, indices, {part.groups * part.vector_rows * part.words + kIndexTail}, "indices");
  part.centroids = part_of<std::uint16_t, 1>(m, owner + 1, centroids, {(part.blocks() * part.groups << part.main_bits) * part.vector + kBookTail}, "centroids");
  if (part.residual_bits)
    part.residuals = part_of<std::uint16_t, 1>(m, owner + 2, residuals, {(part.blocks() * part.groups << part.residual_bits) * part.vector + kBookTail}, "residuals");
}

// Sizes are (rows of a vector, bits of the main and of the residual index, groups, rows that share books or 0); arrays that a matrix lacks are None. The
// caller has checked `order`; indices are in range whatever they are, as codebooks are as long as their bits count.
PyMatrix codebook_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, nb::tuple sizes, nb::object indices, nb::object centroids,
                         nb::object residuals, std::int64_t outliers, nb::tuple outlier_sizes, nb::object outlier_indices, nb::object outlier_centroids,
                         nb::object order, nb::object scale_and_offset) {
  require(rows >= 0 && cols >= 0 && outliers >= 0 && outliers <= cols, "codebooks have no negative sizes");
  PyMatrix m;
  m.spec = spec;
  m.view.form = mw::Form::codebook;
  m.view.rows = rows;
  m.view.cols = cols;
  m.view.wide = cols > 65536;
  m.codebooks = std::make_shared<mw::CodebookMatrix>();
  m.view.codebooks = m.codebooks.get();
  fill_codebooks(m, m.codebooks->rest, 0, outliers, cols - outliers, sizes, indices, centroids, residuals);
  if (outliers) fill_codebooks(m, m.codebooks->outliers, 3, 0, outliers, outlier_sizes, outlier_indices, outlier_centroids, nb::none());
  if (!order.is_none())
    m.view.order = m.view.wide ? static_cast<const void*>(part_of<std::uint32_t, 1>(m, 6, order, {cols}, "order"))
                               : static_cast<const void*>(part_of<std::uint16_t, 1>(m, 6, order, {cols}, "order"));
  if (!scale_and_offset.is_none()) {
    m.codebooks->scale = part_of<std::uint16_t, 2>(m, 7, scale_and_offset, {2, cols}, "scale and offset");
    m.codebooks->offset = m.codebooks->scale + cols;
  }
  return m;
}

// Signs and masks: either salient columns and an order, or steps, starts and low bits; the caller has checked what they point at.
PyMatrix masked_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, Codes codes, nb::object params, nb::object salient,
                       nb::object order, nb::object steps, nb::object starts, nb::object rest) {
  PyMatrix m = codes_matrix(spec, rows, cols, 2, mw::kMaskedGroup, codes);
  mw::Matrix& view = m.view;
  view.form = mw::Form::masked;
  view.wide = cols > 65536;
  const std::int64_t num_params = rest.is_none() ? mw::kBillmParams : mw::kPbLlmParams;
  view.scales = part_of<std::uint16_t, 4>(m, 1, params, {view.row_tiles, view.groups, num_params, mw::kTileRows}, "params");
  if (rest.is_none()) {
    view.salient = part_of<std::uint8_t, 1>(m, 2, salient, {view.groups}, "salient columns");
    if (view.wide) view.order = part_of<std::uint32_t, 1>(m, 3, order, {cols}, "order");
    else view.order = part_of<std::uint16_t, 1>(m, 3, order, {cols}, "order");
    return m;
  }
  view.steps = part_of<float, 3>(m, 2, steps, {view.row_tiles, 2, mw::kTileRows}, "steps");
  view.starts = part_of<std::uint32_t, 2>(m, 3, starts, {view.row_tiles, view.groups}, "starts");
  view.rest = part_of<std::uint8_t, 1>(m, 4, rest, {}, "low bits");
  view.rest_bytes = static_cast<std::int64_t>(nb::len(rest));
  return m;
}

// Two of every four columns; zeros may be None. The caller has checked the positions.
PyMatrix sparse_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, int group, nb::object codes, nb::object scales,
                       nb::object zeros) {
  require(bits >= 2 && bits <= 8 && rows >= 0 && cols >= 0, "kept weights have 2 to 8 bits");
  require(group == 64 || group == 128 || group == 256, "the group of sparse tiles is 64, 128 or 256, got " + std::to_string(group));
  PyMatrix m;
  m.spec = spec;
  mw::Matrix& view = m.view;
  view.form = mw::Form::sparse;
  view.rows = rows;
  view.cols = cols;
  view.bits = bits;
  view.group = group;
  view.row_tiles = (rows + mw::kTileRows - 1) / mw::kTileRows;
  view.groups = (cols + group - 1) / group;
  const std::int64_t unit_bytes = (bits + mw::kPositionBits) * mw::kLaneVectorBytes;
  view.data = part_of<std::uint8_t, 4>(m, 0, codes, {view.row_tiles, view.groups, group / mw::kSparseUnitColumns, unit_bytes}, "codes");
  view.scales = part_of<std::uint16_t, 3>(m, 1, scales, {view.row_tiles, view.groups, mw::kTileRows}, "scales");
  if (!zeros.is_none()) view.zeros = part_of<std::uint8_t, 3>(m, 2, zeros, {view.row_tiles, view.groups, mw::kTileRows}, "zeros");
  return m;
}

// Integer tiles of 4 bits whose products round activations by group, to 8 bits where `wide` is 1 and to 4 where it is 0. order:
// the column at each stored place, or None; the caller has checked that it names each once.
PyMatrix mixed_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int group, Codes codes, Halves scales, nb::object wide,
                      nb::object order) {
  require(cols <= mw::kMostMixedColumns, spec + ": products with mixed activations have at most 65536 columns, not " + std::to_string(cols));
  PyMatrix m = tile_matrix(spec, rows, cols, 4, group, codes, scales, std::nullopt, order);
  m.view.wide_groups = part_of<std::uint8_t, 1>(m, 2, wide, {m.view.groups}, "widths of groups");
  return m;
}

// Sign blocks in turn, each in bytes.
PyMatrix stacked_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int rank, nb::sequence blocks) {
  require(rows >= 0 && cols >= 0 && rank >= 1 && nb::len(blocks) >= 1, "a stack has at least one block of rank 1 or more");
  PyMatrix m;
  m.spec = spec;
  m.blocks = std::make_shared<std::vector<const std::uint8_t*>>();
  for (const nb::handle each : blocks) {
    const auto bytes = nb::cast<nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(each, false);
    require(static_cast<std::int64_t>(bytes.shape(0)) == rows * ((cols + 7) / 8) + 2 * rank * (rows + cols),
            "a block has another size than the matrix and its rank ask for");
    require(reinterpret_cast<std::uintptr_t>(bytes.data()) % 2 == 0, "blocks must begin at an even address");
    m.blocks->push_back(bytes.data());
    m.block_owners.push_back(nb::borrow(each));
  }
  mw::Matrix& view = m.view;
  view.form = mw::Form::stacked;
  view.rows = rows;
  view.cols = cols;
  view.rank = rank;
  view.num_blocks = static_cast<int>(m.blocks->size());
  view.blocks = m.blocks->data();
  return m;
}

template <class T>
using Table = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
void fill_table(T* to, const Table<T>& from, const char* name) {
  require(from.shape(0) > 0 && 256 % from.shape(0) == 0, std::string(name) + " must have as many entries as there are codes, a power of two");
  for (std::size_t i = 0; i < 256; ++i) to[i] = from.data()[i % from.shape(0)];
}

// What codes mean: see mw::Levels.
std::shared_ptr<mw::Levels> make_levels(Table<float> values, Table<float> second, Table<std::uint8_t> low, Table<std::uint8_t> high, float unit,
                                        int low_offset, int high_offset, int bytes, bool pairs) {
  require(bytes >= 0 && bytes <= 2, "levels have up to two bytes");
  auto levels = std::make_shared<mw::Levels>();
  fill_table(levels->values, values, "values");
  fill_table(levels->second, second, "second");
  fill_table(levels->low, low, "low");
  fill_table(levels->high, high, "high");
  levels->unit = unit;
  levels->low_offset = low_offset;
  levels->high_offset = high_offset;
  levels->bytes = bytes;
  levels->pairs = pairs;
  require(!pairs || bytes == 2, "pairs of scales have two bytes of levels");
  return levels;
}

struct PyLevels {
  std::shared_ptr<mw::Levels> levels;
};

template <class T, int Dimensions>
using Numbers = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

template <class T>
const T* statistics_of(const nb::object& array, const mw::Matrix& view, const char* name) {
  const auto values = nb::cast<Numbers<T, 3>>(array, false);
  require(static_cast<std::int64_t>(values.shape(0)) == view.row_tiles && static_cast<std::int64_t>(values.shape(1)) == view.groups &&
              values.shape(2) == mw::kTileRows,
          std::string(name) + " must have shape [row tiles, groups, 16] to go with the codes");
  return values.data();
}

// scales: float16 as integers, float32 or bytes, by scale_form. extra: the second scales; or nested scales, offsets, and perhaps shifts
// and their peaks.
PyMatrix level_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, int group, Codes codes, const PyLevels& levels,
                      const std::string& scale_form, nb::object scales, nb::list extra) {
  require(bits >= 1 && bits <= 8, "tiles hold 1 to 8 bits, got " + std::to_string(bits));
  PyMatrix m = codes_matrix(spec, rows, cols, bits, group, codes);
  mw::Matrix& view = m.view;
  m.levels = levels.levels;
  view.levels = m.levels.get();
  m.owners[1] = scales;
  for (std::size_t i = 0; i < nb::len(extra) && i < 5; ++i) m.owners[2 + i] = extra[i];
  if (scale_form == "f16") {
    view.scales = statistics_of<std::uint16_t>(scales, view, "scales");
    if (nb::len(extra) == 1) view.second = statistics_of<std::uint16_t>(extra[0], view, "second scales");
  } else if (scale_form == "f32") {
    view.scale_form = mw::ScaleForm::single;
    view.scales = statistics_of<float>(scales, view, "scales");
  } else if (scale_form == "e8m0") {
    view.scale_form = mw::ScaleForm::exponent;
    view.scales = statistics_of<std::uint8_t>(scales, view, "scales");
  } else {
    require(scale_form == "dq" && (nb::len(extra) == 2 || nb::len(extra) == 4),
            "scales are f16, f32, e8m0, or dq with nested scales, offsets and, where numbers are shifted, shifts and their peaks");
    view.scale_form = mw::ScaleForm::nested;
    view.scales = statistics_of<std::uint8_t>(scales, view, "scales");
    const auto nested = nb::cast<Numbers<float, 2>>(extra[0], false);
    const auto offsets = nb::cast<Numbers<float, 1>>(extra[1], false);
    require(static_cast<std::int64_t>(nested.shape(0)) == view.row_tiles &&
                static_cast<std::int64_t>(nested.shape(1)) == (view.groups + mw::kNestedGroups - 1) / mw::kNestedGroups &&
                static_cast<std::int64_t>(offsets.shape(0)) == view.row_tiles,
            "nested scales must have shape [row tiles, groups / 16] and offsets [row tiles]");
    view.nested = nested.data();
    view.offsets = offsets.data();
    if (nb::len(extra) == 4) {
      view.shifts = statistics_of<std::uint8_t>(extra[2], view, "shifts");
      const auto peaks = nb::cast<Numbers<float, 2>>(extra[3], false);
      require(peaks.shape(0) == nested.shape(0) && peaks.shape(1) == nested.shape(1), "peaks of shifts must have the shape of nested scales");
      view.shift_peaks = peaks.data();
    }
  }
  require((view.second != nullptr) == view.levels->pairs, "second scales do not go with these levels");
  return m;
}

// A turn's factors as the kernels read them: `order`, then `left` and `right` of one token laid out as [p, q].
mw::Turn turn_of(PyMatrix& m, int owner, nb::object order, nb::object left, nb::object right, std::int64_t size) {
  mw::Turn turn;
  turn.p = static_cast<std::int64_t>(nb::len(left));
  turn.q = static_cast<std::int64_t>(nb::len(right));
  require(turn.size() == size, "the factors of a turn must have as many numbers together as it turns");
  turn.order = part_of<std::int32_t, 1>(m, owner, order, {size}, "order");
  turn.left = part_of<float, 2>(m, owner + 1, left, {turn.p, turn.p}, "left factors");
  turn.right = part_of<float, 2>(m, owner + 2, right, {turn.q, turn.q}, "right factors");
  for (std::int64_t i = 0; i < size; ++i) require(turn.order[i] >= 0 && turn.order[i] < size, "the order of a turn points outside of it");
  return turn;
}

// Tiles of levels without scales, read through turns: into and back are (order, left, right).
PyMatrix turned_matrix(const std::string& spec, std::int64_t rows, std::int64_t cols, int bits, Codes codes, const PyLevels& levels,
                       nb::tuple into, nb::tuple back, nb::object columns, float scale) {
  require(bits >= 1 && bits <= 8 && nb::len(into) == 3 && nb::len(back) == 3, "turned tiles hold 1 to 8 bits, turns have three parts");
  PyMatrix m = codes_matrix(spec, rows, cols, bits, mw::kMaskedGroup, codes);
  m.levels = levels.levels;
  m.view.levels = m.levels.get();
  m.view.scale_form = mw::ScaleForm::one;
  m.view.turned = true;
  m.view.into = turn_of(m, 1, into[0], into[1], into[2], cols);
  m.view.back = turn_of(m, 4, back[0], back[1], back[2], rows);
  m.view.columns = part_of<std::uint16_t, 1>(m, 7, columns, {cols}, "columns");
  m.view.scale = scale;
  return m;
}

void set_dynamic_levels(Table<float> values) {
  require(values.shape(0) == 256, "there are 256 dynamic levels");
  for (int i = 0; i < 256; ++i) mw::dynamic_levels[i] = values.data()[i];
}

mw::Product product_of(const PyMatrix& m, nb::handle out, nb::handle bias, std::size_t tokens, std::size_t cols, bool accumulate) {
  require(static_cast<std::size_t>(m.view.cols) == cols,
          "linear: x has " + std::to_string(cols) + " columns, a matrix has " + std::to_string(m.view.cols));
  Rows<float> to;
  require(nb::try_cast(out, to, false), "linear: outs and biases must be C-contiguous float32 arrays that can be written");
  require(to.shape(0) == tokens && static_cast<std::int64_t>(to.shape(1)) == m.view.rows,
          "linear: out must have shape [" + std::to_string(tokens) + ", " + std::to_string(m.view.rows) + "]");
  mw::Product product{&m.view, {to.data(), m.view.rows, nullptr, accumulate}};
  if (!bias.is_none()) {
    Vector values;
    require(nb::try_cast(bias, values, false), "linear: outs and biases must be C-contiguous float32 arrays that can be written");
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

// Products by a schedule; see mw::linear_scheduled. tiles [n, 4]: product, strip, first and last group; starts [workers + 1].
std::vector<double> linear_scheduled(nb::sequence xs, nb::sequence matrices, nb::sequence outs, Rows<const std::int32_t> tiles,
                                     nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> starts, bool steal) {
  std::vector<mw::MixedProduct> products;
  std::size_t tokens = 0;
  const std::size_t count = nb::len(matrices);
  require(count >= 1 && nb::len(xs) == count && nb::len(outs) == count, "linear_scheduled: inputs, matrices and outs differ in number");
  for (std::size_t i = 0; i < count; ++i) {
    const auto& m = nb::cast<const PyMatrix&>(nb::object(matrices[i]));
    const auto x = nb::cast<Rows<const float>>(nb::object(xs[i]), false);
    if (i == 0) tokens = x.shape(0);
    require(m.view.wide_groups != nullptr, "linear_scheduled: " + m.spec + " has no mixed activations");
    require(x.shape(0) == tokens && tokens >= 1 && tokens <= static_cast<std::size_t>(mw::kMaxTokens), "linear_scheduled: all inputs have the same tokens, 1 to 256");
    const mw::Product checked = product_of(m, nb::object(outs[i]), nb::none(), tokens, x.shape(1), false);
    products.push_back({checked.matrix, x.data(), checked.output});
  }
  require(tiles.shape(1) == 4 && starts.shape(0) >= 2, "linear_scheduled: tiles are [n, 4], and there is a worker at least");
  const auto num_tiles = static_cast<std::int64_t>(tiles.shape(0));
  const auto workers = static_cast<int>(starts.shape(0)) - 1;
  require(starts.data()[0] == 0 && starts.data()[workers] == num_tiles, "linear_scheduled: starts must begin at 0 and end at the tiles");
  for (int w = 0; w < workers; ++w) require(starts.data()[w] <= starts.data()[w + 1], "linear_scheduled: starts must ascend");
  const auto* each = reinterpret_cast<const mw::MixedTile*>(tiles.data());
  for (std::int64_t i = 0; i < num_tiles; ++i) {
    require(each[i].product >= 0 && each[i].product < static_cast<std::int32_t>(count), "linear_scheduled: a tile names a product that is not there");
    const mw::Matrix& m = *products[static_cast<std::size_t>(each[i].product)].matrix;
    const std::int64_t strips = (m.rows + mw::mixed_strip_rows() - 1) / mw::mixed_strip_rows();
    require(each[i].strip >= 0 && each[i].strip < strips && each[i].first >= 0 && each[i].first < each[i].last && each[i].last <= m.groups,
            "linear_scheduled: a tile lies outside of its matrix");
  }
  std::vector<double> seconds(static_cast<std::size_t>(workers));
  nb::gil_scoped_release release;
  mw::linear_scheduled(products.data(), count, static_cast<std::int64_t>(tokens), each, num_tiles, starts.data(), workers, steal, seconds.data());
  return seconds;
}

// Activations as products with `m` store them, in blocks of one token.
void quantize_mixed(const PyMatrix& m, Rows<const float> x, Rows<std::int8_t> codes, Rows<float> scales, Rows<std::int32_t> sums) {
  require(m.view.wide_groups != nullptr, "quantize_mixed: " + m.spec + " has no mixed activations");
  const auto tokens = x.shape(0), groups = static_cast<std::size_t>(m.view.groups);
  require(static_cast<std::int64_t>(x.shape(1)) == m.view.cols && codes.shape(0) == tokens &&
              static_cast<std::int64_t>(codes.shape(1)) == mw::mixed_code_bytes(m.view) && scales.shape(0) == tokens && scales.shape(1) == groups &&
              sums.shape(0) == tokens && sums.shape(1) == groups,
          "quantize_mixed: shapes do not fit");
  nb::gil_scoped_release release;
  mw::quantize_mixed(m.view, x.data(), static_cast<std::int64_t>(tokens), codes.data(), scales.data(), sums.data());
}

void gather_rows(const PyMatrix& m, nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> ids, Rows<float> out) {
  require(!m.view.turned, "gather_rows: a row of " + m.spec + " cannot be had without all others");
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
  tile_matrix("tiles", from.view.rows, from.view.cols, bits, group, Codes(codes), Halves(scales), read_mins, nb::none());
  const mw::EncodeTask task{from.view.form, from.view.data, from.view.rows, from.view.cols,          bits,
                            group,          codes.data(),   scales.data(),  mins ? mins->data() : nullptr};
  nb::gil_scoped_release release;
  return mw::encode_tiles(task);
}

// Rounds a dense matrix to the codes of a level format; see mw::LevelSearch.
void encode_levels(const PyMatrix& from, int bits, int group, Rows<const float> inverses, Table<float> thresholds, Table<std::uint8_t> level_codes,
                   int zero_code, Writable<std::uint8_t, 4> codes) {
  require(from.view.form != mw::Form::tiles, "encode_levels: the values must be a dense matrix");
  require(bits >= 1 && bits <= 8, "tiles hold 1 to 8 bits, got " + std::to_string(bits));
  const PyMatrix to = codes_matrix("tiles", from.view.rows, from.view.cols, bits, group, Codes(codes));
  require(static_cast<std::int64_t>(inverses.shape(0)) == to.view.rows && static_cast<std::int64_t>(inverses.shape(1)) == to.view.groups,
          "encode_levels: there is one inverse scale per row and group");
  const std::size_t num_levels = level_codes.shape(0);
  require(num_levels >= 1 && num_levels <= 256 && thresholds.shape(0) == num_levels - 1, "encode_levels: there is a threshold between two levels");
  float padded[256];
  for (std::size_t i = 0; i < 256; ++i) padded[i] = i + 1 < num_levels ? thresholds.data()[i] : std::numeric_limits<float>::infinity();
  const mw::LevelSearch search{inverses.data(), padded, level_codes.data(), static_cast<int>(num_levels), static_cast<std::uint8_t>(zero_code)};
  const mw::EncodeTask task{from.view.form, from.view.data, from.view.rows, from.view.cols, bits, group, codes.data(), nullptr, nullptr, &search};
  nb::gil_scoped_release release;
  mw::encode_tiles(task);
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
  m.def("plane_matrix", &plane_matrix, "spec"_a, "cols"_a, "activation_bits"_a, "words"_a, "scales"_a);
  m.def("bilevel_matrix", &bilevel_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "codes"_a, "statistics"_a, "order"_a = nb::none(),
        "row_offsets"_a = nb::none(), "columns"_a = nb::none(), "values"_a = nb::none());
  m.def("codebook_matrix", &codebook_matrix, "spec"_a, "rows"_a, "cols"_a, "sizes"_a, "indices"_a, "centroids"_a, "residuals"_a = nb::none(),
        "outliers"_a = 0, "outlier_sizes"_a = nb::make_tuple(), "outlier_indices"_a = nb::none(), "outlier_centroids"_a = nb::none(),
        "order"_a = nb::none(), "scale_and_offset"_a = nb::none());
  m.def("masked_matrix", &masked_matrix, "spec"_a, "rows"_a, "cols"_a, "codes"_a.noconvert(), "params"_a, "salient"_a = nb::none(),
        "order"_a = nb::none(), "steps"_a = nb::none(), "starts"_a = nb::none(), "rest"_a = nb::none());
  m.def("sparse_matrix", &sparse_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "group"_a, "codes"_a, "scales"_a, "zeros"_a = nb::none());
  m.def("mixed_matrix", &mixed_matrix, "spec"_a, "rows"_a, "cols"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert(), "wide"_a,
        "order"_a.none());
  m.def("linear_scheduled", &linear_scheduled, "xs"_a, "matrices"_a, "outs"_a, "tiles"_a.noconvert(), "starts"_a.noconvert(), "steal"_a);
  m.def("mixed_strip_rows", &mw::mixed_strip_rows);
  m.def("mixed_code_bytes", [](const PyMatrix& self) {
    require(self.view.wide_groups != nullptr, self.spec + " has no mixed activations");
    return mw::mixed_code_bytes(self.view);
  }, "matrix"_a);
  m.def("quantize_mixed", &quantize_mixed, "matrix"_a, "x"_a.noconvert(), "codes"_a.noconvert(), "scales"_a.noconvert(), "sums"_a.noconvert());
  m.def("widen_codes", [](nb::ndarray<const std::int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> packed,
                          nb::ndarray<std::int8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> to) {
    require(packed.shape(0) % 4 == 0 && to.shape(0) == 2 * packed.shape(0), "widen_codes: whole fours of bytes become twice as many");
    mw::widen_codes(packed.data(), static_cast<std::int64_t>(to.shape(0)), to.data());
  }, "packed"_a.noconvert(), "to"_a.noconvert());
  m.def("stacked_matrix", &stacked_matrix, "spec"_a, "rows"_a, "cols"_a, "rank"_a, "blocks"_a);
  m.def("tile_matrix", &tile_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
        "mins"_a.noconvert().none(), "order"_a.none() = nb::none());
  nb::class_<PyLevels>(m, "Levels", "What the codes of a level format mean, in the forms kernels read")
      .def("__init__",
           [](PyLevels* self, Table<float> values, Table<float> second, Table<std::uint8_t> low, Table<std::uint8_t> high, float unit,
              int low_offset, int high_offset, int bytes, bool pairs) {
             new (self) PyLevels{make_levels(values, second, low, high, unit, low_offset, high_offset, bytes, pairs)};
           },
           nb::kw_only(), "values"_a, "second"_a, "low"_a, "high"_a, "unit"_a, "low_offset"_a, "high_offset"_a, "bytes"_a, "pairs"_a)
      .def(
          "set_linear",
          [](PyLevels& self, Table<std::int16_t> base, Table<std::int8_t> step) {
            require(base.shape(0) == 16 && step.shape(0) == 16, "there are 16 blocks of codes");
            self.levels->linear = true;
            for (int i = 0; i < 16; ++i) {
              self.levels->base_low[i] = static_cast<std::uint8_t>(base.data()[i] & 255);
              self.levels->base_high[i] = static_cast<std::uint8_t>((base.data()[i] >> 8) & 255);
              self.levels->step[i] = step.data()[i];
            }
          },
          "base"_a, "step"_a, "Says that levels are linear in the low four bits of codes: see mw::Levels")
      .def(
          "set_half",
          [](PyLevels& self, int shift, int mask, float unit) {
            require(shift >= 0 && shift < 16 && mask >= 0 && mask < 65536, "no way from codes to float16");
            self.levels->half_shift = shift;
            self.levels->half_mask = static_cast<std::uint16_t>(mask);
            self.levels->half_unit = unit;
          },
          "shift"_a, "mask"_a, "unit"_a, "Says how the codes become float16: see mw::Levels")
      .def(
          "set_signed",
          [](PyLevels& self, Table<std::uint8_t> low, Table<std::uint8_t> high, const std::string& kind, float upper_units, bool twos) {
            const auto named = kind == "bytes"        ? mw::Magnitudes::bytes
                               : kind == "digits"     ? mw::Magnitudes::digits
                               : kind == "far digits" ? mw::Magnitudes::far_digits
                               : kind == "ranges"     ? mw::Magnitudes::ranges
                                                      : mw::Magnitudes::none;
            require(low.shape(0) <= 64 && high.shape(0) == low.shape(0) && named != mw::Magnitudes::none, "no table of magnitudes");
            for (int i = 0; i < 64; ++i) {
              self.levels->magnitude_low[i] = low.data()[i % low.shape(0)];
              self.levels->magnitude_high[i] = high.data()[i % low.shape(0)];
            }
            self.levels->magnitudes = named;
            self.levels->upper_units = upper_units;
            self.levels->twos = twos;
          },
          "low"_a, "high"_a, "kind"_a, "upper_units"_a, "twos"_a, "Says that the highest bit of a code is a sign: see mw::Levels")
      .def(
          "set_digits",
          [](PyLevels& self, Table<std::uint8_t> low, Table<std::uint8_t> high, const std::string& kind, int step, int offset) {
            require(low.shape(0) == 16 && high.shape(0) == 16, "there are 16 digits of each kind");
            std::copy_n(low.data(), 16, self.levels->digit_low);
            std::copy_n(high.data(), 16, self.levels->digit_high);
            self.levels->digits = kind == "affine" ? mw::Digits::affine : kind == "one" ? mw::Digits::one : mw::Digits::two;
            self.levels->digit_step = step;
            self.levels->digit_offset = offset;
          },
          "low"_a, "high"_a, "kind"_a, "step"_a, "offset"_a, "Says what else levels are made of: see mw::Digits");
  m.def("level_matrix", &level_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "group"_a, "codes"_a.noconvert(), "levels"_a, "scale_form"_a,
        "scales"_a, "extra"_a);
  m.def("turned_matrix", &turned_matrix, "spec"_a, "rows"_a, "cols"_a, "bits"_a, "codes"_a.noconvert(), "levels"_a, "into"_a, "back"_a,
        "columns"_a, "scale"_a);
  m.def("set_dynamic_levels", &set_dynamic_levels, "values"_a);
  m.def("encode_levels", &encode_levels, "values"_a, "bits"_a, "group"_a, "inverses"_a.noconvert(), "thresholds"_a.noconvert(),
        "level_codes"_a.noconvert(), "zero_code"_a, "codes"_a.noconvert());
  bind_step(m, program, "linear", &linear, "x"_a.noconvert(), "matrices"_a, "outs"_a, nb::kw_only(), "exact"_a = false,
            "accumulate"_a = false, "biases"_a = nb::none());
  m.def("encode_tiles", &encode_tiles, "values"_a, "bits"_a, "group"_a, "codes"_a.noconvert(), "scales"_a.noconvert(),
        "mins"_a.noconvert().none());
  m.def("gather_rows", &gather_rows, "matrix"_a, "ids"_a.noconvert(), "out"_a.noconvert());
  m.def("linear_scratch_bytes", &mw::linear_scratch_bytes);
  m.def("linear_products", &mw::linear_products);
  m.def("linear_striped_products", &mw::linear_striped_products);
  m.def("linear_scratch_bytes_for", &mw::linear_scratch_bytes_for, "tokens"_a, "cols"_a, "group"_a, "threads"_a);
}
