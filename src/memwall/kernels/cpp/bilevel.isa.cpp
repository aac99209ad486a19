// Products with bilevel tiles and their sparse outliers (formats/spqr.py): dense and sparse in one pass over a row tile.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;
constexpr int kGroupBlocks = kBilevelGroup / 4;
// outliers of a tile whose products are held together; behind them lies room for what vectors read past a row's end
constexpr std::uint32_t kSparseProducts = 8192;
static_assert(2 * kSparseProducts * sizeof(float) + kVectorBytes <= kWorkerScratchBytes);

// Not those of the standard library: a copy compiled for one instruction set could be linked into the code of another.
template <class T>
MW_INLINE constexpr T lesser(T a, T b) { return a < b ? a : b; }
template <class T>
MW_INLINE const T* first_from(const T* begin, const T* end, std::int64_t least) {
  while (begin < end) {
    const T* middle = begin + (end - begin) / 2;
    if (*middle < least) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// 3-bit codes of rows p * kWidth and on, out of a stream of 48 bits.
MW_INLINE Vi second_codes(std::uint64_t stream, int p) {
  Vi shifts;
  for (int i = 0; i < kWidth; ++i) shifts[i] = i % 8 * 3;
  Vi words = splat(static_cast<std::int32_t>(stream >> (3 * kWidth * p) & 0xffffff));
  if constexpr (kWidth == 16) {
    const Vi high = splat(static_cast<std::int32_t>(stream >> 24 & 0xffffff));
    Vi upper;
    for (int i = 0; i < kWidth; ++i) upper[i] = i < 8 ? 0 : -1;
    words = (words & ~upper) | (high & upper);
  }
  return (words >> shifts) & 7;
}

// Scales and zeros of one tile and group.
struct Statistics {
  std::uint64_t scale_codes, zero_codes;
  float second[4];  // scale step, scale least, zero step, zero least

  MW_INLINE explicit Statistics(const std::uint8_t* at) {
    __builtin_memcpy(&scale_codes, at, 8);
    __builtin_memcpy(&zero_codes, at + kBilevelCodeBytes, 8);
    std::uint16_t halves[4];
    __builtin_memcpy(halves, at + 2 * kBilevelCodeBytes, sizeof halves);
#if defined(__AVX2__)
    _mm_storeu_ps(second, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(halves))));
#else
    for (int i = 0; i < 4; ++i) second[i] = half_to_float(halves[i]);
#endif
  }
  MW_INLINE Vf scale(int p) const { return to_float(second_codes(scale_codes, p)) * splat(second[0]) + splat(second[1]); }
  MW_INLINE Vf zero(int p) const { return to_float(second_codes(zero_codes, p)) * splat(second[2]) + splat(second[3]); }
};

// A group's dot product takes four steps, so its sums are whole after four.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int Bits>
struct GroupDotOf {
  using type = NarrowDot<lesser(narrow_steps<Bits>(), kGroupBlocks)>;
};
template <>
struct GroupDotOf<8> {
  using type = WideDot;
};
template <int Bits>
using GroupDot = typename GroupDotOf<Bits>::type;
#else
template <int Bits>
using GroupDot = Dot<Bits>;
#endif

// One token times the codes of one tile.
template <int Bits>
void dense_tile(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  const std::uint8_t* unit = m.tile(tile);
  const std::uint8_t* statistics = m.bilevel_statistics(tile);
  const std::int8_t* x = a.codes;
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < a.groups; g += 2, unit += kLaneVectorBytes * Bits, x += kUnitColumns) {
    static_for<2>([&](auto half) __attribute__((always_inline)) {
      constexpr int kHalf = decltype(half)::value;
      if (kHalf == 1 && g + 1 == a.groups) return;  // the unit's other columns are padding
      GroupDot<Bits> dot[kPieces];
      for (auto& d : dot) d.start(Vi{});
      static_for<kGroupBlocks>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value, kBlock = kGroupBlocks * kHalf + I;
        if constexpr (kBlock < Bits) __builtin_prefetch(unit + kBlock * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(x + 4 * kBlock);
        for (int p = 0; p < kPieces; ++p) dot[p].template add<I>(code_block<Bits, kBlock>(unit + p * kVectorBytes), four);
      });
      const Statistics held(statistics);
      statistics += kBilevelStatisticBytes;
      const float x_scale = a.scales[g + kHalf], sum = static_cast<float>(a.sums[g + kHalf]);
      for (int p = 0; p < kPieces; ++p) total[p] += held.scale(p) * x_scale * (to_float(dot[p].total()) - held.zero(p) * sum);
    });
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

