// Integer products of a few tokens: weights are unpacked into registers and multiplied with as many tokens there as are quantized
// side by side, so that a batch costs no more than reading the weights while arithmetic keeps up. A tile that has been read is near:
// unpacking it again for some more tokens costs less than a panel does.
#include "linear_kernels.h"
#include "sparse_tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;

// Where codes come from: `block<J>` gives 16 rows by 4 columns of a unit of kBlocks such blocks.
template <int Bits, int Bytes>
struct DenseTiles {
  using DotType = LevelDot<Bits, Bytes>;
  static constexpr int kBlocks = kUnitBlocks, kLines = Bits;
  const std::uint8_t* table;
  DenseTiles(const Matrix& m, std::int64_t, std::int64_t, int) : table(Bytes ? m.levels->low : nullptr) {}
  template <int J>
  MW_INLINE Vb block(const std::uint8_t* unit) const {
    const Vb codes = code_block<Bits, J>(unit);
    if constexpr (Bytes == 0) return codes;
    else return look_up<Bits>(table, codes);
  }
};

template <int Bits>
struct SparseTiles {
  using DotType = LevelDot<Bits, 0>;
  static constexpr int kBlocks = 2 * kUnitBlocks, kLines = Bits + kPositionBits;
  Vb zero;
  SparseTiles(const Matrix& m, std::int64_t tile, std::int64_t g, int p) : zero(zero_codes(m, tile, g, p)) {}
  template <int J>
  MW_INLINE Vb block(const std::uint8_t* unit) const {
    return four_columns<J % 2>(code_block<Bits, J / 2>(unit), positions<Bits, J / 2>(unit), zero);
  }
};

#if defined(__AVX512VNNI__)
constexpr int kChains = 8;  // dot products under way at once
#else
constexpr int kChains = 1;
#endif

// Tokens of the first block times one tile. Those that are missing are computed too, from whatever lies there.
template <class Tiles, int Tokens>
void few_tokens_tile(const Matrix& m, const Activations& a, std::int64_t tile, float (*out)[kTileRows]) {
  constexpr int kParts = kChains > Tokens ? kChains / Tokens : 1;
  const int units = m.group / (4 * Tiles::kBlocks), offset = m.low_offset();
  const std::uint8_t* unit = m.tile(tile);
  const std::int8_t* x = a.codes;
  const float *x_scales = a.scales, one = m.unit();
  const std::int32_t* x_sums = a.sums;
  Vf total[Tokens][kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g, x_scales += kTokenBlock, x_sums += kTokenBlock) {
    typename Tiles::DotType dot[Tokens][kPieces][kParts];
    for (int t = 0; t < Tokens; ++t)
      for (int p = 0; p < kPieces; ++p)
        for (int i = 0; i < kParts; ++i) dot[t][p][i].start(splat(i == 0 ? -(x_sums[t] * offset) : 0));
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Tiles::kLines, x += 4 * Tiles::kBlocks * kTokenBlock)
      for (int p = 0; p < kPieces; ++p) {
        const Tiles tiles(m, tile, g, p);
        static_for<Tiles::kBlocks>([&](auto block) __attribute__((always_inline)) {
          constexpr int J = decltype(block)::value;
          if constexpr (J < Tiles::kLines)
            if (p == 0) __builtin_prefetch(unit + J * kLaneVectorBytes + kPrefetchBytes);
          const Vb codes = tiles.template block<J>(unit + p * kVectorBytes);
          for (int t = 0; t < Tokens; ++t)
            dot[t][p][J % kParts].template add<J % kUnitBlocks>(codes, repeat_four(x + 4 * (J * kTokenBlock + t)));
        });
      }
    for (int p = 0; p < kPieces; ++p) {
      const Vf scale = group_scale(m, tile, g, p);
      Vf least{};
      const std::int64_t at = (tile * m.groups + g) * kTileRows + p * kWidth;
      if (m.adds()) least = group_least(m, tile, g, p);
      if (m.zeros) least = -scale * to_float(load_bytes(m.zeros + at));
      for (int t = 0; t < Tokens; ++t) {
        Vi sum = dot[t][p][0].total();
        for (int i = 1; i < kParts; ++i) sum += dot[t][p][i].total();
        total[t][p] += scale * (x_scales[t] * one) * to_float(sum);
        if (offset == 0 || m.shifts) total[t][p] += least * (x_scales[t] * static_cast<float>(x_sums[t]));
      }
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int p = 0; p < kPieces; ++p) store(out[t] + p * kWidth, total[t][p]);
}

template <class Tiles>
void few_tokens(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out) {
  alignas(64) float values[kTokenBlock][kTileRows];
  const int tokens = static_cast<int>(input.tokens);
  for (std::int64_t tile = begin; tile < end; ++tile) {
    Activations block = input.coded;
    for (int first = 0; first < tokens; first += kTokenBlock) {
      const int count = tokens - first < kTokenBlock ? tokens - first : kTokenBlock;
      if (count <= 2) few_tokens_tile<Tiles, 2>(m, block, tile, values);
      else if (count <= 4 || kTokenBlock == 4) few_tokens_tile<Tiles, kTokenBlock < 4 ? kTokenBlock : 4>(m, block, tile, values);
      else few_tokens_tile<Tiles, kTokenBlock>(m, block, tile, values);
      for (int t = 0; t < count; ++t) write_rows(values[t], first + t, tile * kTileRows, kTileRows, out);
      block.codes += block.padded_cols() * kTokenBlock;
      block.scales += block.groups * kTokenBlock;
      block.sums += block.groups * kTokenBlock;
    }
  }
}

}  // namespace

void tiles_few(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  with_bits(m.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    if (m.form == Form::sparse) return few_tokens<SparseTiles<kBits>>(m, input, begin, end, out);
    if (m.bytes() == 0) return few_tokens<DenseTiles<kBits, 0>>(m, input, begin, end, out);
    few_tokens<DenseTiles<kBits, 1>>(m, input, begin, end, out);
  });
}

}  // namespace mw::MW_ISA
