// Products of 4-bit weights with activations in 4 or 8 bits, one width for each group of columns (formats/comet.py).
//
// Weights are the tiles of int4: a byte holds one row's code of two column blocks. One layout serves both widths: bytes are made of
// nibbles by one shift and one mask, which leaves 16 times the code where a sum of 32 bits follows, so that no sign has to be
// extended; activations of 4 bits widen the same way. What is too much by powers of two is divided out of the scale once a group.
// This file is compiled without fused multiplication and addition: its floats are the same on every processor.
#include "linear_kernels.h"
#include "matrix_unit.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
constexpr int kWeightFactor = 1;  // pairs of products are added in 16 bits here, which 16 times a code would leave
#else
constexpr int kWeightFactor = 16;
#endif
constexpr int kNibbleFactor = 16;
constexpr int kOffset = 8 * kWeightFactor;  // codes count from -8

// Codes of column block I of a unit as bytes, kWeightFactor times.
template <int I>
MW_INLINE Vb weight_block(const std::uint8_t* unit) {
  if constexpr (kWeightFactor == 1) return code_block<4, I>(unit);
  const Vh raw = load<Vh>(unit + kLaneVectorBytes * (I / 2));
  return (Vb)((I % 2 ? raw : raw << 4) & 0xf0f0);
}

