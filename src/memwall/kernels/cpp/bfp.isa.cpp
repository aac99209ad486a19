// Attention on block floating point rows; the layout is in bfp_form.h.
//
// Scores are integer products: a query is brought into the same form with mantissas of 8 bits, codes are multiplied as they lie,
// and each block's sum meets the product of two powers of two. Weighted sums of values are taken in float.
#include <cmath>

#include "attention_isa.h"
#include "bfp_codes.h"

namespace mw::MW_ISA {
namespace {

constexpr int kQueryBits = 8;  // mantissas of a query
constexpr int kHeads = 4;      // query heads that share what is read of a key or value

// 2^(E - (bits - 2)) for the exponent byte of a block
struct Steps {
  float of[256];
  explicit Steps(int bits) {
    for (int byte = 0; byte < 256; ++byte) {
      const int exponent = static_cast<std::int8_t>(byte);
      of[byte] = exponent == -128 ? 0.0f : std::ldexp(1.0f, exponent - (bits - 2));
    }
  }
};

const float* steps_of(int bits) {
  static const Steps three(3), four(4), six(6), eight(8);
  return bits == 3 ? three.of : bits == 4 ? four.of : bits == 6 ? six.of : eight.of;
}

template <typename Body>
inline void with_width(int bits, Body&& body) {
  if (bits == 3) body(std::integral_constant<int, 3>());
  else if (bits == 4) body(std::integral_constant<int, 4>());
  else if (bits == 6) body(std::integral_constant<int, 6>());
  else body(std::integral_constant<int, 8>());
}

// 2^(E - (P - 2)) of W exponents
template <int P>
static inline vf steps_at(const std::uint8_t* exponents) {
#if defined(__AVX512F__)
  const __m512i own = _mm512_add_epi32(_mm512_cvtepi8_epi32(load_128(exponents)), _mm512_set1_epi32(127 - (P - 2)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_max_epi32(own, _mm512_setzero_si512()), 23));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(exponents));
  const __m256i own = _mm256_add_epi32(_mm256_cvtepi8_epi32(bytes), _mm256_set1_epi32(127 - (P - 2)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_max_epi32(own, _mm256_setzero_si256()), 23));
#else
  vf to;
  for (int i = 0; i < W; ++i) to[i] = steps_of(P)[exponents[i]];
  return to;
#endif
}

// ---- numbers to blocks -------------------------------------------------------------------------------------------------

inline float at(const Rows& rows, std::int64_t i) {
  if (rows.type == Real::float32) return static_cast<const float*>(rows.data)[i];
  if (rows.type == Real::float16) return half_to_float(static_cast<const f16*>(rows.data)[i]);
  return to_float(static_cast<const bf16*>(rows.data)[i]);
}

// The exponent of a block whose largest magnitude is `top`; -128 for a block of zeros. Below 2^-100 all is zero.
inline int exponent_of(float top, int bits, BfpTop rule) {
  if (!(top >= 7.9e-31f)) return -128;
  int e = top > 1.7e38f ? 127 : std::ilogb(top);
  if (rule == BfpTop::raise && e < 127 && std::nearbyint(std::ldexp(top, bits - 2 - e)) >= std::ldexp(1.0f, bits - 1)) ++e;
  return e;
}

inline int mantissa_of(float x, float inverse_step, int bits) {
  const float most = static_cast<float>((1 << (bits - 1)) - 1), scaled = x * inverse_step;
  if (!(scaled == scaled)) return 0;
  const float cut = scaled < -most - 1.0f ? -most - 1.0f : scaled > most ? most : scaled;
  return static_cast<int>(std::nearbyint(cut));  // half to even
}

inline float inverse_step(int exponent, int bits) { return exponent == -128 ? 0.0f : std::ldexp(1.0f, bits - 2 - exponent); }

// The exponent of a block; each mantissa goes to put(i, mantissa).
template <int P, typename Put>
inline std::uint8_t encode_block(const float* x, int count, BfpTop rule, Put&& put) {
  float top = 0.0f;
  for (int i = 0; i < count; ++i) top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
  const int e = exponent_of(top, P, rule);
  const float inverse = inverse_step(e, P);
  for (int i = 0; i < count; ++i) put(i, mantissa_of(x[i], inverse, P));
  return static_cast<std::uint8_t>(e);
}

// ---- scores ------------------------------------------------------------------------------------------------------------

// One query head in blocks: mantissas, and for each block its step and what takes back the bias of the codes it meets.
struct Query {
  const std::int8_t* codes;   // [dim]
  const float* steps;         // [dim / block]
  const std::int32_t* shift;  // [dim / block]
};

struct Queries {
  int dim, blocks;
  std::int8_t* codes;
  float* steps;
  std::int32_t* shift;
  Queries(const Attention& a, float* scratch)
      : dim(a.key_dim),
        blocks(dim / a.bfp.block),
        codes(reinterpret_cast<std::int8_t*>(scratch)),
        steps(scratch + a.num_heads * (dim / 4)),
        shift(reinterpret_cast<std::int32_t*>(steps + a.num_heads * blocks)) {}
  static std::size_t floats(const Attention& a) {
    return static_cast<std::size_t>(a.num_heads) * static_cast<unsigned>(a.key_dim / 4 + 2 * (a.key_dim / 16));
  }
  Query of(int head) const { return {codes + head * dim, steps + head * blocks, shift + head * blocks}; }
};

#if defined(__AVX2__)

static inline Quads four_of(const std::int8_t* p) {
  int word;
  std::memcpy(&word, p, sizeof word);
#if defined(__AVX512F__)
  return _mm512_set1_epi32(word);
#else
  return _mm256_set1_epi32(word);
#endif
}

// Sums of products of one block's quads [from, to) for R heads: sums[r] in 32 bits, one for each token.
template <int P, int R>
static inline void block_sums(const std::uint8_t* lanes, int from, int to, const Query* q, int b, vf (&sums)[R]) {
  Quads sum[R];
#if defined(__AVX512F__)
  for (int r = 0; r < R; ++r) sum[r] = _mm512_set1_epi32(q[r].shift[b]);
  for (int quad = from; quad < to; ++quad) {
    const Quads codes = quad_codes<P>(lanes + quad / 8 * kGroupBytes<P> * kTokens, quad % 8);
    for (int r = 0; r < R; ++r) sum[r] = _mm512_dpbusd_epi32(sum[r], codes, four_of(q[r].codes + 4 * quad));
  }
  for (int r = 0; r < R; ++r) sums[r] = _mm512_cvtepi32_ps(sum[r]);
#else
  constexpr int kUnfolded = P == 6 ? 2 : 8;  // sums of pairs that 16 bits hold: each is at most 2 (2^P - 1) 128
  const __m256i ones = _mm256_set1_epi16(1);
  for (int r = 0; r < R; ++r) sum[r] = _mm256_set1_epi32(q[r].shift[b]);
  if constexpr (P == 8) {  // two products of full bytes do not fit 16 bits
    for (int quad = from; quad < to; ++quad) {
      const Quads codes = quad_codes<P>(lanes + quad / 8 * kGroupBytes<P> * kTokens, quad % 8);
      const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes, 8);
      for (int r = 0; r < R; ++r) {
        const Quads four = four_of(q[r].codes + 4 * quad);
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8)));
        sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(odd, _mm256_srai_epi16(four, 8)));
      }
    }
  } else {
    for (int first = from; first < to; first += kUnfolded) {
      __m256i pairs[R];
      for (int r = 0; r < R; ++r) pairs[r] = _mm256_setzero_si256();
      for (int quad = first; quad < to && quad < first + kUnfolded; ++quad) {
        const Quads codes = quad_codes<P>(lanes + quad / 8 * kGroupBytes<P> * kTokens, quad % 8);
        for (int r = 0; r < R; ++r) pairs[r] = _mm256_add_epi16(pairs[r], _mm256_maddubs_epi16(codes, four_of(q[r].codes + 4 * quad)));
      }
      for (int r = 0; r < R; ++r) sum[r] = _mm256_add_epi32(sum[r], _mm256_madd_epi16(pairs[r], ones));
    }
  }
  for (int r = 0; r < R; ++r) sums[r] = _mm256_cvtepi32_ps(sum[r]);
