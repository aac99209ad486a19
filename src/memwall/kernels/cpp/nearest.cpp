// Shares the search for nearest centroids among threads.
#include "nearest.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(NearestKernels, nearest_kernels)

namespace mw {

void nearest(const NearestTask& task) {
  const auto kernel = nearest_kernels_in_use().nearest;
  const std::int64_t work = std::max<std::int64_t>(task.num_centroids * task.size, 1);
  const auto grain = static_cast<std::size_t>(std::max<std::int64_t>(16, (std::int64_t{1} << 20) / work / 4 * 4));
  parallel_for(static_cast<std::size_t>(task.num_points), grain, [&](std::size_t begin, std::size_t end, int) {
    kernel(task, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

}  // namespace mw