// One group of one token; `stride` bytes lie between two fours of bytes. widen: codes of 4 bits are a byte each, 16 times the code.
// Returns the sum of the codes.
template <int Group>
std::int32_t quantize_group(const float* x, std::int64_t stride, bool wide, bool widen, std::int8_t* codes, float* scale) {
  constexpr int kVectors = Group / kWidth;
  Vi largest{};  // magnitudes order as their bits do, and infinities and what is not a number come last
  for (int i = 0; i < kVectors; ++i) {
    const Vi bits = load<Vi>(x + i * kWidth) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const std::int32_t most = across(largest, [](Vi a, Vi b) { return a > b ? a : b; });
  float peak;
  __builtin_memcpy(&peak, &most, sizeof peak);
  const float levels = wide ? 127.0f : 7.0f;
  const bool finite = most < 0x7f800000;
  const float inverse = finite && peak > 1e-30f ? levels / peak : 0.0f;  // a smaller peak would overflow the quotient
  *scale = finite ? peak / levels : __builtin_nanf("");                  // nothing is made up for what is not a number
  alignas(64) std::int32_t rounded[Group];
  Vi sum{};
  for (int i = 0; i < kVectors; ++i) {
    const Vi code = finite ? round_to_int(load<Vf>(x + i * kWidth) * inverse) : Vi{};
    sum += code;
    store(rounded + i * kWidth, code);
  }
  if (wide || widen) {
    for (int c = 0; c < Group; c += 4, codes += stride)
      for (int j = 0; j < 4; ++j) codes[j] = static_cast<std::int8_t>(wide ? rounded[c + j] : rounded[c + j] * kNibbleFactor);
  } else {
    for (int c = 0; c < Group; c += 8, codes += stride)
      for (int j = 0; j < 4; ++j) codes[j] = static_cast<std::int8_t>((rounded[c + j] & 15) | rounded[c + 4 + j] << 4);
  }
  return sum_of(sum);
}

template <int Group>
void quantize_token(const float* x, const Matrix& m, int token, const Activations& to, std::int8_t* codes, float* scales, std::int32_t* sums) {
  float values[Group];
  for (std::int64_t g = 0; g < m.groups; ++g) {
    const std::int64_t first = g * Group, count = m.cols - first < Group ? m.cols - first : Group;
    const bool wide = m.wide_groups[g];
    const float* from = x + first;
    if (m.order != nullptr || count < Group) {
      for (std::int64_t c = 0; c < count; ++c) values[c] = x[m.column_at(first + c)];
      for (std::int64_t c = count; c < Group; ++c) values[c] = 0.0f;
      from = values;
    }
    sums[g * to.block + token] = quantize_group<Group>(from, to.next_four(), wide, to.rows, codes + token * to.next_token(), scales + g * to.block + token);
    codes += (wide || to.rows ? Group : Group / 2) * to.block;
  }
}

// Codes of 4 bits to bytes, 16 times: of eight columns the first four are the low nibbles. One run of bytes has those of all tokens.
template <int Bytes>
struct RunOf {
  typedef std::uint8_t type __attribute__((vector_size(Bytes)));
};
template <int Tokens>
MW_INLINE void widen(const std::int8_t* packed, int columns, std::int8_t* bytes) {
  using Run = typename RunOf<4 * Tokens>::type;
  for (int c = 0; c < columns; c += 8, packed += sizeof(Run), bytes += 2 * sizeof(Run)) {
    const Run both = load<Run>(packed), low = both << 4, high = both & 0xf0;
    store(bytes, low);
    store(bytes + sizeof(Run), high);
  }
}

// What the sum of a group is divided by, as a factor of the scale; a power of two, so that nothing is rounded by it.
MW_INLINE float group_factor(bool wide) { return 1.0f / static_cast<float>(wide ? kWeightFactor : kWeightFactor * kNibbleFactor); }
MW_INLINE std::int32_t start_of(std::int32_t sum, bool wide) { return -sum * (wide ? kOffset : kOffset * kNibbleFactor); }

#if defined(__AVX512VNNI__)
constexpr int kChains = 4;
#else
constexpr int kChains = 1;
#endif
constexpr int kPrefetchBytes = 4096;

// One token, one tile; `bytes` are the activations with all groups as bytes.
void one_token_tile(const Matrix& m, const Activations& a, const std::int8_t* bytes, std::int64_t tile, float* out) {
  const int units = m.group / kUnitColumns;
  const std::uint8_t* unit = m.tile(tile);
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    const bool wide = m.wide_groups[g];
    Dot<4> dot[kPieces][kChains];
    for (auto& sums : dot)
      for (int i = 0; i < kChains; ++i) sums[i].start(splat(i == 0 ? start_of(a.sums[g], wide) : 0));
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * 4, bytes += kUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < 4) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(bytes + 4 * I);
        for (int p = 0; p < kPieces; ++p) dot[p][I % kChains].template add<I>(weight_block<I>(unit + p * kVectorBytes), four);
      });
    const float x_scale = a.scales[g] * group_factor(wide);
    for (int p = 0; p < kPieces; ++p) {
      Vi sum = dot[p][0].total();
      for (int i = 1; i < kChains; ++i) sum += dot[p][i].total();
      total[p] += group_scale(m, tile, g, p) * x_scale * to_float(sum);
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

// Several tokens: blocks of them pass over a strip of row tiles, whose weights come from the tiles themselves where the tokens are
// few, else from a panel that some groups are unpacked into.
constexpr int kPanelColumns = 512, kPanelGroups = kPanelColumns / 32;
struct Panel {
  alignas(64) std::uint8_t codes[kPanelColumns / 4][kStripVectors][kVectorBytes];
  alignas(64) float scales[kPanelGroups][kStripRows];
  alignas(64) float sums[kMaxTokens][kStripRows];
  alignas(64) std::int8_t bytes[kPanelColumns * kTokenBlock];  // activations of a block of tokens
};
struct Few {
  alignas(64) float sums[32][kStripRows];
  alignas(64) std::int8_t bytes[kWorkerScratchBytes - sizeof sums];  // activations of all tokens, widened once for all strips
  // Whether so many tokens have room.
  bool holds(std::int64_t tokens, std::int64_t columns) const {
    return tokens <= 32 && (tokens + kTokenBlock - 1) / kTokenBlock * kTokenBlock * columns <= static_cast<std::int64_t>(sizeof bytes);
  }
};
static_assert(sizeof(Panel) <= kWorkerScratchBytes && sizeof(Few) <= kWorkerScratchBytes);

// Where weights of a strip come from, unit by unit: vector v of column block I, and the scales of group g.
struct FromTiles {
  const Matrix& m;
  std::int64_t tiles[kStripTiles];
  const std::uint8_t* units[kStripTiles];

  // A strip may end past the last tile, which then stands for the missing one: those rows are not written.
  FromTiles(const Matrix& matrix, std::int64_t strip) : m(matrix) {
    for (int slot = 0; slot < kStripTiles; ++slot) {
      const std::int64_t tile = strip * kStripTiles + slot;
      tiles[slot] = tile < m.row_tiles ? tile : m.row_tiles - 1;
      units[slot] = m.tile(tiles[slot]);
    }
  }
  template <int I>
  MW_INLINE Vb weights(int v) const {
    return weight_block<I>(units[v / kPieces] + v % kPieces * kVectorBytes);
  }
  MW_INLINE Vf scale(std::int64_t g, int v) const { return group_scale(m, tiles[v / kPieces], g, v % kPieces); }
  MW_INLINE void next() {
    for (auto& unit : units) unit += kLaneVectorBytes * 4;
  }
};
struct FromPanel {
  const Panel& panel;
  const std::uint8_t (*codes)[kStripVectors][kVectorBytes] = panel.codes;

  template <int I>
  MW_INLINE Vb weights(int v) const {
    return load<Vb>(codes[I][v]);
  }
  MW_INLINE Vf scale(std::int64_t g, int v) const { return load<Vf>(panel.scales[g] + v * kWidth); }
  MW_INLINE void next() { codes += kUnitBlocks; }
};

// Less: what is taken off the bytes.
template <int Less = 0>
void unpack_groups(const Matrix& m, std::int64_t strip, std::int64_t first, int groups, Panel& panel) {
  FromTiles from(m, strip);
  for (auto& unit : from.units) unit += first * m.group_bytes();
  for (int u = 0; u < groups * (m.group / kUnitColumns); ++u, from.next())
    static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
      constexpr int I = decltype(block)::value;
      for (int v = 0; v < kStripVectors; ++v) store(panel.codes[u * kUnitBlocks + I][v], from.weights<I>(v) - static_cast<std::uint8_t>(Less));
    });
  for (int g = 0; g < groups; ++g)
    for (int v = 0; v < kStripVectors; ++v) store(panel.scales[g] + v * kWidth, from.scale(first + g, v));
}