#endif
}

#endif

// logits of the first `count` tokens of a block for R heads
template <int P, int R>
inline void score_block(const std::uint8_t* keys, int count, const Query* q, int dim, int block, float* scores) {
  const std::uint8_t* exponents = keys + kTokens * BfpForm::code_bytes(P, dim);
#if defined(__AVX2__)
  for (int first = 0; first < count; first += kLaneTokens) {
    vf sum[R], part[R];
    for (int r = 0; r < R; ++r) sum[r] = vset(0.0f);
    for (int b = 0; b < dim / block; ++b) {
      block_sums<P, R>(keys + 4 * first, b * block / 4, (b + 1) * block / 4, q, b, part);
      const vf step = steps_at<P>(exponents + b * kTokens + first);
      for (int r = 0; r < R; ++r) sum[r] = vfma(part[r], vmul(step, vset(q[r].steps[b])), sum[r]);
    }
    for (int r = 0; r < R; ++r) {
      if (count - first >= kLaneTokens) {
        vstore(scores + r * kStep + first, sum[r]);
        continue;
      }
      alignas(64) float last[W];  // exact keys may follow
      vstore(last, sum[r]);
      for (int t = first; t < count; ++t) scores[r * kStep + t] = last[t - first];
    }
  }
#else
  const float* steps = steps_of(P);
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < R; ++r) {
      float sum = 0.0f;
      for (int b = 0; b < dim / block; ++b) {
        std::int32_t part = 0;
        for (int i = b * block; i < (b + 1) * block; ++i) part += get_key<P>(keys, t, i) * q[r].codes[i];
        sum += static_cast<float>(part) * (steps[exponents[b * kTokens + t]] * q[r].steps[b]);
      }
      scores[r * kStep + t] = sum;
    }