MW_INLINE Vf gathered(const float* x, const Vi places) {
#if defined(__AVX512F__)
  return (Vf)_mm512_i32gather_ps((__m512i)places, x, 4);
#elif defined(__AVX2__)
  return (Vf)_mm256_i32gather_ps(x, (__m256i)places, 4);
#else
  Vf found;
  for (int i = 0; i < kWidth; ++i) found[i] = x[places[i]];
  return found;
#endif
}

// Asks for the outliers of a tile's rows while its codes are worked.
template <class Index>
MW_INLINE void expect_outliers(const Matrix& m, std::int64_t tile) {
  const std::uint32_t begin = m.row_offsets[tile * kTileRows], end = m.row_offsets[lesser<std::int64_t>(m.rows, (tile + 1) * kTileRows)];
  constexpr std::uint32_t kStep = 64 / sizeof(Index);
  for (std::uint32_t e = begin; e < end; e += kStep) {
    __builtin_prefetch(static_cast<const Index*>(m.outlier_columns) + e);
    __builtin_prefetch(m.outlier_values + e);
  }
}

// Products of one token with the outliers [begin, end), in vectors that may go on into those of the next row or past the last.
template <class Index>
MW_INLINE void outlier_products(const Matrix& m, const float* x, std::uint32_t begin, std::uint32_t end, float* products) {
  typedef Index Places __attribute__((vector_size(kWidth * sizeof(Index))));
  const auto* columns = static_cast<const Index*>(m.outlier_columns);
  const std::uint32_t last = m.row_offsets[m.rows];
  std::uint32_t e = begin;
  for (; e < end && e + kWidth <= last; e += kWidth) {
    const Vi places = __builtin_convertvector(load<Places>(columns + e), Vi);
    store(products + (e - begin), load_half(m.outlier_values + e) * gathered(x, places));
  }
  for (; e < end; ++e) products[e - begin] = half_to_float(m.outlier_values[e]) * x[columns[e]];
}

// Adds one token times the outliers of the tile's rows: all their products first, as fetching single activations is what takes
// time and no lane of it is wasted then; the sums of rows after that, with as many vectors for each as the longest needs, so
// that nothing depends on how long a row is.
template <class Index>
void sparse_tile(const Matrix& m, const float* x, std::int64_t tile, float* out, float* products) {
  const std::int64_t first_row = tile * kTileRows, count = lesser<std::int64_t>(kTileRows, m.rows - first_row);
  const std::uint32_t* offsets = m.row_offsets + first_row;
  std::uint32_t longest = 0;
  for (std::int64_t r = 0; r < count; ++r) longest = offsets[r + 1] - offsets[r] > longest ? offsets[r + 1] - offsets[r] : longest;
  if (offsets[count] - offsets[0] > kSparseProducts) {  // too many to hold: part by part, whole rows or not
    for (std::int64_t r = 0; r < count; ++r)
      for (std::uint32_t e = offsets[r]; e < offsets[r + 1]; e += kSparseProducts) {
        const std::uint32_t end = lesser<std::uint32_t>(offsets[r + 1], e + kSparseProducts);
        outlier_products<Index>(m, x, e, end, products);
        for (std::uint32_t i = 0; i < end - e; ++i) out[r] += products[i];
      }
    return;
  }
  outlier_products<Index>(m, x, offsets[0], offsets[count], products);
  Vi lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  for (std::int64_t r = 0; r < count; r += 4) {
    Vf sums[4] = {};
    for (int i = 0; i < 4 && r + i < count; ++i) {
      const float* from = products + (offsets[r + i] - offsets[0]);
      Vi left = splat(static_cast<std::int32_t>(offsets[r + i + 1] - offsets[r + i]));
      for (std::uint32_t v = 0; v < longest; v += kWidth, left -= kWidth) sums[i] += (Vf)(load<Vi>(from + v) & (lanes < left));
    }
    float four[kWidth];
    store(four, sums_of(sums[0], sums[1], sums[2], sums[3]));
    for (int i = 0; i < 4; ++i) out[r + i] += four[i];
  }
}

}  // namespace

