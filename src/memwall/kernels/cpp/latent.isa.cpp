// Codes of latent rows, and softmax-weighted sums over one block of rebuilt rows. One record or one tile of heads a call.
#include "latent.h"

#include "exponential.h"
#include "half.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr float kNever = -1e30f;  // below every logit, and finite
constexpr int kChannels = 256;    // worked at once: their scales stay on the stack

MW_INLINE float larger(float a, float b) { return a > b ? a : b; }
MW_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

struct Grid {
  float scale;
  int zero;
};

// The finest grid of 2^b steps that covers [low, high] and whose zero point fits its byte.
Grid grid_of(const LatentForm& form, float low, float high, std::uint16_t* scale_bits) {
  const float levels = static_cast<float>((1 << form.bits) - 1);
  const int least = form.lowest_zero(), most = form.highest_zero();
  float scale = (high - low) / levels;
  if (low > 0.0f) scale = larger(scale, least < 0 ? low / static_cast<float>(-least) : high / levels);
  else scale = larger(scale, -low / static_cast<float>(most));
  *scale_bits = float_to_half(scale);
  scale = half_to_float(*scale_bits);
  if (!(scale > 0.0f)) return {0.0f, 0};
  float zero = __builtin_rintf(-low / scale);
  zero = zero < static_cast<float>(least) ? static_cast<float>(least) : zero > static_cast<float>(most) ? static_cast<float>(most) : zero;
  return {scale, static_cast<int>(zero)};
}

MW_INLINE std::uint8_t code_of(float x, float inverse, int zero, int levels) {
  float q = __builtin_rintf(x * inverse) + static_cast<float>(zero);
  q = q < 0.0f ? 0.0f : q > static_cast<float>(levels) ? static_cast<float>(levels) : q;
  return static_cast<std::uint8_t>(q);
}

// eight codes into `bits` bytes, lowest bits first, and back
MW_INLINE void pack(const std::uint8_t* codes, int bits, std::uint8_t* to) {
  std::uint64_t word = 0;
  for (int i = 0; i < 8; ++i) word |= static_cast<std::uint64_t>(codes[i]) << (bits * i);
  for (int i = 0; i < bits; ++i) to[i] = static_cast<std::uint8_t>(word >> (8 * i));
}
template <int Bits>
MW_INLINE void unpack(const std::uint8_t* from, float* codes) {
  std::uint64_t word = 0;
  __builtin_memcpy(&word, from, Bits);
  const auto low = static_cast<std::uint32_t>(word), high = static_cast<std::uint32_t>(word >> (4 * Bits));
  for (int i = 0; i < 4; ++i) codes[i] = static_cast<float>(static_cast<int>(low >> (Bits * i) & ((1u << Bits) - 1)));
  for (int i = 0; i < 4; ++i) codes[4 + i] = static_cast<float>(static_cast<int>(high >> (Bits * i) & ((1u << Bits) - 1)));
}

void put_grid(const LatentForm& form, std::uint8_t* record, std::int64_t at, std::uint16_t scale, int zero) {
  std::uint8_t* scales = record + form.tokens() * form.row_bytes();
  __builtin_memcpy(scales + 2 * at, &scale, 2);
  scales[2 * form.scales() + at] = static_cast<std::uint8_t>(zero - form.lowest_zero());
}

Grid get_grid(const LatentForm& form, const std::uint8_t* record, std::int64_t at) {
  const std::uint8_t* scales = record + form.tokens() * form.row_bytes();
  std::uint16_t scale;
  __builtin_memcpy(&scale, scales + 2 * at, 2);
  return {half_to_float(scale), static_cast<int>(scales[2 * form.scales() + at]) + form.lowest_zero()};
}

