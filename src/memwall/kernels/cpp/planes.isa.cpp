// Bit-plane products: population counts of whole vectors, by table look-up where there is no instruction; sums of a row pair stay in
// registers until they are whole.
// This file is compiled without fused multiplication and addition: its floats are the same on every processor.
#include "linear_kernels.h"
#include "planes.h"
#include "tiles.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kVectorWords = kVectorBytes / 8;

typedef std::uint64_t Vw __attribute__((vector_size(kVectorBytes)));

// Adds popcount(w ^ x) to each of N sums, per 64-bit lane, for N planes of w that lie one after another, `words` long each, and one
// plane of x. Returns how many words of each it has done; the rest is the caller's.
#if defined(__AVX512VPOPCNTDQ__)
template <int N>
MW_INLINE std::int64_t add_differing(const std::uint64_t* w, const std::uint64_t* x, std::int64_t words, Vw (&sums)[N]) {
  const auto add = [&](std::int64_t from, auto load_words) __attribute__((always_inline)) {
    const __m512i at = load_words(x + from);
    for (int i = 0; i < N; ++i) sums[i] += (Vw)_mm512_popcnt_epi64(_mm512_xor_si512(load_words(w + i * words + from), at));
  };
  std::int64_t from = 0;
  for (; from + kVectorWords <= words; from += kVectorWords) add(from, [](const std::uint64_t* at) { return (__m512i)load<Vw>(at); });
  const auto rest = static_cast<__mmask8>((1u << (words - from)) - 1);
  if (rest) add(from, [&](const std::uint64_t* at) { return _mm512_maskz_loadu_epi64(rest, at); });
  return words;
}
MW_INLINE std::int64_t total_of(Vw lanes) { return _mm512_reduce_add_epi64((__m512i)lanes); }
#elif defined(__AVX2__)
MW_INLINE Vb nibble_counts(Vb nibbles) {
  const __m128i table = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  return (Vb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)nibbles);
}
// bits set in each byte
MW_INLINE Vb byte_counts(Vw v) {
  const Vb low = (Vb)v & 15, high = (Vb)((Vw)v >> 4) & 15;
  return nibble_counts(low) + nibble_counts(high);
}
template <int N>
MW_INLINE std::int64_t add_differing(const std::uint64_t* w, const std::uint64_t* x, std::int64_t words, Vw (&sums)[N]) {
  // a byte counts up to 8 bits a vector, so this many vectors fit in its 255
  constexpr std::int64_t kBurst = 31 * kVectorWords;
  const std::int64_t whole = words / kVectorWords * kVectorWords;
  for (std::int64_t first = 0; first < whole; first += kBurst) {
    const std::int64_t stop = first + kBurst < whole ? first + kBurst : whole;
    Vb counts[N] = {};
    for (std::int64_t at = first; at < stop; at += kVectorWords) {
      const Vw from = load<Vw>(x + at);
      for (int i = 0; i < N; ++i) counts[i] += byte_counts(load<Vw>(w + i * words + at) ^ from);
    }
    for (int i = 0; i < N; ++i) sums[i] += (Vw)_mm256_sad_epu8((__m256i)counts[i], _mm256_setzero_si256());
  }
  return whole;
}
MW_INLINE std::int64_t total_of(Vw lanes) {
  return static_cast<std::int64_t>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}
#else
template <int N>
MW_INLINE std::int64_t add_differing(const std::uint64_t*, const std::uint64_t*, std::int64_t, Vw (&)[N]) {
  return 0;
}
MW_INLINE std::int64_t total_of(Vw) { return 0; }
#endif

// Differing bits of two rows of words from word `from` on.
MW_INLINE std::int64_t differing_tail(const std::uint64_t* w, const std::uint64_t* x, std::int64_t from, std::int64_t words) {
  std::int64_t sum = 0;
  for (std::int64_t i = from; i < words; ++i) sum += __builtin_popcountll(w[i] ^ x[i]);
  return sum;
}

// sum_ij 2^(i+j) popcount(w_i ^ x_j) of Rows rows of w, of N planes each, and one row of x, kept in registers throughout.
template <int N, int Rows>
MW_INLINE void weighted_differences(const Planes& w, const Planes& x, std::int64_t w_row, std::int64_t x_row, std::int64_t* to) {
  const std::int64_t words = w.row_words();
  std::int64_t done = 0;
  Vw lanes[Rows] = {};
  for (int j = 0; j < x.bits; ++j) {
    Vw sums[Rows * N] = {};
    done = add_differing<Rows * N>(w.plane(w_row, 0), x.plane(x_row, j), words, sums);
    for (int r = 0; r < Rows; ++r)
      for (int i = 0; i < N; ++i) lanes[r] += sums[r * N + i] << (i + j);
  }
  for (int r = 0; r < Rows; ++r) {
    to[r] = total_of(lanes[r]);
    for (int i = 0; i < N && done < words; ++i)
      for (int j = 0; j < x.bits; ++j) to[r] += differing_tail(w.plane(w_row + r, i), x.plane(x_row, j), done, words) << (i + j);
  }
}

