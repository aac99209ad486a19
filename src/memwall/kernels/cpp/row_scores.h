// Scores of queries against rows of vectors in few bits, which lie one after another as a file has them: each row is decoded to
// registers or to a panel of a few rows, multiplied and forgotten.
#pragma once

#include <cstdint>

namespace mw {

enum class RowForm : int { float32, float16, bfloat16, e4m3, e5m2, e2m1, bytes, count };

constexpr std::int64_t kRowPad = 16;  // queries, steps and offsets have columns up to a multiple of this, those that are missing zero
constexpr int kPanelRows = 4;         // rows that several queries are multiplied with at once

struct RowTask {
  RowForm form;
  const std::uint8_t* rows;  // [num_rows, row_bytes]; of e2m1 the first column of two is the low half of a byte
  std::int64_t num_rows, row_bytes, cols;
  const float *steps, *offsets;  // [padded cols]: a number is its level times a step plus an offset; null: the level itself
  const float* queries;          // [num_queries, padded cols]
  std::int64_t num_queries;
  bool cosine;    // products are divided by the rows' lengths
  float* scores;  // [num_queries, num_rows]
};

struct BitTask {
  const std::uint8_t *rows, *queries;  // [.., row_bytes]; bits after the last column are zero
  std::int64_t num_rows, row_bytes, cols, num_queries;
  bool signs;     // bits mean -1 and 1, else 0 and 1
  float* scores;  // [num_queries, num_rows]: cosines
};

inline std::int64_t padded_cols(std::int64_t cols) { return (cols + kRowPad - 1) / kRowPad * kRowPad; }
std::int64_t packed_row_bytes(RowForm form, std::int64_t cols);

struct RowKernels {
  void (*scores)(const RowTask&, std::int64_t begin, std::int64_t end, float* panel);  // panel: [kPanelRows, padded cols]
  void (*bits)(const BitTask&, std::int64_t begin, std::int64_t end);
};

void row_scores(const RowTask& task);
void bit_scores(const BitTask& task);

}  // namespace mw
