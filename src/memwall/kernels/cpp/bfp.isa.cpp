// Attention on block floating point rows; the layout is in bfp_form.h.
//
// Scores are integer products: a query is brought into the same form with mantissas of 8 bits, codes are multiplied as they lie,
// and each block's sum meets the product of two powers of two. Weighted sums of values are taken in float.
#include <cmath>

#include "attention_isa.h"
#include "attention_simd.h"

namespace mw::MW_ISA {
namespace {

constexpr int kGroup = 32;     // channels that are packed together
constexpr int kQueryBits = 8;  // mantissas of a query
constexpr int kAhead = 8;      // rows fetched ahead

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

template <int P>
constexpr int kBytes = 4 * P;  // of 32 channels
template <int P>
constexpr int kBias = P == 8 ? 0 : 1 << (P - 1);

// ---- 32 codes ----------------------------------------------------------------------------------------------------------

#if defined(__AVX2__)

using Codes32 = __m256i;

static inline __m256i nibbles(const std::uint8_t* p) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
  return _mm256_set_m128i(_mm_and_si128(_mm_srli_epi16(both, 4), low), _mm_and_si128(both, low));
}

static inline __m256i pairs(const std::uint8_t* p) {
  long long word;
  std::memcpy(&word, p, sizeof word);
  const __m256i all = _mm256_srlv_epi64(_mm256_set1_epi64x(word), _mm256_setr_epi64x(0, 2, 4, 6));
  return _mm256_and_si256(all, _mm256_set1_epi8(3));
}

template <int P>
static inline Codes32 load32(const std::uint8_t* p) {
  if constexpr (P == 4) return nibbles(p);
  if constexpr (P == 6) return _mm256_or_si256(nibbles(p), _mm256_slli_epi16(pairs(p + 16), 4));
  if constexpr (P == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  int word;
  std::memcpy(&word, p + 8, sizeof word);
  const __m256i place = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i spread = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word), place), bit);
  return _mm256_or_si256(pairs(p), _mm256_and_si256(_mm256_cmpeq_epi8(spread, bit), _mm256_set1_epi8(4)));
}

// sums of four neighbouring products, 8 of them
template <int P>
static inline __m256i products(Codes32 codes, __m256i query) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, query), _mm256_set1_epi16(1));
}

static inline __m256 halves_of(float low, float high) { return _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low)); }

// eight signed mantissas of a group as floats
template <int P>
static inline __m256 eight(const Codes32& signed_codes, int from) {
  const __m128i half = from < 16 ? _mm256_castsi256_si128(signed_codes) : _mm256_extracti128_si256(signed_codes, 1);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(from % 16 == 0 ? half : _mm_srli_si128(half, 8)));
}

#else

struct Codes32 {
  std::uint8_t of[kGroup];
};

template <int P>
static inline Codes32 load32(const std::uint8_t* p) {
  Codes32 c;
  for (int i = 0; i < kGroup; ++i) {
    const int nibble = p[i % 16] >> (i / 16 * 4) & 15;
    if constexpr (P == 4) c.of[i] = static_cast<std::uint8_t>(nibble);
    if constexpr (P == 6) c.of[i] = static_cast<std::uint8_t>(nibble | (p[16 + i % 8] >> (i / 8 * 2) & 3) << 4);
    if constexpr (P == 3) c.of[i] = static_cast<std::uint8_t>((p[i % 8] >> (i / 8 * 2) & 3) | (p[8 + i / 8] >> (i % 8) & 1) << 2);
    if constexpr (P == 8) c.of[i] = p[i];
  }
  return c;
}

#endif

template <int P>
inline int mantissa(const std::uint8_t* group, int i) {
  if constexpr (P == 8) return static_cast<std::int8_t>(group[i]);
  int code = 0;
  if constexpr (P == 4 || P == 6) code = group[i % 16] >> (i / 16 * 4) & 15;
  if constexpr (P == 6) code |= (group[16 + i % 8] >> (i / 8 * 2) & 3) << 4;
  if constexpr (P == 3) code = (group[i % 8] >> (i / 8 * 2) & 3) | (group[8 + i / 8] >> (i % 8) & 1) << 2;
  return code - kBias<P>;
}

