// KIVI blocks of 2 or 4 bits against queries and shares of 8: sums of integers, 8 x 4 bit products in 32 bits, one rescaling a block.
//
// A key is minimum + scale * code, by channel: q . k = sum of (q * scale) * code + sum of q * minimum. The first factor is rounded
// to 8 signed bits, with a step for each head and block; the second sum does not depend on the token and stays a float. Values
// likewise, by token: shares are never negative and have all 8 bits. A word holds 8 / B codes in each of its four bytes, so that a
// mask turns it into four factors of a product: channels (tokens, for values) k * 8 / B + i, k = 0 .. 3, for pass i.
//
// Source: AccLLM (Liang 2025, arXiv 2505.03745), KV4: Q K^T and P V as 8 x 4 bit integer products.
#include "attention_isa.h"
#include "attention_simd.h"
#include "kivi_codes.h"

namespace mw::MW_ISA {
namespace {

constexpr int kHeads = 4;           // query heads that share one unpacking
constexpr float kLeastTop = 1e-30f;  // a block whose largest factor is below it counts as zeros: its step would have no inverse

template <int B>
constexpr int kPasses = 8 / B;

// Four codes of each lane, and the factors they meet: the same four for all lanes.
#if defined(__AVX512F__)
inline vi mask_bytes(vi x, std::uint32_t mask) { return _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(mask))); }
inline vi zeros() { return _mm512_setzero_si512(); }
inline vf to_floats(vi x) { return _mm512_cvtepi32_ps(x); }
template <int B, bool kShares>
inline vi add_products(vi sum, const vi (&codes)[kPasses<B>], const std::uint32_t* fours) {
  for (int i = 0; i < kPasses<B>; ++i) {
    const vi four = _mm512_set1_epi32(static_cast<int>(fours[i]));
    sum = kShares ? _mm512_dpbusd_epi32(sum, four, codes[i]) : _mm512_dpbusd_epi32(sum, codes[i], four);  // unsigned first
  }
  return sum;
}
#elif defined(__AVX2__)
inline vi mask_bytes(vi x, std::uint32_t mask) { return _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(mask))); }
inline vi zeros() { return _mm256_setzero_si256(); }
inline vf to_floats(vi x) { return _mm256_cvtepi32_ps(x); }
// All passes of a word fit 16 bits: at most 2 * 2 * 15 * 255.
template <int B, bool kShares>
inline vi add_products(vi sum, const vi (&codes)[kPasses<B>], const std::uint32_t* fours) {
  vi pairs = zeros();
  for (int i = 0; i < kPasses<B>; ++i) {
    const vi four = _mm256_set1_epi32(static_cast<int>(fours[i]));
    pairs = _mm256_add_epi16(pairs, kShares ? _mm256_maddubs_epi16(four, codes[i]) : _mm256_maddubs_epi16(codes[i], four));
  }
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
typedef std::int32_t vs __attribute__((vector_size(16)));
inline vi mask_bytes(vi x, std::uint32_t mask) { return x & mask; }
inline vi zeros() { return vi{}; }
inline vf to_floats(vi x) { return __builtin_convertvector(reinterpret_cast<vs>(x), vf); }
template <int B, bool kShares>
inline vi add_products(vi sum, const vi (&codes)[kPasses<B>], const std::uint32_t* fours) {
  for (int i = 0; i < kPasses<B>; ++i)
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t byte = fours[i] >> (8 * k) & 255u;
      const std::int32_t factor = kShares ? static_cast<std::int32_t>(byte) : static_cast<std::int8_t>(byte);
      sum += (codes[i] >> static_cast<std::uint32_t>(8 * k) & 255u) * static_cast<std::uint32_t>(factor);  // wraps as signed numbers do
    }
  return sum;
}
#endif

template <int B>
inline void unpack(vi word, vi (&codes)[kPasses<B>]) {
  constexpr std::uint32_t kMask = 0x01010101u * ((1u << B) - 1u);
  for (int i = 0; i < kPasses<B>; ++i) codes[i] = mask_bytes(ishift(word, B * i), kMask);
}

// Sixteen factors, rounded, as the bytes that `add_products` meets: those of one pass of a word beside each other.
template <int B, bool kShares>
inline void pack_factors(const float* x, float inverse, std::uint8_t* to) {
#if defined(__AVX2__)
  const __m128i order = B == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                               : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(inverse))));
