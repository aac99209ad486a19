// Products with low-rank factors whose rows are found through page tables, a few tokens and rows at a time.
#include "lora.h"

#include "vector.h"

namespace mw::MW_ISA {
namespace {

MW_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Tokens x rows dot products; each is summed in the same order whatever stands beside it.
template <class Number, int Tokens, int Rows>
MW_INLINE void dots(const LoraRows& a, const float* x, std::int64_t x_stride, std::int64_t row, float* t, std::int64_t t_stride) {
  using Element = typename Number::Element;
  Vf sums[Tokens][Rows];
  float rest[Tokens][Rows];
  for (int b = 0; b < Tokens; ++b)
    for (int r = 0; r < Rows; ++r) sums[b][r] = Vf{}, rest[b][r] = 0.0f;
  for (std::int64_t u = 0; u < a.row_units; ++u) {
    const Element* unit[Rows];
    for (int r = 0; r < Rows; ++r) unit[r] = reinterpret_cast<const Element*>(a.unit(row + r, u));
    const float* at = x + u * a.unit_values;
    const std::int64_t count = smaller(a.unit_values, a.width - u * a.unit_values);
    std::int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      Vf values[Rows];
      for (int r = 0; r < Rows; ++r) values[r] = Number::vector(unit[r] + i);
      for (int b = 0; b < Tokens; ++b) {
        const Vf input = load<Vf>(at + b * x_stride + i);
        for (int r = 0; r < Rows; ++r) sums[b][r] += input * values[r];
      }
    }
    for (; i < count; ++i)
      for (int b = 0; b < Tokens; ++b)
        for (int r = 0; r < Rows; ++r) rest[b][r] += at[b * x_stride + i] * Number::scalar(unit[r][i]);
  }
  for (int b = 0; b < Tokens; ++b)
    for (int r = 0; r < Rows; ++r) t[b * t_stride + r] = sum_of(sums[b][r]) + rest[b][r];
}

template <class Number, int Tokens>
MW_INLINE void dots_of_rows(const LoraRows& a, const float* x, std::int64_t x_stride, std::int64_t begin, std::int64_t end, float* t,
                            std::int64_t t_stride) {
  constexpr int kRows = Tokens == 1 ? 4 : 2;
  std::int64_t row = begin;
  for (; row + kRows <= end; row += kRows) dots<Number, Tokens, kRows>(a, x, x_stride, row, t + row, t_stride);
  for (; row < end; ++row) dots<Number, Tokens, 1>(a, x, x_stride, row, t + row, t_stride);
}

template <class Number>
void shrink(const LoraRows& a, const float* x, std::int64_t x_stride, std::int64_t tokens, std::int64_t begin, std::int64_t end, float* t,
            std::int64_t t_stride) {
  std::int64_t b = 0;
  for (; b + 4 <= tokens; b += 4) dots_of_rows<Number, 4>(a, x + b * x_stride, x_stride, begin, end, t + b * t_stride, t_stride);
  for (; b < tokens; ++b) dots_of_rows<Number, 1>(a, x + b * x_stride, x_stride, begin, end, t + b * t_stride, t_stride);
}

// Tokens x Vectors outputs stay in registers while the rows pass by.
template <class Number, int Tokens, int Vectors>
MW_INLINE void add_strip(const typename Number::Element* const* units, const float* t, std::int64_t t_stride, std::int64_t rank, float scale,
                         std::int64_t i, float* y, std::int64_t y_stride) {
  Vf sums[Tokens][Vectors];
  for (int n = 0; n < Tokens; ++n)
    for (int v = 0; v < Vectors; ++v) sums[n][v] = Vf{};
  for (std::int64_t j = 0; j < rank; ++j) {
    Vf values[Vectors];
    for (int v = 0; v < Vectors; ++v) values[v] = Number::vector(units[j] + i + v * kWidth);
    for (int n = 0; n < Tokens; ++n) {
      const Vf factor = splat(t[n * t_stride + j]);
      for (int v = 0; v < Vectors; ++v) sums[n][v] += factor * values[v];
    }
  }
  for (int n = 0; n < Tokens; ++n)
    for (int v = 0; v < Vectors; ++v) {
      float* at = y + n * y_stride + v * kWidth;
      store(at, load<Vf>(at) + scale * sums[n][v]);
    }
}

template <class Number, int Tokens>
MW_INLINE void add_units(const LoraRows& b, const float* t, std::int64_t t_stride, std::int64_t rank, float scale, std::int64_t begin,
                         std::int64_t end, float* y, std::int64_t y_stride) {
  using Element = typename Number::Element;
  constexpr int kVectors = Tokens == 1 ? 8 : 2;
  const Element* units[kMostLoraRank];
  for (std::int64_t u = begin; u < end; ++u) {
    for (std::int64_t j = 0; j < rank; ++j) units[j] = reinterpret_cast<const Element*>(b.unit(j, u));
    float* at = y + u * b.unit_values;
    const std::int64_t count = smaller(b.unit_values, b.width - u * b.unit_values);
    std::int64_t i = 0;
    for (; i + kVectors * kWidth <= count; i += kVectors * kWidth)
      add_strip<Number, Tokens, kVectors>(units, t, t_stride, rank, scale, i, at + i, y_stride);
    for (; i + kWidth <= count; i += kWidth) add_strip<Number, Tokens, 1>(units, t, t_stride, rank, scale, i, at + i, y_stride);
    for (; i < count; ++i)
      for (int n = 0; n < Tokens; ++n) {
        float sum = 0.0f;
        for (std::int64_t j = 0; j < rank; ++j)
          sum += t[n * t_stride + j] * Number::scalar(units[j][i]);
        at[n * y_stride + i] += scale * sum;
      }
  }
}

template <class Number>
void expand(const LoraRows& b, const float* t, std::int64_t t_stride, std::int64_t tokens, std::int64_t rank, float scale,
            std::int64_t begin, std::int64_t end, float* y, std::int64_t y_stride) {
  std::int64_t n = 0;
  for (; n + 4 <= tokens; n += 4)
    add_units<Number, 4>(b, t + n * t_stride, t_stride, rank, scale, begin, end, y + n * y_stride, y_stride);
  for (; n < tokens; ++n)
    add_units<Number, 1>(b, t + n * t_stride, t_stride, rank, scale, begin, end, y + n * y_stride, y_stride);
}

}  // namespace

extern const LoraKernels lora_kernels;
const LoraKernels lora_kernels = {{shrink<Float32>, shrink<Float16>, shrink<BFloat16>}, {expand<Float32>, expand<Float16>, expand<BFloat16>}};

}  // namespace mw::MW_ISA