template <int P>
inline void put(std::uint8_t* group, int i, int m) {
  if constexpr (P == 8) {
    group[i] = static_cast<std::uint8_t>(m);
    return;
  }
  const unsigned code = static_cast<unsigned>(m + kBias<P>);
  const auto add = [&](int byte, int shift, unsigned part) { group[byte] = static_cast<std::uint8_t>(group[byte] | part << shift); };
  if constexpr (P == 4 || P == 6) add(i % 16, i / 16 * 4, code & 15);
  if constexpr (P == 6) add(16 + i % 8, i / 8 * 2, code >> 4);
  if constexpr (P == 3) {
    add(i % 8, i / 8 * 2, code & 3);
    add(8 + i / 8, i % 8, code >> 2);
  }
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

template <int P>
void encode_row(const float* x, int dim, int block, BfpTop rule, std::uint8_t* row) {
  std::memset(row, 0, BfpForm::code_bytes(P, dim));
  std::uint8_t* exponents = row + BfpForm::code_bytes(P, dim);
  for (int b = 0; b < dim / block; ++b) {
    float top = 0.0f;
    for (int i = 0; i < block; ++i) top = std::fabs(x[b * block + i]) > top ? std::fabs(x[b * block + i]) : top;
    const int e = exponent_of(top, P, rule);
    exponents[b] = static_cast<std::uint8_t>(e);
    for (int i = b * block; i < (b + 1) * block; ++i)
      put<P>(row + i / kGroup * kBytes<P>, i % kGroup, mantissa_of(x[i], inverse_step(e, P), P));
  }
}

// ---- scores ------------------------------------------------------------------------------------------------------------

// One query head in blocks: mantissas, what their shift adds to each sum, and the steps of its blocks.
struct Query {
  const std::int8_t* codes;   // [dim]
  const std::int32_t* shift;  // [dim / 4]: bias times the sum of four neighbours
  const float* steps;         // [dim / block]
};

struct Queries {
  std::int8_t* codes;
  std::int32_t* shift;
  float* steps;
  int dim, blocks;
  Queries(const Attention& a, float* scratch) : dim(a.key_dim), blocks(a.key_dim / a.bfp.block) {
    shift = reinterpret_cast<std::int32_t*>(scratch);
    steps = scratch + a.num_heads * (dim / 4);
    codes = reinterpret_cast<std::int8_t*>(steps + a.num_heads * blocks);
  }
  Query of(int head) const { return {codes + head * dim, shift + head * (dim / 4), steps + head * blocks}; }
};

// logits of T tokens for R heads, of which the first `count` are wanted: exact keys may follow
template <int P, int R, int T>
inline void score_tile(const std::uint8_t* const rows[T], int count, const Query* q, int dim, int block, const float* steps,
                       float* scores) {
#if defined(__AVX2__)
  __m256 sum[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = _mm256_setzero_ps();
  const int code_bytes = dim * P / 8;
  for (int d = 0, g = 0; d < dim; d += kGroup, g += kBytes<P>) {
    __m256i codes[T];
    float low[T], high[T];
    const int b = d / block, next = (d + 16) / block;
    for (int t = 0; t < T; ++t) {
      codes[t] = load32<P>(rows[t] + g);
      low[t] = steps[rows[t][code_bytes + b]], high[t] = steps[rows[t][code_bytes + next]];
    }
    for (int r = 0; r < R; ++r) {
      const __m256i query = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q[r].codes + d));
      const __m256 own = halves_of(q[r].steps[b], q[r].steps[next]);
      for (int t = 0; t < T; ++t) {
        const __m256 scale = _mm256_mul_ps(own, halves_of(low[t], high[t]));
        if constexpr (P == 8) {  // products of two full bytes need 32 bits at once; 16 channels a time
          for (int half = 0; half < 2; ++half) {
            const __m128i c = half ? _mm256_extracti128_si256(codes[t], 1) : _mm256_castsi256_si128(codes[t]);
            const __m128i x = half ? _mm256_extracti128_si256(query, 1) : _mm256_castsi256_si128(query);
            const __m256i parts = _mm256_madd_epi16(_mm256_cvtepi8_epi16(c), _mm256_cvtepi8_epi16(x));
            const __m256 step = half ? _mm256_permute2f128_ps(scale, scale, 0x11) : _mm256_permute2f128_ps(scale, scale, 0);
            sum[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts), step, sum[r][t]);
          }
        } else {
          const __m256i shift = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q[r].shift + d / 4));
          const __m256i parts = _mm256_sub_epi32(products<P>(codes[t], query), shift);
          sum[r][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts), scale, sum[r][t]);
        }
      }
    }
  }
  const auto total = [](__m256 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  };
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < count; ++t) scores[r * kStep + t] = total(sum[r][t]);
#else
  for (int t = 0; t < count; ++t) {
    float sum[R] = {};
    const std::uint8_t* exponents = rows[t] + dim * P / 8;
    for (int d = 0; d < dim; d += 16) {  // no block is shorter
      std::int32_t parts[R] = {};
      for (int i = d; i < d + 16; ++i) {
        const int m = mantissa<P>(rows[t] + i / kGroup * kBytes<P>, i % kGroup);
        for (int r = 0; r < R; ++r) parts[r] += m * q[r].codes[i];
      }
      const float step = steps[exponents[d / block]];
      for (int r = 0; r < R; ++r) sum[r] += static_cast<float>(parts[r]) * (step * q[r].steps[d / block]);
    }
    for (int r = 0; r < R; ++r) scores[r * kStep + t] = sum[r];
  }
