// Normalization, rotary embedding and activations on vectors.
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

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::int64_t rows, std::int64_t width, float* out) {
  const std::int64_t whole = width / kWidth * kWidth;
  for (std::int64_t row = 0; row < rows; ++row, x += width, out += width) {
    Vf sums{};
    for (std::int64_t i = 0; i < whole; i += kWidth) sums += load<Vf>(x + i);
    float total = sum_of(sums);
    for (std::int64_t i = whole; i < width; ++i) total += x[i];
    const float mean = total / static_cast<float>(width);
    Vf squares{};  // of what is left without the mean: taken from the squares' mean it would cancel
    for (std::int64_t i = 0; i < whole; i += kWidth) squares += (load<Vf>(x + i) - mean) * (load<Vf>(x + i) - mean);
    total = sum_of(squares);
    for (std::int64_t i = whole; i < width; ++i) total += (x[i] - mean) * (x[i] - mean);
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(width) + eps);
    for (std::int64_t i = 0; i < whole; i += kWidth)
      store(out + i, (load<Vf>(x + i) - mean) * factor * load<Vf>(weight + i) + load<Vf>(bias + i));
    for (std::int64_t i = whole; i < width; ++i) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
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

// Phi(x) = erfc(-x / sqrt 2) / 2. With z = |x| / sqrt 2, erfc(z) = exp(-z^2) * P(1 / (1 + 0.43 z)), where P is the polynomial that
// comes nearest, by relative error, for z from 0 to 9 (fitted for this file; off by 1e-7 at most).
MW_INLINE Vf normal_share(Vf x) {
  const Vf z = vabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.43f * z);
  Vf sum = t * 0.073708095f - 0.3103741f;
  sum = sum * t + 0.383707f;
  sum = sum * t - 0.08572695f;
  sum = sum * t + 0.24684507f;
  sum = sum * t + 0.20495091f;
  sum = sum * t + 0.24437547f;
  sum = sum * t + 0.24251461f;
  sum *= t;
  const Vf below = 0.5f * sum * exponential(-z * z);  // of -|x|
  return x < 0.0f ? below : 1.0f - below;
}

// x * Phi(x), or x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2, which is x / (1 + exp(-2 ...)).
MW_INLINE Vf gelu_of(Vf x, bool near) {
  if (near) return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
  return x * normal_share(x);
}

void gelu(const float* x, std::int64_t count, bool near, float* out) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, gelu_of(load<Vf>(x + i), near));
  if (i == count) return;
  float rest[kWidth] = {};
  for (std::int64_t j = i; j < count; ++j) rest[j - i] = x[j];
  store(rest, gelu_of(load<Vf>(rest), near));
  for (std::int64_t j = i; j < count; ++j) out[j] = rest[j - i];
}

typedef std::int8_t Bytes __attribute__((vector_size(kWidth)));

void to_int8(const float* x, std::int64_t heads, std::int64_t dim, std::int8_t* out) {
  for (std::int64_t head = 0; head < heads; ++head, x += dim, out += dim + 2) {
    const std::int64_t whole = dim / kWidth * kWidth;
    Vf most{}, zeros{};  // sums of zeros are no number where one of x is none
    for (std::int64_t i = 0; i < whole; i += kWidth) {
      most = vmax(most, vabs(load<Vf>(x + i)));
      zeros += 0.0f * load<Vf>(x + i);
    }
    float top = max_of(most), zero = sum_of(zeros);
    for (std::int64_t i = whole; i < dim; ++i) {
      top = __builtin_fabsf(x[i]) > top ? __builtin_fabsf(x[i]) : top;
      zero += 0.0f * x[i];
    }
    std::uint16_t half = float_to_half(top / 127.0f + zero);
    if (127.0f * half_to_float(half) < top && half < 0x7c00) ++half;  // rounded up, so that no code falls short of its number
    store(out + dim, half);
    const float scale = half_to_float(half), inverse = scale > 0.0f && scale < __builtin_inff() ? 1.0f / scale : 0.0f;
    const Vf most_code = splat(127.0f);
    std::int64_t i = 0;
    // the division may round a little above 127
    const auto codes = [&](Vf v) { return __builtin_convertvector(round_to_int(vmin(vmax(v * inverse, -most_code), most_code)), Bytes); };
    for (; i < whole; i += kWidth) store(out + i, codes(load<Vf>(x + i)));
    if (i == dim) continue;
    float rest[kWidth] = {};
    for (std::int64_t j = i; j < dim; ++j) rest[j - i] = x[j];
    const Bytes last = codes(load<Vf>(rest));
    for (std::int64_t j = i; j < dim; ++j) out[j] = last[j - i];
  }
}

void to_half(const float* x, std::int64_t count, std::uint16_t* out) {
  std::int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) out[i] = float_to_half(x[i]);
}

}  // namespace

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {rms_norm, layer_norm, rope, swiglu, gelu, to_int8, to_half};

}  // namespace mw::MW_ISA