void bilevel_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  auto* products = reinterpret_cast<float*>(scratch);
  const auto work = [&](auto bits, auto index) {
    using Places = decltype(index);
    for (std::int64_t tile = begin; tile < end; ++tile) {
      alignas(64) float values[kTileRows];
      if (m.row_offsets) expect_outliers<Places>(m, tile);
      dense_tile<decltype(bits)::value>(m, input.coded, tile, values);
      if (m.row_offsets) sparse_tile<Places>(m, input.x, tile, values, products);
      write_rows(values, 0, tile * kTileRows, kTileRows, out);
    }
  };
  with_bits(m.bits, [&](auto bits) {
    if (m.wide) work(bits, std::uint32_t{});
    else work(bits, std::uint16_t{});
  });
}

namespace {

// Several tokens: a strip of row tiles is unpacked, some groups at a time, into a panel that stays in the first-level cache, and
// every block of tokens passes over it; outliers are then added for all tokens at once.
constexpr int kPanelGroups = 16;
struct BilevelPanel {
  alignas(64) std::uint8_t codes[kPanelGroups * kGroupBlocks][kStripTiles][kLaneVectorBytes];
  alignas(64) float scales[kPanelGroups][kStripRows];
  alignas(64) float offsets[kPanelGroups][kStripRows];  // minus scale times zero
  alignas(64) float sums[kMaxTokens][kStripRows];
};
static_assert(sizeof(BilevelPanel) <= kWorkerScratchBytes);

template <int Bits>
void unpack_tile(const Matrix& m, std::int64_t tile, std::int64_t first_group, int num_groups, int slot, BilevelPanel& panel) {
  const std::uint8_t* unit = m.tile(tile) + first_group / 2 * kLaneVectorBytes * Bits;
  const std::uint8_t* statistics = m.bilevel_statistics(tile) + first_group * kBilevelStatisticBytes;
  for (int g = 0; g < num_groups; g += 2, unit += kLaneVectorBytes * Bits)
    static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
      constexpr int I = decltype(block)::value;
      for (int p = 0; p < kPieces; ++p)
        store(panel.codes[g * kGroupBlocks + I][slot] + p * kVectorBytes, code_block<Bits, I>(unit + p * kVectorBytes));
    });
  for (int g = 0; g < num_groups; ++g, statistics += kBilevelStatisticBytes) {
    const Statistics held(statistics);
    for (int p = 0; p < kPieces; ++p) {
      const Vf scale = held.scale(p);
      store(panel.scales[g] + slot * kTileRows + p * kWidth, scale);
      store(panel.offsets[g] + slot * kTileRows + p * kWidth, -(scale * held.zero(p)));
    }
  }
}

