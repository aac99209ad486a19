// Shares bit-plane products among threads, and packs numbers to planes.
#include "planes.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(PlaneKernels, plane_kernels)

namespace mw {
namespace {

// Rough, for the size of chunks only: 64-bit words that one core compares and counts in a microsecond.
constexpr double kWordsPerMicrosecond = 3000, kChunkMicroseconds = 20;

std::size_t row_grain(const Planes& w, const Planes& x) {
  const double words = static_cast<double>(w.row_words()) * w.bits * x.bits * static_cast<double>(std::max<std::int64_t>(x.rows, 1));
  return static_cast<std::size_t>(std::clamp(kChunkMicroseconds * kWordsPerMicrosecond / std::max(words, 1.0), 1.0, 1e6));
}

// Bit `index` of eight bytes, gathered: the product moves the low bit of byte k to bit 56 + k.
std::uint64_t gathered(const std::uint8_t* codes, int index) {
  std::uint64_t bytes;
  std::memcpy(&bytes, codes, sizeof bytes);
  return ((bytes >> index) & 0x0101010101010101u) * 0x0102040810204080u >> 56;
}

// Codes of the up to 64 columns of one word, whose planes lie `stride` words apart.
void pack_word(const float* x, int count, int bits, float scale, std::int64_t stride, std::uint64_t* words) {
  const int half = 1 << (bits - 1), top = (1 << bits) - 1;
  const float inverse = scale > 0 ? 0.5f / scale : 0.0f;
  alignas(8) std::uint8_t codes[kWordBits] = {};
  for (int c = 0; c < count; ++c) {
    // floor by way of a positive number: the cast then rounds down
    const int code = static_cast<int>(x[c] * inverse + static_cast<float>(half));
    codes[c] = static_cast<std::uint8_t>(std::clamp(code, 0, top));
  }
  for (int p = 0; p < bits; ++p) {
    std::uint64_t packed = 0;
    for (int eight = 0; eight < kWordBits / 8; ++eight) packed |= gathered(codes + 8 * eight, p) << (8 * eight);
    words[p * stride] = packed;
  }
}

// max|x| / (2^bits - 1), or not a number where one of them is not finite.
float scale_of(const float* x, std::int64_t count, int bits) {
  // magnitudes order as their bits do, and infinities and what is not a number come last
  std::int32_t most = 0;
  for (std::int64_t c = 0; c < count; ++c) {
    std::int32_t magnitude;
    std::memcpy(&magnitude, x + c, sizeof magnitude);
    most = std::max(most, magnitude & 0x7fffffff);
  }
  if (most >= 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  return largest / static_cast<float>((1 << bits) - 1);
}

}  // namespace

void plane_products(const Planes& w, const Planes& x, std::int32_t* out) {
  const auto kernel = plane_kernels_in_use().fused;
  parallel_for(static_cast<std::size_t>(w.rows), row_grain(w, x), [&](std::size_t begin, std::size_t end, int) {
    kernel(w, x, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end), out);
  });
}

void plane_products_apart(const Planes& w, const Planes& x, std::int32_t* out) {
  const auto kernel = plane_kernels_in_use().apart;
  parallel_for(static_cast<std::size_t>(w.rows), row_grain(w, x), [&](std::size_t begin, std::size_t end, int) {
    kernel(w, x, static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end), out);
  });
}

bool pack_planes(const float* x, std::int64_t rows, std::int64_t cols, int bits, bool grouped, std::uint64_t* words, float* scales) {
  const std::int64_t row_words = (cols + kWordBits - 1) / kWordBits, num_scales = grouped ? row_words : 1;
  const std::size_t grain = static_cast<std::size_t>(std::max<std::int64_t>(1, (1 << 14) / (cols + 1)));
  std::atomic<bool> good{true};
  parallel_for(static_cast<std::size_t>(rows), grain, [&](std::size_t begin, std::size_t end, int) {
    for (auto r = static_cast<std::int64_t>(begin); r < static_cast<std::int64_t>(end); ++r) {
      const float* row = x + r * cols;
      float* scale = scales + r * num_scales;
      if (!grouped) *scale = scale_of(row, cols, bits);
      for (std::int64_t word = 0; word < row_words; ++word) {
        const std::int64_t first = word * kWordBits;
        const int count = static_cast<int>(std::min<std::int64_t>(kWordBits, cols - first));
        if (grouped) scale[word] = scale_of(row + first, count, bits);
        const float each = scale[grouped ? word : 0];
        std::uint64_t* to = words + r * row_words * bits + word;
        if (each == each) pack_word(row + first, count, bits, each, row_words, to);
        else for (int p = 0; p < bits; ++p) to[p * row_words] = 0;  // nothing is made up for what is not finite
      }
      for (std::int64_t i = 0; i < num_scales; ++i)
        if (scale[i] != scale[i]) good.store(false, std::memory_order_relaxed);
    }
  });
  return good.load();
}

}  // namespace mw
