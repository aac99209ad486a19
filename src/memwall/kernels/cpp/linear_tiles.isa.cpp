// Integer products: packed weight tiles times activations quantized to 8 bits.
#include "linear_kernels.h"
#include "matrix_unit.h"
#include "tiles.h"

#include <algorithm>
#include <type_traits>

namespace mw::MW_ISA {
namespace {

// One group of one token: scale = largest magnitude / 127. Returns the sum of the codes; `stride` bytes lie between two fours.
// Magnitudes order as their bits do, with infinities and what is not a number last: nothing is made up for a group that has one.
template <int Group>
std::int32_t quantize_group(const float* x, std::int64_t stride, std::int8_t* codes, float* scale) {
  typedef std::int8_t Bytes __attribute__((vector_size(kWidth)));
  constexpr int kVectors = Group / kWidth;
  Vi largest{};
  for (int i = 0; i < kVectors; ++i) {
    const Vi bits = load<Vi>(x + i * kWidth) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const std::int32_t most = across(largest, [](Vi a, Vi b) { return a > b ? a : b; });
  float peak;
  __builtin_memcpy(&peak, &most, sizeof peak);
  const bool finite = most < 0x7f800000;
  const float inverse = finite && peak > 1e-30f ? 127.0f / peak : 0.0f;  // a smaller peak would overflow the quotient
  *scale = finite ? peak * (1.0f / 127.0f) : __builtin_nanf("");
  Vi sum{};
  for (int i = 0; i < kVectors; ++i) {
    const Vi rounded = finite ? round_to_int(load<Vf>(x + i * kWidth) * inverse) : Vi{};
    sum += rounded;
    std::int8_t bytes[kWidth];
    store(bytes, __builtin_convertvector(rounded, Bytes));
    for (int j = 0; j < kWidth; j += 4, codes += stride) __builtin_memcpy(codes, bytes + j, 4);
  }
  return sum_of(sum);
}

// Tokens of a block, group by group: what they write lies side by side, a kilobyte at a time, and is not fetched again for every
// token. The last group may be short.
template <int Group>
void quantize_tokens(const float* x, std::int64_t cols, int count, std::int64_t index, const Activations& to) {
  const std::int64_t stride = to.next_four(), token = to.next_token();
  std::int8_t* codes = to.codes + index * to.padded_cols() * to.block;
  float* scales = to.scales + index * to.groups * to.block;
  std::int32_t* sums = to.sums + index * to.groups * to.block;
  for (std::int64_t first = 0; first < cols; first += Group, codes += Group * to.block, scales += to.block, sums += to.block)
    for (int t = 0; t < count; ++t) {
      const float* from = x + t * cols + first;
      float padded[Group];
      if (cols - first < Group) {
        for (std::int64_t i = 0; i < Group; ++i) padded[i] = first + i < cols ? from[i] : 0.0f;
        from = padded;
      }
      sums[t] = quantize_group<Group>(from, stride, codes + t * token, scales + t);
    }
}

// The same with columns gathered in the order of a matrix while they are rounded: no ordered copy of the tokens is made.
template <int Group, class Index>
void quantize_gathered(const float* x, const Index* order, std::int64_t cols, int count, std::int64_t index, const Activations& to) {
  const std::int64_t stride = to.next_four(), token = to.next_token();
  std::int8_t* codes = to.codes + index * to.padded_cols() * to.block;
  float* scales = to.scales + index * to.groups * to.block;
  std::int32_t* sums = to.sums + index * to.groups * to.block;
  alignas(64) float values[Group];
  for (std::int64_t first = 0; first < cols; first += Group, codes += Group * to.block, scales += to.block, sums += to.block) {
    const std::int64_t held = cols - first < Group ? cols - first : Group;
    for (int t = 0; t < count; ++t) {
      const float* from = x + t * cols;
      for (std::int64_t i = 0; i < held; ++i) values[i] = from[order[first + i]];
      for (std::int64_t i = held; i < Group; ++i) values[i] = 0.0f;
      sums[t] = quantize_group<Group>(values, stride, codes + t * token, scales + t);
    }
  }
}

#if defined(__AVX512VNNI__)
constexpr int kChains = 4;  // a fused dot product takes four cycles or five, and two can start in each
#else
constexpr int kChains = 1;
#endif
constexpr int kPrefetchBytes = 4096;  // hardware prefetch stops at the end of a page

// One token, one tile. The offset of codes and the minimum of asymmetric ones both multiply the sum of the activations, which is
// known beforehand: they cost one operation per group, not one per weight. Levels of two bytes are two products whose sums meet
// once per group, or one of 16-bit words.
template <int Bits, int Bytes>
void one_token_tile(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  constexpr bool kOfWords = kWords && (Bytes == 2 || Bytes == 4);
  constexpr int kSums = Bytes >= 2 && !kOfWords ? 2 : 1, kParts = kChains > kSums ? kChains / kSums : 1;
  const int units = m.group / kUnitColumns, offsets[2] = {m.low_offset(), Bytes >= 2 ? m.levels->high_offset : 0};
  const std::uint8_t* tables[2] = {Bytes ? m.levels->low : nullptr, Bytes >= 2 ? m.levels->high : nullptr};
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  const float one = m.unit();
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    LevelDot<Bits, Bytes> dot[kPieces][kSums][kParts];
    for (auto& sums : dot)
      for (int s = 0; s < kSums; ++s)
        for (int i = 0; i < kParts; ++i) sums[s][i].start(splat(i == 0 ? -(a.sums[g] * offsets[s]) : 0));
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Bits, x += kUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < Bits) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(x + 4 * I);
        for (int p = 0; p < kPieces; ++p) {
          const Vb codes = code_block<Bits, I>(unit + p * kVectorBytes);
          if constexpr (Bytes == 0) dot[p][0][I % kParts].template add<I>(codes, four);
          else if constexpr (kOfWords)
            dot[p][0][0].template add<I>(level_words<Bits, Bytes>(*m.levels, codes), four);
          else
            for (int s = 0; s < kSums; ++s) dot[p][s][I % kParts].template add<I>(look_up<Bits>(tables[s], codes), four);
        }
      });
    const float x_scale = a.scales[g] * one;
    for (int p = 0; p < kPieces; ++p) {
      Vi sums[kSums];
      for (int s = 0; s < kSums; ++s) {
        sums[s] = dot[p][s][0].total();
        for (int i = 1; i < kParts; ++i) sums[s] += dot[p][s][i].total();
      }
      const Vf scale = group_scale(m, tile, g, p);
      total[p] += scale * x_scale * to_float(sums[0]);
      if constexpr (kSums == 2) total[p] += high_scale(m, tile, g, p, scale) * x_scale * to_float(sums[1]);
    }
    if (m.adds()) {
      const float sum = a.scales[g] * static_cast<float>(a.sums[g]);
      for (int p = 0; p < kPieces; ++p) total[p] += group_least(m, tile, g, p) * sum;
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// One token, one tile of minifloats whose table is too large for byte shuffles: codes become float16 by a shift, and the
// processor makes float32 of that.
template <int Bits>
void one_token_halves(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  const Levels& levels = *m.levels;
  const int units = m.group / kUnitColumns;
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    Vf sums[kPieces][2][2] = {};  // rows 0 to 3 and 4 to 7, columns 0 and 2, 1 and 3
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Bits, x += kUnitColumns) {
      alignas(32) float values[kUnitColumns];  // of each four columns 0, 2, 1, 3
      for (int c = 0; c < kUnitColumns; c += kWidth) {
        const Vi eight = (Vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + c)));
        store(values + c, __builtin_shufflevector(to_float(eight), Vf{}, 0, 2, 1, 3, 4, 6, 5, 7));
      }
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < Bits) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vf pairs[2] = {(Vf)_mm256_broadcast_sd(reinterpret_cast<const double*>(values + 4 * I)),
                             (Vf)_mm256_broadcast_sd(reinterpret_cast<const double*>(values + 4 * I + 2))};
        for (int p = 0; p < kPieces; ++p) {
          const Vh codes = (Vh)code_block<Bits, I>(unit + p * kVectorBytes) << (8 - Bits);
          const Vs halves[2] = {half_words(levels, (Vs)(codes << 8)), half_words(levels, (Vs)codes)};
          for (int odd = 0; odd < 2; ++odd) {
            sums[p][0][odd] += (Vf)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)halves[odd])) * pairs[odd];
            sums[p][1][odd] += (Vf)_mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)halves[odd], 1)) * pairs[odd];
          }
        }
      });
    }
    for (int p = 0; p < kPieces; ++p) {
      const __m256 rows = _mm256_hadd_ps((__m256)(sums[p][0][0] + sums[p][0][1]), (__m256)(sums[p][1][0] + sums[p][1][1]));
      const Vf sum = (Vf)_mm256_permute4x64_pd(_mm256_castps_pd(rows), 0b11011000);
      total[p] += group_scale(m, tile, g, p) * (a.scales[g] * levels.half_unit) * sum;
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

// A bit of each of 32 codes in the highest bit of their bytes, where a blend looks for it; lower bits are whatever was there.
template <int Bit>
MW_INLINE Vb bit_on_top(const std::uint8_t* from) { return (Vb)(load<Vh>(from) << (7 - Bit)); }
MW_INLINE Vb choose(Vb without, Vb with, Vb on_top) {
  return (Vb)_mm256_blendv_epi8((__m256i)without, (__m256i)with, (__m256i)on_top);
}

// The pieces of 32 codes of 5, 6 or 7 bits whose highest is a sign, read from the planes and never put together: four bits, which
// a shuffle takes, and on top of bytes the fifth and the sixth bit of the magnitude and the sign.
template <int Bits>
struct SignedCodes {
  Vb low, fifth, sixth, sign;
  template <int I>
  static MW_INLINE SignedCodes read(const std::uint8_t* unit) {
    constexpr int kTwoBits = 4 * kLaneVectorBytes, kOneBit = (Bits - 1) * kLaneVectorBytes;  // planes of 4, 2 and 1 bits
    SignedCodes codes{};
    codes.low = code_block<4, I>(unit);
    const std::uint8_t* two = unit + kTwoBits + kLaneVectorBytes * (I / 4);
    if constexpr (Bits >= 6) codes.fifth = bit_on_top<2 * (I % 4)>(two);
    if constexpr (Bits == 6) codes.sign = bit_on_top<2 * (I % 4) + 1>(two);
    if constexpr (Bits == 7) codes.sixth = bit_on_top<2 * (I % 4) + 1>(two);
    if constexpr (Bits != 6) codes.sign = bit_on_top<I>(unit + kOneBit);
    return codes;
  }
  // Bytes of a table by all bits of the magnitude but, in codes of 7 bits, the sixth.
  static MW_INLINE Vb half(const std::uint8_t* table, Vb low, Vb fifth) {
    if constexpr (Bits == 5) return look_up<4>(table, low);
    else return choose(look_up<4>(table, low), look_up<4>(table + 16, low), fifth);
  }
  MW_INLINE Vb bytes(const std::uint8_t* table) const {
    if constexpr (Bits == 7) return choose(half(table, low, fifth), half(table + 32, low, fifth), sixth);
    else return half(table, low, fifth);
  }
  MW_INLINE Vb turned(Vb four, Vb negative) const { return choose(four, negative, sign); }
  // Magnitudes of the lower half of the codes and those of the upper half, zero where a code is of the other half. A shuffle gives
  // zero where bit 7 of what it reads is set.
  MW_INLINE void ranges(const Levels& levels, Vb* lower, Vb* upper) const {
    if constexpr (Bits == 7) {
      const Vb is_upper = (Vb)_mm256_cmpgt_epi8(_mm256_setzero_si256(), (__m256i)sixth);
      *lower = half(levels.magnitude_low, low, fifth) & ~is_upper;
      *upper = half(levels.magnitude_high, low, fifth) & is_upper;
    } else {
      const Vb at = low | (fifth & 0x80);
      *lower = look_up<4>(levels.magnitude_low, at);
      *upper = look_up<4>(levels.magnitude_high, at ^ 0x80);
    }
  }
};

// The same of codes in two's complement: the whole code in the high bits of its byte is a signed number, which gives its sign to the
// activations and whose magnitude is the level's code. The code of no number is its own negative and reads as zero's.
template <int Bits>
struct TwosCodes {
  Vb low, fifth, sixth, number;
  template <int I>
  static MW_INLINE TwosCodes read(const std::uint8_t* unit) {
    constexpr int kShift = 8 - Bits;
    TwosCodes codes{};
    codes.number = (Vb)((Vh)code_block<Bits, I>(unit) << kShift);
    const Vh magnitude = (Vh)_mm256_abs_epi8((__m256i)codes.number);
    codes.low = (Vb)(magnitude >> kShift) & static_cast<std::uint8_t>(0xff >> kShift);
    if constexpr (Bits >= 6) codes.fifth = (Vb)(magnitude << (Bits - 5));
    if constexpr (Bits == 7) codes.sixth = (Vb)(magnitude << (Bits - 6));
    return codes;
  }
  MW_INLINE Vb bytes(const std::uint8_t* table) const { return SignedCodes<Bits>{low, fifth, sixth, number}.bytes(table); }
  MW_INLINE Vb turned(Vb four, Vb) const { return (Vb)_mm256_sign_epi8((__m256i)four, (__m256i)number); }
};

// One token, one tile of levels with a sign bit: the table of magnitudes is half as large, and the sign is given to the
// activations. See mw::Levels for what magnitudes are made of; the largest bytes say how many products 16 bits hold.
template <int Bits, Magnitudes Kind, class Codes = SignedCodes<Bits>>
void one_token_signed(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  constexpr bool kRanges = Kind == Magnitudes::ranges, kDigits = Kind == Magnitudes::digits, kFar = Kind == Magnitudes::far_digits;
  using Low = NarrowDot<kFar ? 1 : kDigits || (kRanges && Bits == 6) ? 4 : 2>;
  using High = NarrowDot<kFar || kDigits ? 4 : kRanges && Bits == 6 ? 2 : 1>;
  const Levels& levels = *m.levels;
  const float high_units = kFar ? 128.0f : kDigits ? 32.0f : levels.upper_units;
  const int units = m.group / kUnitColumns;
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    Low low[kPieces];
    High high[kPieces];
    for (int p = 0; p < kPieces; ++p) {
      low[p].start(Vi{});
      high[p].start(Vi{});
    }
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Bits, x += kUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < Bits) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(x + 4 * I), negative = Vb{} - four;
        for (int p = 0; p < kPieces; ++p) {
          const auto codes = Codes::template read<I>(unit + p * kVectorBytes);
          const Vb turned = codes.turned(four, negative);
          Vb lower, upper;
          if constexpr (kRanges) codes.ranges(levels, &lower, &upper);
          else lower = codes.bytes(levels.magnitude_low);
          if constexpr (kDigits || kFar) upper = codes.bytes(levels.magnitude_high);
          low[p].template add<I>(lower, turned);
          if constexpr (Kind != Magnitudes::bytes) high[p].template add<I>(upper, turned);
        }
      });
    for (int p = 0; p < kPieces; ++p) {
      Vf sum = to_float(low[p].total());
      if constexpr (Kind != Magnitudes::bytes) sum += to_float(high[p].total()) * high_units;
      total[p] += group_scale(m, tile, g, p) * (a.scales[g] * levels.unit) * sum;
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

template <int Bits>
void tiles_signed(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out) {
  auto one = one_token_signed<Bits, Magnitudes::bytes>;
  const auto take = [&](auto codes) {
    using Codes = decltype(codes);
    if (m.levels->magnitudes == Magnitudes::bytes) one = one_token_signed<Bits, Magnitudes::bytes, Codes>;
    if (m.levels->magnitudes == Magnitudes::digits) one = one_token_signed<Bits, Magnitudes::digits, Codes>;
    if (m.levels->magnitudes == Magnitudes::far_digits) one = one_token_signed<Bits, Magnitudes::far_digits, Codes>;
  };
  if (m.levels->twos) take(TwosCodes<Bits>{});
  else take(SignedCodes<Bits>{});
  if constexpr (Bits > 5) {
    if (m.levels->magnitudes == Magnitudes::ranges) one = one_token_signed<Bits, Magnitudes::ranges>;
  }
  for (std::int64_t tile = begin; tile < end; ++tile) {
    alignas(64) float values[kTileRows];
    one(m, input.coded, tile, values);
    write_rows(values, 0, tile * kTileRows, kTileRows, out);
  }
}

// One token, one tile of levels that are cheaper than a look-up of two bytes: see mw::Digits.
template <int Bits, Digits Kind>
void one_token_digits(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  using Low = std::conditional_t<Kind == Digits::affine, Dot<Bits>, NarrowDot<Kind == Digits::two ? 4 : 1>>;
  const Levels& levels = *m.levels;
  const int units = m.group / kUnitColumns;
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    Low low[kPieces];
    NarrowDot<4> high[kPieces];
    for (int p = 0; p < kPieces; ++p) {
      low[p].start(Vi{});
      high[p].start(Vi{});
    }
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Bits, x += kUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < Bits) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(x + 4 * I);
        for (int p = 0; p < kPieces; ++p) {
          const Vb codes = code_block<Bits, I>(unit + p * kVectorBytes);
          if constexpr (Kind == Digits::affine) low[p].template add<I>(codes, four);
          else low[p].template add<I>(look_up<4>(levels.digit_low, codes), four);
          if constexpr (Kind == Digits::two) high[p].template add<I>(look_up<4>(levels.digit_high, codes), four);
        }
      });
    const Vi offset = splat(a.sums[g] * levels.digit_offset);
    for (int p = 0; p < kPieces; ++p) {
      Vi sum = low[p].total();
      if constexpr (Kind == Digits::affine) sum *= levels.digit_step;
      if constexpr (Kind == Digits::two) sum += high[p].total() << 5;
      const Vf scale = group_scale(m, tile, g, p);
      total[p] += scale * (a.scales[g] * levels.unit) * to_float(sum - offset);
      if (m.adds()) total[p] += group_least(m, tile, g, p) * (a.scales[g] * static_cast<float>(a.sums[g]));
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

template <int Bits>
void tiles_digits(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out) {
  auto one = one_token_digits<Bits, Digits::affine>;
  if constexpr (Bits == 4) {
    if (m.levels->digits == Digits::one) one = one_token_digits<Bits, Digits::one>;
    if (m.levels->digits == Digits::two) one = one_token_digits<Bits, Digits::two>;
  }
  for (std::int64_t tile = begin; tile < end; ++tile) {
    alignas(64) float values[kTileRows];
    one(m, input.coded, tile, values);
    write_rows(values, 0, tile * kTileRows, kTileRows, out);
  }
}

// Whether one token's product goes by way of float16.
bool takes_halves(const Matrix& m) { return m.levels && m.levels->half_unit != 0.0f && m.bits > 4 && m.bytes() == 2; }
#endif

// Several tokens: a strip of row tiles is unpacked, some groups at a time, into a panel that stays in the first-level cache, and
// every block of tokens passes over it.
constexpr int kPanelColumns = 512;
constexpr int kPanelGroups = kPanelColumns / 32;
struct Part {  // codes, or one byte of their levels, and what they are multiples of
  alignas(64) std::uint8_t codes[kPanelColumns / 4][kStripTiles][kLaneVectorBytes];
  alignas(64) float scales[kPanelGroups][kStripRows];
};
struct Panel {
  Part parts[2];
  alignas(64) float mins[kPanelGroups][kStripRows];
  alignas(64) float sums[kMaxTokens][kStripRows];
};
static_assert(sizeof(Panel) <= kWorkerScratchBytes);

template <int Bits, int Bytes>
void unpack_tile(const Matrix& m, std::int64_t tile, std::int64_t first_group, int num_groups, int slot, int less, Panel& panel) {
  const std::uint8_t* unit = m.tile(tile) + first_group * m.group_bytes();
  const int num_units = num_groups * (m.group / kUnitColumns);
  for (int u = 0; u < num_units; ++u, unit += kLaneVectorBytes * Bits)
    static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
      constexpr int I = decltype(block)::value;
      for (int p = 0; p < kPieces; ++p) {
        const Vb codes = code_block<Bits, I>(unit + p * kVectorBytes);
        const auto put = [&](int part, Vb bytes) __attribute__((always_inline)) {
          store(panel.parts[part].codes[u * kUnitBlocks + I][slot] + p * kVectorBytes, bytes);
        };
        if constexpr (Bytes == 0) put(0, codes - static_cast<std::uint8_t>(less));
        if constexpr (kWords && (Bytes == 2 || Bytes == 4)) {
          const auto words = level_words<Bits, Bytes>(*m.levels, codes);
          put(0, (Vb)words.first);
          put(1, (Vb)words.second);
        } else {
          if constexpr (Bytes >= 1) put(0, look_up<Bits>(m.levels->low, codes) - static_cast<std::uint8_t>(less));
          if constexpr (Bytes >= 2) put(1, look_up<Bits>(m.levels->high, codes));
        }
      }
    });
  const float one = m.unit();
  for (int g = 0; g < num_groups; ++g)
    for (int p = 0; p < kPieces; ++p) {
      const int at = slot * kTileRows + p * kWidth;
      const Vf scale = group_scale(m, tile, first_group + g, p);
      store(panel.parts[0].scales[g] + at, scale * one);
      if constexpr (Bytes >= 2) store(panel.parts[1].scales[g] + at, high_scale(m, tile, first_group + g, p, scale) * one);
      if (m.adds()) store(panel.mins[g] + at, group_least(m, tile, first_group + g, p));
    }
}