void encode(const LatentForm& form, const float* rows, std::uint8_t* record) {
  const int levels = (1 << form.bits) - 1;
  for (std::int64_t first = 0; first < form.width; first += kChannels) {
    const std::int64_t count = smaller(kChannels, form.width - first);
    float inverse[kChannels];
    int zero[kChannels];
    const auto found = [&](std::int64_t at, float low, float high, std::int64_t begin, std::int64_t end) {
      std::uint16_t scale;
      const Grid grid = grid_of(form, low, high, &scale);
      put_grid(form, record, at, scale, grid.zero);
      for (std::int64_t i = begin; i < end; ++i) inverse[i] = grid.scale > 0.0f ? 1.0f / grid.scale : 0.0f, zero[i] = grid.zero;
    };
    if (form.along_tokens) {
      float low[kChannels], high[kChannels];
      for (std::int64_t i = 0; i < count; ++i) low[i] = high[i] = rows[first + i];
      for (std::int64_t t = 1; t < form.group; ++t)
        for (std::int64_t i = 0; i < count; ++i) {
          const float x = rows[t * form.width + first + i];
          low[i] = x < low[i] ? x : low[i], high[i] = x > high[i] ? x : high[i];
        }
      for (std::int64_t i = 0; i < count; ++i) found(first + i, low[i], high[i], i, i + 1);
    } else {
      // a group may begin in an earlier piece of the row: its grid is found anew, the same
      for (std::int64_t g = first / form.group; g * form.group < first + count; ++g) {
        const std::int64_t from = g * form.group, to = smaller(from + form.group, form.width);
        float low = rows[from], high = low;
        for (std::int64_t i = from; i < to; ++i) low = rows[i] < low ? rows[i] : low, high = rows[i] > high ? rows[i] : high;
        found(g, low, high, from > first ? from - first : 0, smaller(to, first + count) - first);
      }
    }
    for (std::int64_t t = 0; t < form.tokens(); ++t) {
      const float* row = rows + t * form.width + first;
      std::uint8_t* to = record + t * form.row_bytes() + first / 8 * form.bits;
      for (std::int64_t i = 0; i < count; i += 8, to += form.bits) {
        std::uint8_t codes[8] = {};
        for (std::int64_t j = 0; j < smaller(8, count - i); ++j) codes[j] = code_of(row[i + j], inverse[i + j], zero[i + j], levels);
        pack(codes, form.bits, to);
      }
    }
  }
}

template <int Bits>
void decode_rows(const LatentForm& form, const std::uint8_t* record, std::int64_t begin, std::int64_t end, float* rows) {
  for (std::int64_t first = 0; first < form.width; first += kChannels) {
    const std::int64_t count = smaller(kChannels, form.width - first), whole = count / 8 * 8;
    float scale[kChannels], offset[kChannels];
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t at = form.along_tokens ? first + i : (first + i) / form.group;
      const std::int64_t stop = form.along_tokens ? i + 1 : smaller((at + 1) * form.group - first, count);
      const Grid grid = get_grid(form, record, at);
      for (; i < stop; ++i) scale[i] = grid.scale, offset[i] = -grid.scale * static_cast<float>(grid.zero);
    }
    for (std::int64_t t = begin; t < end; ++t) {
      const std::uint8_t* from = record + t * form.row_bytes() + first / 8 * Bits;
      float* row = rows + (t - begin) * form.width + first;
      for (std::int64_t i = 0; i < whole; i += 8, from += Bits) {
        float codes[8];
        unpack<Bits>(from, codes);
        for (int j = 0; j < 8; ++j) row[i + j] = codes[j] * scale[i + j] + offset[i + j];
      }
      if (whole < count) {
        float codes[8];
        unpack<Bits>(from, codes);
        for (std::int64_t i = whole; i < count; ++i) row[i] = codes[i - whole] * scale[i] + offset[i];
      }
    }
  }
}

void decode(const LatentForm& form, const std::uint8_t* record, std::int64_t begin, std::int64_t end, float* rows) {
  if (form.bits == 2) decode_rows<2>(form, record, begin, end, rows);
  else if (form.bits == 3) decode_rows<3>(form, record, begin, end, rows);
  else if (form.bits == 4) decode_rows<4>(form, record, begin, end, rows);
  else decode_rows<8>(form, record, begin, end, rows);
}

