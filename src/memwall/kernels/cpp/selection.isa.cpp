// H's rows of the columns that fetch one entry together are added up, and their sum is handed to the entries that the other columns
// fetch: an entry's row stays in the first cache, and H is read in whole rows.
#include "selection.h"

namespace mw::MW_ISA {
namespace {

// Pairs of columns are taken once, in order; a column with itself counts half.
void half_row(const SelectionTask& task, const SelectionLists& lists, std::int64_t entry, float* room, double* sums) {
  const std::int64_t cols = task.cols;
  const std::uint32_t* places = lists.places;
  for (std::int64_t e = 0; e < task.entries; ++e) sums[e] = 0.0;
  for (std::int64_t at = lists.offsets[entry], end = lists.offsets[entry + 1]; at < end;) {
    const std::int64_t m = places[at] / cols, first = places[at] - m * cols;
    const float* together = task.hessian + first * cols;
    std::int64_t next = at + 1;
    for (; next < end && places[next] < (m + 1) * cols; ++next) {
      const std::int64_t i = places[next] - m * cols;
      const float* row = task.hessian + i * cols;
      if (next == at + 1)
        for (std::int64_t j = first + 1; j < cols; ++j) room[j] = together[j];
      for (std::int64_t j = i + 1; j < cols; ++j) room[j] += row[j];
    }
    if (next > at + 1) together = room;
    for (std::int64_t s = 0; s < task.stages; ++s) {
      const std::int32_t* slots = task.slots + (s * task.rows + m) * cols;
      for (std::int64_t j = first + 1; j < cols; ++j) sums[slots[j]] += together[j];
      for (std::int64_t k = at; k < next; ++k) {
        const std::int64_t i = places[k] - m * cols;
        sums[slots[i]] += 0.5 * task.hessian[i * cols + i];
      }
    }
    at = next;
  }
  float* row = task.gram + entry * task.entries;
  for (std::int64_t e = 0; e < task.entries; ++e) row[e] = static_cast<float>(sums[e]);
}

}  // namespace

extern const SelectionKernels selection_kernels;
const SelectionKernels selection_kernels = {half_row};

}  // namespace mw::MW_ISA
