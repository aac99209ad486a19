// Lists who fetches what, shares the rows of the form among threads, and adds the form's two halves up.
#include "selection.h"

#include <vector>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(SelectionKernels, selection_kernels)

namespace mw {
namespace {

constexpr std::int64_t kTile = 32;

// gram + gram^T over itself, a tile and its mirror at a time.
void add_mirrored(float* gram, std::int64_t size) {
  const auto tiles = static_cast<std::size_t>((size + kTile - 1) / kTile);
  parallel_for(tiles, 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::int64_t first = static_cast<std::int64_t>(begin) * kTile; first < static_cast<std::int64_t>(end) * kTile && first < size; first += kTile)
      for (std::int64_t other = 0; other <= first; other += kTile)
        for (std::int64_t a = first; a < first + kTile && a < size; ++a)
          for (std::int64_t b = other; b < other + kTile && b <= a; ++b) {
            const float both = gram[a * size + b] + gram[b * size + a];
            gram[a * size + b] = gram[b * size + a] = both;
          }
  });
}

}  // namespace

void selection_gram(const SelectionTask& task) {
  const std::int64_t each = task.rows * task.cols;
  std::vector<std::int64_t> offsets(static_cast<std::size_t>(task.entries) + 1, 0);
  for (std::int64_t at = 0; at < task.stages * each; ++at) ++offsets[static_cast<std::size_t>(task.slots[at]) + 1];
  for (std::int64_t e = 0; e < task.entries; ++e) offsets[static_cast<std::size_t>(e) + 1] += offsets[static_cast<std::size_t>(e)];
  std::vector<std::uint32_t> places(static_cast<std::size_t>(task.stages * each));
  std::vector<std::int64_t> next(offsets.begin(), offsets.end() - 1);
  for (std::int64_t at = 0; at < each; ++at)
    for (std::int64_t s = 0; s < task.stages; ++s) places[static_cast<std::size_t>(next[static_cast<std::size_t>(task.slots[s * each + at])]++)] = static_cast<std::uint32_t>(at);
  const SelectionLists lists{offsets.data(), places.data()};
  const auto kernel = selection_kernels_in_use().half_row;
  std::vector<std::vector<float>> rooms(static_cast<std::size_t>(num_threads()));
  std::vector<std::vector<double>> sums(rooms.size());
  for (auto& room : rooms) room.resize(static_cast<std::size_t>(task.cols));
  for (auto& sum : sums) sum.resize(static_cast<std::size_t>(task.entries));
  parallel_for(static_cast<std::size_t>(task.entries), 1, [&](std::size_t begin, std::size_t end, int worker) {
    const auto w = static_cast<std::size_t>(worker);
    for (std::size_t e = begin; e < end; ++e) kernel(task, lists, static_cast<std::int64_t>(e), rooms[w].data(), sums[w].data());
  });
  add_mirrored(task.gram, task.entries);
}

}  // namespace mw
