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

// The bytes that codes of Bits bits stand for, by byte shuffles where the processor has them.
template <int Bits>
MW_INLINE Vb look_up(const std::uint8_t* table, Vb codes) {
#if defined(__AVX512VBMI__)
  const __m512i at = (__m512i)codes;
  if constexpr (Bits <= 4) return (Vb)_mm512_shuffle_epi8(_mm512_load_si512(table), at);
  else if constexpr (Bits <= 6) return (Vb)_mm512_permutexvar_epi8(at, _mm512_load_si512(table));
  else {
    const __m512i first = _mm512_permutex2var_epi8(_mm512_load_si512(table), at, _mm512_load_si512(table + 64));
    if constexpr (Bits == 7) return (Vb)first;
    const __m512i second = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), at, _mm512_load_si512(table + 192));
    return (Vb)_mm512_mask_blend_epi8(_mm512_movepi8_mask(at), first, second);
  }
#elif defined(__AVX2__)
  if constexpr (Bits <= 4) {
    return (Vb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(table)), (__m256i)codes);
  } else {
    // a shuffle reads bits 0 to 3 and gives zero where bit 7 is set; each further bit of the code chooses between two halves
    const Vb low = Bits == 8 ? codes & 0x7f : codes;
    const Vb chosen = (Vb)((Vh)codes << (8 - Bits));
    return (Vb)_mm256_blendv_epi8((__m256i)look_up<Bits - 1>(table, low), (__m256i)look_up<Bits - 1>(table + (1 << (Bits - 1)), low),
                                  (__m256i)chosen);
  }
#else
  Vb found;
  for (int i = 0; i < kVectorBytes; ++i) found[i] = table[codes[i]];
  return found;
#endif
}

// The floats that codes stand for, one code per lane.
template <int Bits>
MW_INLINE Vf look_up(const float* table, Vi codes) {
#if defined(__AVX512F__)
  if constexpr (Bits <= 4) return (Vf)_mm512_permutexvar_ps((__m512i)codes, _mm512_load_ps(table));
  return (Vf)_mm512_i32gather_ps((__m512i)codes, table, 4);
#elif defined(__AVX2__)
  return (Vf)_mm256_i32gather_ps(table, (__m256i)codes, 4);
#else
  Vf found;
  for (int i = 0; i < kWidth; ++i) found[i] = table[codes[i]];
  return found;
#endif
}