// Codes of pruned weights are those of zero: sums of activations are then known beforehand, as with dense tiles.
void unpack_sparse(const Matrix& m, std::int64_t tile, std::int64_t first_group, int num_groups, int slot, Panel& panel) {
  sparse_codes(m, tile, first_group, num_groups, panel.parts[0].codes[0][slot], sizeof panel.parts[0].codes[0]);
  for (int g = 0; g < num_groups; ++g)
    for (int p = 0; p < kPieces; ++p) {
      const int at = slot * kTileRows + p * kWidth;
      const Vf scale = group_scale(m, tile, first_group + g, p);
      store(panel.parts[0].scales[g] + at, scale);
      if (m.zeros) store(panel.mins[g] + at, -scale * to_float(load_bytes(m.zeros + (tile * m.groups + first_group + g) * kTileRows + p * kWidth)));
    }
}

// A strip may end past the last tile: the missing one reads as zeros. less: what is taken off the codes of integers.
void unpack_panel(const Matrix& m, std::int64_t strip, std::int64_t first_group, int num_groups, int less, Panel& panel) {
  for (int slot = 0; slot < kStripTiles; ++slot) {
    const std::int64_t tile = strip * kStripTiles + slot;
    if (tile < m.row_tiles && m.form == Form::sparse) {
      unpack_sparse(m, tile, first_group, num_groups, slot, panel);
      continue;
    }
    if (tile < m.row_tiles) {
      with_form(m, [&](auto bits, auto bytes) {
        unpack_tile<decltype(bits)::value, decltype(bytes)::value>(m, tile, first_group, num_groups, slot, less, panel);
      });
      continue;
    }
    for (int g = 0; g < num_groups; ++g)
      for (int r = slot * kTileRows; r < (slot + 1) * kTileRows; ++r)
        panel.parts[0].scales[g][r] = panel.parts[1].scales[g][r] = panel.mins[g][r] = 0.0f;
  }
}

