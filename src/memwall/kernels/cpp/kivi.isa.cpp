// Reading and writing KIVI blocks.
//
// Keys are grouped along tokens, one channel at a time; a block is one group of tokens:
//   codes: planes of width w (3 bits = a plane of 2 and one of 1), each [ceil(channels * w / 32)][tokens] words of 32 bits; the
//          word of a token holds 32 / w consecutive channels, the first in the lowest bits; any number of channels, zeros
//          behind; unless 16 divides the channels, a last row that half words would do for has words of 16 bits
//   scales float16 [channels], minima float16 [channels]
// Values are grouped along channels inside one token; a block is 32 tokens:
//   codes: planes, each [tokens * w / 32][channels] words; the word of a channel holds 32 / w consecutive tokens
//   scales float16 [channels / group][tokens], minima the same
// So in both, the lanes of a vector are what shares no scale, one shift and one table look-up turn a word into 16 codes, and the
// scale goes with the other factor: q * scale once per channel and block, p * scale once per token and group.
// That factor is a float here; kivi_integer.isa.cpp rounds it to eight bits.
#include "attention_isa.h"
#include "attention_simd.h"
#include "kivi_codes.h"

#include <vector>

namespace mw::MW_ISA {
namespace {

constexpr int kHeads = 4;  // query heads that share one unpacking: 8 sums in registers, which AVX2 just holds
#if defined(__AVX512F__)
constexpr int kSums = 2;  // per result: twice the registers, so twice the additions under way
#else
constexpr int kSums = 1;
#endif
constexpr float kLargestHalf = 65504.0f;

// Turns the code that starts at bit `shift` of each lane into a float. Tables look at the lowest bits alone, and repeat, so that
// the codes above need no mask.
#if defined(__AVX512F__)
template <int B>
struct Codes {
  vf low, high;
  Codes() {
    alignas(64) float table[16], bit[16];
    for (int i = 0; i < 16; ++i) table[i] = static_cast<float>(B == 4 ? i : i & 3), bit[i] = 4.0f * (i & 1);
    low = vload(table), high = vload(bit);
  }
  vf operator()(vi word, vi plane, int i) const {
    if constexpr (B == 8) {
      (void)plane;
      return _mm512_cvtepi32_ps(_mm512_and_si512(ishift(word, 8 * i), _mm512_set1_epi32(255)));
    } else if constexpr (B == 3) {
      return vadd(_mm512_permutexvar_ps(ishift(word, 2 * i), low), _mm512_permutexvar_ps(ishift(plane, i), high));
    } else {
      (void)plane;
      return _mm512_permutexvar_ps(ishift(word, B * i), low);
    }
  }
};
#elif defined(__AVX2__)
template <int B>
struct Codes {
  vf low, high;
  Codes() : low(_mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3)), high(_mm256_setr_ps(0, 4, 0, 4, 0, 4, 0, 4)) {}
  vf operator()(vi word, vi plane, int i) const {
    if constexpr (B == 8 || B == 4) {
      (void)plane;
      return _mm256_cvtepi32_ps(_mm256_and_si256(ishift(word, B * i), _mm256_set1_epi32((1 << B) - 1)));
    } else if constexpr (B == 3) {
      return vadd(_mm256_permutevar8x32_ps(low, ishift(word, 2 * i)), _mm256_permutevar8x32_ps(high, ishift(plane, i)));
    } else {
      (void)plane;
      return _mm256_permutevar8x32_ps(low, ishift(word, B * i));
    }
  }
};
#else
template <int B>
struct Codes {
  vf operator()(vi word, vi plane, int i) const {
    typedef std::int32_t vs __attribute__((vector_size(16)));
    vi code = ishift(word, (B == 3 ? 2 : B) * i) & ((1u << (B == 3 ? 2 : B)) - 1u);
    if constexpr (B == 3) code |= (ishift(plane, i) & 1u) << 2;
    else (void)plane;
    return __builtin_convertvector(reinterpret_cast<vs>(code), vf);
  }
};
#endif

// the main plane, and the one of third bits behind it
template <int B>
struct Planes {
  Plane main, extra;
  Planes(const std::uint8_t* block, int tokens, int dim)
      : main(words(block), tokens, dim, kPerWord<B>),
        extra(words(block + 2 * (2 * main.full + KiviForm::half_row(dim, kPerWord<B>)) * tokens), tokens, dim, 32) {}
};

template <int B>
struct Bits {
  static constexpr int value = B;
};

template <typename Body>
inline void with_bits(int bits, Body&& body) {
  if (bits == 2) body(Bits<2>{});
  else if (bits == 3) body(Bits<3>{});
  else if (bits == 4) body(Bits<4>{});
  else body(Bits<8>{});
}

// ---- scores ------------------------------------------------------------------------------------------------------------

// V vectors of tokens of one key block for R query heads; U sums per result break the chain of dependent additions
template <int B, int R, int V, int U>
inline void score_tile(const Codes<B>& codes, const Planes<B>& planes, int first, int dim, int padded, const float* scaled,
                       const float* offset, float* scores) {
  vf sum[R][V][U];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      for (int u = 0; u < U; ++u) sum[r][v][u] = vset(u == 0 ? offset[r] : 0.0f);
  for (int d = 0; d < dim; d += kPerWord<B>) {
    vi word[V], plane[V];
    for (int v = 0; v < V; ++v) {
      word[v] = planes.main.load(d / kPerWord<B>, first + v * W);
      plane[v] = word[v];
      if constexpr (B == 3) plane[v] = ishift(planes.extra.load(d / 32, first + v * W), d % 32);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPerWord<B>; ++i) {
      vf code[V];
      for (int v = 0; v < V; ++v) code[v] = codes(word[v], plane[v], i);
      for (int r = 0; r < R; ++r) {
        const vf query = vset(scaled[r * padded + d + i]);
        for (int v = 0; v < V; ++v) sum[r][v][i % U] = vfma(code[v], query, sum[r][v][i % U]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      vf total = sum[r][v][0];
      for (int u = 1; u < U; ++u) total = vadd(total, sum[r][v][u]);
      vstore(scores + r * kStep + v * W, total);
    }
}

template <int B, int R, int U>
inline void score_block(const Codes<B>& codes, const std::uint8_t* block, int tokens, int dim, int padded, const float* scaled,
                        const float* offset, float* scores) {
  const Planes<B> planes(block, tokens, dim);
  int t = 0;
  for (; t + 2 * W <= tokens; t += 2 * W)
    score_tile<B, R, 2, U>(codes, planes, t, dim, padded, scaled, offset, scores + t);
  for (; t < tokens; t += W) score_tile<B, R, 1, U>(codes, planes, t, dim, padded, scaled, offset, scores + t);
}

// ---- values ------------------------------------------------------------------------------------------------------------

template <int B, int R, int V, int U>
inline void value_tile(const Codes<B>& codes, const std::uint32_t* main, const std::uint32_t* extra, int dim, const float* scaled,
                       const float* offset, float* out) {
  vf sum[R][V][U];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      for (int u = 0; u < U; ++u) sum[r][v][u] = u == 0 ? vadd(vload(out + r * dim + v * W), vset(offset[r])) : vset(0.0f);
  vi bit[V];
  for (int v = 0; v < V; ++v) {
    bit[v] = iload(main + v * W);
    if constexpr (B == 3) bit[v] = iload(extra + v * W);
  }
#pragma GCC unroll 1  // or all 32 tokens are unrolled, and the scheduler runs out of registers
  for (int t = 0; t < kBlock; t += kPerWord<B>, main += dim) {
    vi word[V], plane[V];
    for (int v = 0; v < V; ++v) {
      word[v] = iload(main + v * W);
      plane[v] = bit[v];
      if constexpr (B == 3) plane[v] = ishift(bit[v], t);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kPerWord<B>; ++i) {
      vf code[V];
      for (int v = 0; v < V; ++v) code[v] = codes(word[v], plane[v], i);
      for (int r = 0; r < R; ++r) {
        const vf weight = vset(scaled[r * kBlock + t + i]);
        for (int v = 0; v < V; ++v) sum[r][v][i % U] = vfma(code[v], weight, sum[r][v][i % U]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      vf total = sum[r][v][0];
      for (int u = 1; u < U; ++u) total = vadd(total, sum[r][v][u]);
      vstore(out + r * dim + v * W, total);
    }
}

template <int B, int R, int U>
inline void value_block(const Codes<B>& codes, const std::uint8_t* block, const KiviForm& form, int dim, const float* const p[],
                        float* out, float* scaled) {
  const std::uint32_t* main = words(block);
  const std::uint32_t* extra = main + kBlock / kPerWord<B> * dim;
  const f16* scales = halves(block + form.value_code_bytes(dim));
  const f16* minima = scales + dim / form.group * kBlock;
  for (int g = 0; g < dim / form.group; ++g, scales += kBlock, minima += kBlock) {
    float offset[R];
    for (int r = 0; r < R; ++r) fold_key_scales(scales, minima, p[r], kBlock, scaled + r * kBlock, offset + r);
    int d = g * form.group;
    const int stop = d + form.group;
    for (; d + 2 * W <= stop; d += 2 * W) value_tile<B, R, 2, U>(codes, main + d, extra + d, dim, scaled, offset, out + d);
    for (; d < stop; d += W) value_tile<B, R, 1, U>(codes, main + d, extra + d, dim, scaled, offset, out + d);
  }
}

// ---- encoding ----------------------------------------------------------------------------------------------------------

inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }  // 0 <= x < 2^22

struct Grid {
  float scale, minimum;
};

// The scale and minimum as they are stored, in half precision: codes are computed with these.
inline Grid grid(float low, float high, int bits, f16* scale, f16* minimum) {
  const float levels = static_cast<float>((1 << bits) - 1);
  float step = (high - low) / levels;
  step = step < kLargestHalf ? step : kLargestHalf;
  *scale = float_to_half(step);
  *minimum = float_to_half(low < -kLargestHalf ? -kLargestHalf : low);
  return {half_to_float(*scale), half_to_float(*minimum)};
}

inline std::uint32_t code_of(float x, Grid g, float levels) {
  float c = g.scale > 0.0f ? (x - g.minimum) / g.scale : 0.0f;  // a constant group has no step: all codes are zero
  c = c > 0.0f ? c : 0.0f;
  c = c < levels ? c : levels;
  return static_cast<std::uint32_t>(round_even(c));
}

// Copies a plane of `channels` in words of 32 bits to where its last row may have words of 16; returns where the next one starts.
inline std::uint8_t* pack_plane(const std::uint32_t* plane, int channels, int per_word, int tokens, std::uint8_t* to) {
  const bool half = KiviForm::half_row(channels, per_word);
  const int full = (channels + per_word - 1) / per_word - half;
  const std::size_t size = static_cast<std::size_t>(full) * tokens * sizeof(std::uint32_t);
  std::memcpy(to, plane, size);
  to += size;
  for (int t = 0; half && t < tokens; ++t, to += 2) {
    const std::uint16_t word = static_cast<std::uint16_t>(plane[full * tokens + t]);
    std::memcpy(to, &word, 2);
  }
  return to;
}

// Puts a code of `bits` bits at position `index` of line `lane`; `width` lanes make a row of words.
inline void put(std::uint32_t* plane, int bits, int rows_of_main, int width, int lane, int index, std::uint32_t code) {
  const int w = bits == 3 ? 2 : bits, per_word = 32 / w;
  std::uint32_t& word = plane[index / per_word * width + lane];
  const int shift = index % per_word * w;
  const std::uint32_t mask = ((1u << w) - 1u) << shift;
  word = (word & ~mask) | ((code << shift) & mask);
  if (bits != 3) return;
  std::uint32_t& high = plane[(rows_of_main + index / 32) * width + lane];
  high = (high & ~(1u << (index % 32))) | ((code >> 2) << (index % 32));
}

// The codes of `count` numbers, in as many lines from the first one of `plane` on, all at position `index`: what `put` does for each of
// them, in loops that vectors can do.
inline void put_row(std::uint32_t* plane, int bits, int rows_of_main, int width, int index, int count, const float* x, Grid cut, float levels) {
  const int w = bits == 3 ? 2 : bits, per_word = 32 / w, shift = index % per_word * w, high_shift = index % 32;
  const std::uint32_t mask = ((1u << w) - 1u) << shift;
  std::uint32_t codes[kStep];
  for (int d = 0; d < count; ++d) {
    float c = (x[d] - cut.minimum) / cut.scale;
    c = c > 0.0f ? c : 0.0f;
    c = c < levels ? c : levels;
    codes[d] = static_cast<std::uint32_t>(static_cast<std::int32_t>(round_even(c)));
  }
  if (!(cut.scale > 0.0f))  // a constant group has no step: all codes are zero
    for (int d = 0; d < count; ++d) codes[d] = 0;
  std::uint32_t* main = plane + index / per_word * width;
  for (int d = 0; d < count; ++d) main[d] = (main[d] & ~mask) | ((codes[d] << shift) & mask);
  if (bits != 3) return;
  std::uint32_t* high = plane + (rows_of_main + index / 32) * width;
  for (int d = 0; d < count; ++d) high[d] = (high[d] & ~(1u << high_shift)) | ((codes[d] >> 2) << high_shift);
}

inline float at(const Rows& rows, std::int64_t i) {
  if (rows.type == Real::float32) return static_cast<const float*>(rows.data)[i];
  if (rows.type == Real::float16) return half_to_float(static_cast<const f16*>(rows.data)[i]);
  return to_float(static_cast<const bf16*>(rows.data)[i]);
}

// numbers first ... first + count, a multiple of 16
inline void load_row(const Rows& rows, std::int64_t first, int count, float* to) {
  const auto all = [&](const auto* from) {
    for (int d = 0; d < count; d += W) vstore(to + d, vload(from + first + d));
  };
  if (rows.type == Real::float32) all(static_cast<const float*>(rows.data));
  else if (rows.type == Real::float16) all(static_cast<const f16*>(rows.data));
  else all(static_cast<const bf16*>(rows.data));
}

}  // namespace

std::size_t kivi_scratch(const Attention& a) {
  const std::size_t rep = static_cast<std::size_t>(a.queries_per_kv_head());
  if (a.form.integers) return kivi_integer_scratch(a);
  return rep * (static_cast<std::size_t>(a.padded_key()) + 1) + kHeads * kBlock + rep * kBlock;
}

void kivi_scores(const Attention& a, const float* q, std::int64_t begin, std::int64_t end, float* scores, float* scratch) {
  if (a.form.integers) return kivi_integer_scores(a, q, begin, end, scores, scratch);
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, padded = a.padded_key(), tokens = a.form.key_tokens();
  const std::size_t size = a.form.key_block_bytes(dim), code_bytes = a.form.key_code_bytes(dim);
  float *scaled = scratch, *offset = scratch + rep * padded;
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    const Codes<B> codes;
    for (std::int64_t token = begin; token < end; token += tokens) {
      const std::uint8_t* block = a.key_block(token);
      for (int h = 0; h < a.num_kv_heads; ++h, block += size) {
        fetch_ahead(block, size);
        const f16* scales = halves(block + code_bytes);
        for (int r = 0; r < rep; ++r)
          fold_key_scales(scales, scales + dim, q + (h * rep + r) * padded, dim, scaled + r * padded, offset + r);
        float* to = scores + (h * rep) * kStep + (token - begin);
        int r = 0;
        for (; r + kHeads <= rep; r += kHeads)
          score_block<B, kHeads, kSums>(codes, block, tokens, dim, padded, scaled + r * padded, offset + r, to + r * kStep);
        for (; r + 2 <= rep; r += 2)
          score_block<B, 2, 2>(codes, block, tokens, dim, padded, scaled + r * padded, offset + r, to + r * kStep);
        for (; r < rep; ++r)
          score_block<B, 1, 4>(codes, block, tokens, dim, padded, scaled + r * padded, offset + r, to + r * kStep);
      }
    }
  });
}

void kivi_values(const Attention& a, const float* p, std::int64_t begin, std::int64_t end, float* out, float* scratch) {
  if (a.form.integers) return kivi_integer_values(a, p, begin, end, out, scratch);
  const int rep = a.queries_per_kv_head(), dim = a.head_dim;
  const std::size_t size = a.form.value_block_bytes(dim);
  float *scaled = scratch, *cut = scratch + kHeads * kBlock;
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    const Codes<B> codes;
    for (std::int64_t token = begin; token < end; token += kBlock) {
      const std::uint8_t* block = a.value_block(token);
      const int count = static_cast<int>(end - token < kBlock ? end - token : kBlock);
      for (int h = 0; h < a.num_kv_heads; ++h, block += size) {
        fetch_ahead(block, size);
        const auto weights = [&](int r) {
          const float* weight = p + (h * rep + r) * kStep + (token - begin);
          if (count == kBlock) return weight;
          for (int t = 0; t < kBlock; ++t) cut[r * kBlock + t] = t < count ? weight[t] : 0.0f;  // the rest is exact, or not there
          return static_cast<const float*>(cut + r * kBlock);
        };
        const float* weight[kHeads];
        float* to = out + h * rep * dim;
        int r = 0;
        for (; r + kHeads <= rep; r += kHeads) {
          for (int i = 0; i < kHeads; ++i) weight[i] = weights(r + i);
          value_block<B, kHeads, kSums>(codes, block, a.form, dim, weight, to + r * dim, scaled);
        }
        for (; r + 2 <= rep; r += 2) {
          weight[0] = weights(r), weight[1] = weights(r + 1);
          value_block<B, 2, 2>(codes, block, a.form, dim, weight, to + r * dim, scaled);
        }
        for (; r < rep; ++r) {
          weight[0] = weights(r);
          value_block<B, 1, 4>(codes, block, a.form, dim, weight, to + r * dim, scaled);
        }
      }
    }
  });
}

void kivi_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.key_dim, tokens = a.form.key_tokens();
  const std::size_t size = a.form.key_block_bytes(dim);
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    const Codes<B> codes;
    alignas(64) float lane[W];
    for (std::int64_t first = begin / tokens * tokens; first < end; first += tokens) {
      const std::uint8_t* block = a.key_block(first) + static_cast<std::size_t>(kv_head) * size;
      const f16* scales = halves(block + a.form.key_code_bytes(dim));
      const Planes<B> planes(block, tokens, dim);
      for (int t = 0; t < tokens; t += W) {
        if (first + t + W <= begin || first + t >= end) continue;
        for (int d = 0; d < dim; ++d) {
          const vi word = planes.main.load(d / kPerWord<B>, t);
          const vi plane = B == 3 ? ishift(planes.extra.load(d / 32, t), d / 16 * 16 % 32) : word;
          const vf scale = vset(half_to_float(scales[d])), minimum = vset(half_to_float(scales[dim + d]));
          vstore(lane, vfma(codes(word, plane, d % kPerWord<B>), scale, minimum));
          for (int i = 0; i < W; ++i) {
            const std::int64_t token = first + t + i;
            if (token >= begin && token < end) tile[(token - begin) * ld + d] = lane[i];
          }
        }
      }
    }
  });
}