#endif
}

// ---- values ------------------------------------------------------------------------------------------------------------

// out[r][d .. d + 32) += sum over rows of weight[r][row] * mantissa, the weights one for each half
template <int P, int R>
inline void value_tile(const std::uint8_t* codes, std::size_t stride, int count, const float* low, const float* high, float* out,
                       int ld) {
#if defined(__AVX2__)
  __m256 sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) sum[r][i] = _mm256_loadu_ps(out + r * ld + 8 * i);
  for (int t = 0; t < count; ++t, codes += stride) {
    const __m256i m = _mm256_sub_epi8(load32<P>(codes), _mm256_set1_epi8(kBias<P>));
    const __m256 value[4] = {eight<P>(m, 0), eight<P>(m, 8), eight<P>(m, 16), eight<P>(m, 24)};
    for (int r = 0; r < R; ++r) {
      const __m256 a = _mm256_set1_ps(low[r * kStep + t]), b = _mm256_set1_ps(high[r * kStep + t]);
      sum[r][0] = _mm256_fmadd_ps(value[0], a, sum[r][0]), sum[r][1] = _mm256_fmadd_ps(value[1], a, sum[r][1]);
      sum[r][2] = _mm256_fmadd_ps(value[2], b, sum[r][2]), sum[r][3] = _mm256_fmadd_ps(value[3], b, sum[r][3]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + r * ld + 8 * i, sum[r][i]);
#else
  for (int t = 0; t < count; ++t, codes += stride)
    for (int i = 0; i < kGroup; ++i) {
      const float m = static_cast<float>(mantissa<P>(codes, i));
      for (int r = 0; r < R; ++r) out[r * ld + i] += m * (i < 16 ? low : high)[r * kStep + t];
    }
#endif
}

// values [begin, end) of R heads of one kv head, blocks along channels
template <int P, int R>
void sum_rows(const Attention& a, int kv_head, const float* p, std::int64_t begin, int count, float* out, float* weights) {
  const int dim = a.head_dim, block = a.bfp.block;
  const std::size_t size = a.bfp.value_bytes(dim), stride = size * static_cast<unsigned>(a.num_kv_heads);
  const std::uint8_t* row = a.value_blocks + static_cast<std::size_t>(begin) * stride + static_cast<unsigned>(kv_head) * size;
  const std::size_t exponents = BfpForm::code_bytes(P, dim);
  const float* steps = steps_of(P);
  const int half = block == 16 ? 16 : 0;
  for (int d = 0; d < dim; d += kGroup) {
    if (d % block == 0)
      for (int t = 0; t < count; ++t)
        for (int h = 0; h <= half / 16; ++h) {
          const float step = steps[row[static_cast<std::size_t>(t) * stride + exponents + static_cast<unsigned>((d + 16 * h) / block)]];
          for (int r = 0; r < R; ++r) weights[(h * R + r) * kStep + t] = p[r * kStep + t] * step;
        }
    value_tile<P, R>(row + d / kGroup * kBytes<P>, stride, count, weights, half ? weights + R * kStep : weights, out + d, a.padded_dim());
  }
}

// the same where a block is `block` tokens of a channel; begin a multiple of it, count whole blocks
template <int P, int R>
void sum_columns(const Attention& a, int kv_head, const float* p, std::int64_t begin, int count, float* out, float* partial) {
  const int dim = a.head_dim, block = a.bfp.block, padded = a.padded_dim();
  const std::size_t size = a.bfp.value_bytes(dim), row_bytes = BfpForm::code_bytes(P, dim);
  const float* steps = steps_of(P);
  for (int t = 0; t < count; t += block) {
    const std::uint8_t* codes = a.value_blocks + (static_cast<std::size_t>((begin + t) / block * a.num_kv_heads + kv_head)) * size;
    const std::uint8_t* exponents = codes + row_bytes * static_cast<unsigned>(block);
    for (int d = 0; d < dim; d += kGroup) {
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kGroup; ++i) partial[r * kGroup + i] = 0.0f;
      value_tile<P, R>(codes + d / kGroup * kBytes<P>, row_bytes, block, p + t, p + t, partial, kGroup);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kGroup; ++i) out[r * padded + d + i] += partial[r * kGroup + i] * steps[exponents[d + i]];
    }
  }
}

}  // namespace

