// The quadratic form of weights that are fetched from codebooks, in the entries of the codebooks.
#pragma once

#include <cstdint>

namespace mw {

// With A_m [cols, entries] that has a one where column i of row of vectors m fetches an entry (in each stage one), the sum over all m
// of A_m^T H A_m. Entries are numbered over all stages together.
struct SelectionTask {
  const std::int32_t* slots;  // [stages, rows, cols]: the entry that is fetched
  std::int64_t stages, rows, cols;
  const float* hessian;  // [cols, cols], symmetric
  std::int64_t entries;
  float* gram;  // [entries, entries]
};

// Rows of vectors and columns that fetch each entry: places[offsets[e] .. offsets[e + 1]) are m * cols + i, rising.
struct SelectionLists {
  const std::int64_t* offsets;
  const std::uint32_t* places;
};

struct SelectionKernels {
  // one row of the form, half of it: gram + gram^T is the whole. room: cols floats; sums: entries doubles.
  void (*half_row)(const SelectionTask&, const SelectionLists&, std::int64_t entry, float* room, double* sums);
};

void selection_gram(const SelectionTask& task);

}  // namespace mw