#endif
}

// ---- values ------------------------------------------------------------------------------------------------------------

// What a run of coded values is: `blocks` blocks of `tokens` tokens, each token `row` bytes, blocks `stride` bytes apart.
struct Run {
  const std::uint8_t* data;
  std::size_t stride, row;
  int blocks, tokens;
};

// out[r][0 .. kPart) += sum over tokens of weight[r][token] * mantissa, for the channels from `channel` on
// low, high: weights of the first and of the other 16 channels; totals: their sums, for the bias of the codes
template <int P, int R>
inline void value_tile(const Run& run, int channel, const float* low, const float* high, const float (&total)[2][R], float* out, int ld) {
  vf sum[R][kPartVectors];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kPartVectors; ++i)
      sum[r][i] = vadd(vload(out + r * ld + i * W), vset(-static_cast<float>(kBias<P>) * total[i * W / 16][r]));
  int t = 0;
  for (int b = 0; b < run.blocks; ++b) {
    const std::uint8_t* token = run.data + static_cast<std::size_t>(b) * run.stride;
    for (int i = 0; i < run.tokens; ++i, ++t, token += run.row) {
      vf value[kPartVectors];
      part_floats<P>(token, channel, value);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kPartVectors; ++v)
          sum[r][v] = vfma(vset((v * W < 16 ? low : high)[r * kStep + t]), value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < kPartVectors; ++i) vstore(out + r * ld + i * W, sum[r][i]);
}

// weights[r][token] = p[r][token] * step of the token's block b, and their sums
template <int P, int R>
inline void weigh(const Run& run, std::size_t exponents, int b, int count, const float* p, float* weights, float (&total)[R]) {
  for (int r = 0; r < R; ++r) total[r] = 0.0f;
  for (int first = 0; first < count; first += kTokens) {
    const std::uint8_t* own = run.data + static_cast<std::size_t>(first / kTokens) * run.stride + exponents + b * kTokens;
    const int held = count - first < kTokens ? count - first : kTokens;
    for (int r = 0; r < R; ++r) {
      vf sum = vset(0.0f);
      for (int t = 0; t < kTokens; t += W) {
        const vf left = held - t >= W ? vload(p + r * kStep + first + t) : vload_part(p + r * kStep + first + t, held > t ? held - t : 0);
        const vf weight = vmul(left, steps_at<P>(own + t));
        vstore(weights + r * kStep + first + t, weight);
        sum = vadd(sum, weight);
      }
      total[r] += hsum(sum);
    }
  }
}