// The same for any number of rows: as many together as have their planes' sums in eight registers.
template <int N>
MW_INLINE void weighted_differences(const Planes& w, const Planes& x, std::int64_t w_row, int rows, std::int64_t x_row, std::int64_t* to) {
  constexpr int kTogether = N > 4 ? 1 : 8 / N;
  int r = 0;
  for (; r + kTogether <= rows; r += kTogether) weighted_differences<N, kTogether>(w, x, w_row + r, x_row, to + r);
  for (; r < rows; ++r) weighted_differences<N, 1>(w, x, w_row + r, x_row, to + r);
}

// Rows whose planes stay in the first-level cache while every token passes.
constexpr int kRows = 8;

template <int N>
void fused_rows(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  // sum_ij 2^(i+j), the weight of the true number of columns
  const std::int64_t all = w.cols * ((1 << w.bits) - 1) * ((1 << x.bits) - 1);
  for (std::int64_t first = begin; first < end; first += kRows) {
    const int count = static_cast<int>(end - first < kRows ? end - first : kRows);
    for (std::int64_t t = 0; t < x.rows; ++t) {
      std::int64_t sums[kRows];
      weighted_differences<N>(w, x, first, count, t, sums);
      for (int r = 0; r < count; ++r) out[t * w.rows + first + r] = static_cast<std::int32_t>(all - 2 * sums[r]);
    }
  }
}
void fused(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  with_bits(w.bits, [&](auto bits) { fused_rows<decltype(bits)::value>(w, x, begin, end, out); });
}

void apart(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  for (int i = 0; i < w.bits; ++i)
    for (int j = 0; j < x.bits; ++j, out += x.rows * w.rows)
      for (std::int64_t t = 0; t < x.rows; ++t)
        for (std::int64_t r = begin; r < end; ++r) {
          const std::uint64_t *a = w.plane(r, i), *b = x.plane(t, j);
          const std::int64_t words = w.row_words();
          Vw sums[1] = {};
          const std::int64_t done = add_differing<1>(a, b, words, sums), sum = total_of(sums[0]) + differing_tail(a, b, done, words);
          out[t * w.rows + r] = static_cast<std::int32_t>(w.cols - 2 * sum);
        }
}

std::int64_t end_of_rows(const Matrix& m, std::int64_t end, std::int64_t strip) { return end * strip < m.rows ? end * strip : m.rows; }
std::int64_t strip_of(const Input& input) { return input.tokens == 1 ? kTileRows : kStripRows; }

// The product of a layer: integer sums of a row and a token, times both scales.
template <int N>
void rounded_rows(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out) {
  const Planes w = m.planes(), &x = input.planes;
  const auto* scales = static_cast<const float*>(m.scales);
  const std::int64_t all = w.cols * ((1 << w.bits) - 1) * ((1 << x.bits) - 1), last = end_of_rows(m, end, strip_of(input));
  for (std::int64_t first = begin * strip_of(input); first < last; first += kRows) {
    const int count = static_cast<int>(last - first < kRows ? last - first : kRows);
    for (std::int64_t t = 0; t < input.tokens; ++t) {
      std::int64_t sums[kRows];
      float values[kRows];
      weighted_differences<N>(w, x, first, count, t, sums);
      for (int r = 0; r < count; ++r) values[r] = static_cast<float>(all - 2 * sums[r]) * (scales[first + r] * input.plane_scales[t]);
      write_rows(values, t, first, count, out);
    }
  }
}

// With a scale for every word of both sides a word's sum leaves the integers: float32 sums of words by their number modulo kSums,
// then added in pairs of the first and the second half.
constexpr int kSums = 8;