// Tokens of one block (the first Tokens of it) times some groups of the panel.
template <class DotType, int Tokens, bool Asymmetric>
void panel_block(const Part& part, const Part& other, const float (*mins)[kStripRows], const Activations& a, std::int64_t block,
                 std::int64_t first_group, int num_groups, int offset, float (*sums)[kStripRows]) {
  const int blocks_per_group = a.group / 4;
  const std::int8_t* x = a.codes + (block * a.padded_cols() + first_group * a.group) * kTokenBlock;
  const float* x_scales = a.scales + (block * a.groups + first_group) * kTokenBlock;
  const std::int32_t* x_sums = a.sums + (block * a.groups + first_group) * kTokenBlock;
  const std::uint8_t *codes = part.codes[0][0], *more = other.codes[0][0];
  Vf total[Tokens][kStripVectors];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) total[t][v] = load<Vf>(sums[t] + v * kWidth);
  for (int g = 0; g < num_groups; ++g, x_scales += kTokenBlock, x_sums += kTokenBlock) {
    DotType dot[Tokens][kStripVectors];
    for (int t = 0; t < Tokens; ++t)
      for (auto& d : dot[t]) d.start(splat(-(x_sums[t] * offset)));
    for (int c = 0; c < blocks_per_group; c += kUnitBlocks)
      static_for<kUnitBlocks>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value;
        typename DotType::Weights weights[kStripVectors];
        for (int v = 0; v < kStripVectors; ++v) weights[v] = DotType::load_weights(codes + v * kVectorBytes, more + v * kVectorBytes);
        for (int t = 0; t < Tokens; ++t) {
          const Vb four = repeat_four(x + 4 * t);
          for (int v = 0; v < kStripVectors; ++v) dot[t][v].template add<I>(weights[v], four);
        }
        codes += kStripVectors * kVectorBytes;
        more += kStripVectors * kVectorBytes;
        x += 4 * kTokenBlock;
      });
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < kStripVectors; ++v) {
        total[t][v] += load<Vf>(part.scales[g] + v * kWidth) * x_scales[t] * to_float(dot[t][v].total());
        if (Asymmetric) total[t][v] += load<Vf>(mins[g] + v * kWidth) * (x_scales[t] * static_cast<float>(x_sums[t]));
      }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) store(sums[t] + v * kWidth, total[t][v]);
}

