// Products with weights of which two of every four columns are kept (formats/sparse.py): one byte shuffle picks, for 16 rows by 8
// columns at once, the activations that each row's kept weights belong to.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;
typedef std::int64_t Vl __attribute__((vector_size(kVectorBytes)));

// What all rows get of a group is a multiple of the sum of the activations they keep, which no other row has: a second sum.
#if defined(__AVX512VNNI__)
constexpr int kParts = 2;
using OnesDot = FusedDot;
#elif defined(__AVX2__)
constexpr int kParts = 1;
using OnesDot = NarrowDot<kUnitBlocks>;
#else
constexpr int kParts = 1;
using OnesDot = WideDot;
#endif

// Eight activations of one token, repeated.
MW_INLINE Vb repeat_eight(const std::int8_t* from) {
  std::int64_t eight;
  __builtin_memcpy(&eight, from, sizeof eight);
  return (Vb)(eight - Vl{});
}

// Bytes of `x`, which repeats eight, at the indices `at` of 0 to 7.
MW_INLINE Vb pick(Vb x, Vb at) {
#if defined(__AVX512BW__)
  return (Vb)_mm512_shuffle_epi8((__m512i)x, (__m512i)at);
#elif defined(__AVX2__)
  return (Vb)_mm256_shuffle_epi8((__m256i)x, (__m256i)at);
#else
  Vb found;
  for (int i = 0; i < kVectorBytes; ++i) found[i] = x[at[i]];
  return found;
#endif
}

// Positions of a block of four kept columns: the first two are of four columns, the last two of the next four.
template <int Bits, int I>
MW_INLINE Vb positions(const std::uint8_t* unit) {
  return code_block<kPositionBits, I>(unit + kLaneVectorBytes * Bits);
}

template <int Bits>
void one_token_tile(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  constexpr int kLines = Bits + kPositionBits;
  const int units = m.group / kSparseUnitColumns;
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  const Vb ones = Vb{} + 1, second_four = (Vb)splat(0x04040000);
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    Dot<Bits> dot[kPieces][kParts];
    OnesDot kept[kPieces][kParts];
    for (int p = 0; p < kPieces; ++p)
      for (int i = 0; i < kParts; ++i) dot[p][i].start(Vi{}), kept[p][i].start(Vi{});
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * kLines, x += kSparseUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        for (int line = I; line < kLines; line += kUnitBlocks) __builtin_prefetch(unit + line * kLaneVectorBytes + kPrefetchBytes);
        const Vb eight = repeat_eight(x + 8 * I);
        for (int p = 0; p < kPieces; ++p) {
          const Vb chosen = pick(eight, positions<Bits, I>(unit + p * kVectorBytes) | second_four);
          dot[p][I % kParts].template add<I>(code_block<Bits, I>(unit + p * kVectorBytes), chosen);
          kept[p][I % kParts].template add<I>(ones, chosen);
        }
      });
    for (int p = 0; p < kPieces; ++p) {
      Vi sum{}, all{};
      for (int i = 0; i < kParts; ++i) sum += dot[p][i].total(), all += kept[p][i].total();
      const Vi zero = m.zeros ? load_bytes(m.zeros + (tile * m.groups + g) * kTileRows + p * kWidth) : splat(m.low_offset());
      total[p] += group_scale(m, tile, g, p) * a.scales[g] * to_float(sum - zero * all);
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
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

template <int Bits>
void unpack(const Matrix& m, std::int64_t tile, std::int64_t first_group, int num_groups, std::uint8_t* to, std::int64_t stride) {
  const std::uint8_t* unit = m.tile(tile) + first_group * m.group_bytes();
  for (int g = 0; g < num_groups; ++g)
    for (int u = 0; u < m.group / kSparseUnitColumns; ++u, unit += kLaneVectorBytes * (Bits + kPositionBits), to += 2 * kUnitBlocks * stride)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        for (int p = 0; p < kPieces; ++p) {
          const Vb codes = code_block<Bits, I>(unit + p * kVectorBytes), at = positions<Bits, I>(unit + p * kVectorBytes);
          const Vb zero = zero_codes(m, tile, first_group + g, p);
          store(to + 2 * I * stride + p * kVectorBytes, four_columns<0>(codes, at, zero));
          store(to + (2 * I + 1) * stride + p * kVectorBytes, four_columns<1>(codes, at, zero));
        }
      });
}

}  // namespace

void sparse_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  with_bits(m.bits, [&](auto bits) {
    for (std::int64_t tile = begin; tile < end; ++tile) {
      alignas(64) float values[kTileRows];
      one_token_tile<decltype(bits)::value>(m, input.coded, tile, values);
      write_rows(values, 0, tile * kTileRows, kTileRows, out);
    }
  });
}

void sparse_codes(const Matrix& m, std::int64_t tile, std::int64_t first_group, int num_groups, std::uint8_t* to, std::int64_t stride) {
  with_bits(m.bits, [&](auto bits) { unpack<decltype(bits)::value>(m, tile, first_group, num_groups, to, stride); });
}

// Columns of one tile (from a whole group on) as floats: the numbers of the codec, bit for bit.
void sparse_panel(const Matrix& m, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride) {
  constexpr int kMostGroup = 256;
  alignas(64) std::uint8_t codes[kMostGroup / 4][kLaneVectorBytes];
  for (int c = 0; c < num_cols; c += m.group) {
    const std::int64_t g = (first_col + c) / m.group;
    sparse_codes(m, tile, g, 1, codes[0], kLaneVectorBytes);
    for (int p = 0; p < kPieces; ++p) {
      const Vf scale = group_scale(m, tile, g, p);
      const Vi zero = m.zeros ? load_bytes(m.zeros + (tile * m.groups + g) * kTileRows + p * kWidth) : splat(m.low_offset());
      for (int i = 0; i < m.group && c + i < num_cols; ++i) {
        const Vi code = (load<Vi>(codes[i / 4] + p * kVectorBytes) >> (8 * (i % 4))) & 0xff;
        store(panel + (c + i) * stride + p * kWidth, scale * to_float(code - zero));
      }
    }
  }
}

}  // namespace mw::MW_ISA