#else
  const auto round = [&](int i) { return _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4 * i), _mm_set1_ps(inverse))); };
  const __m128i low = _mm_packs_epi32(round(0), round(1)), high = _mm_packs_epi32(round(2), round(3));
  const __m128i bytes = kShares ? _mm_packus_epi16(low, high) : _mm_packs_epi16(low, high);
#endif
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, order));
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest even
  for (int c = 0; c < 16; ++c) {
    const float rounded = (x[c] * inverse + kRound) - kRound;
    const int within = c % (4 * kPasses<B>), word = c / (4 * kPasses<B>);
    to[word * 4 * kPasses<B> + within % kPasses<B> * 4 + within / kPasses<B>] = static_cast<std::uint8_t>(static_cast<int>(rounded));
  }
#endif
}

// Rounds `count` factors, a multiple of 16, to 8 bits; returns their step.
template <int B, bool kShares>
inline float round_factors(const float* x, int count, std::uint32_t* fours) {
  vf most = vset(0.0f);
  for (int i = 0; i < count; i += W) {
    const vf value = vload(x + i);
    most = vmax(most, kShares ? value : vmax(value, vsub(vset(0.0f), value)));
  }
  constexpr float kTop = kShares ? 255.0f : 127.0f;
  const float top = hmax(most), inverse = top > kLeastTop ? kTop / top : 0.0f;
  auto* to = reinterpret_cast<std::uint8_t*>(fours);
  for (int i = 0; i < count; i += 16) pack_factors<B, kShares>(x + i, inverse, to + i);
  return top / kTop;
}

// V vectors of tokens of one key block for R query heads
template <int B, int R, int V>
inline void score_tile(const Plane& plane, int rows, int first, const std::uint32_t* fours, int stride, const float* steps,
                       const float* offsets, float* scores) {
  vi sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = zeros();
  for (int row = 0; row < rows; ++row, fours += kPasses<B>) {
    vi codes[V][kPasses<B>];
    for (int v = 0; v < V; ++v) unpack<B>(plane.load(row, first + v * W), codes[v]);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = add_products<B, false>(sum[r][v], codes[v], fours + r * stride);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) vstore(scores + r * kStep + v * W, vfma(to_floats(sum[r][v]), vset(steps[r]), vset(offsets[r])));
}

template <int B, int R>
inline void score_block(const std::uint8_t* block, int tokens, int dim, const std::uint32_t* fours, int stride, const float* steps,
                        const float* offsets, float* scores) {
  const Plane plane(words(block), tokens, dim, kPerWord<B>);
  const int rows = (dim + kPerWord<B> - 1) / kPerWord<B>;
  int t = 0;
  for (; t + 2 * W <= tokens; t += 2 * W) score_tile<B, R, 2>(plane, rows, t, fours, stride, steps, offsets, scores + t);
  for (; t < tokens; t += W) score_tile<B, R, 1>(plane, rows, t, fours, stride, steps, offsets, scores + t);
}

// V vectors of channels of one value block for R query heads
template <int B, int R, int V>
inline void value_tile(const std::uint32_t* main, int dim, const std::uint32_t* fours, const float* steps, const float* offsets, float* out) {
  vi sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = zeros();
  for (int row = 0; row < kBlock / kPerWord<B>; ++row, main += dim, fours += kPasses<B>) {
    vi codes[V][kPasses<B>];
    for (int v = 0; v < V; ++v) unpack<B>(iload(main + v * W), codes[v]);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] = add_products<B, true>(sum[r][v], codes[v], fours + r * (kBlock / 4));
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* to = out + r * dim + v * W;
      vstore(to, vfma(to_floats(sum[r][v]), vset(steps[r]), vadd(vload(to), vset(offsets[r]))));
    }
}

