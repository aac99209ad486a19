// Logits of decoding where several query heads share a key: rows of 16-bit numbers are turned into columns of W tokens first.
//
// A product of rows ends in a sum across a vector, which for heads of 64 numbers takes as many instructions as the products. A column
// holds one number of W tokens, so that sums of products are logits as they are. Turning costs less the more heads share it; it is
// done before numbers are widened, at half the shuffles.
#pragma once

#include "attention.h"
#include "attention_simd.h"

namespace mw::MW_ISA {

#if defined(__AVX512F__)

constexpr bool kTurns = true;
constexpr int kTurned = 2 * W;       // numbers of a row that are turned at once: a vector of them
constexpr int kLanes = kTurned / 8;  // of 128 bits
constexpr int kFewColumns = 5;       // query heads from which on the registers hold sums of two vectors of tokens each, and not of four

// Columns do not come in the order of their numbers: of each kTurned, column j * kLanes + l is number 8 * l + j.
constexpr int number_of_column(int column) {
  const int within = column % kTurned;
  return column - within + 8 * (within % kLanes) + within / kLanes;
}

// Eight rows; lane l of columns[j] is number 8 * l + j of all of them.
static inline void turn_eight(const __m512i (&rows)[8], __m512i (&columns)[8]) {
  __m512i two[8], four[8];
  for (int i = 0; i < 8; i += 2) {
    two[i] = _mm512_unpacklo_epi16(rows[i], rows[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi16(rows[i], rows[i + 1]);
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = 0; i < 2; ++i) {
      four[half + 2 * i] = _mm512_unpacklo_epi32(two[half + i], two[half + 2 + i]);
      four[half + 2 * i + 1] = _mm512_unpackhi_epi32(two[half + i], two[half + 2 + i]);
    }
  for (int i = 0; i < 4; ++i) {
    columns[2 * i] = _mm512_unpacklo_epi64(four[i], four[4 + i]);
    columns[2 * i + 1] = _mm512_unpackhi_epi64(four[i], four[4 + i]);
  }
}

// W rows of `dim` numbers, a multiple of kTurned: to[column * W + row]
static inline void turn_rows(const std::uint16_t* const rows[W], int dim, std::uint16_t* to) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int d = 0; d < dim; d += kTurned, to += kTurned * W) {
    __m512i eight[8], columns[2][8];
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) eight[i] = _mm512_loadu_si512(rows[8 * half + i] + d);
      turn_eight(eight, columns[half]);
    }
    for (int j = 0; j < 8; ++j) {  // lanes of the same column side by side
      _mm512_storeu_si512(to + 4 * j * W, _mm512_permutex2var_epi64(columns[0][j], first, columns[1][j]));
      _mm512_storeu_si512(to + (4 * j + 2) * W, _mm512_permutex2var_epi64(columns[0][j], second, columns[1][j]));
    }
  }
}

// scores[r * kStep + token] of R query heads and `G` times W tokens, whose columns of T begin at `columns` and every dim * W from there;
// q: numbers in the order of columns, those of `rep` heads side by side. between() is called for every kLanes columns.
template <int R, int G, typename T, typename Between>
inline void dot_columns(const std::uint16_t* columns, int dim, const float* q, int rep, float* scores, Between&& between) {
  const T* at[G];
  for (int g = 0; g < G; ++g) at[g] = reinterpret_cast<const T*>(columns) + static_cast<std::int64_t>(g) * dim * W;
  vf sum[R][G];
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sum[r][g] = vset(0.0f);
  for (int c = 0; c < dim; c += kLanes) {
    for (int i = 0; i < kLanes; ++i, q += rep) {
      vf key[G];
      for (int g = 0; g < G; ++g) key[g] = vload(at[g] + (c + i) * W);
      for (int r = 0; r < R; ++r) {
        const vf query = vset(q[r]);
        for (int g = 0; g < G; ++g) sum[r][g] = vfma(query, key[g], sum[r][g]);
      }
    }
    between();
  }
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) vstore(scores + r * kStep + g * W, sum[r][g]);
}

#else

constexpr bool kTurns = false;
constexpr int kTurned = 1;

#endif

}  // namespace mw::MW_ISA