void kivi_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  const int dim = a.head_dim, groups = dim / a.form.group;
  const std::size_t size = a.form.value_block_bytes(dim);
  with_bits(a.form.bits, [&](auto width) {
    constexpr int B = decltype(width)::value;
    const Codes<B> codes;
    for (std::int64_t token = begin; token < end; ++token) {
      const std::uint8_t* block = a.value_block(token) + static_cast<std::size_t>(kv_head) * size;
      const f16* scales = halves(block + a.form.value_code_bytes(dim));
      const std::uint32_t* main = words(block);
      const std::uint32_t* extra = main + kBlock / kPerWord<B> * dim;
      const int t = static_cast<int>(token % kBlock);
      for (int d = 0; d < dim; d += W) {
        const int g = d / a.form.group;
        const vi word = iload(main + t / kPerWord<B> * dim + d);
        const vi plane = B == 3 ? ishift(iload(extra + d), t / 16 * 16) : word;
        const vf scale = vset(half_to_float(scales[g * kBlock + t]));
        const vf minimum = vset(half_to_float(scales[(groups + g) * kBlock + t]));
        vstore(tile + (token - begin) * ld + d, vfma(codes(word, plane, t % kPerWord<B>), scale, minimum));
      }
    }
  });
}

void kivi_encode_key_block(const Rows& rows, const KiviForm& form, int kv_heads, int key_dim, std::uint8_t* block) {
  const std::int64_t stride = static_cast<std::int64_t>(kv_heads) * key_dim;
  const float levels = static_cast<float>((1 << form.bits) - 1);
  const int main_bits = form.bits == 3 ? 2 : form.bits, main_rows = (key_dim * main_bits + 31) / 32;
  const int all_rows = main_rows + (form.bits == 3 ? (key_dim + 31) / 32 : 0);
  static thread_local std::vector<std::uint32_t> whole;  // all rows of words as if none were short
  for (int h = 0; h < kv_heads; ++h, block += form.key_block_bytes(key_dim)) {
    whole.assign(static_cast<std::size_t>(all_rows) * form.key_tokens(), 0);
    f16* scales = reinterpret_cast<f16*>(block + form.key_code_bytes(key_dim));
    for (int d = 0; d < key_dim; ++d) {
      float x[kStep], low = __builtin_inff(), high = -__builtin_inff();
      for (int t = 0; t < form.key_tokens(); ++t) {
        x[t] = at(rows, t * stride + h * key_dim + d);
        low = x[t] < low ? x[t] : low, high = x[t] > high ? x[t] : high;
      }
      const Grid g = grid(low, high, form.bits, scales + d, scales + key_dim + d);
      for (int t = 0; t < form.key_tokens(); ++t) put(whole.data(), form.bits, main_rows, form.key_tokens(), t, d, code_of(x[t], g, levels));
    }
    std::uint8_t* behind = pack_plane(whole.data(), key_dim, 32 / main_bits, form.key_tokens(), block);
    if (form.bits == 3) pack_plane(whole.data() + main_rows * form.key_tokens(), key_dim, 32, form.key_tokens(), behind);
  }
}

