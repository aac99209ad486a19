// Normalization, rotary embedding and gated activation on vectors.
#include "elementwise.h"

#include "exponential.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

void rms_norm(const float* x, const float* weight, float eps, std::int64_t rows, std::int64_t width, float* out) {
  const std::int64_t whole = width / kWidth * kWidth;
  for (std::int64_t row = 0; row < rows; ++row, x += width, out += width) {
    Vf squares{};
    for (std::int64_t i = 0; i < whole; i += kWidth) squares += load<Vf>(x + i) * load<Vf>(x + i);
    float total = sum_of(squares);
    for (std::int64_t i = whole; i < width; ++i) total += x[i] * x[i];
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
    for (std::int64_t i = 0; i < whole; i += kWidth) store(out + i, load<Vf>(x + i) * factor * load<Vf>(weight + i));
    for (std::int64_t i = whole; i < width; ++i) out[i] = x[i] * factor * weight[i];
  }
}

void rope(float* x, const float* cos, const float* sin, std::int64_t heads, std::int64_t width, std::int64_t half) {
  const std::int64_t whole = half / kWidth * kWidth;
  for (std::int64_t head = 0; head < heads; ++head, x += width) {
    float* y = x + half;
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      const Vf c = load<Vf>(cos + i), s = load<Vf>(sin + i), a = load<Vf>(x + i), b = load<Vf>(y + i);
      store(x + i, a * c - b * s);
      store(y + i, b * c + a * s);
    }
    for (std::int64_t i = whole; i < half; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a * cos[i] - b * sin[i];
      y[i] = b * cos[i] + a * sin[i];
    }
  }
}

MW_INLINE Vf gated(Vf gate, Vf up) { return gate / (1.0f + exponential(-gate)) * up; }

void swiglu(const float* gate, const float* up, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, gated(load<Vf>(gate + i), load<Vf>(up + i)));
  if (i == count) return;
  float rest[2][kWidth] = {};
  for (std::int64_t j = i; j < count; ++j) rest[0][j - i] = gate[j], rest[1][j - i] = up[j];
  store(rest[0], gated(load<Vf>(rest[0]), load<Vf>(rest[1])));
  for (std::int64_t j = i; j < count; ++j) out[j] = rest[0][j - i];
}

typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));

MW_INLINE Bytes float8_of(Vf x) {
  const Vi magnitude = (Vi)x & 0x7fffffff, sign = ((Vi)x >> 24) & 0x80;
  const Vi kept = magnitude < 0x43e00000 ? magnitude : splat(std::int32_t{0x43e00000});  // 448
  // 20 of 23 bits of fraction go; the exponent's bias falls from 127 to 7
  const Vi normal = ((kept + 0x7ffff + ((kept >> 20) & 1)) >> 20) - (120 << 3);
  // below 2^-6 the adder rounds: at 2^14 a unit in the last place is 2^-9
  const Vi small = (Vi)((Vf)kept + 16384.0f) - 0x46800000;
  Vi code = kept < 0x3c800000 ? small : normal;
  code = magnitude > 0x7f800000 ? splat(std::int32_t{0x7f}) : code;
  return __builtin_convertvector(code | sign, Bytes);
}

void to_float8(const float* x, std::int64_t count, std::uint8_t* out) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, float8_of(load<Vf>(x + i)));
  if (i == count) return;
  float rest[kWidth] = {};
  for (std::int64_t j = i; j < count; ++j) rest[j - i] = x[j];
  const Bytes codes = float8_of(load<Vf>(rest));
  for (std::int64_t j = i; j < count; ++j) out[j] = codes[j - i];
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {rms_norm, rope, swiglu, to_float8};

}  // namespace mw::MW_ISA