std::size_t bfp_scratch(const Attention& a) {
  const std::size_t heads = static_cast<std::size_t>(a.num_heads), dim = static_cast<std::size_t>(a.key_dim);
  return heads * (dim / 4 + dim / 16 + (dim + 3) / 4) + 4 * kStep;
}

void bfp_prepare(const Attention& a, const float* q, float* scratch) {
  const Queries queries(a, scratch);
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, padded = a.padded_key(), block = a.bfp.block;
  const int bias = a.bfp.bits == 8 ? 0 : 1 << (a.bfp.bits - 1);
  for (int h = 0; h < a.num_heads; ++h) {
    const std::int16_t* order = a.bfp.order != nullptr ? a.bfp.order + h / rep * dim : nullptr;
    const auto x = [&](int i) { return q[h * padded + (order != nullptr ? order[i] : i)]; };
    std::int8_t* codes = queries.codes + h * dim;
    for (int b = 0; b < dim / block; ++b) {
      float top = 0.0f;
      for (int i = b * block; i < (b + 1) * block; ++i) top = std::fabs(x(i)) > top ? std::fabs(x(i)) : top;
      const int e = exponent_of(top, kQueryBits, BfpTop::clamp);
      queries.steps[h * (dim / block) + b] = steps_of(kQueryBits)[static_cast<std::uint8_t>(e)];
      const float inverse = inverse_step(e, kQueryBits);
      for (int i = b * block; i < (b + 1) * block; ++i) codes[i] = static_cast<std::int8_t>(mantissa_of(x(i), inverse, kQueryBits));
    }
    for (int i = 0; i < dim; i += 4) queries.shift[(h * dim + i) / 4] = bias * (codes[i] + codes[i + 1] + codes[i + 2] + codes[i + 3]);
  }
}

void bfp_scores(const Attention& a, std::int64_t begin, std::int64_t end, float* scores, float* scratch) {
  const Queries queries(a, scratch);
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, block = a.bfp.block;
  const std::size_t size = a.bfp.key_row_bytes(dim), stride = size * static_cast<unsigned>(a.num_kv_heads);
  with_width(a.bfp.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const float* steps = steps_of(P);
    for (std::int64_t token = begin; token < end; token += 4) {
      const std::uint8_t* first = a.key_blocks + static_cast<std::size_t>(token) * stride;
      for (std::size_t byte = 0; byte < 4 * stride; byte += 64) __builtin_prefetch(first + kAhead * stride + byte);
      const int count = static_cast<int>(end - token < 4 ? end - token : 4);
      for (int h = 0; h < a.num_kv_heads; ++h) {
        const std::uint8_t* rows[4];  // the last row again instead of rows that are not there
        for (int t = 0; t < 4; ++t)
          rows[t] = first + static_cast<std::size_t>(t < count ? t : count - 1) * stride + static_cast<unsigned>(h) * size;
        float* to = scores + h * rep * kStep + (token - begin);
        int r = 0;
        for (; r + 2 <= rep; r += 2) {
          const Query q[2] = {queries.of(h * rep + r), queries.of(h * rep + r + 1)};
          score_tile<P, 2, 4>(rows, count, q, dim, block, steps, to + r * kStep);
        }
        for (; r < rep; ++r) {
          const Query q[1] = {queries.of(h * rep + r)};
          score_tile<P, 1, 4>(rows, count, q, dim, block, steps, to + r * kStep);
        }
      }
    }
  });
}

