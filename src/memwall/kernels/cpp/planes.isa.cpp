// Bit-plane products: population counts of whole vectors by table look-up, sums of a row pair in registers until they are whole.
#include "linear_kernels.h"
#include "planes.h"
#include "tiles.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kVectorWords = kVectorBytes / 8;
// a byte counts up to 8 bits a vector, so this many vectors fit in its 255
constexpr std::int64_t kBurst = 31;

typedef std::uint64_t Vw __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX2__)
MW_INLINE Vb nibble_counts(Vb nibbles) {
  const __m128i table = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
#if defined(__AVX512F__)
  return (Vb)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)nibbles);
#else
  return (Vb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)nibbles);
#endif
}
// bits set in each byte
MW_INLINE Vb byte_counts(Vw v) {
  const Vb low = (Vb)v & 15, high = (Vb)((Vw)v >> 4) & 15;
  return nibble_counts(low) + nibble_counts(high);
}
// bytes added up in each 64-bit lane
MW_INLINE Vw lane_sums(Vb counts) {
#if defined(__AVX512F__)
  return (Vw)_mm512_sad_epu8((__m512i)counts, _mm512_setzero_si512());
#else
  return (Vw)_mm256_sad_epu8((__m256i)counts, _mm256_setzero_si256());
#endif
}

// popcount(w ^ x) of `vectors` vectors, per 64-bit lane
MW_INLINE Vw differing(const std::uint64_t* w, const std::uint64_t* x, std::int64_t vectors) {
  Vw total = {};
  for (std::int64_t v = 0; v < vectors;) {
    const std::int64_t stop = v + kBurst < vectors ? v + kBurst : vectors;
    Vb counts = {};
    for (; v < stop; ++v) counts += byte_counts(load<Vw>(w + v * kVectorWords) ^ load<Vw>(x + v * kVectorWords));
    total += lane_sums(counts);
  }
  return total;
}
MW_INLINE std::int64_t total_of(Vw lanes) {
  std::int64_t sum = 0;
  for (int i = 0; i < kVectorWords; ++i) sum += static_cast<std::int64_t>(lanes[i]);
  return sum;
}
#endif

// Differing bits of two rows of words beyond the whole vectors.
MW_INLINE std::int64_t differing_tail(const std::uint64_t* w, const std::uint64_t* x, std::int64_t from, std::int64_t words) {
  std::int64_t sum = 0;
  for (std::int64_t i = from; i < words; ++i) sum += __builtin_popcountll(w[i] ^ x[i]);
  return sum;
}

// sum_ij 2^(i+j) popcount(w_i ^ x_j) of one row of each, kept in registers throughout.
std::int64_t weighted_differences(const Planes& w, const Planes& x, std::int64_t w_row, std::int64_t x_row) {
  const std::int64_t words = w.row_words();
  std::int64_t sum = 0, whole = 0;
#if defined(__AVX2__)
  const std::int64_t vectors = words / kVectorWords;
  whole = vectors * kVectorWords;
  Vw lanes = {};
  for (int i = 0; i < w.bits && vectors; ++i)
    for (int j = 0; j < x.bits; ++j) lanes += differing(w.plane(w_row, i), x.plane(x_row, j), vectors) << (i + j);
  sum = total_of(lanes);
#endif
  for (int i = 0; i < w.bits && whole < words; ++i)
    for (int j = 0; j < x.bits; ++j) sum += differing_tail(w.plane(w_row, i), x.plane(x_row, j), whole, words) << (i + j);
  return sum;
}

void fused(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  // sum_ij 2^(i+j), the weight of the true number of columns
  const std::int64_t all = w.cols * ((1 << w.bits) - 1) * ((1 << x.bits) - 1);
  // a few rows of w stay in the first-level cache while every row of x passes
  constexpr std::int64_t kRows = 8;
  for (std::int64_t first = begin; first < end; first += kRows) {
    const std::int64_t last = first + kRows < end ? first + kRows : end;
    for (std::int64_t t = 0; t < x.rows; ++t)
      for (std::int64_t r = first; r < last; ++r)
        out[t * w.rows + r] = static_cast<std::int32_t>(all - 2 * weighted_differences(w, x, r, t));
  }
}

void apart(const Planes& w, const Planes& x, std::int64_t begin, std::int64_t end, std::int32_t* out) {
  for (int i = 0; i < w.bits; ++i)
    for (int j = 0; j < x.bits; ++j, out += x.rows * w.rows)
      for (std::int64_t t = 0; t < x.rows; ++t)
        for (std::int64_t r = begin; r < end; ++r) {
          const std::uint64_t *a = w.plane(r, i), *b = x.plane(t, j);
          const std::int64_t words = w.row_words();
          std::int64_t sum = 0, whole = 0;
#if defined(__AVX2__)
          const std::int64_t vectors = words / kVectorWords;
          whole = vectors * kVectorWords;
          sum = total_of(differing(a, b, vectors));
#endif
          sum += differing_tail(a, b, whole, words);
          out[t * w.rows + r] = static_cast<std::int32_t>(w.cols - 2 * sum);
        }
}

std::int64_t end_of_rows(const Matrix& m, std::int64_t end, std::int64_t strip) { return end * strip < m.rows ? end * strip : m.rows; }
std::int64_t strip_of(const Input& input) { return input.tokens == 1 ? kTileRows : kStripRows; }

}  // namespace

// The product of a layer: integer sums of a row and a token, times both scales.
void planes_rounded(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  const Planes w = m.planes(), &x = input.planes;
  const auto* scales = static_cast<const float*>(m.scales);
  const std::int64_t all = w.cols * ((1 << w.bits) - 1) * ((1 << x.bits) - 1), last = end_of_rows(m, end, strip_of(input));
  constexpr int kRows = 8;  // rows whose planes stay in the first-level cache while every token passes
  for (std::int64_t first = begin * strip_of(input); first < last; first += kRows) {
    const int count = static_cast<int>(last - first < kRows ? last - first : kRows);
    for (std::int64_t t = 0; t < input.tokens; ++t) {
      float values[kRows];
      for (int r = 0; r < count; ++r)
        values[r] = static_cast<float>(all - 2 * weighted_differences(w, x, first + r, t)) * (scales[first + r] * input.plane_scales[t]);
      write_rows(values, t, first, count, out);
    }
  }
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
      decode_planes(m.planes(), row, from, to, static_cast<const float*>(m.scales)[row], weights);
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