using PanelBlock = void (*)(const Part&, const Part&, const float (*)[kStripRows], const Activations&, std::int64_t, std::int64_t, int, int,
                            float (*)[kStripRows]);

template <class DotType, bool Asymmetric>
PanelBlock panel_block_for(int tokens) {
  PanelBlock found = nullptr;
  static_for<kTokenBlock>([&](auto index) {
    constexpr int count = decltype(index)::value + 1;
    if (tokens == count) found = panel_block<DotType, count, Asymmetric>;
  });
  return found;
}

// first: of the bytes that bring along what is added to numbers.
PanelBlock pick_panel_block(const Matrix& m, int tokens, bool first = true) {
  PanelBlock found = nullptr;
  with_form(m, [&](auto bits, auto bytes) {
    using D = LevelDot<decltype(bits)::value, decltype(bytes)::value>;
    found = first && (m.adds() || m.zeros) ? panel_block_for<D, true>(tokens) : panel_block_for<D, false>(tokens);
  });
  return found;
}

// As panel_block, of a block of 16 tokens by the matrix unit, a row tile at a time: the same sums, and the same operations on floats.
template <bool Asymmetric>
void unit_block(const MatrixUnit& unit, const Part& part, const float (*mins)[kStripRows], const Activations& a, std::int64_t block,
                std::int64_t first_group, int num_groups, int offset, float (*sums)[kStripRows]) {
  const std::int64_t at = (block * a.groups + first_group) * kUnitTokens;
  for (int v = 0; v < kStripVectors; ++v) {
    Vf total[kUnitTokens];
    static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) { total[decltype(t)::value] = load<Vf>(sums[decltype(t)::value] + v * kWidth); });
    unit.for_groups(a.codes + at * a.group, part.codes[0][v], num_groups, [&](int g, const MatrixUnit::Sums& dots) __attribute__((always_inline)) {
      const Vf scale = load<Vf>(part.scales[g] + v * kWidth);
      const float* x_scales = a.scales + at + g * kUnitTokens;
      const std::int32_t* x_sums = a.sums + at + g * kUnitTokens;
      static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) {
        constexpr int T = decltype(t)::value;
        Vi dot = load<Vi>(dots[T]);
        if (offset) dot -= x_sums[T] * offset;
        total[T] += scale * x_scales[T] * to_float(dot);
        if (Asymmetric) total[T] += load<Vf>(mins[g] + v * kWidth) * (x_scales[T] * static_cast<float>(x_sums[T]));
      });
    });
    static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) { store(sums[decltype(t)::value] + v * kWidth, total[decltype(t)::value]); });
  }
}