// What a block of tokens is multiplied by some groups with: `wide` and the statistics of activations from the first of them on.
struct Groups {
  int columns, count;  // of one group, and how many
  const std::uint8_t* wide;
  const float* scales;
  const std::int32_t* sums;
};

// Adds the products of the first Tokens of a block to its sums; `bytes` are its activations.
template <int Tokens, class Source>
void token_block(Source from, const Groups& groups, const std::int8_t* bytes, float (*sums)[kStripRows]) {
  Vf total[Tokens][kStripVectors];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) total[t][v] = load<Vf>(sums[t] + v * kWidth);
  for (int g = 0; g < groups.count; ++g) {
    const float *x_scales = groups.scales + g * kTokenBlock, factor = group_factor(groups.wide[g]);
    Dot<4> dot[Tokens][kStripVectors];
    for (int t = 0; t < Tokens; ++t)
      for (auto& d : dot[t]) d.start(splat(start_of(groups.sums[g * kTokenBlock + t], groups.wide[g])));
    for (int c = 0; c < groups.columns; c += kUnitColumns, from.next())
      static_for<kUnitBlocks>([&](auto index) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value;
        Vb weights[kStripVectors];
        for (int v = 0; v < kStripVectors; ++v) weights[v] = from.template weights<I>(v);
        for (int t = 0; t < Tokens; ++t) {
          const Vb four = repeat_four(bytes + 4 * t);
          for (int v = 0; v < kStripVectors; ++v) dot[t][v].template add<I>(weights[v], four);
        }
        bytes += 4 * kTokenBlock;
      });
    for (int v = 0; v < kStripVectors; ++v) {
      const Vf scale = from.scale(g, v);
      for (int t = 0; t < Tokens; ++t) total[t][v] += scale * (x_scales[t] * factor) * to_float(dot[t][v].total());
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) store(sums[t] + v * kWidth, total[t][v]);
}

template <class Source>
auto token_block_for(std::int64_t tokens) {
  void (*found)(Source, const Groups&, const std::int8_t*, float (*)[kStripRows]) = nullptr;
  static_for<kTokenBlock>([&](auto index) {
    constexpr int count = decltype(index)::value + 1;
    if (tokens == count) found = token_block<count, Source>;
  });
  return found;
}