// values [begin, begin + count) of R heads of one kv head, blocks along channels
template <int P, int R>
void sum_rows(const Attention& a, int kv_head, const float* p, std::int64_t begin, int count, float* out, float* weights) {
  const int dim = a.head_dim, block = a.bfp.block;
  const std::size_t size = a.bfp.value_bytes(dim), stride = size * static_cast<unsigned>(a.num_kv_heads);
  const std::uint8_t* data = a.value_blocks + static_cast<std::size_t>(begin / kTokens) * stride + static_cast<unsigned>(kv_head) * size;
  const Run whole{data, stride, BfpForm::code_bytes(P, dim), count / kTokens, kTokens};
  const Run rest{data + static_cast<std::size_t>(whole.blocks) * stride, stride, whole.row, 1, count % kTokens};
  const std::size_t exponents = a.bfp.value_code_bytes(dim);
  float total[2][R];
  float* other = block < kPart ? weights + R * kStep : weights;
  for (int d = 0; d < dim; d += kPart) {
    if (d % block == 0) {
      weigh<P, R>(whole, exponents, d / block, count, p, weights, total[0]);
      if (block < kPart) weigh<P, R>(whole, exponents, d / block + 1, count, p, other, total[1]);
      else for (int r = 0; r < R; ++r) total[1][r] = total[0][r];
    }
    value_tile<P, R>(whole, d, weights, other, total, out + d, a.padded_dim());
    const float none[2][R] = {};
    const int done = whole.blocks * kTokens;
    if (rest.tokens) value_tile<P, R>(rest, d, weights + done, other + done, none, out + d, a.padded_dim());
  }
}

// the same where a block is `block` tokens of a channel; begin a multiple of it, count whole blocks
template <int P, int R>
void sum_columns(const Attention& a, int kv_head, const float* p, std::int64_t begin, int count, float* out) {
  const int dim = a.head_dim, block = a.bfp.block, padded = a.padded_dim();
  const std::size_t size = a.bfp.value_bytes(dim), row_bytes = BfpForm::code_bytes(P, dim);
  for (int t = 0; t < count; t += block) {
    const std::uint8_t* codes = a.value_blocks + (static_cast<std::size_t>((begin + t) / block * a.num_kv_heads + kv_head)) * size;
    const std::uint8_t* exponents = codes + a.bfp.value_code_bytes(dim);
    float total[2][R] = {};
    for (int r = 0; r < R; ++r) {
      for (int i = t; i < t + block; ++i) total[0][r] += p[r * kStep + i];
      total[1][r] = total[0][r];
    }
    for (int d = 0; d < dim; d += kPart) {
      float part[R * kPart] = {};
      value_tile<P, R>({codes, 0, row_bytes, 1, block}, d, p + t, p + t, total, part, kPart);
      for (int i = 0; i < kPart; i += W) {
        const vf step = steps_at<P>(exponents + d + i);
        for (int r = 0; r < R; ++r) {
          float* to = out + r * padded + d + i;
          vstore(to, vfma(vload(part + r * kPart + i), step, vload(to)));
        }
      }
    }
  }
}

// calls body(first head, number of heads as a constant) over all, kHeads at a time
template <typename Body>
inline void by_heads(int heads, Body&& body) {
  int r = 0;
  for (; r + kHeads <= heads; r += kHeads) body(r, std::integral_constant<int, kHeads>());
  for (; r + 2 <= heads; r += 2) body(r, std::integral_constant<int, 2>());
  for (; r < heads; ++r) body(r, std::integral_constant<int, 1>());
}

}  // namespace

std::size_t bfp_scratch(const Attention&) { return 2 * kHeads * kStep; }
std::size_t bfp_prepared(const Attention& a) { return Queries::floats(a); }