// What passes over a panel: blocks of tokens, which are multiplied by as many instructions as they have tokens or by the matrix unit.
class PanelProduct {
 public:
  PanelProduct(const Matrix& m, const Activations& a)
      : m_(m), a_(a), two_sums_(m.second || (!kWords && m.bytes() == 2)), less_(bytes_less(m, a)), unit_(a.rows, m.group, less_ != 0) {}

  int together() const { return a_.block; }
  // What is taken off the first byte of weights as a panel is unpacked, which makes them signed.
  int less() const { return less_; }

  // Adds the products of `count` tokens (at most `together`, from a block's first on) with the groups that the panel holds.
  void add(const Panel& panel, std::int64_t first_token, int count, std::int64_t first_group, int num_groups, float (*sums)[kStripRows]) const {
    one_part(panel, 0, m_.low_offset() - less_, first_token, count, first_group, num_groups, sums);
    if (two_sums_) one_part(panel, 1, m_.levels->high_offset, first_token, count, first_group, num_groups, sums);
  }

 private:
  // The first part brings along what is added to numbers.
  void one_part(const Panel& panel, int index, int offset, std::int64_t first_token, int count, std::int64_t first_group, int num_groups,
                float (*sums)[kStripRows]) const {
    const Part& part = panel.parts[index];
    if (a_.rows) {
      const auto multiply = index == 0 && (m_.adds() || m_.zeros) ? unit_block<true> : unit_block<false>;
      return multiply(unit_, part, panel.mins, a_, first_token / kUnitTokens, first_group, num_groups, offset, sums);
    }
    pick_panel_block(m_, count, index == 0)(part, panel.parts[1], panel.mins, a_, first_token / kTokenBlock, first_group, num_groups, offset, sums);
  }