float dot(const float* a, const float* b, std::int64_t count) {
  Vf sum{};
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) sum += load<Vf>(a + i) * load<Vf>(b + i);
  float total = sum_of(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// out[r] += sum over tokens of p[r][token] * v[token], in strips of V vectors that stay in registers
template <int R, int V>
MW_INLINE void sum_strip(const float* p, const float* v, std::int64_t stride, std::int64_t begin, std::int64_t end, float* out,
                         std::int64_t out_stride) {
  Vf sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sum[r][i] = load<Vf>(out + r * out_stride + i * kWidth);
  for (std::int64_t t = begin; t < end; ++t)
    for (int i = 0; i < V; ++i) {
      const Vf value = load<Vf>(v + t * stride + i * kWidth);
      for (int r = 0; r < R; ++r) sum[r][i] += splat(p[r * kMostLatentTokens + t]) * value;
    }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(out + r * out_stride + i * kWidth, sum[r][i]);
}

template <int R>
void sum_values(const float* p, const float* v, std::int64_t stride, std::int64_t begin, std::int64_t end, float* out,
                std::int64_t dim) {
  std::int64_t d = 0;
  for (; d + 2 * kWidth <= dim; d += 2 * kWidth) sum_strip<R, 2>(p, v + d, stride, begin, end, out + d, dim);
  for (; d + kWidth <= dim; d += kWidth) sum_strip<R, 1>(p, v + d, stride, begin, end, out + d, dim);
  for (; d < dim; ++d)
    for (int r = 0; r < R; ++r)
      for (std::int64_t t = begin; t < end; ++t) out[r * dim + d] += p[r * kMostLatentTokens + t] * v[t * stride + d];
}

void attend(const LatentAttention& a, std::int64_t query, std::int64_t head, int count) {
  alignas(64) float p[4 * kMostLatentTokens];
  const std::int64_t begin = a.first_key + query > 0 ? a.first_key + query : 0;
  if (begin >= a.tokens) return;
  const std::int64_t rep = a.heads / a.kv_heads, row = query * a.heads + head;
  for (int r = 0; r < count; ++r) {
    const float* q = a.q + (row + r) * a.dim;
    float *scores = p + r * kMostLatentTokens, *stats = a.stats + 2 * (row + r), *out = a.out + (row + r) * a.value_dim;
    const float* k = a.k + (head + r) / rep * a.dim;
    const float before = stats[1] > 0.0f ? stats[0] : kNever;
    float peak = before;
    for (std::int64_t t = begin; t < a.tokens; ++t) {
      scores[t] = a.scale * dot(q, k + t * a.kv_heads * a.dim, a.dim);
      peak = larger(peak, scores[t]);
    }
    float shrink[kWidth];
    store(shrink, exponential(splat(before - peak)));
    const float factor = stats[1] > 0.0f ? shrink[0] : 0.0f;
    if (factor != 1.0f)
      for (std::int64_t d = 0; d < a.value_dim; ++d) out[d] = factor > 0.0f ? out[d] * factor : 0.0f;
    float sum = factor * stats[1];
    std::int64_t t = begin;
    for (; t + kWidth <= a.tokens; t += kWidth) {
      const Vf weights = exponential(load<Vf>(scores + t) - peak);
      store(scores + t, weights);
      sum += sum_of(weights);
    }
    for (; t < a.tokens; ++t) {
      float lane[kWidth];
      store(lane, exponential(splat(scores[t] - peak)));
      scores[t] = lane[0];
      sum += lane[0];
    }
    stats[0] = peak, stats[1] = sum;
  }
  const float* v = a.v + (a.value_heads == 1 ? 0 : head / rep) * a.value_dim;
  float* out = a.out + row * a.value_dim;
  const std::int64_t stride = a.value_heads * a.value_dim;
  if (count == 4) sum_values<4>(p, v, stride, begin, a.tokens, out, a.value_dim);
  else if (count == 2) sum_values<2>(p, v, stride, begin, a.tokens, out, a.value_dim);
  else sum_values<1>(p, v, stride, begin, a.tokens, out, a.value_dim);
}

void widen(const std::uint16_t* halves, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load_half(halves + i));
  for (; i < count; ++i) to[i] = half_to_float(halves[i]);
}

}  // namespace

extern const LatentKernels latent_kernels;
const LatentKernels latent_kernels = {encode, decode, attend, widen};

}  // namespace mw::MW_ISA