// Codes of groups [first, last) of a block of tokens, a byte each: `packed` is where the first begins. Returns where the last ends.
const std::int8_t* widen_groups(const Matrix& m, const std::int8_t* packed, std::int64_t first, std::int64_t last, std::int8_t* bytes) {
  const int count = m.group * kTokenBlock;
  for (std::int64_t g = first; g < last; ++g, bytes += count) {
    if (m.wide_groups[g]) __builtin_memcpy(bytes, packed, static_cast<std::size_t>(count));
    else widen<kTokenBlock>(packed, m.group, bytes);
    packed += m.wide_groups[g] ? count : count / 2;
  }
  return packed;
}

// The same of a block of 16 tokens by the matrix unit, a row tile at a time.
void unit_block(const MatrixUnit& unit, const Panel& panel, const Groups& groups, const std::int8_t* codes, float (*sums)[kStripRows]) {
  for (int v = 0; v < kStripVectors; ++v) {
    Vf total[kUnitTokens];
    static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) { total[decltype(t)::value] = load<Vf>(sums[decltype(t)::value] + v * kWidth); });
    unit.for_groups(codes, panel.codes[0][v], groups.count, [&](int g, const MatrixUnit::Sums& dots) __attribute__((always_inline)) {
      const float factor = group_factor(groups.wide[g]);
      const Vf scale = load<Vf>(panel.scales[g] + v * kWidth);
      static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) {
        constexpr int T = decltype(t)::value;
        total[T] += scale * (groups.scales[g * kUnitTokens + T] * factor) * to_float(load<Vi>(dots[T]));
      });
    });
    static_for<kUnitTokens>([&](auto t) __attribute__((always_inline)) { store(sums[decltype(t)::value] + v * kWidth, total[decltype(t)::value]); });
  }
}

// Gives panel.sums what all groups of a strip add up to, by the matrix unit: its weights are 16 times the signed codes.
void strip_by_unit(const MatrixUnit& unit, const Matrix& m, const Activations& a, std::int64_t tokens, std::int64_t strip, Panel& panel) {
  __builtin_memset(panel.sums, 0, sizeof(float) * kStripRows * static_cast<std::size_t>(tokens));
  const std::int64_t chunk = kPanelColumns / m.group;
  for (std::int64_t g = 0; g < m.groups; g += chunk) {
    const int count = static_cast<int>(m.groups - g < chunk ? m.groups - g : chunk);
    unpack_groups<kOffset>(m, strip, g, count, panel);
    for (std::int64_t t = 0; t < tokens; t += kUnitTokens) {
      const std::int64_t at = t * a.groups + g * kUnitTokens;
      const Groups groups{m.group, count, m.wide_groups + g, a.scales + at, a.sums + at};
      unit_block(unit, panel, groups, a.codes + at * m.group, panel.sums + t);
    }
  }
}

// Gives panel.sums what groups [first, last) of a strip add up to.
void strip_groups(const Matrix& m, const Activations& a, std::int64_t tokens, std::int64_t strip, std::int64_t first, std::int64_t last, Panel& panel) {
  __builtin_memset(panel.sums, 0, sizeof(float) * kStripRows * static_cast<std::size_t>(tokens));
  const std::int64_t chunk = kPanelColumns / m.group;
  const auto full = token_block_for<FromPanel>(kTokenBlock), rest = token_block_for<FromPanel>(tokens % kTokenBlock);
  std::int64_t before = 0;  // bytes of a token's codes in front of the groups
  for (std::int64_t g = 0; g < first; ++g) before += m.wide_groups[g] ? m.group : m.group / 2;
  for (std::int64_t g = first, end, passed = 0; g < last; g = end, before += passed) {
    end = g + chunk < last ? g + chunk : last;
    const int count = static_cast<int>(end - g);
    unpack_groups(m, strip, g, count, panel);
    for (std::int64_t t = 0; t < tokens; t += kTokenBlock) {
      const std::int64_t block = t / kTokenBlock, at = (block * a.groups + g) * kTokenBlock;
      const std::int8_t* packed = a.codes + (block * a.token_bytes + before) * kTokenBlock;
      passed = (widen_groups(m, packed, g, end, panel.bytes) - packed) / kTokenBlock;
      const Groups groups{m.group, count, m.wide_groups + g, a.scales + at, a.sums + at};
      (tokens - t < kTokenBlock ? rest : full)({panel}, groups, panel.bytes, panel.sums + t);
    }
  }
}

}  // namespace