template <int B, int R>
inline void value_block(const std::uint8_t* block, const KiviForm& form, int dim, const float* const p[], float* out, float* scratch) {
  const std::uint32_t* main = words(block);
  const f16* scales = halves(block + form.value_code_bytes(dim));
  const f16* minima = scales + dim / form.group * kBlock;
  auto* fours = reinterpret_cast<std::uint32_t*>(scratch + kBlock);
  for (int g = 0; g < dim / form.group; ++g, scales += kBlock, minima += kBlock) {
    float steps[R], offsets[R];
    for (int r = 0; r < R; ++r) {
      fold_key_scales(scales, minima, p[r], kBlock, scratch, offsets + r);
      steps[r] = round_factors<B, true>(scratch, kBlock, fours + r * (kBlock / 4));
    }
    int d = g * form.group;
    const int stop = d + form.group;
    for (; d + 2 * W <= stop; d += 2 * W) value_tile<B, R, 2>(main + d, dim, fours, steps, offsets, out + d);
    for (; d < stop; d += W) value_tile<B, R, 1>(main + d, dim, fours, steps, offsets, out + d);
  }
}

// body(number of heads, first head) over the query heads of one kv head
template <typename Body>
inline void by_heads(int count, Body&& body) {
  int r = 0;
  for (; r + kHeads <= count; r += kHeads) body(std::integral_constant<int, kHeads>(), r);
  for (; r + 2 <= count; r += 2) body(std::integral_constant<int, 2>(), r);
  for (; r < count; ++r) body(std::integral_constant<int, 1>(), r);
}

template <typename Body>
inline void with_bits(int bits, Body&& body) {
  if (bits == 2) body(std::integral_constant<int, 2>());
  else body(std::integral_constant<int, 4>());
}

}  // namespace

std::size_t kivi_integer_scratch(const Attention& a) {
  const auto rep = static_cast<std::size_t>(a.queries_per_kv_head()), padded = static_cast<std::size_t>(a.padded_key());
  const std::size_t keys = padded + rep * padded / 4 + 2 * rep, values = kBlock + kHeads * kBlock / 4 + rep * kBlock;
  return keys > values ? keys : values;
}

void kivi_integer_scores(const Attention& a, const float* q, std::int64_t begin, std::int64_t end, float* scores, float* scratch) {
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, padded = a.padded_key(), tokens = a.form.key_tokens(), stride = padded / 4;
  const std::size_t size = a.form.key_block_bytes(dim), code_bytes = a.form.key_code_bytes(dim);
  float *scaled = scratch, *steps = scaled + padded, *offsets = steps + rep;
  auto* fours = reinterpret_cast<std::uint32_t*>(offsets + rep);
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    for (std::int64_t token = begin; token < end; token += tokens) {
      const std::uint8_t* block = a.key_block(token);
      for (int h = 0; h < a.num_kv_heads; ++h, block += size) {
        fetch_ahead(block, size);
        const f16* scales = halves(block + code_bytes);
        for (int r = 0; r < rep; ++r) {
          fold_key_scales(scales, scales + dim, q + (h * rep + r) * padded, dim, scaled, offsets + r);
          steps[r] = round_factors<B, false>(scaled, padded, fours + r * stride);
        }
        float* to = scores + (h * rep) * kStep + (token - begin);
        by_heads(rep, [&](auto heads, int r) {
          score_block<B, decltype(heads)::value>(block, tokens, dim, fours + r * stride, stride, steps + r, offsets + r, to + r * kStep);
        });
      }
    }
  });
}

void kivi_integer_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch) {
  const int rep = a.queries_per_kv_head(), dim = a.head_dim;
  const std::size_t size = a.form.value_block_bytes(dim);
  float* cut = scratch + kBlock + kHeads * kBlock / 4;
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    for (std::int64_t token = begin; token < end; token += kBlock) {
      const std::uint8_t* block = a.value_block(token);
      const int count = static_cast<int>(end - token < kBlock ? end - token : kBlock);
      for (int h = 0; h < a.num_kv_heads; ++h, block += size) {
        fetch_ahead(block, size);
        const auto weights = [&](int r) {
          const float* weight = p + (h * rep + r) * kStep + (token - begin);
          if (count == kBlock) return weight;
          for (int t = 0; t < kBlock; ++t) cut[r * kBlock + t] = t < count ? weight[t] : 0.0f;  // the rest is exact, or not there
          return static_cast<const float*>(cut + r * kBlock);
        };
        by_heads(rep, [&](auto heads, int r) {
          constexpr int R = decltype(heads)::value;
          const float* weight[R];
          for (int i = 0; i < R; ++i) weight[i] = weights(r + i);
          value_block<B, R>(block, a.form, dim, weight, out + (h * rep + r) * dim, scratch);
        });
      }
    }
  });
}

}  // namespace mw::MW_ISA
