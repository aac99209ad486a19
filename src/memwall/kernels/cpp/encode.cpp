// Shares the row tiles of a matrix that is being encoded among threads.
#include "encode.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(EncodeKernels, encode_kernels)

namespace mw {

bool encode_tiles(const EncodeTask& task) {
  const auto kernel = encode_kernels_in_use().encode;
  const std::int64_t tiles = (task.rows + kTileRows - 1) / kTileRows;
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (kTileRows * task.cols + 1));  // about 50 us
  std::atomic<bool> good{true};
  parallel_for(static_cast<std::size_t>(tiles), static_cast<std::size_t>(grain), [&](std::size_t begin, std::size_t end, int) {
    if (good.load(std::memory_order_relaxed) && !kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)))
      good.store(false, std::memory_order_relaxed);
  });
  return good.load();
}

}  // namespace mw
