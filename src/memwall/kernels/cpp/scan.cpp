// Shares channels, heads or tokens of a state space layer among threads.
#include "scan.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(ScanKernels, scan_kernels)

namespace mw {
namespace {

// Numbers per chunk: some 10 us of work.
constexpr std::int64_t kChunk = 1 << 15;

std::size_t grain(std::int64_t each, std::int64_t multiple = 1) {
  const std::int64_t count = std::max<std::int64_t>(1, kChunk / std::max<std::int64_t>(each, 1));
  return static_cast<std::size_t>((count + multiple - 1) / multiple * multiple);
}

}  // namespace

void conv_silu(const ConvTask& task) {
  const auto kernel = scan_kernels_in_use().conv;
  parallel_for(static_cast<std::size_t>(task.channels), grain(task.tokens * task.taps, 64), [&](std::size_t begin, std::size_t end, int) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

void selective_scan(const ScanTask& task) {
  const auto kernel = scan_kernels_in_use().scan;
  const std::int64_t size = task.scratch_size();
  parallel_for(static_cast<std::size_t>(task.heads), grain(task.tokens * size / 2), [&](std::size_t begin, std::size_t end, int worker) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end), task.scratch + worker * size);
  });
}

void gated_norm(const GateTask& task) {
  const auto kernel = scan_kernels_in_use().gate;
  parallel_for(static_cast<std::size_t>(task.tokens), grain(4 * task.width), [&](std::size_t begin, std::size_t end, int) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

void hadamard(float* x, std::int64_t rows, std::int64_t width, int mix, const std::int8_t* signs) {
  const auto kernel = scan_kernels_in_use().hadamard;
  parallel_for(static_cast<std::size_t>(rows), grain(8 * width), [&](std::size_t begin, std::size_t end, int) {
    kernel(x + static_cast<std::int64_t>(begin) * width, static_cast<std::int64_t>(end - begin), width, mix, signs);
  });
}

void round_static(const float* x, std::int64_t count, float inverse, std::int8_t* out) {
  const auto kernel = scan_kernels_in_use().round_static;
  parallel_for(static_cast<std::size_t>(count), kChunk, [&](std::size_t begin, std::size_t end, int) {
    kernel(x + begin, static_cast<std::int64_t>(end - begin), inverse, out + begin);
  });
}

}  // namespace mw
