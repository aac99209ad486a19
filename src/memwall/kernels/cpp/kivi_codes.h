// What both ways to multiply with KIVI's codes share: where words lie, and how scales go to the other factor.
#pragma once

#include "attention_isa.h"
#include "attention_simd.h"

namespace mw::MW_ISA {
namespace {

constexpr int kBlock = KiviForm::kValueBlock;

template <int B>
constexpr int kPerWord = B == 8 ? 4 : B == 4 ? 8 : 16;  // codes in a word of the main plane

inline const std::uint32_t* words(const std::uint8_t* p) { return reinterpret_cast<const std::uint32_t*>(p); }

// Rows of words of a key block's plane.
struct Plane {
  const std::uint32_t* data;
  int tokens, full;  // rows of 32-bit words; what comes after has words of 16
  Plane(const std::uint32_t* first, int block_tokens, int dim, int per_word)
      : data(first), tokens(block_tokens), full((dim + per_word - 1) / per_word - KiviForm::half_row(dim, per_word)) {}
  vi load(int row, int token) const {
    const std::uint32_t* at = data + row * tokens;
    return row < full ? iload(at + token) : iload(reinterpret_cast<const std::uint16_t*>(at) + token);
  }
};

inline const f16* halves(const std::uint8_t* p) { return reinterpret_cast<const f16*>(p); }

// the block four further on: of another head, or of the next tokens
inline void fetch_ahead(const std::uint8_t* block, std::size_t size) {
  for (std::size_t byte = 0; byte < size; byte += 64) __builtin_prefetch(block + 4 * size + byte);
}

// q * scale per channel, and the sum of q * minimum: the same for all tokens of the block; zeros up to the next multiple of 16
inline void fold_key_scales(const f16* scales, const f16* minima, const float* q, int dim, float* scaled, float* offset) {
  vf sum = vset(0.0f);
  int d = 0;
  for (; d + W <= dim; d += W) {
    const vf query = vload(q + d);
    vstore(scaled + d, vmul(query, vload(scales + d)));
    sum = vfma(query, vload(minima + d), sum);
  }
  if (d < dim) {
    const vf query = vload(q + d);
    vstore(scaled + d, vmul(query, vload_part(scales + d, dim - d)));
    sum = vfma(query, vload_part(minima + d, dim - d), sum);
    d += W;
  }
  for (; d % 16 != 0; d += W) vstore(scaled + d, vset(0.0f));
  *offset = hsum(sum);
}

}  // namespace
}  // namespace mw::MW_ISA
