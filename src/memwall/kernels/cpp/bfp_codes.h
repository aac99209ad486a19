// Codes of block floating point blocks (bfp_form.h): put one by one, read one by one or as vectors.
#pragma once

#include "attention_simd.h"
#include "bfp_form.h"

namespace mw::MW_ISA {

constexpr int kGroup = 32;  // channels that are packed together
constexpr int kTokens = BfpForm::kTokens;
constexpr int kQuad = 4 * kTokens;  // bytes of a key vector: four channels of each token
template <int P>
constexpr int kGroupBytes = 4 * P;  // of one token
template <int P>
constexpr int kBias = 1 << (P - 1);

// Where the parts of a code lie: byte, shift inside it, and how many bits of the code are there, from which bit of it on.
struct Part {
  int byte, shift, bits, from;
};

// Of channel i (< 32) in a group of a value's token.
template <int P, typename Body>
static inline void value_parts(int i, Body&& body) {
  if constexpr (P == 8) body(Part{i, 0, 8, 0});
  if constexpr (P == 4 || P == 6) body(Part{i % 16, i / 16 * 4, 4, 0});
  if constexpr (P == 6) body(Part{16 + i % 8, i / 8 * 2, 2, 4});
  if constexpr (P == 3) body(Part{i % 8, i / 8 * 2, 2, 0});
  if constexpr (P == 3) body(Part{8 + i / 8, i % 8, 1, 2});
}

// Of channel i in a group of keys, for token t of the block.
template <int P, typename Body>
static inline void key_parts(int t, int i, Body&& body) {
  const int lane = 4 * t + i % 4;
  if constexpr (P == 8) body(Part{i / 4 * kQuad + lane, 0, 8, 0});
  if constexpr (P == 4 || P == 6) body(Part{i / 8 * kQuad + lane, i / 4 % 2 * 4, 4, 0});
  if constexpr (P == 6) body(Part{4 * kQuad + i / 16 * kQuad + lane, i / 4 % 4 * 2, 2, 4});
  if constexpr (P == 3) body(Part{i / 16 * kQuad + lane, i / 4 % 4 * 2, 2, 0});
  if constexpr (P == 3) body(Part{2 * kQuad + lane, i / 4, 1, 2});
}

static inline void put_part(std::uint8_t* group, const Part& part, unsigned code) {
  const unsigned mask = ((1u << part.bits) - 1u) << part.shift;
  group[part.byte] = static_cast<std::uint8_t>((group[part.byte] & ~mask) | ((code >> part.from << part.shift) & mask));
}
static inline int get_part(const std::uint8_t* group, const Part& part) {
  return (group[part.byte] >> part.shift & ((1 << part.bits) - 1)) << part.from;
}

template <int P>
static inline void put_value(std::uint8_t* token, int channel, int mantissa) {
  value_parts<P>(channel % kGroup, [&](const Part& part) {
    put_part(token + channel / kGroup * kGroupBytes<P>, part, static_cast<unsigned>(mantissa + kBias<P>));
  });
}
template <int P>
static inline int get_value(const std::uint8_t* token, int channel) {
  int code = 0;
  value_parts<P>(channel % kGroup, [&](const Part& part) { code |= get_part(token + channel / kGroup * kGroupBytes<P>, part); });
  return code - kBias<P>;
}
template <int P>
static inline void put_key(std::uint8_t* block, int t, int channel, int mantissa) {
  key_parts<P>(t, channel % kGroup, [&](const Part& part) {
    put_part(block + channel / kGroup * kGroupBytes<P> * kTokens, part, static_cast<unsigned>(mantissa + kBias<P>));
  });
}
template <int P>
static inline int get_key(const std::uint8_t* block, int t, int channel) {
  int code = 0;
  key_parts<P>(t, channel % kGroup, [&](const Part& part) { code |= get_part(block + channel / kGroup * kGroupBytes<P> * kTokens, part); });
  return code - kBias<P>;
}

#if defined(__AVX2__)

static inline __m128i load_128(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// 16 codes of one half of a value's group
template <int P>
static inline __m128i half_codes(const std::uint8_t* group, int half) {
  if constexpr (P == 8) return load_128(group + 16 * half);
  __m128i codes = _mm_setzero_si128();
  if constexpr (P == 4 || P == 6) {
    const __m128i both = load_128(group);
    codes = _mm_and_si128(half ? _mm_srli_epi16(both, 4) : both, _mm_set1_epi8(15));
  }
  if constexpr (P == 3 || P == 6) {
    long long word;
    std::memcpy(&word, group + (P == 6 ? 16 : 0), sizeof word);
    const __m128i places = half ? _mm_set_epi64x(6, 4) : _mm_set_epi64x(2, 0);
    const __m128i pairs = _mm_and_si128(_mm_srlv_epi64(_mm_set1_epi64x(word), places), _mm_set1_epi8(3));
    codes = P == 6 ? _mm_or_si128(codes, _mm_slli_epi16(pairs, 4)) : pairs;
  }
  if constexpr (P == 3) {
    short word;
    std::memcpy(&word, group + 8 + 2 * half, sizeof word);
    const __m128i bit = _mm_set1_epi64x(static_cast<long long>(0x8040201008040201));
    const __m128i spread = _mm_shuffle_epi8(_mm_set1_epi16(word), _mm_set_epi64x(0x0101010101010101, 0));
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(spread, bit), bit);
    codes = _mm_or_si128(codes, _mm_and_si128(set, _mm_set1_epi8(4)));
  }
  return codes;
}

// Bytes of the key lanes of as many tokens as a register holds, from token `kLaneTokens * part` of the block on.
#if defined(__AVX512F__)
using Quads = __m512i;
constexpr int kLaneTokens = 16;
static inline Quads load_quads(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Quads bits_of(Quads x, int shift, int mask) {
  return _mm512_and_si512(shift ? _mm512_srl_epi16(x, _mm_cvtsi32_si128(shift)) : x, _mm512_set1_epi8(static_cast<char>(mask)));
}
static inline Quads join(Quads low, Quads high, int shift) { return _mm512_or_si512(low, _mm512_sll_epi16(high, _mm_cvtsi32_si128(shift))); }
#else
using Quads = __m256i;
constexpr int kLaneTokens = 8;
static inline Quads load_quads(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
static inline Quads bits_of(Quads x, int shift, int mask) {
  return _mm256_and_si256(shift ? _mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)) : x, _mm256_set1_epi8(static_cast<char>(mask)));
}
static inline Quads join(Quads low, Quads high, int shift) { return _mm256_or_si256(low, _mm256_sll_epi16(high, _mm_cvtsi32_si128(shift))); }
#endif

// Codes of channels 4 quad ... 4 quad + 3 of a group, of the tokens whose lanes `group` points to.
template <int P>
static inline Quads quad_codes(const std::uint8_t* group, int quad) {
  if constexpr (P == 8) return load_quads(group + quad * kQuad);
  if constexpr (P == 4) return bits_of(load_quads(group + quad / 2 * kQuad), quad % 2 * 4, 15);
  if constexpr (P == 6)
    return join(bits_of(load_quads(group + quad / 2 * kQuad), quad % 2 * 4, 15),
                bits_of(load_quads(group + (4 + quad / 4) * kQuad), quad % 4 * 2, 3), 4);
  return join(bits_of(load_quads(group + quad / 4 * kQuad), quad % 4 * 2, 3), bits_of(load_quads(group + 2 * kQuad), quad, 1), 2);
}

#endif

// Channels of a value that are summed together, as vectors: a group where registers are wide, half of one elsewhere.
#if defined(__AVX512F__)
constexpr int kPart = 32;
#else
constexpr int kPart = 16;
#endif
constexpr int kPartVectors = kPart / W;

template <int P>
static inline void part_floats(const std::uint8_t* token, int channel, vf (&to)[kPartVectors]) {
  const std::uint8_t* group = token + channel / kGroup * kGroupBytes<P>;
#if defined(__AVX512F__)
  if constexpr (P == 4) {  // a table of 16 numbers is one instruction
    const __m512 table = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i both = _mm512_cvtepu8_epi32(load_128(group));
    to[0] = _mm512_permutexvar_ps(both, table);
    to[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table);
    return;
  }
  for (int half = 0; half < 2; ++half) to[half] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(half_codes<P>(group, half)));
#elif defined(__AVX2__)
  const __m128i codes = half_codes<P>(group, channel / 16 % 2);
  to[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
  to[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)));
#else
  for (int i = 0; i < kPart; ++i) to[i / W][i % W] = static_cast<float>(get_value<P>(token, channel + i) + kBias<P>);
  (void)group;
#endif
}

}  // namespace mw::MW_ISA
