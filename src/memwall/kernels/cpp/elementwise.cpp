// Shares the rows of elementwise operations among threads when there are enough of them.
#include "elementwise.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(ElementwiseKernels, elementwise_kernels)

namespace mw {
namespace {

// Numbers per chunk: about 10 us of work, so that decoding (one token) stays on the calling thread.
constexpr std::int64_t kChunk = 1 << 16;

std::size_t rows_per_chunk(std::int64_t width) { return static_cast<std::size_t>(std::max<std::int64_t>(1, kChunk / (width + 1))); }

}  // namespace

void rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out) {
  const auto kernel = elementwise_kernels_in_use().rms_norm;
  parallel_for(static_cast<std::size_t>(rows), rows_per_chunk(width), [&](std::size_t begin, std::size_t end, int) {
    const auto at = static_cast<std::int64_t>(begin) * width;
    kernel(x + at, weight, eps, static_cast<std::int64_t>(end - begin), width, out + at);
  });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t width, float* out) {
  const auto kernel = elementwise_kernels_in_use().layer_norm;
  parallel_for(static_cast<std::size_t>(rows), rows_per_chunk(width), [&](std::size_t begin, std::size_t end, int) {
    const auto at = static_cast<std::int64_t>(begin) * width;
    kernel(x + at, weight, bias, eps, static_cast<std::int64_t>(end - begin), width, out + at);
  });
}

void rope(float* x, const float* cos, const float* sin, std::int64_t tokens, std::int64_t heads, std::int64_t width,
          std::int64_t half) {
  const auto kernel = elementwise_kernels_in_use().rope;
  parallel_for(static_cast<std::size_t>(tokens), rows_per_chunk(heads * width), [&](std::size_t begin, std::size_t end, int) {
    for (auto t = static_cast<std::int64_t>(begin); t < static_cast<std::int64_t>(end); ++t)
      kernel(x + t * heads * width, cos + t * half, sin + t * half, heads, width, half);
  });
}

void swiglu(const float* gate, const float* up, std::int64_t count, float* out) {
  const auto kernel = elementwise_kernels_in_use().swiglu;
  parallel_for(static_cast<std::size_t>(count), kChunk / 4, [&](std::size_t begin, std::size_t end, int) {
    kernel(gate + begin, up + begin, static_cast<std::int64_t>(end - begin), out + begin);
  });
}

void gelu(const float* x, std::int64_t count, bool near, float* out) {
  const auto kernel = elementwise_kernels_in_use().gelu;
  parallel_for(static_cast<std::size_t>(count), kChunk / 4, [&](std::size_t begin, std::size_t end, int) {
    kernel(x + begin, static_cast<std::int64_t>(end - begin), near, out + begin);
  });
}

void relu(const float* x, const float* up, float threshold, std::int64_t count, float* out) {
  parallel_for(static_cast<std::size_t>(count), kChunk, [&](std::size_t begin, std::size_t end, int) {
    if (up == nullptr)
      for (std::size_t i = begin; i < end; ++i) out[i] = x[i] <= threshold ? 0.0f : x[i];
    else
      for (std::size_t i = begin; i < end; ++i) out[i] = x[i] <= threshold ? 0.0f : x[i] * up[i];
  });
}

void store_int8(const float* x, const std::int64_t* places, std::int64_t rows, std::int64_t heads, std::int64_t dim, std::int8_t* out) {
  const auto kernel = elementwise_kernels_in_use().to_int8;
  parallel_for(static_cast<std::size_t>(rows), rows_per_chunk(heads * dim), [&](std::size_t begin, std::size_t end, int) {
    for (auto row = static_cast<std::int64_t>(begin); row < static_cast<std::int64_t>(end); ++row)
      kernel(x + row * heads * dim, heads, dim, out + places[row] * heads * (dim + 2));
  });
}

void store_half(const float* x, std::int64_t count, std::uint16_t* out) { elementwise_kernels_in_use().to_half(x, count, out); }

void store_bfloat(const float* x, std::int64_t count, std::uint16_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const bool none = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding would make an infinity of what is no number
    out[i] = static_cast<std::uint16_t>((none ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}

void to_int8_rows(const float* x, std::int64_t heads, std::int64_t dim, std::int8_t* out) {
  elementwise_kernels_in_use().to_int8(x, heads, dim, out);
}

}  // namespace mw
