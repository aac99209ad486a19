// Products of a few tokens that keep their activations in float32: codes become floats in registers, without a conversion, and are
// multiplied with all tokens there. Sums run column by column, as over the panel of linear_float.isa.cpp, so that a token's results do
// not depend on how many others there are, to the bit.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;
constexpr int kMostGroup = 128;
// A code in the low bits of 2^23 reads as 2^23 + code (MARLIN's way, arXiv 2408.11743, section 3.4, in float32).
constexpr std::int32_t kExponent = 0x4b000000;
constexpr float kExponentValue = 8388608.0f;

constexpr int kChains = 8;  // sums under way at once: an addition takes four cycles, and two can start in each

// So many tiles are worked on together that their sums and those of the tokens are kChains.
constexpr int tiles_together(int tokens) { return tokens * kPieces >= kChains ? 1 : kChains / (tokens * kPieces) < 4 ? kChains / (tokens * kPieces) : 4; }

template <int Bits, int Tokens, int Tiles>
void exact_tiles(const Matrix& m, const float* const* x, std::int64_t tile, float (*out)[kTokenBlock][kTileRows]) {
  const int units = m.group / kUnitColumns;
  const Vf zero = splat(kExponentValue + static_cast<float>(m.low_offset()));
  const std::int64_t tile_bytes = m.tile_bytes();
  const std::uint8_t* unit = m.tile(tile);
  alignas(64) float tail[Tokens][kMostGroup];
  Vf total[Tiles][Tokens][kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    const float* from[Tokens];
    for (int t = 0; t < Tokens; ++t) from[t] = x[t] + g * m.group;
    const std::int64_t left = m.cols - g * m.group;
    for (int t = 0; t < Tokens && left < m.group; ++t) {
      for (int c = 0; c < m.group; ++c) tail[t][c] = c < left ? from[t][c] : 0.0f;
      from[t] = tail[t];
    }
    Vf scale[Tiles][kPieces], least[Tiles][kPieces];
    for (int k = 0; k < Tiles; ++k)
      for (int p = 0; p < kPieces; ++p) {
        scale[k][p] = group_scale(m, tile + k, g, p);
        least[k][p] = m.mins ? load_half(m.mins + ((tile + k) * m.groups + g) * kTileRows + p * kWidth) : Vf{};
      }
    for (int u = 0; u < units; ++u, unit += kLaneVectorBytes * Bits)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        for (int k = 0; k < Tiles; ++k) {
          const std::uint8_t* at = unit + k * tile_bytes;
          if constexpr (I < Bits) __builtin_prefetch(at + I * kLaneVectorBytes + kPrefetchBytes);
          for (int p = 0; p < kPieces; ++p) {
            const Vi codes = (Vi)code_block<Bits, I>(at + p * kVectorBytes);
            static_for<4>([&](auto byte) __attribute__((always_inline)) {
              constexpr int B = decltype(byte)::value;
              const Vf weight = scale[k][p] * ((Vf)(((codes >> (8 * B)) & 0xff) | kExponent) - zero) + least[k][p];
              for (int t = 0; t < Tokens; ++t) total[k][t][p] += weight * splat(from[t][u * kUnitColumns + 4 * I + B]);
            });
          }
        }
      });
  }
  for (int k = 0; k < Tiles; ++k)
    for (int t = 0; t < Tokens; ++t)
      for (int p = 0; p < kPieces; ++p) store(out[k][t] + p * kWidth, total[k][t][p]);
}

template <int Bits, int Tokens>
void exact_tokens(const Matrix& m, const float* const* x, int tokens, std::int64_t begin, std::int64_t end, const Output& out) {
  constexpr int kTiles = tiles_together(Tokens);
  alignas(64) float values[kTiles][kTokenBlock][kTileRows];
  for (std::int64_t tile = begin; tile < end;) {
    const int count = end - tile >= kTiles ? kTiles : 1;
    if (count == kTiles) exact_tiles<Bits, Tokens, kTiles>(m, x, tile, values);
    else exact_tiles<Bits, Tokens, 1>(m, x, tile, values);
    for (int k = 0; k < count; ++k, ++tile)
      for (int t = 0; t < tokens; ++t) write_rows(values[k][t], t, tile * kTileRows, kTileRows, out);
  }
}

}  // namespace

// Tokens that are missing from a block are computed too, from the first one.
void tiles_exact_few(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  const float* x[kTokenBlock];
  const int tokens = static_cast<int>(input.tokens);
  for (int t = 0; t < kTokenBlock; ++t) x[t] = input.x + (t < tokens ? t : 0) * input.cols;
  with_bits(m.bits, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value, kFour = kTokenBlock < 4 ? kTokenBlock : 4;
    if (tokens == 1) exact_tokens<kBits, 1>(m, x, tokens, begin, end, out);
    else if (tokens == 2) exact_tokens<kBits, 2>(m, x, tokens, begin, end, out);
    else if (tokens <= kFour) exact_tokens<kBits, kFour>(m, x, tokens, begin, end, out);
    else exact_tokens<kBits, kTokenBlock>(m, x, tokens, begin, end, out);
  });
}

}  // namespace mw::MW_ISA
