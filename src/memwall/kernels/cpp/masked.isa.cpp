// Products with weights of a sign and a mask bit (formats/sign_mask.py): bits times activations, and what they are worth per block.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;
constexpr int kBlockUnits = kMaskedGroup / kUnitColumns;

// Bits are at most 2 and low bits at most 127: two products fit in 16 bits, of which no more are added.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
using BitDot = NarrowDot<1>;
#else
using BitDot = Dot<8>;
#endif

MW_INLINE Vf chosen(Vi yes, Vf a, Vf b) { return (Vf)(((Vi)a & yes) | ((Vi)b & ~yes)); }
MW_INLINE Vf around(Vf mean, Vf scale, Vi above) { return chosen(above, mean + scale, mean - scale); }

// The parameters of kWidth rows of one block.
struct Params {
  const std::uint16_t* at;
  MW_INLINE Params(const Matrix& m, std::int64_t tile, std::int64_t g, int p)
      : at(m.masked_params(tile, g) + p * kWidth) {}
  MW_INLINE Vf operator[](int i) const { return load_half(at + i * kTileRows); }
};

// What codes 00, 10 (sign), 01 (mask) and 11 of weights that are not salient columns stand for. Low bits add `step` each.
struct Levels4 {
  Vf neither, sign, mask, both;
  MW_INLINE Levels4(const Matrix& m, const Params& params, std::int64_t tile, int p) {
    const Vf mean = params[0], scale = params[1];
    neither = mean - scale;
    sign = mean + scale;
    if (m.rest) {
      const float* steps = m.masked_steps(tile) + p * kWidth;
      const Vf step = load<Vf>(steps), zero = load<Vf>(steps + kTileRows);
      mask = step * (Vf{} - zero);
      both = step * (splat(128.0f) - zero);
    } else {
      const Vf far_mean = params[2], far_scale = params[3];
      mask = far_mean - far_scale;
      both = far_mean + far_scale;
    }
  }
};

// The low bits of a vector of codes, 0 where the mask is not set; they lie one after another from `rest` on.
MW_INLINE Vb expanded(Vb codes, const std::uint8_t*& rest) {
#if defined(__AVX512VBMI2__)
  const __mmask64 set = _mm512_test_epi8_mask((__m512i)codes, _mm512_set1_epi8(2));
  const Vb found = (Vb)_mm512_maskz_expand_epi8(set, _mm512_loadu_si512(rest));
  rest += __builtin_popcountll(set);
  return found;
#elif defined(__AVX2__)
  const auto set = static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16((__m256i)codes, 6)));
  std::uint64_t found[4];
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t eight = set >> (8 * i) & 255;
    std::uint64_t from;
    __builtin_memcpy(&from, rest, sizeof from);
    found[i] = _pdep_u64(from, _pdep_u64(eight, 0x0101010101010101u) * 255);
    rest += __builtin_popcount(eight);
  }
  return load<Vb>(found);
#else
  Vb found;
  for (int i = 0; i < kVectorBytes; ++i) found[i] = codes[i] & 2 ? *rest++ : 0;
  return found;
#endif
}

// Sums of one kind of columns: of signs, masks (twice) and where both are set.
struct Sums {
  BitDot sign[kPieces], mask[kPieces], both[kPieces];
  MW_INLINE Sums() {
    for (int p = 0; p < kPieces; ++p) sign[p].start(Vi{}), mask[p].start(Vi{}), both[p].start(Vi{});
  }
  MW_INLINE void add(int p, Vb codes, Vb four, bool pairs) {
    sign[p].template add<0>(codes & 1, four);
    mask[p].template add<0>(codes & 2, four);
    if (pairs) both[p].template add<0>(codes & (Vb)((Vh)codes >> 1) & 1, four);
  }
};

