// The few vector operations that the attention kernels are written in, one set per instruction set.
//
// Everything is inside mw::MW_ISA: a function compiled with AVX-512 flags must never be the copy that the linker keeps for an
// older processor. The portable set uses the compiler's vector extension, which becomes SSE2 or NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
// the compiler's own headers leave the pass-through operand of unmasked operations undefined, and it warns about that
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace mw::MW_ISA {

using f16 = std::uint16_t;
struct bf16 {
  std::uint16_t bits;
};
struct i8 {  // a code; times its row's scale it is a number
  std::int8_t code;
};

static inline float half_to_float(std::uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  std::uint32_t bits = static_cast<std::uint32_t>(h & 0x7fffu) << 13;
  float value;
  if ((h & 0x7c00u) == 0x7c00u) {
    bits |= 0x7f800000u;
    bits |= sign;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  std::memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112: moves the exponent's bias from 15 to 127, subnormals included
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

// Rounds half to even, as NumPy does; beyond the range gives infinity.
static inline std::uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal: let the float adder do the rounding
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<std::uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
  return sign | static_cast<std::uint16_t>(bits >> 13);
#endif
}

static inline float to_float(float x) { return x; }
static inline float to_float(f16 x) { return half_to_float(x); }
static inline float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float to_float(i8 x) { return x.code; }

#if defined(__AVX512F__)

constexpr int W = 16;
using vf = __m512;
using vi = __m512i;
static inline vf vset(float x) { return _mm512_set1_ps(x); }
static inline vf vload(const float* p) { return _mm512_loadu_ps(p); }
static inline vf vload(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline vf vload(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
static inline vf vload(const i8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
static inline void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline float hsum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float hmax(vf a) { return _mm512_reduce_max_ps(a); }
static inline vf vround(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vscale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
// s where lo <= index < hi, minus infinity elsewhere
static inline vf vwithin(vf s, vf index, vf lo, vf hi) {
  const __mmask16 keep = _mm512_cmp_ps_mask(index, lo, _CMP_GE_OQ) & _mm512_cmp_ps_mask(index, hi, _CMP_LT_OQ);
  return _mm512_mask_blend_ps(keep, _mm512_set1_ps(-__builtin_inff()), s);
}
// y where x > limit, zero elsewhere
static inline vf vzero_below(vf y, vf x, vf limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_GT_OQ), y);
}
// sums of four vectors, side by side in memory
static inline void store_sums4(float* p, vf a, vf b, vf c, vf d) {
  const auto fold = [](vf x) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  };
  __m128 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  _MM_TRANSPOSE4_PS(w, x, y, z);
  _mm_storeu_ps(p, _mm_add_ps(_mm_add_ps(w, x), _mm_add_ps(y, z)));
}
// the sums of vectors whose lanes are done two by two: a in the lower half, b in the upper one; then four, in 128 bits each
static inline vf halve(vf a, vf b) { return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e)); }
static inline vf quarter(vf a, vf b, vf c, vf d) {
  const vf x = halve(a, b), y = halve(c, d);
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}
// sums of 16 vectors at the price of eleven shuffles by four: row r, place t to p[r * stride + t]
template <int R>
static inline void store_sums(float* p, int stride, const vf (&sum)[R][4]) {
  if constexpr (R == 1) return store_sums4(p, sum[0][0], sum[0][1], sum[0][2], sum[0][3]);
  constexpr int kLast = R - 1, kThird = R > 2 ? 2 : kLast;
  vf q[4];  // of place t: row r in lane r of 128 bits
  for (int t = 0; t < 4; ++t) q[t] = quarter(sum[0][t], sum[1][t], sum[kThird][t], sum[kLast][t]);
  const vf x = _mm512_add_ps(_mm512_unpacklo_ps(q[0], q[1]), _mm512_unpackhi_ps(q[0], q[1]));
  const vf y = _mm512_add_ps(_mm512_unpacklo_ps(q[2], q[3]), _mm512_unpackhi_ps(q[2], q[3]));
  const auto pairs = [](vf v) { return _mm512_castps_pd(v); };
  const vf all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pairs(x), pairs(y))), _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(x), pairs(y))));
  _mm_storeu_ps(p, _mm512_castps512_ps128(all));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(all, 1));
  if constexpr (R > 2) _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(all, 2));
  if constexpr (R > 3) _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(all, 3));
}
static inline vi iload(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
static inline vi iload(const std::uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline vi ishift(vi a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

#elif defined(__AVX2__)

constexpr int W = 8;
using vf = __m256;
using vi = __m256i;
static inline vf vset(float x) { return _mm256_set1_ps(x); }
static inline vf vload(const float* p) { return _mm256_loadu_ps(p); }
static inline vf vload(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline vf vload(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
static inline vf vload(const i8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
static inline void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vsub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline __m128 fold128(vf a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }
static inline float hsum(vf a) {
  __m128 x = fold128(a);
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float hmax(vf a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline vf vround(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf vscale2(vf a, vf n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
static inline vf vwithin(vf s, vf index, vf lo, vf hi) {
  const __m256 keep = _mm256_and_ps(_mm256_cmp_ps(index, lo, _CMP_GE_OQ), _mm256_cmp_ps(index, hi, _CMP_LT_OQ));
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), s, keep);
}
static inline vf vzero_below(vf y, vf x, vf limit) { return _mm256_and_ps(y, _mm256_cmp_ps(x, limit, _CMP_GT_OQ)); }
static inline void store_sums4(float* p, vf a, vf b, vf c, vf d) {
  __m128 w = fold128(a), x = fold128(b), y = fold128(c), z = fold128(d);
  _MM_TRANSPOSE4_PS(w, x, y, z);
  _mm_storeu_ps(p, _mm_add_ps(_mm_add_ps(w, x), _mm_add_ps(y, z)));
}
// sums of R x 4 vectors: row r, place t to p[r * stride + t]; of two rows at once by half the shuffles
template <int R>
static inline void store_sums(float* p, int stride, const vf (&sum)[R][4]) {
  if constexpr (R == 2) {
    vf q[4];  // of place t: row r in lane r of 128 bits
    for (int t = 0; t < 4; ++t)
      q[t] = _mm256_add_ps(_mm256_blend_ps(sum[0][t], sum[1][t], 0xf0), _mm256_permute2f128_ps(sum[0][t], sum[1][t], 0x21));
    const vf x = _mm256_add_ps(_mm256_unpacklo_ps(q[0], q[1]), _mm256_unpackhi_ps(q[0], q[1]));
    const vf y = _mm256_add_ps(_mm256_unpacklo_ps(q[2], q[3]), _mm256_unpackhi_ps(q[2], q[3]));
    const vf all = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
    _mm_storeu_ps(p, _mm256_castps256_ps128(all));
    _mm_storeu_ps(p + stride, _mm256_extractf128_ps(all, 1));
  } else {
    for (int r = 0; r < R; ++r) store_sums4(p + r * stride, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
  }
}
static inline vi iload(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline vi iload(const std::uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline vi ishift(vi a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }

#else

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef std::uint32_t vi __attribute__((vector_size(16)));
static inline vf vset(float x) { return vf{x, x, x, x}; }
static inline vf vload(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vi load_words(const void* p) {
  typedef std::uint16_t words __attribute__((vector_size(8)));
  words x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, vi);
}
static inline vf vload(const f16* p) {  // as half_to_float, four at once
  const vi h = load_words(p), magnitude = (h & 0x7fffu) << 13;
  vf value;
  std::memcpy(&value, &magnitude, sizeof value);
  value *= 5.192296858534828e33f;
  vi bits;
  std::memcpy(&bits, &value, sizeof bits);
  const vi special = reinterpret_cast<vi>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  bits |= special | (h & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline vf vload(const bf16* p) {
  const vi bits = load_words(p) << 16;
  vf value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline vf vload(const i8* p) { return vf{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
static inline void vstore(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline vf vadd(vf a, vf b) { return a + b; }
static inline vf vsub(vf a, vf b) { return a - b; }
static inline vf vmul(vf a, vf b) { return a * b; }
static inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }
static inline float hsum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
static inline float hmax(vf a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
static inline vf vround(vf a) { return (a + 12582912.0f) - 12582912.0f; }  // |a| < 2^22 here
static inline vf vscale2(vf a, vf n) {
  typedef std::int32_t vs __attribute__((vector_size(16)));
  const vs exponent = (__builtin_convertvector(n, vs) + 127) << 23;
  vf factor;
  std::memcpy(&factor, &exponent, sizeof factor);
  return a * factor;
}
static inline vf vwithin(vf s, vf index, vf lo, vf hi) {
  const auto keep = (index >= lo) & (index < hi);
  return keep ? s : vset(-__builtin_inff());
}
static inline vf vzero_below(vf y, vf x, vf limit) { return x > limit ? y : vset(0.0f); }
static inline void store_sums4(float* p, vf a, vf b, vf c, vf d) {
  p[0] = hsum(a), p[1] = hsum(b), p[2] = hsum(c), p[3] = hsum(d);
}
template <int R>
static inline void store_sums(float* p, int stride, const vf (&sum)[R][4]) {
  for (int r = 0; r < R; ++r) store_sums4(p + r * stride, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}
static inline vi iload(const std::uint32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
static inline vi iload(const std::uint16_t* p) { return load_words(p); }
static inline vi ishift(vi a, int n) { return a >> static_cast<std::uint32_t>(n); }

#endif

// What stands behind the numbers of a head's row: for codes their scale, in half precision.
template <typename T>
constexpr bool kScaled = std::is_same_v<T, i8>;
template <typename T>
constexpr int kBehind = kScaled<T> ? 2 : 0;
template <typename T>
static inline float scale_of(const T* row, int dim) {
  if constexpr (kScaled<T>) {
    std::uint16_t half;
    std::memcpy(&half, row + dim, sizeof half);
    return half_to_float(half);
  } else {
    return 1.0f;
  }
}

// First n (< W) numbers of a row, zeros behind. Nothing behind them is read.
template <typename T>
static inline vf vload_part(const T* p, int n) {
#if defined(__AVX512F__)
  const auto keep = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps(keep, p);
  if constexpr (std::is_same_v<T, f16>) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(keep, p));
  if constexpr (std::is_same_v<T, bf16>)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, p)), 16));
#endif
  alignas(64) T lane[W] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return vload(lane);
}

// e^x for x <= 0 (softmax after its maximum is taken off), relative error below 2e-7; minus infinity gives 0.
static inline vf vexp(vf argument) {
  const vf x = vmax(argument, vset(-87.0f));
  const vf n = vround(vmul(x, vset(1.44269504088896341f)));
  vf r = vfma(n, vset(-0.693359375f), x);
  r = vfma(n, vset(2.12194440e-4f), r);
  vf p = vset(1.9875691500e-4f);
  p = vfma(p, r, vset(1.3981999507e-3f));
  p = vfma(p, r, vset(8.3334519073e-3f));
  p = vfma(p, r, vset(4.1665795894e-2f));
  p = vfma(p, r, vset(1.6666665459e-1f));
  p = vfma(p, r, vset(5.0000001201e-1f));
  p = vfma(vmul(p, r), r, vadd(r, vset(1.0f)));
  return vzero_below(vscale2(p, n), argument, vset(-87.0f));
}

}  // namespace mw::MW_ISA
