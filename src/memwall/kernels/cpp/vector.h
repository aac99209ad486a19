// Vectors of the instruction set that the including .isa.cpp file is compiled for.
//
// Written with the vector extensions of GCC and Clang, so that arithmetic reads as arithmetic and one source serves every
// processor; intrinsics stand only where the language has no word for the instruction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MW_INLINE inline __attribute__((always_inline))

namespace mw::MW_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in one vector
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;  // SSE2, NEON
#endif
constexpr int kVectorBytes = 4 * kWidth;

typedef float Vf __attribute__((vector_size(kVectorBytes)));
typedef std::int32_t Vi __attribute__((vector_size(kVectorBytes)));
typedef std::uint32_t Vu __attribute__((vector_size(kVectorBytes)));
typedef std::int16_t Vs __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Vh __attribute__((vector_size(kVectorBytes)));
typedef std::uint8_t Vb __attribute__((vector_size(kVectorBytes)));

template <class V>
MW_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
MW_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// x - 0 is x for every float, minus zero included, so these cost one broadcast and nothing else
MW_INLINE Vf splat(float x) { return x - Vf{}; }
MW_INLINE Vi splat(std::int32_t x) { return x - Vi{}; }

MW_INLINE Vf to_float(Vi v) { return __builtin_convertvector(v, Vf); }

// of two equal numbers, or where one is not a number, the second
MW_INLINE Vf vmax(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
MW_INLINE Vf vmin(Vf a, Vf b) {
#if defined(__AVX512F__)
  return (Vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vf)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
MW_INLINE Vf vabs(Vf a) { return (Vf)((Vi)a & 0x7fffffff); }

template <int N, class V, std::size_t... I>
MW_INLINE V rotated(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, static_cast<int>((I + N) % kWidth)...);
}

// Combines all lanes by halves: f is applied log2(kWidth) times.
template <int N = kWidth / 2, class V, class F>
MW_INLINE auto across(V v, F&& f) {
  v = f(v, rotated<N>(v, std::make_index_sequence<kWidth>{}));
  if constexpr (N > 1) return across<N / 2>(v, f);
  else return v[0];
}
MW_INLINE float sum_of(Vf v) {
  return across(v, [](Vf a, Vf b) { return a + b; });
}
MW_INLINE std::int32_t sum_of(Vi v) {
  return across(v, [](Vi a, Vi b) { return a + b; });
}
// Each of a and b holds groups of Span lanes; gives groups of Span / 2 with the same sums, those of a before those of b.
template <int Span, std::size_t... I>
MW_INLINE Vf fold(Vf a, Vf b, std::index_sequence<I...>) {
  constexpr int kHalf = kWidth / 2, kLeft = Span / 2;
  const Vf low = __builtin_shufflevector(a, b, static_cast<int>(I / kHalf * kWidth + I % kHalf / kLeft * Span + I % kHalf % kLeft)...);
  const Vf high = __builtin_shufflevector(a, b, static_cast<int>(I / kHalf * kWidth + I % kHalf / kLeft * Span + I % kHalf % kLeft + kLeft)...);
  return low + high;
}
template <int Span>
MW_INLINE Vf fold(Vf a, Vf b) {
  return fold<Span>(a, b, std::make_index_sequence<kWidth>{});
}
// The sums of four vectors, in the first four lanes: a third of the work of four times `sum_of`.
MW_INLINE Vf sums_of(Vf a, Vf b, Vf c, Vf d) {
  Vf all = fold<kWidth / 2>(fold<kWidth>(a, b), fold<kWidth>(c, d));
  if constexpr (kWidth >= 8) all = fold<kWidth / 4>(all, all);
  if constexpr (kWidth >= 16) all = fold<kWidth / 8>(all, all);
  return all;
}
MW_INLINE float max_of(Vf v) { return across(v, vmax); }

// Nearest integer, ties to even. Adding 1.5 * 2^23 leaves no room for a fraction; holds for |x| < 2^22.
MW_INLINE Vi round_to_int(Vf x) { return (Vi)(x + 12582912.0f) - 0x4b400000; }

MW_INLINE Vf load_half(const std::uint16_t* from) {
#if defined(__AVX512F__)
  return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  float lane[kWidth];
  for (int i = 0; i < kWidth; ++i) lane[i] = half_to_float(from[i]);
  return load<Vf>(lane);
#endif
}

MW_INLINE Vf load_bfloat(const std::uint16_t* from) {
  typedef std::uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  return (Vf)(__builtin_convertvector(load<Narrow>(from), Vu) << 16);
}

// Element types of stored matrices, so that one template reads all three.
struct Float32 {
  using Element = float;
  static MW_INLINE Vf vector(const float* from) { return load<Vf>(from); }
  static MW_INLINE float scalar(float value) { return value; }
};
struct Float16 {
  using Element = std::uint16_t;
  static MW_INLINE Vf vector(const std::uint16_t* from) { return load_half(from); }
  static MW_INLINE float scalar(std::uint16_t value) { return half_to_float(value); }
};
struct BFloat16 {
  using Element = std::uint16_t;
  static MW_INLINE Vf vector(const std::uint16_t* from) { return load_bfloat(from); }
  static MW_INLINE float scalar(std::uint16_t value) { return bfloat_to_float(value); }
};

// f(0), f(1), ... f(N - 1) with the index known to the compiler.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int N, int I = 0, class F>
MW_INLINE void static_for(F&& f) {
  if constexpr (I < N) {
    f(Index<I>{});
    static_for<N, I + 1>(f);
  }
}

}  // namespace mw::MW_ISA
