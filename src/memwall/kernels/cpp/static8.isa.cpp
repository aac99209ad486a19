// Codes become a panel of bytes for some columns, which all tokens are then multiplied with.
#include "static8.h"

#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr std::int64_t kPanelColumns = 512;
constexpr int kBlock = 4;  // tokens that share what is loaded of the panel

// (a * b + 2^14) >> 15 of 16-bit numbers.
MW_INLINE Vs multiply_round(Vs a, Vs b) {
#if defined(__AVX512F__)
  return (Vs)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vs)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b);
#else
  Vs out;
  for (int i = 0; i < 2 * kWidth; ++i) out[i] = static_cast<std::int16_t>((a[i] * b[i] + (1 << 14)) >> 15);
  return out;
#endif
}

// Columns [first, first + count) of a tile as bytes of integer + 128.
void unpack_panel(const StaticProduct& m, std::int64_t tile, std::int64_t first, std::int64_t count, std::uint8_t* panel) {
  const std::int64_t groups = m.cols / m.group;
  for (std::int64_t column = first; column < first + count; column += kUnitColumns) {
    const std::uint8_t* unit = m.codes + (tile * m.cols + column) * kTileRows / 2;
    const std::uint16_t* scales = m.groups + (tile * groups + column / m.group) * kTileRows;
    for (int p = 0; p < kPieces; ++p) {
      const Vi fixed = round_to_int(load_half(scales + p * kWidth) * 2048.0f);
      const Vs both = (Vs)((fixed & 0xffff) | (fixed << 16));
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        const Vb codes = code_block<4, block.value>(unit + p * kVectorBytes);
        const Vs even = (Vs)((((Vh)codes & 0x00ff) << 4)) - std::int16_t{128}, odd = (Vs)(((Vh)codes >> 8) << 4) - std::int16_t{128};
        const Vh low = (Vh)multiply_round(even, both) & 0x00ff, high = (Vh)multiply_round(odd, both) << 8;
        store(panel + (column - first + 4 * block.value) * kTileRows + p * kVectorBytes, (Vb)(low | high) ^ std::uint8_t{0x80});
      });
    }
  }
}

MW_INLINE Vi add_pairs(Vi sum, Vs a, Vs b) {
#if defined(__AVX512VNNI__)
  return (Vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#else
  return sum + multiply_add_pairs(a, b);
#endif
}

// One token times 4 bits: integers stay in 16-bit lanes, as they come out of the multiplication by their group's scale.
void multiply_one(const StaticProduct& m, std::int64_t tile, std::int32_t* sums) {
  const std::int64_t groups = m.cols / m.group;
  const std::int16_t nibble = 0x00f0, half = 128;
  for (int p = 0; p < kPieces; ++p) {
    Vi even_sum{}, odd_sum{};
    for (std::int64_t g = 0; g < groups; ++g) {
      const Vi fixed = round_to_int(load_half(m.groups + (tile * groups + g) * kTileRows + p * kWidth) * 2048.0f);
      const Vs scale = (Vs)((fixed & 0xffff) | (fixed << 16));
      const std::uint8_t* codes = m.codes + (tile * m.cols + g * m.group) * kTileRows / 2 + p * kVectorBytes;
      const std::int32_t* pairs = m.pairs + g * m.group / 2;
      // a vector holds columns 8 i to 8 i + 3 in its low nibbles and the next four in its high ones
      for (int i = 0; i < m.group / 8; ++i, codes += kLaneVectorBytes, pairs += 4) {
        const Vh raw = load<Vh>(codes);
        const Vs low_even = (Vs)((raw << 4) & nibble) - half, low_odd = (Vs)((raw >> 4) & nibble) - half;
        const Vs high_even = (Vs)(raw & nibble) - half, high_odd = (Vs)((raw >> 8) & nibble) - half;
        even_sum = add_pairs(even_sum, multiply_round(low_even, scale), (Vs)splat(pairs[0]));
        odd_sum = add_pairs(odd_sum, multiply_round(low_odd, scale), (Vs)splat(pairs[1]));
        even_sum = add_pairs(even_sum, multiply_round(high_even, scale), (Vs)splat(pairs[2]));
        odd_sum = add_pairs(odd_sum, multiply_round(high_odd, scale), (Vs)splat(pairs[3]));
      }
    }
    store(sums + p * kWidth, even_sum + odd_sum);
  }
}

template <int Tokens>
MW_INLINE void multiply_panel(const StaticProduct& m, const std::uint8_t* panel, std::int64_t first, std::int64_t count, std::int64_t token,
                              std::int32_t* sums) {
  for (int p = 0; p < kPieces; ++p) {
    Dot<8> dots[Tokens];
    for (int t = 0; t < Tokens; ++t) dots[t].start(load<Vi>(sums + (token + t) * kTileRows + p * kWidth));
    const std::int8_t* x = m.x + token * m.cols + first;
    for (std::int64_t c = 0; c < count; c += 4) {
      const Vb weights = load<Vb>(panel + c * kTileRows + p * kVectorBytes);
      for (int t = 0; t < Tokens; ++t) dots[t].template add<0>(weights, repeat_four(x + t * m.cols + c));
    }
    for (int t = 0; t < Tokens; ++t) store(sums + (token + t) * kTileRows + p * kWidth, dots[t].total());
  }
}

void write_tile(const StaticProduct& m, std::int64_t tile, const std::int32_t* sums) {
  const std::int64_t first = tile * kTileRows, count = m.rows - first < kTileRows ? m.rows - first : kTileRows;
  for (std::int64_t t = 0; t < m.tokens; ++t)
    for (std::int64_t r = 0; r < count; ++r) {
      const float value = static_cast<float>(sums[t * kTileRows + r] - 128 * m.sums[t]) * (m.channels[first + r] * m.x_scale);
      const std::int64_t at = t * m.rows + first + r;
      if (m.out_bytes) {
        const float scaled = value * m.out_inverse[first + r];
        const float bounded = scaled < -127.0f ? -127.0f : scaled > 127.0f ? 127.0f : scaled;
        m.out_bytes[at] = static_cast<std::int8_t>(__builtin_rintf(bounded));
      } else {
        m.out[at] = m.accumulate ? m.out[at] + value : value;
      }
    }
}

void rows(const StaticProduct& m, std::int64_t begin, std::int64_t end) {
  alignas(64) std::int32_t sums[kStaticTokens * kTileRows];
  alignas(64) std::uint8_t held[kPanelColumns * kTileRows];
  for (std::int64_t tile = begin; tile < end; ++tile) {
    if (m.pairs) {
      multiply_one(m, tile, sums);
      write_tile(m, tile, sums);
      continue;
    }
    for (std::int64_t i = 0; i < m.tokens * kTileRows; ++i) sums[i] = 0;
    for (std::int64_t first = 0; first < m.cols; first += kPanelColumns) {
      const std::int64_t count = m.cols - first < kPanelColumns ? m.cols - first : kPanelColumns;
      const std::uint8_t* panel = m.codes + (tile * m.cols + first) * kTileRows;
      if (m.bits == 4) {
        unpack_panel(m, tile, first, count, held);
        panel = held;
      }
      std::int64_t t = 0;
      for (; t + kBlock <= m.tokens; t += kBlock) multiply_panel<kBlock>(m, panel, first, count, t, sums);
      for (; t < m.tokens; ++t) multiply_panel<1>(m, panel, first, count, t, sums);
    }
    write_tile(m, tile, sums);
  }
}

}  // namespace

extern const StaticKernels static_kernels;
const StaticKernels static_kernels = {rows};

}  // namespace mw::MW_ISA
