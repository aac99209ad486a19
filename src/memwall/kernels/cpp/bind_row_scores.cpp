// Python face of row_scores.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <string>

#include "row_scores.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

mw::RowForm form_of(const std::string& name) {
  const char* const names[] = {"float32", "float16", "bfloat16", "e4m3", "e5m2", "e2m1", "bytes"};
  static_assert(sizeof names / sizeof *names == static_cast<std::size_t>(mw::RowForm::count));
  for (int i = 0; i < static_cast<int>(mw::RowForm::count); ++i)
    if (name == names[i]) return static_cast<mw::RowForm>(i);
  throw nb::value_error(("no form of rows is called " + name).c_str());
}

const float* table_of(const nb::object& table, std::int64_t cols, const char* name) {
  if (table.is_none()) return nullptr;
  Array<const float, 1> values;
  require(nb::try_cast(table, values, false) && static_cast<std::int64_t>(values.shape(0)) == cols,
          std::string("row_scores: ") + name + " must be float32 with one number per padded column");
  return values.data();
}

void row_scores(const std::string& form, std::int64_t cols, Array<const std::uint8_t, 2> rows, Array<const float, 2> queries,
                Array<float, 2> scores, bool cosine, nb::object steps, nb::object offsets) {
  mw::RowTask task{};
  task.form = form_of(form);
  const std::int64_t padded = mw::padded_cols(cols);
  require(cols > 0 && static_cast<std::int64_t>(rows.shape(1)) == mw::packed_row_bytes(task.form, cols),
          "row_scores: rows of " + form + " with " + std::to_string(cols) + " columns do not take " + std::to_string(rows.shape(1)) + " bytes");
  require(static_cast<std::int64_t>(queries.shape(1)) == padded, "row_scores: queries must be padded to a multiple of 16 columns");
  require(scores.shape(0) == queries.shape(0) && scores.shape(1) == rows.shape(0), "row_scores: scores must have shape [queries, rows]");
  task.rows = rows.data();
  task.num_rows = static_cast<std::int64_t>(rows.shape(0));
  task.row_bytes = static_cast<std::int64_t>(rows.shape(1));
  task.cols = cols;
  task.steps = table_of(steps, padded, "steps");
  task.offsets = table_of(offsets, padded, "offsets");
  require((task.steps == nullptr) == (task.offsets == nullptr), "row_scores: steps and offsets come together");
  require(task.steps == nullptr || task.form == mw::RowForm::bytes || task.form == mw::RowForm::e2m1,
          "row_scores: " + form + " takes no steps");
  task.queries = queries.data();
  task.num_queries = static_cast<std::int64_t>(queries.shape(0));
  task.cosine = cosine;
  task.scores = scores.data();
  nb::gil_scoped_release release;
  if (task.num_rows > 0 && task.num_queries > 0) mw::row_scores(task);
}

void bit_scores(std::int64_t cols, Array<const std::uint8_t, 2> rows, Array<const std::uint8_t, 2> queries, Array<float, 2> scores, bool signs) {
  require(cols > 0 && rows.shape(1) == queries.shape(1) && static_cast<std::int64_t>(rows.shape(1)) == (cols + 7) / 8,
          "bit_scores: rows and queries have a bit per column");
  require(scores.shape(0) == queries.shape(0) && scores.shape(1) == rows.shape(0), "bit_scores: scores must have shape [queries, rows]");
  const mw::BitTask task{rows.data(), queries.data(), static_cast<std::int64_t>(rows.shape(0)), static_cast<std::int64_t>(rows.shape(1)), cols,
                         static_cast<std::int64_t>(queries.shape(0)), signs, scores.data()};
  nb::gil_scoped_release release;
  if (task.num_rows > 0 && task.num_queries > 0) mw::bit_scores(task);
}

}  // namespace

void bind_row_scores(nb::module_& m) {
  m.def("row_scores", &row_scores, "form"_a, "cols"_a, "rows"_a.noconvert(), "queries"_a.noconvert(), "scores"_a.noconvert(), "cosine"_a = true,
        "steps"_a = nb::none(), "offsets"_a = nb::none());
  m.def("bit_scores", &bit_scores, "cols"_a, "rows"_a.noconvert(), "queries"_a.noconvert(), "scores"_a.noconvert(), "signs"_a);
}
