// Four rows at a time, while others are fetched: rows of a list lie anywhere.
#include "tenant_tree.h"

#include <cstring>

#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kRows = 4, kAhead = 8;  // rows compared at once, and how far ahead they are fetched

template <int Rows>
MW_INLINE void some_rows(const float* query, const float* const* rows, std::int64_t following, std::int64_t cols, float* out) {
  Vf sum[kRows] = {};
  std::int64_t col = 0;
  for (; col + kWidth <= cols; col += kWidth) {
    const Vf x = load<Vf>(query + col);
    for (int r = 0; r < Rows; ++r) {
      if (r < following) __builtin_prefetch(rows[kAhead + r] + col);
      const Vf difference = load<Vf>(rows[r] + col) - x;
      sum[r] += difference * difference;
    }
  }
  if (col < cols) {
    const Vf x = load<Vf>(query + col);
    for (int r = 0; r < Rows; ++r) {
      float last[kWidth] = {};
      std::memcpy(last, rows[r] + col, sizeof(float) * static_cast<std::size_t>(cols - col));
      const Vf difference = load<Vf>(last) - x;
      sum[r] += difference * difference;
    }
  }
  const Vf all = sums_of(sum[0], sum[1], sum[2], sum[3]);
  for (int r = 0; r < Rows; ++r) out[r] = all[r];
}

void distances(const float* query, const float* const* rows, std::int64_t count, std::int64_t cols, float* out) {
  std::int64_t at = 0;
  for (; at + kRows <= count; at += kRows) some_rows<kRows>(query, rows + at, count - at - kAhead, cols, out + at);
  for (; at < count; ++at) some_rows<1>(query, rows + at, 0, cols, out + at);
}

}  // namespace

extern const TenantKernels tenant_kernels;
const TenantKernels tenant_kernels = {distances};

}  // namespace mw::MW_ISA