  // The offset of the first byte, where what is left fits in a signed one.
  static int bytes_less(const Matrix& m, const Activations& a) {
    const int offset = m.low_offset();
    if (!a.rows || m.form != Form::tiles || m.bytes() > 1 || offset > 128) return 0;
    int most = (1 << m.bits) - 1;
    if (m.bytes() == 1) most = *std::max_element(m.levels->low, m.levels->low + 256);
    return most - offset <= 127 ? offset : 0;
  }

  const Matrix& m_;
  const Activations& a_;
  bool two_sums_;
  int less_;
  MatrixUnit unit_;
};

}  // namespace

void quantize_block(const float* x, std::int64_t cols, int count, std::int64_t index, const Activations& to) {
  const auto all = to.group == 256  ? quantize_tokens<256>
                   : to.group == 16 ? quantize_tokens<16>
                   : to.group == 32 ? quantize_tokens<32>
                   : to.group == 64 ? quantize_tokens<64>
                                    : quantize_tokens<128>;
  all(x, cols, count, index, to);
}

void quantize_ordered(const float* x, const Matrix& m, int count, std::int64_t index, const Activations& to) {
  const auto all = [&](const auto* order) {
    if (to.group == 32) quantize_gathered<32>(x, order, m.cols, count, index, to);
    else if (to.group == 64) quantize_gathered<64>(x, order, m.cols, count, index, to);
    else quantize_gathered<128>(x, order, m.cols, count, index, to);
  };
  if (m.wide) all(static_cast<const std::uint32_t*>(m.order));
  else all(static_cast<const std::uint16_t*>(m.order));
}

