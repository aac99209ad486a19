// Shares rows among threads.
#include "row_scores.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(RowKernels, row_kernels)

namespace mw {

namespace {

// Rows of one piece of work: half a megabyte or so, in whole panels.
std::size_t piece_rows(std::int64_t row_bytes) {
  const std::int64_t rows = (std::int64_t{1} << 19) / std::max<std::int64_t>(row_bytes, 1);
  return static_cast<std::size_t>(std::max<std::int64_t>(rows / kPanelRows, 1) * kPanelRows);
}

}  // namespace

std::int64_t packed_row_bytes(RowForm form, std::int64_t cols) {
  switch (form) {
    case RowForm::float32: return 4 * cols;
    case RowForm::float16:
    case RowForm::bfloat16: return 2 * cols;
    case RowForm::e2m1: return (cols + 1) / 2;
    default: return cols;
  }
}

void row_scores(const RowTask& task) {
  const auto kernel = row_kernels_in_use().scores;
  const std::int64_t panel = kPanelRows * padded_cols(task.cols);
  std::vector<float> panels(static_cast<std::size_t>(panel * num_threads()));
  parallel_for(static_cast<std::size_t>(task.num_rows), piece_rows(task.row_bytes), [&](std::size_t begin, std::size_t end, int worker) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end), panels.data() + worker * panel);
  });
}

void bit_scores(const BitTask& task) {
  const auto kernel = row_kernels_in_use().bits;
  parallel_for(static_cast<std::size_t>(task.num_rows), piece_rows(task.row_bytes), [&](std::size_t begin, std::size_t end, int) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

}  // namespace mw