// Tokens of one block (the first Tokens of it) times some groups of the panel.
template <int Bits, int Tokens>
void token_block(const BilevelPanel& panel, const Activations& a, std::int64_t block, std::int64_t first_group, int num_groups,
                 float (*sums)[kStripRows]) {
  const std::int8_t* x = a.codes + (block * a.padded_cols() + first_group * kBilevelGroup) * kTokenBlock;
  const float* x_scales = a.scales + (block * a.groups + first_group) * kTokenBlock;
  const std::int32_t* x_sums = a.sums + (block * a.groups + first_group) * kTokenBlock;
  const std::uint8_t* codes = panel.codes[0][0];
  Vf total[Tokens][kStripVectors];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) total[t][v] = load<Vf>(sums[t] + v * kWidth);
  for (int g = 0; g < num_groups; ++g, x_scales += kTokenBlock, x_sums += kTokenBlock) {
    GroupDot<Bits> dot[Tokens][kStripVectors];
    for (int t = 0; t < Tokens; ++t)
      for (auto& d : dot[t]) d.start(Vi{});
    static_for<kGroupBlocks>([&](auto index) __attribute__((always_inline)) {
      constexpr int I = decltype(index)::value;
      Vb weights[kStripVectors];
      for (int v = 0; v < kStripVectors; ++v) weights[v] = load<Vb>(codes + v * kVectorBytes);
      for (int t = 0; t < Tokens; ++t) {
        const Vb four = repeat_four(x + 4 * t);
        for (int v = 0; v < kStripVectors; ++v) dot[t][v].template add<I>(weights[v], four);
      }
      codes += kStripVectors * kVectorBytes;
      x += 4 * kTokenBlock;
    });
    for (int t = 0; t < Tokens; ++t)
      for (int v = 0; v < kStripVectors; ++v) {
        total[t][v] += load<Vf>(panel.scales[g] + v * kWidth) * x_scales[t] * to_float(dot[t][v].total());
        total[t][v] += load<Vf>(panel.offsets[g] + v * kWidth) * (x_scales[t] * static_cast<float>(x_sums[t]));
      }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) store(sums[t] + v * kWidth, total[t][v]);
}

MW_INLINE float float_of(std::uint16_t half) {
#if defined(__AVX2__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
#else
  return half_to_float(half);
#endif
}

// Adds all tokens times the outliers of a strip's rows.
template <class Index>
void sparse_strip(const Matrix& m, const Input& input, std::int64_t first_row, float (*sums)[kStripRows]) {
  constexpr int kVectors = kColumnTokens / kWidth;
  const auto* columns = static_cast<const Index*>(m.outlier_columns);
  const int tokens = static_cast<int>(input.tokens), count = static_cast<int>(lesser<std::int64_t>(kStripRows, m.rows - first_row));
  for (int r = 0; r < count; ++r) {
    const std::uint32_t begin = m.row_offsets[first_row + r], end = m.row_offsets[first_row + r + 1];
    for (int t = 0; t < tokens && begin < end; t += kColumnTokens) {
      Vf total[kVectors] = {};
      for (std::uint32_t e = begin; e < end; ++e) {
        const Vf value = splat(float_of(m.outlier_values[e]));
        const float* x = input.columns + columns[e] * input.column_stride + t;
        for (int v = 0; v < kVectors; ++v) total[v] += value * load<Vf>(x + v * kWidth);
      }
      for (int i = 0; i < kColumnTokens && t + i < tokens; ++i) sums[t + i][r] += total[i / kWidth][i % kWidth];
    }
  }
}

