// Shares the row tiles of a static 8-bit product among threads.
#include "static8.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(StaticKernels, static_kernels)

namespace mw {

void static_product(StaticProduct product) {
  const auto kernel = static_kernels_in_use().rows;
  std::int32_t sums[kStaticTokens];
  for (std::int64_t t = 0; t < product.tokens; ++t) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < product.cols; ++i) sum += product.x[t * product.cols + i];
    sums[t] = sum;
  }
  product.sums = sums;
  const std::int64_t tiles = (product.rows + 15) / 16;
  const std::int64_t work = std::max<std::int64_t>(16 * product.cols * std::min<std::int64_t>(product.tokens, 16), 1);
  const auto grain = static_cast<std::size_t>(std::max<std::int64_t>(1, (std::int64_t{1} << 17) / work));
  parallel_for(static_cast<std::size_t>(tiles), grain, [&](std::size_t begin, std::size_t end, int) {
    kernel(product, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

}  // namespace mw