void tiles_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  if (m.levels && m.levels->magnitudes != Magnitudes::none) {
    if (m.bits == 5) return tiles_signed<5>(m, input, begin, end, out);
    if (m.bits == 6) return tiles_signed<6>(m, input, begin, end, out);
    return tiles_signed<7>(m, input, begin, end, out);
  }
  if (m.levels && m.levels->digits != Digits::none)
    return with_bits(m.bits, [&](auto bits) { tiles_digits<decltype(bits)::value>(m, input, begin, end, out); });
  if (takes_halves(m) && !m.levels->linear)
    return with_bits(m.bits, [&](auto bits) {
      for (std::int64_t tile = begin; tile < end; ++tile) {
        alignas(64) float values[kTileRows];
        one_token_halves<decltype(bits)::value>(m, input.coded, tile, values);
        write_rows(values, 0, tile * kTileRows, kTileRows, out);
      }
    });
#endif
  with_form(m, [&](auto bits, auto bytes) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      alignas(64) float values[kTileRows];
      one_token_tile<decltype(bits)::value, decltype(bytes)::value>(m, input.coded, tile, values);
      write_rows(values, 0, tile * kTileRows, kTileRows, out);
    }
  });
}

// What a panel's codes are unpacked from. The next one's are fetched in parts while this one is multiplied: of a tile they are a
// page at most, too little for the processor to see what comes, and the memory would rest while a batch is multiplied.
struct PanelCodes {
  const std::uint8_t* from[kStripTiles] = {};
  std::int64_t bytes = 0;