void bfp_prepare(const Attention& a, const float* q, float* to) {
  const Queries queries(a, to);
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, padded = a.padded_key(), block = a.bfp.block;
  float x[1024];
  for (int h = 0; h < a.num_heads; ++h) {
    const std::int16_t* order = a.bfp.order != nullptr ? a.bfp.order + h / rep * dim : nullptr;
    for (int i = 0; i < dim; ++i) x[i] = q[h * padded + (order != nullptr ? order[i] : i)];
    for (int b = 0; b < queries.blocks; ++b) {
      const float* own = x + b * block;
      std::int8_t* codes = queries.codes + h * dim + b * block;
      float top = 0.0f;
      for (int i = 0; i < block; ++i) top = std::fabs(own[i]) > top ? std::fabs(own[i]) : top;
      const int e = exponent_of(top, kQueryBits, BfpTop::clamp);
      const float inverse = inverse_step(e, kQueryBits);
      std::int32_t sum = 0;
      for (int i = 0; i < block; ++i) {  // as mantissa_of, in a form that becomes vectors
        const float scaled = own[i] * inverse, cut = scaled > -128.0f ? (scaled < 127.0f ? scaled : 127.0f) : -128.0f;
        const int m = static_cast<int>(std::nearbyint(cut));
        codes[i] = static_cast<std::int8_t>(m);
        sum += m;
      }
      queries.steps[h * queries.blocks + b] = steps_of(kQueryBits)[static_cast<std::uint8_t>(e)];
      queries.shift[h * queries.blocks + b] = -sum * (1 << (a.bfp.bits - 1));
    }
  }
}

void bfp_scores(const Attention& a, const float* prepared, std::int64_t begin, std::int64_t end, float* scores) {
  const Queries queries(a, const_cast<float*>(prepared));  // read only here
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, block = a.bfp.block;
  const std::size_t size = a.bfp.key_bytes(dim);
  with_width(a.bfp.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    for (std::int64_t token = begin; token < end; token += kTokens) {
      const std::uint8_t* keys = a.key_blocks + static_cast<std::size_t>(token / kTokens * a.num_kv_heads) * size;
      const int count = static_cast<int>(end - token < kTokens ? end - token : kTokens);
      for (int h = 0; h < a.num_kv_heads; ++h, keys += size) {
        for (std::size_t byte = 0; byte < size; byte += 64) __builtin_prefetch(keys + 4 * size + byte);
        by_heads(rep, [&](int r, auto heads) {
          constexpr int R = decltype(heads)::value;
          Query q[R];
          for (int i = 0; i < R; ++i) q[i] = queries.of(h * rep + r + i);
          score_block<P, R>(keys, count, q, dim, block, scores + (h * rep + r) * kStep + (token - begin));
        });
      }
    }
  });
}

void bfp_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_dim(), count = static_cast<int>(end - begin);
  const std::size_t unit = a.bfp.value_bytes(a.head_dim) * static_cast<unsigned>(a.num_kv_heads);
  const std::size_t bytes = unit * static_cast<unsigned>(count / a.bfp.value_tokens());
  const std::uint8_t* next = a.value_blocks + unit * static_cast<std::size_t>(begin / a.bfp.value_tokens()) + bytes;
  float* weights = scratch;
  with_width(a.bfp.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    for (int h = 0; h < a.num_kv_heads; ++h) {
      const std::size_t share = bytes / static_cast<unsigned>(a.num_kv_heads);  // each head fetches its part of the next tokens'
      for (std::size_t byte = 0; byte < share; byte += 64) __builtin_prefetch(next + static_cast<unsigned>(h) * share + byte);
      by_heads(rep, [&](int r, auto heads) {
        constexpr int R = decltype(heads)::value;
        const float* from = p + (h * rep + r) * kStep;
        float* to = out + (h * rep + r) * padded;
        if (a.bfp.by_token) sum_rows<P, R>(a, h, from, begin, count, to, weights);
        else sum_columns<P, R>(a, h, from, begin, count, to);
      });
    }
  });
}