template <int Bits>
void strips(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, BilevelPanel& panel) {
  const int tokens = static_cast<int>(input.tokens);
  for (std::int64_t strip = begin; strip < end; ++strip) {
    __builtin_memset(panel.sums, 0, sizeof(float) * kStripRows * tokens);
    for (std::int64_t g = 0; g < input.coded.groups; g += kPanelGroups) {
      const int num_groups = static_cast<int>(lesser<std::int64_t>(kPanelGroups, input.coded.groups - g));
      for (int slot = 0; slot < kStripTiles; ++slot) {
        const std::int64_t tile = strip * kStripTiles + slot;
        if (tile < m.row_tiles) {
          unpack_tile<Bits>(m, tile, g, num_groups, slot, panel);
          continue;
        }
        for (int i = 0; i < num_groups; ++i)
          for (int r = slot * kTileRows; r < (slot + 1) * kTileRows; ++r) panel.scales[i][r] = panel.offsets[i][r] = 0.0f;
      }
      int t = 0;
      for (; t + kTokenBlock <= tokens; t += kTokenBlock)
        token_block<Bits, kTokenBlock>(panel, input.coded, t / kTokenBlock, g, num_groups, panel.sums + t);
      static_for<kTokenBlock>([&](auto index) {
        constexpr int count = decltype(index)::value;
        if constexpr (count > 0)
          if (tokens - t == count) token_block<Bits, count>(panel, input.coded, t / kTokenBlock, g, num_groups, panel.sums + t);
      });
    }
    if (m.row_offsets && m.wide) sparse_strip<std::uint32_t>(m, input, strip * kStripRows, panel.sums);
    else if (m.row_offsets) sparse_strip<std::uint16_t>(m, input, strip * kStripRows, panel.sums);
    for (int t = 0; t < tokens; ++t) write_rows(panel.sums[t], t, strip * kStripRows, kStripRows, out);
  }
}

}  // namespace

void bilevel_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  auto& panel = *reinterpret_cast<BilevelPanel*>(scratch);
  with_bits(m.bits, [&](auto bits) { strips<decltype(bits)::value>(m, input, begin, end, out, panel); });
}

// Decodes columns of one tile, outliers and all, into a panel of `stride` floats per column: the numbers that
// SpqrCodec.decode gives, bit for bit.
void bilevel_panel(const Matrix& m, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride) {
  const std::uint8_t* unit = m.tile(tile) + first_col / kUnitColumns * kLaneVectorBytes * m.bits;
  const std::uint8_t* statistics = m.bilevel_statistics(tile) + first_col / kBilevelGroup * kBilevelStatisticBytes;
  with_bits(m.bits, [&](auto bits) {
    constexpr int Bits = decltype(bits)::value;
    for (int c = 0; c < num_cols; c += kUnitColumns, unit += kLaneVectorBytes * Bits, statistics += 2 * kBilevelStatisticBytes) {
      const Statistics held[2] = {Statistics(statistics), Statistics(statistics + kBilevelStatisticBytes)};
      for (int p = 0; p < kPieces; ++p) {
        const Vf scales[2] = {held[0].scale(p), held[1].scale(p)}, zeros[2] = {held[0].zero(p), held[1].zero(p)};
        static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
          constexpr int I = decltype(block)::value, kHalf = I / kGroupBlocks;
          const Vi codes = (Vi)code_block<Bits, I>(unit + p * kVectorBytes);
          for (int byte = 0; byte < 4; ++byte) {
            const Vi code = (codes >> (8 * byte)) & 0xff;
            store(panel + (c + 4 * I + byte) * stride + p * kWidth, scales[kHalf] * (to_float(code) - zeros[kHalf]));
          }
        });
      }
    }
  });
  if (m.row_offsets == nullptr) return;
  const std::int64_t first_row = tile * kTileRows, count = lesser<std::int64_t>(kTileRows, m.rows - first_row);
  const auto add = [&](const auto* columns) {
    for (std::int64_t r = 0; r < count; ++r) {
      const auto *row_begin = columns + m.row_offsets[first_row + r], *row_end = columns + m.row_offsets[first_row + r + 1];
      for (const auto* at = first_from(row_begin, row_end, first_col); at < row_end && *at < first_col + num_cols; ++at)
        panel[(*at - first_col) * stride + r] += half_to_float(m.outlier_values[at - columns]);
    }
  };
  if (m.wide) add(static_cast<const std::uint32_t*>(m.outlier_columns));
  else add(static_cast<const std::uint16_t*>(m.outlier_columns));
}

}  // namespace mw::MW_ISA
