// Reading packed tiles: bit planes to one code per byte, and dot products of codes with 8-bit activations.
#pragma once

#include "linear.h"
#include "vector.h"

namespace mw::MW_ISA {

// A lane vector of 16 rows takes this many vectors here; "piece" p holds rows p * kWidth and on.
constexpr int kPieces = kTileRows / kWidth;
constexpr int kUnitBlocks = kUnitColumns / 4;

constexpr int widest_plane(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// Codes of column block I (4 columns) of a unit, one per byte. Planes come widest first and hold the low bits first; a plane of
// width w keeps 8 / w blocks in each of its w lane vectors. Shifting 16-bit lanes is right for bytes too: what crosses over is
// masked away.
template <int Bits, int I, int Low = 0, int First = 0>
MW_INLINE Vb code_block(const std::uint8_t* unit) {
  constexpr int width = widest_plane(Bits), per_byte = 8 / width, bit = width * (I % per_byte);
  constexpr int mask = ((1 << width) - 1) << Low;
  const Vh raw = load<Vh>(unit + kLaneVectorBytes * (First + I / per_byte));
  Vh moved = raw;
  if constexpr (bit > Low) moved = raw >> (bit - Low);
  if constexpr (bit < Low) moved = raw << (Low - bit);
  Vb codes = (Vb)moved;
  if constexpr (width < 8) codes = (Vb)(moved & static_cast<std::uint16_t>(mask * 0x0101));
  if constexpr (Bits > width) codes |= code_block<Bits - width, I, Low + width, First + width>(unit);
  return codes;
}

// Four activations of one token, repeated in every 32-bit lane.
MW_INLINE Vb repeat_four(const std::int8_t* from) {
  std::int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return (Vb)splat(four);
}

// Products of 16-bit neighbours, added in pairs into 32 bits.
MW_INLINE Vi multiply_add_pairs(Vs a, Vs b) {
#if defined(__AVX512F__)
  return (Vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Vi low = (((Vi)a << 16) >> 16) * (((Vi)b << 16) >> 16);
  return low + ((Vi)a >> 16) * ((Vi)b >> 16);
#endif
}

// Any codes: even and odd bytes as 16-bit numbers, so nothing can overflow.
struct WideDot {
  Vi sum;
  MW_INLINE void start(Vi first) { sum = first; }
  template <int Step>
  MW_INLINE void add(Vb codes, Vb four) {
    const Vs even = (Vs)((Vh)codes & 0x00ff), odd = (Vs)((Vh)codes >> 8);
    sum += multiply_add_pairs(even, (Vs)((Vh)four << 8) >> 8);
    sum += multiply_add_pairs(odd, (Vs)four >> 8);
  }
};

#if defined(__AVX512VNNI__)
struct FusedDot {
  Vi sum;
  MW_INLINE void start(Vi first) { sum = first; }
  template <int Step>
  MW_INLINE void add(Vb codes, Vb four) {
    sum = (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)four);
  }
};
template <int Bits>
using Dot = FusedDot;
#elif defined(__AVX2__)
// The products of narrow codes are small: Steps of them are added in 16 bits before widening costs two more instructions.
template <int Steps>
struct NarrowDot {
  Vi sum;
  Vs part;
  MW_INLINE void start(Vi first) { sum = first; }
  template <int Step>
  MW_INLINE void add(Vb codes, Vb four) {
    const Vs products = (Vs)_mm256_maddubs_epi16((__m256i)codes, (__m256i)four);
    part = Step % Steps == 0 ? products : part + products;
    if (Step % Steps == Steps - 1) sum += multiply_add_pairs(part, Vs{} + std::int16_t{1});
  }
};
template <int Bits>
constexpr int narrow_steps() {
  // the largest power of two that keeps Steps * 2 products of (2^Bits - 1) * 127 below 2^15, at most one unit
  int steps = 8;
  while (steps > 1 && steps * 2 * ((1 << Bits) - 1) * 127 > 32767) steps /= 2;
  return steps;
}
template <int Bits>
struct DotOf {
  using type = NarrowDot<narrow_steps<Bits>()>;
};
template <>
struct DotOf<8> {
  using type = WideDot;
};
template <int Bits>
using Dot = typename DotOf<Bits>::type;
#else
template <int Bits>
using Dot = WideDot;
#endif

// Calls f<Bits>() for the bits of a matrix, known to the compiler.
template <class F>
MW_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    case 4: return f(Index<4>{});
    case 5: return f(Index<5>{});
    case 6: return f(Index<6>{});
    case 7: return f(Index<7>{});
    default: return f(Index<8>{});
  }
}

// Writes `count` results of one token to its output row, which may end among them.
MW_INLINE void write_rows(const float* values, std::int64_t token, std::int64_t first_row, int count, const Output& out) {
  float* to = out.data + token * out.rows + first_row;
  const float* bias = out.bias ? out.bias + first_row : nullptr;
  int i = 0;
  if (out.rows - first_row < count) count = static_cast<int>(out.rows - first_row);
  for (; i + kWidth <= count; i += kWidth) {
    Vf value = load<Vf>(values + i);
    if (bias) value += load<Vf>(bias + i);
    if (out.accumulate) value += load<Vf>(to + i);
    store(to + i, value);
  }
  for (; i < count; ++i) {
    const float value = bias ? values[i] + bias[i] : values[i];
    to[i] = out.accumulate ? to[i] + value : value;
  }
}

// Asks for the lines that write_rows will write, while there is other work to do.
MW_INLINE void expect_rows(std::int64_t token, std::int64_t first_row, int count, const Output& out) {
  const float* to = out.data + token * out.rows + first_row;
  for (int i = 0; i < count; i += 16) __builtin_prefetch(to + i, 1);
}

}  // namespace mw::MW_ISA
