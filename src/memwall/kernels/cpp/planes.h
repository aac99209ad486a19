// Products of two matrices of bipolar integers, kept as bit planes: exclusive or and population count instead of multiplying.
//
// A bipolar integer of n bits is sum_i (2 b_i - 1) 2^i. With planes i of w and j of x packed 64 columns to a word, the product
// of two rows is sum_ij 2^(i+j) (cols - 2 popcount(w_i ^ x_j)); padding bits are 0 in both and count nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

constexpr int kWordBits = 64, kMaxPlanes = 8;

// Rows of bit planes: words [row][plane][word], so that all of a row lies together. Borrowed.
struct Planes {
  const std::uint64_t* words = nullptr;
  std::int64_t rows = 0, cols = 0;
  int bits = 0;

  std::int64_t row_words() const { return (cols + kWordBits - 1) / kWordBits; }
  const std::uint64_t* plane(std::int64_t row, int index) const { return words + (row * bits + index) * row_words(); }
};

struct PlaneKernels {
  // integer products of rows [begin, end) of w with every row of x, added up in registers, into out[x row][w row]
  void (*fused)(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out);
  // the same for every pair of planes apart: out[i][j][x row][w row], what recovery outside of the kernel has to read back
  void (*apart)(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out);
};

// out[x row][w row]: exact while cols (2^n - 1) (2^m - 1) fits in 31 bits, which callers check.
void plane_products(const Planes& w, const Planes& x, std::int32_t* out);
void plane_products_apart(const Planes& w, const Planes& x, std::int32_t* out);

// Nearest odd multiples of scale = max|x| / (2^bits - 1), one scale per row, or, grouped, for the columns of each word: scales
// [rows] or [rows, words]. Where all are zeros the scale is 0 and codes are +1. False when a number is not finite.
bool pack_planes(const float* x, std::int64_t rows, std::int64_t cols, int bits, bool grouped, std::uint64_t* words, float* scales);

// Columns [begin, end) of one row, decoded; scale_of(word) gives the scale of a word's columns.
template <class ScaleOf>
void decode_planes(const Planes& planes, std::int64_t row, std::int64_t begin, std::int64_t end, ScaleOf&& scale_of, float* out) {
  const int top = (1 << planes.bits) - 1;
  float scale = 0.0f;
  for (std::int64_t col = begin; col < end; ++col) {
    if (col == begin || col % kWordBits == 0) scale = scale_of(col / kWordBits);
    int code = 0;
    for (int p = 0; p < planes.bits; ++p)
      code |= static_cast<int>(planes.plane(row, p)[col / kWordBits] >> (col % kWordBits) & 1) << p;
    out[col - begin] = scale * static_cast<float>(2 * code - top);
  }
}

}  // namespace mw
