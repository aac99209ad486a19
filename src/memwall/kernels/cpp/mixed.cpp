// Products with mixed activations by a schedule of tiles, and their activations for those who want to see them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "linear.h"
#include "threads.h"

MW_KERNEL_TABLE(LinearKernels, linear_kernels)

namespace mw {
namespace {

// Tiles of one worker that are still to be taken; others take from it too.
struct alignas(64) Queue {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
  std::int64_t left() const { return end - next.load(std::memory_order_relaxed); }
};

// The next tile for `worker`, or -1: its own, else one of the worker with the most left.
std::int64_t take(Queue* queues, int workers, int worker, bool steal) {
  std::int64_t tile = queues[worker].next.fetch_add(1, std::memory_order_relaxed);
  if (tile < queues[worker].end) return tile;
  while (steal) {
    Queue* most = std::max_element(queues, queues + workers, [](const Queue& a, const Queue& b) { return a.left() < b.left(); });
    if (most->left() <= 0) return -1;
    tile = most->next.fetch_add(1, std::memory_order_relaxed);
    if (tile < most->end) return tile;
  }
  return -1;
}

std::vector<std::int8_t> code_room(const Matrix& m, std::int64_t tokens, int block) {
  return std::vector<std::int8_t>(static_cast<std::size_t>((tokens + block - 1) / block * block * mixed_code_bytes(m)));
}

}  // namespace

int mixed_strip_rows() { return linear_kernels_in_use().strip_tiles * kTileRows; }

std::int64_t mixed_code_bytes(const Matrix& m) {
  std::int64_t bytes = 0;
  for (std::int64_t g = 0; g < m.groups; ++g) bytes += m.wide_groups[g] ? m.group : m.group / 2;
  return bytes;
}

void quantize_mixed(const Matrix& m, const float* x, std::int64_t tokens, std::int8_t* codes, float* scales, std::int32_t* sums) {
  Activations a;
  a.codes = codes, a.scales = scales, a.sums = sums;
  a.block = 1, a.group = m.group, a.groups = m.groups, a.token_bytes = mixed_code_bytes(m);
  for (std::int64_t t = 0; t < tokens; ++t) linear_kernels_in_use().quantize_mixed(x + t * m.cols, m, 1, t, a);
}

void widen_codes(const std::int8_t* packed, std::int64_t columns, std::int8_t* to) { linear_kernels_in_use().widen_codes(packed, columns, to); }

void linear_scheduled(const MixedProduct* products, std::size_t count, std::int64_t tokens, const MixedTile* tiles, std::int64_t num_tiles,
                      const std::int32_t* starts, int workers, bool steal, double* seconds) {
  const LinearKernels& kernels = linear_kernels_in_use();
  const int block = kernels.token_block, strip_rows = kernels.strip_tiles * kTileRows;
  std::vector<std::vector<std::int8_t>> codes;
  std::vector<std::vector<float>> scales;
  std::vector<std::vector<std::int32_t>> sums;
  std::vector<Input> inputs(count);
  for (std::size_t i = 0; i < count; ++i) {
    const Matrix& m = *products[i].matrix;
    const auto entries = static_cast<std::size_t>((tokens + block - 1) / block * block * m.groups);
    codes.push_back(code_room(m, tokens, block));
    scales.emplace_back(entries);
    sums.emplace_back(entries);
    Activations& a = inputs[i].coded;
    a.codes = codes[i].data(), a.scales = scales[i].data(), a.sums = sums[i].data();
    a.block = block, a.group = m.group, a.groups = m.groups, a.token_bytes = mixed_code_bytes(m);
    inputs[i].x = products[i].x, inputs[i].tokens = tokens, inputs[i].cols = m.cols;
    for (std::int64_t t = 0; t < tokens; t += block)
      kernels.quantize_mixed(products[i].x + t * m.cols, m, static_cast<int>(std::min<std::int64_t>(block, tokens - t)), t / block, a);
  }
  const std::size_t part = static_cast<std::size_t>(tokens) * strip_rows;
  std::vector<float> partial(part * static_cast<std::size_t>(num_tiles));
  const auto queues = std::make_unique<Queue[]>(static_cast<std::size_t>(workers));
  for (int w = 0; w < workers; ++w) queues[w].next = starts[w], queues[w].end = starts[w + 1], seconds[w] = 0;
  const std::unique_ptr<char, decltype(&std::free)> room(
      static_cast<char*>(std::aligned_alloc(64, kWorkerScratchBytes * static_cast<std::size_t>(workers))), &std::free);
  if (room == nullptr) throw std::bad_alloc();
  const auto began = std::chrono::steady_clock::now();
  parallel_for(static_cast<std::size_t>(workers), 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t w = begin; w < end; ++w) {
      for (std::int64_t i; (i = take(queues.get(), workers, static_cast<int>(w), steal)) >= 0;) {
        const MixedTile& tile = tiles[i];
        kernels.mixed_part(*products[tile.product].matrix, inputs[static_cast<std::size_t>(tile.product)], tile.strip, tile.first, tile.last,
                           partial.data() + part * static_cast<std::size_t>(i), room.get() + w * kWorkerScratchBytes);
      }
      seconds[w] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    }
  });
  // parts of a strip in the order of their groups, so that the sum does not depend on who made them
  std::vector<std::int64_t> order(static_cast<std::size_t>(num_tiles));
  for (std::int64_t i = 0; i < num_tiles; ++i) order[static_cast<std::size_t>(i)] = i;
  std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    const MixedTile &x = tiles[a], &y = tiles[b];
    return x.product != y.product ? x.product < y.product : x.strip != y.strip ? x.strip < y.strip : x.first < y.first;
  });
  for (const std::int64_t i : order) {
    const MixedTile& tile = tiles[i];
    const Output& out = products[tile.product].output;
    const std::int64_t first_row = std::int64_t{tile.strip} * strip_rows, rows = std::min<std::int64_t>(strip_rows, out.rows - first_row);
    const float* from = partial.data() + part * static_cast<std::size_t>(i);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t r = 0; r < rows; ++r) {
        float& to = out.data[t * out.rows + first_row + r];
        to = tile.first == 0 ? from[t * strip_rows + r] : to + from[t * strip_rows + r];
      }
  }
}

}  // namespace mw