void kivi_encode_value_rows(const Rows& rows, const KiviForm& form, int kv_heads, int head_dim, int slot, int count,
                            std::uint8_t* block) {
  const std::int64_t stride = static_cast<std::int64_t>(kv_heads) * head_dim;
  const float levels = static_cast<float>((1 << form.bits) - 1);
  const int groups = head_dim / form.group, main_rows = form.bits == 3 ? 2 : form.bits;
  for (int h = 0; h < kv_heads; ++h, block += form.value_block_bytes(head_dim)) {
    std::uint32_t* plane = reinterpret_cast<std::uint32_t*>(block);
    f16* scales = reinterpret_cast<f16*>(block + form.value_code_bytes(head_dim));
    if (slot == 0) std::memset(block, 0, form.value_block_bytes(head_dim));  // what is not there yet reads as zero
    for (int i = 0; i < count; ++i)
      for (int g = 0; g < groups; ++g) {
        float x[kStep], low = __builtin_inff(), high = -__builtin_inff();
        load_row(rows, i * stride + h * head_dim + g * form.group, form.group, x);
        for (int d = 0; d < form.group; ++d) low = x[d] < low ? x[d] : low, high = x[d] > high ? x[d] : high;
        const Grid cut = grid(low, high, form.bits, scales + g * kBlock + slot + i, scales + (groups + g) * kBlock + slot + i);
        put_row(plane + g * form.group, form.bits, main_rows, head_dim, slot + i, form.group, x, cut, levels);
      }
  }
}

}  // namespace mw::MW_ISA