// kWidth bytes as integers.
MW_INLINE Vi load_bytes(const std::uint8_t* from) {
#if defined(__AVX512F__)
  return (Vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  typedef std::uint8_t Narrow __attribute__((vector_size(kWidth)));
  return __builtin_convertvector(load<Narrow>(from), Vi);
#endif
}

// Scales of rows p * kWidth and on of group g of a tile.
MW_INLINE Vf group_scale(const Matrix& m, std::int64_t tile, std::int64_t g, int p) {
  const std::int64_t at = (tile * m.groups + g) * kTileRows + p * kWidth;
  switch (m.scale_form) {
    case ScaleForm::half: return load_half(static_cast<const std::uint16_t*>(m.scales) + at);
    case ScaleForm::single: return load<Vf>(static_cast<const float*>(m.scales) + at);
    case ScaleForm::exponent: {
      // byte 0 is 2^-127, which float32 writes without the hidden bit; 255, which is NaN, becomes an infinity
      return vmax((Vf)(load_bytes(static_cast<const std::uint8_t*>(m.scales) + at) << 23), (Vf)splat(0x00400000));
    }
    case ScaleForm::one: return splat(1.0f);
    default: {
      const Vi bytes = load_bytes(static_cast<const std::uint8_t*>(m.scales) + at);
      const float most = m.nested[tile * ((m.groups + kNestedGroups - 1) / kNestedGroups) + g / kNestedGroups];
      return look_up<8>(dynamic_levels, bytes) * most + m.offsets[tile];
    }
  }
}
// What is added to every number of rows p * kWidth and on of group g of a tile.
MW_INLINE Vf group_least(const Matrix& m, std::int64_t tile, std::int64_t g, int p) {
  const std::int64_t at = (tile * m.groups + g) * kTileRows + p * kWidth;
  if (m.mins) return load_half(m.mins + at);
  if (!m.shifts) return Vf{};
  const float peak = m.shift_peaks[tile * ((m.groups + kNestedGroups - 1) / kNestedGroups) + g / kNestedGroups];
  return look_up<8>(dynamic_levels, load_bytes(m.shifts + at)) * peak;
}
// What the high bytes of codes are multiples of.
MW_INLINE Vf high_scale(const Matrix& m, std::int64_t tile, std::int64_t g, int p, Vf scale) {
  if (m.second == nullptr) return scale * 256.0f;
  return load_half(m.second + (tile * m.groups + g) * kTileRows + p * kWidth);
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

// How the weights of a panel are held for a kind of dot product: one vector of bytes, from the first part.
struct BytePanel {
  using Weights = Vb;
  static MW_INLINE Weights load_weights(const std::uint8_t* first, const std::uint8_t*) { return load<Vb>(first); }
};

// Any codes: even and odd bytes as 16-bit numbers, so nothing can overflow.
struct WideDot : BytePanel {
  Vi sum;
  MW_INLINE Vi total() const { return sum; }
  MW_INLINE void start(Vi first) { sum = first; }
  template <int Step>
  MW_INLINE void add(Vb codes, Vb four) {
    const Vs even = (Vs)((Vh)codes & 0x00ff), odd = (Vs)((Vh)codes >> 8);
    sum += multiply_add_pairs(even, (Vs)((Vh)four << 8) >> 8);
    sum += multiply_add_pairs(odd, (Vs)four >> 8);
  }
};

#if defined(__AVX512VNNI__)
struct FusedDot : BytePanel {
  Vi sum;
  MW_INLINE Vi total() const { return sum; }
  MW_INLINE void start(Vi first) { sum = first; }
  template <int Step>
  MW_INLINE void add(Vb codes, Vb four) {
    sum = (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)four);
  }
};
template <int Bits>
using Dot = FusedDot;
template <int Bits, int Bytes>
using LevelDot = FusedDot;
constexpr bool kWords = false;
struct Words {};  // never made here
template <int Bits, int Bytes>
Words level_words(const Levels& levels, Vb codes);
#elif defined(__AVX2__)
// The products of narrow codes are small: Steps of them are added in 16 bits before widening costs two more instructions.
template <int Steps>
struct NarrowDot : BytePanel {
  Vi sum;
  MW_INLINE Vi total() const { return sum; }
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
// Levels of one byte are small: up to 32 for narrow codes (4 steps of two products of 32 * 127 fill 16 bits), up to
// 2^7 for others. With two bytes, all of each may be used.
template <int Bits, int Bytes>
struct LevelDotOf {
  using type = WideDot;
};
template <int Bits>
struct LevelDotOf<Bits, 1> {
  using type = NarrowDot<Bits <= 4 ? 4 : 1>;
};
template <int Bits>
struct LevelDotOf<Bits, 0> {
  using type = Dot<Bits>;
};
template <int Bits, int Bytes>
using LevelDot = typename LevelDotOf<Bits, Bytes>::type;

// Levels of two bytes as signed 16-bit words, rows 0, 1, 4, 5 of eight in the first vector and the others in the second: one
// product costs less than two with the halves of the words.
constexpr bool kWords = true;
struct Words {
  Vs first, second;
};
MW_INLINE Words words_of(Vb low, Vb high) {
  const Vb flipped = high ^ 0x80;  // from an offset of 2^15 to a sign
  return {(Vs)_mm256_unpacklo_epi8((__m256i)low, (__m256i)flipped), (Vs)_mm256_unpackhi_epi8((__m256i)low, (__m256i)flipped)};
}
// Words of levels that are linear in the low four bits of their codes.
MW_INLINE Words linear_words(const Levels& levels, Vb codes) {
  const Vb block = (Vb)((Vh)codes >> 4) & 15, within = codes & 15;
  const __m256i low = (__m256i)look_up<4>(levels.base_low, block), high = (__m256i)look_up<4>(levels.base_high, block);
  const __m256i step = (__m256i)look_up<4>(reinterpret_cast<const std::uint8_t*>(levels.step), block), zero = _mm256_setzero_si256();
  const __m256i first = _mm256_maddubs_epi16(_mm256_unpacklo_epi8((__m256i)within, zero), _mm256_unpacklo_epi8(step, zero));
  const __m256i second = _mm256_maddubs_epi16(_mm256_unpackhi_epi8((__m256i)within, zero), _mm256_unpackhi_epi8(step, zero));
  return {(Vs)_mm256_unpacklo_epi8(low, high) + (Vs)first, (Vs)_mm256_unpackhi_epi8(low, high) + (Vs)second};
}
// Words of any levels of two bytes: Bytes is 2, or 4 where they are linear.
template <int Bits, int Bytes>
MW_INLINE Words level_words(const Levels& levels, Vb codes) {
  if constexpr (Bytes == 4) return linear_words(levels, codes);
  else return words_of(look_up<Bits>(levels.low, codes), look_up<Bits>(levels.high, codes));
}
struct WordDot {
  Vi first, second;
  MW_INLINE void start(Vi) { first = second = Vi{}; }
  template <int Step>
  MW_INLINE void add(Words words, Vb four) {
    const Vs x = (Vs)_mm256_cvtepi8_epi16(_mm256_castsi256_si128((__m256i)four));
    first += multiply_add_pairs(words.first, x);
    second += multiply_add_pairs(words.second, x);
  }
  MW_INLINE Vi total() const { return (Vi)_mm256_hadd_epi32((__m256i)first, (__m256i)second); }
  using Weights = Words;
  static MW_INLINE Weights load_weights(const std::uint8_t* first, const std::uint8_t* second) {
    return {load<Vs>(first), load<Vs>(second)};
  }
};
template <int Bits>
struct LevelDotOf<Bits, 2> {
  using type = WordDot;
};
template <int Bits>
struct LevelDotOf<Bits, 4> {
  using type = WordDot;
};
template <int Bits>
struct LevelDotOf<Bits, 3> {
  using type = NarrowDot<4>;  // of pairs of scales, whose levels are two at most
};

// A code as float16: two columns of eight rows, or of the same rows and the columns one on.
MW_INLINE Vs half_words(const Levels& levels, Vs codes) { return (codes >> levels.half_shift) & (Vs{} + static_cast<std::int16_t>(levels.half_mask)); }
#else
constexpr bool kWords = false;
struct Words {};  // never made here
template <int Bits, int Bytes>
Words level_words(const Levels& levels, Vb codes);
template <int Bits>
using Dot = WideDot;
template <int Bits, int Bytes>
using LevelDot = WideDot;
#endif

// Calls f<Bits>() for the bits of a matrix, known to the compiler.
template <class F>
MW_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 1: return f(Index<1>{});
    case 2: return f(Index<2>{});
    case 3: return f(Index<3>{});
    case 4: return f(Index<4>{});
    case 5: return f(Index<5>{});
    case 6: return f(Index<6>{});
    case 7: return f(Index<7>{});
    default: return f(Index<8>{});
  }
}

// The same with the bytes of its levels: 3 where they are two with scales of their own, 4 where they are two and linear in the
// low bits of their codes, which is of use to some: f<Bits, Bytes>().
template <class F>
MW_INLINE void with_form(const Matrix& m, F&& f) {
  if (m.second) return f(Index<2>{}, Index<3>{});
  if (kWords && m.levels && m.levels->linear) {
    if (m.bits == 8) return f(Index<8>{}, Index<4>{});
    if (m.bits == 7) return f(Index<7>{}, Index<4>{});
    if (m.bits == 6) return f(Index<6>{}, Index<4>{});
    if (m.bits == 5) return f(Index<5>{}, Index<4>{});
  }
  with_bits(m.bits, [&](auto bits) __attribute__((always_inline)) {
    switch (m.bytes()) {
      case 0: return f(bits, Index<0>{});
      case 1: return f(bits, Index<1>{});
      default: return f(bits, Index<2>{});
    }
  });
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