template <bool Rest>
void masked_tile(const Matrix& m, const Activations& a, std::int64_t tile, float* out) {
  const std::uint8_t* unit = m.tile(tile);
  const std::uint8_t* rest = Rest ? m.rest + m.starts[tile * m.groups] : nullptr;
  const std::int8_t* x = a.codes;
  Vf total[kPieces] = {};
  for (std::int64_t g = 0; g < m.groups; ++g) {
    const int salient = Rest ? 0 : m.salient[g];
    std::int32_t salient_sum = 0;
    for (int c = 0; c < salient; ++c) salient_sum += x[c];
    const std::int32_t other_sum = a.sums[g] - salient_sum;
    Sums others, columns;
    BitDot low[kPieces];
    for (auto& dot : low) dot.start(Vi{});
    for (int u = 0; u < kBlockUnits; ++u, unit += 2 * kLaneVectorBytes, x += kUnitColumns)
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        if constexpr (I < 2) __builtin_prefetch(unit + I * kLaneVectorBytes + kPrefetchBytes);
        const Vb four = repeat_four(x + 4 * I);
        const int left = Rest ? 0 : salient - u * kUnitColumns - 4 * I;  // salient columns of this block and those to come
        for (int p = 0; p < kPieces; ++p) {
          const Vb codes = code_block<2, I>(unit + p * kVectorBytes);
          if (Rest) low[p].template add<0>(expanded(codes, rest), four);
          if (left <= 0) {
            others.add(p, codes, four, true);
          } else if (left >= 4) {
            columns.add(p, codes, four, false);
          } else {
            const Vb first = (Vb)splat(static_cast<std::int32_t>((1u << (8 * left)) - 1));
            columns.add(p, codes, four & first, false);
            others.add(p, codes, four & ~first, true);
          }
        }
      });
    const float x_scale = a.scales[g];
    for (int p = 0; p < kPieces; ++p) {
      const Params params(m, tile, g, p);
      const Levels4 levels(m, params, tile, p);
      const Vf signs = to_float(others.sign[p].total()), masks = to_float(others.mask[p].total()) * 0.5f;
      Vf sum = levels.neither * static_cast<float>(other_sum) + (levels.sign - levels.neither) * signs;
      sum += (levels.mask - levels.neither) * masks;
      sum += ((levels.both - levels.mask) - (levels.sign - levels.neither)) * to_float(others.both[p].total());
      if (Rest) sum += load<Vf>(m.masked_steps(tile) + p * kWidth) * to_float(low[p].total());
      if (!Rest && salient) {
        const Vf first = params[5], second = params[6];
        sum += (params[4] - first - second) * static_cast<float>(salient_sum);
        sum += first * 2.0f * to_float(columns.sign[p].total()) + second * to_float(columns.mask[p].total());
      }
      total[p] += sum * x_scale;
    }
  }
  for (int p = 0; p < kPieces; ++p) store(out + p * kWidth, total[p]);
}

}  // namespace

void masked_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  for (std::int64_t tile = begin; tile < end; ++tile) {
    alignas(64) float values[kTileRows];
    if (m.rest) masked_tile<true>(m, input.coded, tile, values);
    else masked_tile<false>(m, input.coded, tile, values);
    write_rows(values, 0, tile * kTileRows, kTileRows, out);
  }
}

// Decodes columns of one tile (from a whole block on) into a panel of `stride` floats per column: the numbers of the codec, bit for
// bit.
void masked_panel(const Matrix& m, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride) {
  const std::uint8_t* unit = m.tile(tile) + first_col / kUnitColumns * 2 * kLaneVectorBytes;
  const std::uint8_t* rest = nullptr;
  for (int c = 0; c < num_cols; c += kUnitColumns, unit += 2 * kLaneVectorBytes) {
    const std::int64_t g = (first_col + c) / kMaskedGroup;
    const int within = static_cast<int>((first_col + c) % kMaskedGroup);
    if (m.rest && within == 0) rest = m.rest + m.starts[tile * m.groups + g];
    static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
      constexpr int I = decltype(block)::value;
      for (int p = 0; p < kPieces; ++p) {
        const Params params(m, tile, g, p);
        const Vb bytes = code_block<2, I>(unit + p * kVectorBytes);
        const Vi codes = (Vi)bytes;
        Vi low{};
        if (m.rest) low = (Vi)expanded(bytes, rest);
        const float* steps = m.rest ? m.masked_steps(tile) + p * kWidth : nullptr;
        for (int byte = 0; byte < 4; ++byte) {
          const Vi signs = Vi{} - ((codes >> (8 * byte)) & 1), masks = Vi{} - ((codes >> (8 * byte + 1)) & 1);
          Vf value = around(params[0], params[1], signs);
          if (m.rest) {
            const Vi code = ((low >> (8 * byte)) & 0x7f) | (signs & 128);
            value = chosen(masks, load<Vf>(steps) * (to_float(code) - load<Vf>(steps + kTileRows)), value);
          } else if (within + 4 * I + byte < m.salient[g]) {
            value = around(around(params[4], params[5], signs), params[6], masks);
          } else {
            value = chosen(masks, around(params[2], params[3], signs), value);
          }
          store(panel + (c + 4 * I + byte) * stride + p * kWidth, value);
        }
      }
    });
  }
}

}  // namespace mw::MW_ISA
