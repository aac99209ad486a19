// Reading tiles of which two of every four columns are kept (formats/sparse.py): their codes and positions, and what they are
// among all columns.
#pragma once

#include "tiles.h"

namespace mw::MW_ISA {

// Positions of a block of four kept columns: the first two are of four columns, the last two of the next four.
template <int Bits, int I>
MW_INLINE Vb positions(const std::uint8_t* unit) {
  return code_block<kPositionBits, I>(unit + kLaneVectorBytes * Bits);
}

// Byte From of each 32-bit lane in all four.
template <int From>
MW_INLINE Vb spread(Vb bytes) {
#if defined(__AVX512BW__)
  const __m128i at = _mm_setr_epi8(From, From, From, From, From + 4, From + 4, From + 4, From + 4, From + 8, From + 8, From + 8, From + 8,
                                   From + 12, From + 12, From + 12, From + 12);
  return (Vb)_mm512_shuffle_epi8((__m512i)bytes, _mm512_broadcast_i32x4(at));
#elif defined(__AVX2__)
  const __m128i at = _mm_setr_epi8(From, From, From, From, From + 4, From + 4, From + 4, From + 4, From + 8, From + 8, From + 8, From + 8,
                                   From + 12, From + 12, From + 12, From + 12);
  return (Vb)_mm256_shuffle_epi8((__m256i)bytes, _mm256_broadcastsi128_si256(at));
#else
  Vi byte = ((Vi)bytes >> (8 * From)) & 0xff;
  byte |= byte << 8;
  return (Vb)(byte | byte << 16);
#endif
}

// The four columns of which kept weights 2 * Half and 2 * Half + 1 are: their codes, and that of zero between them.
template <int Half>
MW_INLINE Vb four_columns(Vb codes, Vb at, Vb zero) {
  const Vb column = (Vb)splat(0x03020100);
  const Vb first = (Vb)(spread<2 * Half>(at) == column), second = (Vb)(spread<2 * Half + 1>(at) == column);
  return (spread<2 * Half>(codes) & first) | (spread<2 * Half + 1>(codes) & second) | (zero & ~(first | second));
}

// The code of zero of kWidth rows of one group, in all bytes of their lanes.
MW_INLINE Vb zero_codes(const Matrix& m, std::int64_t tile, std::int64_t g, int p) {
  if (m.zeros == nullptr) return Vb{} + static_cast<std::uint8_t>(m.low_offset());
  return spread<0>((Vb)load_bytes(m.zeros + (tile * m.groups + g) * kTileRows + p * kWidth));
}

}  // namespace mw::MW_ISA
