// 16-bit floats by bit manipulation, for processors without conversion instructions and for code that handles single values.
// Static: a copy compiled for AVX-512 must never be the one that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

namespace mw {

static inline float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Moving the exponent field and multiplying by 2^112 corrects its bias and makes subnormals come out right by themselves.
static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
  const float value = float_of_bits(magnitude << 13) * float_of_bits(0x77800000u);
  std::uint32_t bits = bits_of_float(value);
  if (magnitude >= 0x7c00u) bits = 0x7f800000u | (magnitude & 0x3ffu) << 13;  // infinity or not a number
  return float_of_bits(bits | sign);
}

// Round to nearest, ties to even, as IEEE 754 and NumPy do; overflow gives infinity.
static inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // a subnormal half counts units of 2^-24: adding 0.5 leaves exactly that count, rounded, in the low bits
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (bits_of_float(shifted) - bits_of_float(0.5f)));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1u;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

static inline float bfloat_to_float(std::uint16_t value) { return float_of_bits(static_cast<std::uint32_t>(value) << 16); }

}  // namespace mw
