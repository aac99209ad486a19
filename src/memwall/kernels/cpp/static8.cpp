// Shares the row tiles of a static 8-bit product among threads.
#include "static8.h"

#include <algorithm>
#include <vector>

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
  thread_local std::vector<std::int32_t> pairs;  // some kilobytes
  if (product.tokens == 1 && product.bits == 4) {
    pairs.resize(static_cast<std::size_t>(product.cols / 2));
    for (std::int64_t i = 0; i < product.cols / 4; ++i)
      for (int odd = 0; odd < 2; ++odd) {
        const std::int8_t *first = product.x + 4 * i + odd, *second = first + 2;
        pairs[static_cast<std::size_t>(2 * i + odd)] = static_cast<std::int32_t>((*second * 65536) | (*first & 0xffff));
      }
    product.pairs = pairs.data();
    sums[0] = 0;  // nothing is added to weights there
  }
  const std::int64_t tiles = (product.rows + 15) / 16;
  const std::int64_t work = std::max<std::int64_t>(16 * product.cols * std::min<std::int64_t>(product.tokens, 16), 1);
  const auto grain = static_cast<std::size_t>(std::max<std::int64_t>(1, (std::int64_t{1} << 17) / work));
  parallel_for(static_cast<std::size_t>(tiles), grain, [&](std::size_t begin, std::size_t end, int) {
    kernel(product, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end));
  });
}

}  // namespace mw