void bfp_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_dim(), count = static_cast<int>(end - begin);
  float* weights = scratch + (bfp_scratch(a) - 4 * kStep);
  with_width(a.bfp.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    for (int h = 0; h < a.num_kv_heads; ++h) {
      int r = 0;
      const auto one = [&](auto heads) {
        constexpr int R = decltype(heads)::value;
        const float* from = p + (h * rep + r) * kStep;
        float* to = out + (h * rep + r) * padded;
        if (a.bfp.by_token) sum_rows<P, R>(a, h, from, begin, count, to, weights);
        else sum_columns<P, R>(a, h, from, begin, count, to, weights);
      };
      for (; r + 2 <= rep; r += 2) one(std::integral_constant<int, 2>());
      for (; r < rep; ++r) one(std::integral_constant<int, 1>());
    }
  });
}

void bfp_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.key_dim;
  const std::size_t size = a.bfp.key_row_bytes(dim);
  const std::int16_t* order = a.bfp.order != nullptr ? a.bfp.order + kv_head * dim : nullptr;
  with_width(a.bfp.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const float* steps = steps_of(P);
    for (std::int64_t token = begin; token < end; ++token, tile += ld) {
      const std::uint8_t* row = a.key_blocks + static_cast<std::size_t>(token * a.num_kv_heads + kv_head) * size;
      const std::uint8_t* exponents = row + BfpForm::code_bytes(P, dim);
      for (int i = 0; i < dim; ++i)
        tile[order != nullptr ? order[i] : i] =
            static_cast<float>(mantissa<P>(row + i / kGroup * kBytes<P>, i % kGroup)) * steps[exponents[i / a.bfp.block]];
    }
  });
}

void bfp_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.head_dim, block = a.bfp.block;
  const std::size_t size = a.bfp.value_bytes(dim);
  with_width(a.bfp.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const float* steps = steps_of(P);
    const std::size_t row_bytes = BfpForm::code_bytes(P, dim);
    for (std::int64_t token = begin; token < end; ++token, tile += ld) {
      const std::int64_t unit = token / a.bfp.value_tokens(), place = token % a.bfp.value_tokens();
      const std::uint8_t* held = a.value_blocks + static_cast<std::size_t>(unit * a.num_kv_heads + kv_head) * size;
      const std::uint8_t* row = held + static_cast<std::size_t>(place) * row_bytes;
      const std::uint8_t* exponents = held + row_bytes * static_cast<unsigned>(a.bfp.value_tokens());
      for (int i = 0; i < dim; ++i)
        tile[i] = static_cast<float>(mantissa<P>(row + i / kGroup * kBytes<P>, i % kGroup)) *
                  steps[exponents[a.bfp.by_token ? i / block : i]];
    }
  });
}

void bfp_encode_key(const Rows& row, const BfpForm& form, BfpTop rule, int kv_heads, int dim, std::uint8_t* to) {
  float x[1024];
  with_width(form.bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    for (int h = 0; h < kv_heads; ++h, to += form.key_row_bytes(dim)) {
      for (int i = 0; i < dim; ++i) x[i] = at(row, h * dim + (form.order != nullptr ? form.order[h * dim + i] : i));
      encode_row<P>(x, dim, form.block, rule, to);
    }
  });
}

void bfp_encode_value(const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, std::uint8_t* to) {
  float x[1024];
  const std::int64_t stride = static_cast<std::int64_t>(kv_heads) * dim;
  with_width(form.value_bits, [&](auto width) {
    constexpr int P = decltype(width)::value;
    const std::size_t row_bytes = BfpForm::code_bytes(P, dim);
    for (int h = 0; h < kv_heads; ++h, to += form.value_bytes(dim)) {
      if (form.by_token) {
        for (int i = 0; i < dim; ++i) x[i] = at(rows, h * dim + i);
        encode_row<P>(x, dim, form.block, rule, to);
        continue;
      }
      std::memset(to, 0, row_bytes * static_cast<unsigned>(form.block));
      for (int i = 0; i < dim; ++i) {
        float top = 0.0f;
        for (int t = 0; t < form.block; ++t) {
          x[t] = at(rows, t * stride + h * dim + i);
          top = std::fabs(x[t]) > top ? std::fabs(x[t]) : top;
        }
        const int e = exponent_of(top, P, rule);
        to[row_bytes * static_cast<unsigned>(form.block) + static_cast<unsigned>(i)] = static_cast<std::uint8_t>(e);
        for (int t = 0; t < form.block; ++t)
          put<P>(to + static_cast<std::size_t>(t) * row_bytes + i / kGroup * kBytes<P>, i % kGroup, mantissa_of(x[t], inverse_step(e, P), P));
      }
    }
  });
}

}  // namespace mw::MW_ISA