void bfp_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.key_dim;
  const std::int16_t* order = a.bfp.order != nullptr ? a.bfp.order + kv_head * dim : nullptr;
  with_width(a.bfp.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const float* steps = steps_of(P);
    for (std::int64_t token = begin; token < end; ++token, tile += ld) {
      const std::uint8_t* keys = a.key_blocks + static_cast<std::size_t>(token / kTokens * a.num_kv_heads + kv_head) * a.bfp.key_bytes(dim);
      const int t = static_cast<int>(token % kTokens);
      const std::uint8_t* exponents = keys + a.bfp.key_code_bytes(dim) + t;
      for (int i = 0; i < dim; ++i)
        tile[order != nullptr ? order[i] : i] = static_cast<float>(get_key<P>(keys, t, i)) * steps[exponents[i / a.bfp.block * kTokens]];
    }
  });
}

void bfp_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.head_dim, tokens = a.bfp.value_tokens();
  with_width(a.bfp.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const float* steps = steps_of(P);
    for (std::int64_t token = begin; token < end; ++token, tile += ld) {
      const std::uint8_t* held = a.value_blocks + static_cast<std::size_t>(token / tokens * a.num_kv_heads + kv_head) * a.bfp.value_bytes(dim);
      const int t = static_cast<int>(token % tokens);
      const std::uint8_t* row = held + static_cast<std::size_t>(t) * BfpForm::code_bytes(P, dim);
      const std::uint8_t* exponents = held + a.bfp.value_code_bytes(dim);
      for (int i = 0; i < dim; ++i)
        tile[i] = static_cast<float>(get_value<P>(row, i)) * steps[exponents[a.bfp.by_token ? i / a.bfp.block * kTokens + t : i]];
    }
  });
}

void bfp_encode_keys(const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, int slot, int count, std::uint8_t* to) {
  float x[1024];
  with_width(form.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    for (int h = 0; h < kv_heads; ++h, to += form.key_bytes(dim)) {
      if (slot == 0) std::memset(to, 0, form.key_bytes(dim));
      for (int t = slot; t < slot + count; ++t) {
        const std::int64_t row = static_cast<std::int64_t>(t - slot) * kv_heads * dim + h * dim;
        for (int i = 0; i < dim; ++i) x[i] = at(rows, row + (form.order != nullptr ? form.order[h * dim + i] : i));
        for (int b = 0; b < dim / form.block; ++b)
          to[form.key_code_bytes(dim) + static_cast<unsigned>(b * kTokens + t)] = encode_block<P>(
              x + b * form.block, form.block, rule, [&](int i, int m) { put_key<P>(to, t, b * form.block + i, m); });
      }
    }
  });
}

void bfp_encode_values(const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, int slot, int count, std::uint8_t* to) {
  float x[1024];
  const std::int64_t stride = static_cast<std::int64_t>(kv_heads) * dim;
  with_width(form.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const std::size_t row_bytes = BfpForm::code_bytes(P, dim);
    for (int h = 0; h < kv_heads; ++h, to += form.value_bytes(dim)) {
      std::uint8_t* exponents = to + form.value_code_bytes(dim);
      if (slot == 0) std::memset(to, 0, form.value_bytes(dim));
      const auto row = [&](int t) { return to + static_cast<std::size_t>(t) * row_bytes; };
      if (form.by_token) {
        for (int t = slot; t < slot + count; ++t) {
          for (int i = 0; i < dim; ++i) x[i] = at(rows, (t - slot) * stride + h * dim + i);
          for (int b = 0; b < dim / form.block; ++b)
            exponents[b * kTokens + t] = encode_block<P>(x + b * form.block, form.block, rule,
                                                         [&](int i, int m) { put_value<P>(row(t), b * form.block + i, m); });
        }
        continue;
      }
      for (int i = 0; i < dim; ++i) {  // a block is whole
        for (int t = 0; t < form.block; ++t) x[t] = at(rows, t * stride + h * dim + i);
        exponents[i] = encode_block<P>(x, form.block, rule, [&](int t, int m) { put_value<P>(row(t), i, m); });
      }
    }
  });
}

}  // namespace mw::MW_ISA