// One row, of N planes, and one token.
template <int N>
MW_INLINE float grouped_product(const Planes& w, const Planes& x, std::int64_t row, std::int64_t token, const std::uint16_t* w_scales, const float* x_scales) {
  const std::int64_t words = w.row_words();
  const std::int64_t weight = ((1 << N) - 1) * ((1 << x.bits) - 1), rest = w.cols - (words - 1) * kWordBits;  // columns of the last word
  const std::uint64_t *a = w.plane(row, 0), *b = x.plane(token, 0);
  alignas(32) float sums[kSums] = {};
#if defined(__AVX512VPOPCNTDQ__)
  static_assert(kVectorWords == kSums);
  __m256 lanes = _mm256_setzero_ps();
  const auto add = [&](std::int64_t from, __mmask8 mask, __m512i whole) __attribute__((always_inline)) {
    Vw differing = {};
    for (int j = 0; j < x.bits; ++j) {
      const __m512i at = _mm512_maskz_loadu_epi64(mask, b + j * words + from);
      for (int i = 0; i < N; ++i)
        differing += (Vw)_mm512_popcnt_epi64(_mm512_xor_si512(_mm512_maskz_loadu_epi64(mask, a + i * words + from), at)) << (i + j);
    }
    const __m256 scale = _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, w_scales + from)) * _mm256_maskz_loadu_ps(mask, x_scales + from);
    const __m256 term = _mm512_cvtepi64_ps((__m512i)((Vw)whole - 2 * differing)) * scale;
    lanes = _mm256_mask_add_ps(lanes, mask, lanes, term);
  };
  const __m512i full = _mm512_set1_epi64(kWordBits * weight);
  std::int64_t from = 0;
  for (; from + kSums < words; from += kSums) add(from, 0xff, full);
  const auto last = static_cast<__mmask8>((1u << (words - from)) - 1);
  add(from, last, _mm512_mask_set1_epi64(full, static_cast<__mmask8>(1u << (words - from - 1)), rest * weight));
  _mm256_store_ps(sums, lanes);
#else
  for (std::int64_t word = 0; word < words; ++word) {
    std::int64_t differing = 0;
    for (int j = 0; j < x.bits; ++j)
      for (int i = 0; i < N; ++i) differing += static_cast<std::int64_t>(__builtin_popcountll(a[i * words + word] ^ b[j * words + word])) << (i + j);
    const std::int64_t sum = (word + 1 < words ? kWordBits : rest) * weight - 2 * differing;
    sums[word % kSums] += static_cast<float>(sum) * (half_to_float(w_scales[word]) * x_scales[word]);
  }
#endif
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

template <int N>
void grouped_rows(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out) {
  const Planes w = m.planes(), &x = input.planes;
  const auto* scales = static_cast<const std::uint16_t*>(m.scales);
  const std::int64_t last = end_of_rows(m, end, strip_of(input)), words = w.row_words();
  for (std::int64_t first = begin * strip_of(input); first < last; first += kRows) {
    const int count = static_cast<int>(last - first < kRows ? last - first : kRows);
    for (std::int64_t t = 0; t < input.tokens; ++t) {
      float values[kRows];
      for (int r = 0; r < count; ++r)
        values[r] = grouped_product<N>(w, x, first + r, t, scales + (first + r) * words, input.plane_scales + t * words);
      write_rows(values, t, first, count, out);
    }
  }
}

}  // namespace

void planes_rounded(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  with_bits(m.bits, [&](auto bits) {
    (m.plane_groups() ? grouped_rows<decltype(bits)::value> : rounded_rows<decltype(bits)::value>)(m, input, begin, end, out);
  });
}

// Activations as they are, weights decoded a piece at a time.
void planes_exact(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  constexpr std::int64_t kPiece = 4096;
  static_assert((kPiece + kMaxTokens) * sizeof(float) <= kWorkerScratchBytes);
  auto* weights = reinterpret_cast<float*>(scratch);
  float* sums = weights + kPiece;
  for (std::int64_t row = begin * kStripRows; row < end_of_rows(m, end, kStripRows); ++row) {
    for (std::int64_t t = 0; t < input.tokens; ++t) sums[t] = 0;
    for (std::int64_t from = 0; from < m.cols; from += kPiece) {
      const std::int64_t to = from + kPiece < m.cols ? from + kPiece : m.cols;
      decode_planes(m.planes(), row, from, to, [&](std::int64_t word) { return m.plane_scale(row, word); }, weights);
      for (std::int64_t t = 0; t < input.tokens; ++t) {
        const float* x = input.x + t * input.cols;
        Vf lanes = {};
        std::int64_t c = from;
        for (; c + kWidth <= to; c += kWidth) lanes += load<Vf>(weights + c - from) * load<Vf>(x + c);
        float sum = sum_of(lanes);
        for (; c < to; ++c) sum += weights[c - from] * x[c];
        sums[t] += sum;
      }
    }
    for (std::int64_t t = 0; t < input.tokens; ++t) write_rows(sums + t, t, row, 1, out);
  }
}

extern const PlaneKernels plane_kernels;
const PlaneKernels plane_kernels = {fused, apart};

}  // namespace mw::MW_ISA