void quantize_mixed(const float* x, const Matrix& m, int count, std::int64_t index, const Activations& to) {
  const auto one = m.group == 32 ? quantize_token<32> : m.group == 64 ? quantize_token<64> : quantize_token<128>;
  const std::int64_t statistics = index * to.groups * to.block;
  for (int t = 0; t < count; ++t)
    one(x + t * m.cols, m, t, to, to.codes + index * to.token_bytes * to.block, to.scales + statistics, to.sums + statistics);
}

void mixed_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  auto* bytes = reinterpret_cast<std::int8_t*>(scratch);
  static_assert(kMostMixedColumns <= kWorkerScratchBytes);
  const std::int8_t* codes = input.coded.codes;
  for (std::int64_t g = 0; g < m.groups; ++g) {
    if (m.wide_groups[g]) __builtin_memcpy(bytes + g * m.group, codes, static_cast<std::size_t>(m.group));
    else widen<1>(codes, m.group, bytes + g * m.group);
    codes += m.wide_groups[g] ? m.group : m.group / 2;
  }
  for (std::int64_t tile = begin; tile < end; ++tile) {
    alignas(64) float values[kTileRows];
    one_token_tile(m, input.coded, bytes, tile, values);
    write_rows(values, 0, tile * kTileRows, kTileRows, out);
  }
}

void mixed_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  const Activations& a = input.coded;
  const std::int64_t tokens = input.tokens;
  const auto write = [&](std::int64_t strip, const float (*sums)[kStripRows]) {
    for (std::int64_t t = 0; t < tokens; ++t) write_rows(sums[t], t, strip * kStripRows, kStripRows, out);
  };
  const std::int64_t columns = m.groups * m.group;
  auto& few = *reinterpret_cast<Few*>(scratch);
  if (!a.rows && few.holds(tokens, columns)) {
    const auto bytes_of = [&](std::int64_t t) { return few.bytes + t * columns; };
    for (std::int64_t t = 0; t < tokens; t += kTokenBlock) widen_groups(m, a.codes + t * a.token_bytes, 0, m.groups, bytes_of(t));
    const auto full = token_block_for<FromTiles>(kTokenBlock), rest = token_block_for<FromTiles>(tokens % kTokenBlock);
    for (std::int64_t strip = begin; strip < end; ++strip) {
      __builtin_memset(few.sums, 0, sizeof(float) * kStripRows * static_cast<std::size_t>(tokens));
      for (std::int64_t t = 0; t < tokens; t += kTokenBlock) {
        const Groups groups{m.group, static_cast<int>(m.groups), m.wide_groups, a.scales + t * a.groups, a.sums + t * a.groups};
        (tokens - t < kTokenBlock ? rest : full)({m, strip}, groups, bytes_of(t), few.sums + t);
      }
      write(strip, few.sums);
    }
    return;
  }
  auto& panel = *reinterpret_cast<Panel*>(scratch);
  const MatrixUnit unit(a.rows, m.group, true);
  for (std::int64_t strip = begin; strip < end; ++strip) {
    if (a.rows) strip_by_unit(unit, m, a, tokens, strip, panel);
    else strip_groups(m, a, tokens, strip, 0, m.groups, panel);
    write(strip, panel.sums);
  }
}

void mixed_part(const Matrix& m, const Input& input, std::int64_t strip, std::int64_t first, std::int64_t last, float* sums, char* scratch) {
  auto& panel = *reinterpret_cast<Panel*>(scratch);
  strip_groups(m, input.coded, input.tokens, strip, first, last, panel);
  __builtin_memcpy(sums, panel.sums, sizeof(float) * kStripRows * static_cast<std::size_t>(input.tokens));
}

// Codes of one token as the kernels widen them: 16 times the signed code, columns in their order.
void widen_codes(const std::int8_t* packed, std::int64_t columns, std::int8_t* to) { widen<1>(packed, static_cast<int>(columns), to); }

}  // namespace mw::MW_ISA
