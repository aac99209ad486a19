// Products of two numbers of 16 bits each at a time, which some processors do in the time of one float: what a prompt's attention takes.
//
// Keys and values of bfloat16 are what they were; queries and shares of the softmax are rounded to as many bits, sums are floats. A word
// holds the numbers 2 i and 2 i + 1 of what is summed over.
#pragma once

#include "attention_simd.h"

namespace mw::MW_ISA {

// How a product takes its operands: the left one a word at a time, the right one by vectors of words.
struct Floats {
  using Word = float;
  using Vector = vf;
  static constexpr int kNumbers = 1;  // in a word
  static inline Vector spread(const Word* p) { return vset(*p); }
  static inline Vector load(const Word* p) { return vload(p); }
  static inline vf add(vf sum, Vector left, Vector right) { return vfma(left, right, sum); }
};

#if defined(__AVX512F__) && defined(MW_BF16_PAIRS)

constexpr int kLeastPaired = 32;  // tokens of a prompt; fewer, as when several are tried where one is due, stay exact

struct Pairs {
  using Word = std::uint32_t;
  using Vector = vi;
  static constexpr int kNumbers = 2;
  static inline Vector spread(const Word* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static inline Vector load(const Word* p) { return _mm512_loadu_si512(p); }
  // The instruction by its name: as an intrinsic it would need all that it is inlined into to be built for these processors alone.
  static inline vf add(vf sum, Vector left, Vector right) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    return sum;
  }

  // Whether they gain: on AMD's processors from Zen 4 on. On Intel's they take as long as two products of floats.
  static inline bool gain() {
    static const bool gain = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16");
    return gain;
  }

  // Numbers rounded to bfloat16 (a tie goes away from zero), those of `low` in the lower halves of words.
  static inline void store(float* to, vf low, vf high) {
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(low), 16), rounded(high)));
  }
  // Numbers that follow each other become pairs, in place.
  static inline void join_along(float* rows, std::int64_t count) {
    auto* to = reinterpret_cast<std::uint16_t*>(rows);
    for (std::int64_t i = 0; i < count; i += W) {
      const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(vload(rows + i)), 16));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), halves);
    }
  }
  // Rows become pairs with the row after them, in place; after an odd number of rows comes one of zeros.
  static inline void join_across(float* rows, int count, int width) {
    for (int row = 0; row < count; row += 2)
      for (int i = 0; i < width; i += W) {
        const float* at = rows + row * width + i;
        store(rows + row / 2 * width + i, vload(at), row + 1 < count ? vload(at + width) : vset(0.0f));
      }
  }

  // e^(x - peak) for x <= peak, relative error below 2e-4, a tenth of what rounding it then takes; minus infinity gives 0.
  static inline vf share(vf x, vf peak) {
    const vf log2e = vset(1.44269504088896341f);
    const vf t = _mm512_fmsub_ps(x, log2e, _mm512_mul_ps(peak, log2e)), n = vround(t), f = vsub(t, n);
    vf p = vfma(vset(0.05517166f), f, vset(0.24261112f));
    p = vfma(p, f, vset(0.69326099f));
    p = vfma(p, f, vset(0.99992807f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, vset(-125.0f), _CMP_GT_OQ), p, n);
  }

 private:
  static inline __m512i rounded(vf x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }
};

#endif

}  // namespace mw::MW_ISA