  PanelCodes() = default;
  PanelCodes(const Matrix& m, std::int64_t strip, std::int64_t first_group, int num_groups) : bytes(num_groups * m.group_bytes()) {
    for (int slot = 0; slot < kStripTiles; ++slot) {
      const std::int64_t tile = strip * kStripTiles + slot;
      if (tile < m.row_tiles) from[slot] = m.tile(tile) + first_group * m.group_bytes();
    }
  }
  void fetch(int part, int parts) const {
    for (const std::uint8_t* tile : from)
      for (std::int64_t at = bytes * part / parts / 64 * 64; tile && at < bytes * (part + 1) / parts; at += 64)
        __builtin_prefetch(tile + at, 0, 2);  // into the second level: the first holds the panel
  }
};

void tiles_part(const Matrix& m, const Input& input, std::int64_t strip, std::int64_t first_group, std::int64_t end_group, std::int64_t first_token,
                int tokens, float* sums, char* scratch) {
  Panel& panel = *reinterpret_cast<Panel*>(scratch);
  auto* to = reinterpret_cast<float(*)[kStripRows]>(sums);
  const PanelProduct product(m, input.coded);
  const std::int64_t chunk = kPanelColumns / m.group;
  const int together = product.together(), blocks = (tokens + together - 1) / together;
  __builtin_memset(sums, 0, sizeof(float) * kStripRows * tokens);
  for (std::int64_t g = first_group; g < end_group; g += chunk) {
    const int num_groups = static_cast<int>(end_group - g < chunk ? end_group - g : chunk);
    unpack_panel(m, strip, g, num_groups, product.less(), panel);
    const std::int64_t left = end_group - g - num_groups;
    const PanelCodes next(m, strip, g + num_groups, static_cast<int>(left < chunk ? left : chunk));
    for (int t = 0; t < tokens; t += together) {
      next.fetch(t / together, blocks);
      product.add(panel, first_token + t, tokens - t < together ? tokens - t : together, g, num_groups, to + t);
    }
  }
}

void tiles_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  Panel& panel = *reinterpret_cast<Panel*>(scratch);
  const PanelProduct product(m, input.coded);
  const int tokens = static_cast<int>(input.tokens), chunk = kPanelColumns / m.group;
  const int together = product.together(), blocks = (tokens + together - 1) / together;
  for (std::int64_t strip = begin; strip < end; ++strip) {
    __builtin_memset(panel.sums, 0, sizeof(float) * kStripRows * tokens);
    for (std::int64_t g = 0; g < m.groups; g += chunk) {
      const int num_groups = static_cast<int>(m.groups - g < chunk ? m.groups - g : chunk);
      unpack_panel(m, strip, g, num_groups, product.less(), panel);
      const bool is_last = g + num_groups == m.groups;
      const std::int64_t next_group = is_last ? 0 : g + num_groups, left = m.groups - next_group;
      PanelCodes next;
      if (!is_last || strip + 1 < end) next = PanelCodes(m, strip + is_last, next_group, static_cast<int>(left < chunk ? left : chunk));
      for (int t = 0; t < tokens; t += together) {
        const int count = tokens - t < together ? tokens - t : together;
        next.fetch(t / together, blocks);
        for (int i = t; is_last && i < t + count; ++i) expect_rows(i, strip * kStripRows, kStripRows, out);
        product.add(panel, t, count, g, num_groups, panel.sums + t);
        for (int i = t; is_last && i < t + count; ++i) write_rows(panel.sums[i], i, strip * kStripRows, kStripRows, out);
      }
    }
  }
}

}  // namespace mw::MW_ISA
