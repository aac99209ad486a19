// Products with codebooks by look-up: a vector of rows is fetched, multiplied with its column's input and added up; no weight is
// ever written down. Several tokens read a decoded panel instead, of which linear_float.isa.cpp makes the products.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kChunk = 64;  // columns whose indices are unpacked at once

// Registers that a vector's rows are fetched to. Lanes past its end hold whatever stands behind it in the codebook.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
template <int Width> struct FloatsOf;
template <> struct FloatsOf<4> { using type = Floats4; };
template <> struct FloatsOf<8> { using type = Floats8; };
template <> struct FloatsOf<16> { using type = Floats16; };

template <int Width>
struct Lanes {
  static constexpr int kWidthOf = Width;
  using Floats = typename FloatsOf<Width>::type;

  static MW_INLINE Floats fetch(const std::uint16_t* from) {
#if defined(__AVX512F__)
    if constexpr (Width == 16) return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
#if defined(__AVX2__)
    if constexpr (Width == 8) return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    // finite numbers only, which formats/vptq.py sees to: the exponent is moved, and what it lacks multiplied in
    typedef std::uint16_t Halves __attribute__((vector_size(8)));
    typedef std::int32_t Words __attribute__((vector_size(16)));
    const Words half = __builtin_convertvector(load<Halves>(from), Words);
    const Floats magnitude = (Floats)((half & 0x7fff) << 13) * float_of_bits(0x77800000u);
    return (Floats)((Words)magnitude | (half & 0x8000) << 16);
#endif
  }
};

// Where the vectors of one stream begin in their codebooks, in halves, for `count` columns from `first` (a multiple of 16) on.
struct Unpacked {
  alignas(64) std::int32_t main[kChunk], residual[kChunk];
};

MW_INLINE void unpack(const Codebooks& part, const std::uint32_t* stream, std::int64_t first, int count, Unpacked& to) {
  const int bits = part.bits(), main_bits = part.main_bits;
  const std::int32_t main_mask = static_cast<std::int32_t>((std::int64_t{1} << main_bits) - 1);
  int at = 0;
#if defined(__AVX512VBMI__)
  if (bits <= 25) {  // an index and the bits before it fit in four bytes
    alignas(64) std::uint8_t picks[64];
    alignas(64) std::int32_t shifts[16];
    for (int lane = 0; lane < 16; ++lane) {
      shifts[lane] = lane * bits % 8;
      for (int byte = 0; byte < 4; ++byte) picks[4 * lane + byte] = static_cast<std::uint8_t>(lane * bits / 8 + byte);
    }
    const __m512i pick = _mm512_load_si512(picks), shift = _mm512_load_si512(shifts);
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), low = _mm512_set1_epi32(main_mask), width = _mm512_set1_epi32(part.vector);
    const char* from = reinterpret_cast<const char*>(stream) + first / 16 * 2 * bits;
    for (; at < count; at += 16, from += 2 * bits) {
      const __m512i raw = _mm512_permutexvar_epi8(pick, _mm512_loadu_si512(from));
      const __m512i codes = _mm512_and_si512(_mm512_srlv_epi32(raw, shift), mask);
      _mm512_store_si512(to.main + at, _mm512_mullo_epi32(_mm512_and_si512(codes, low), width));
      if (part.residuals) _mm512_store_si512(to.residual + at, _mm512_mullo_epi32(_mm512_srli_epi32(codes, main_bits), width));
    }
    return;
  }
#elif defined(__AVX2__)
  if (bits <= 25) {
    alignas(32) std::uint8_t picks[32];
    alignas(32) std::int32_t shifts[8];
    for (int lane = 0; lane < 8; ++lane) {  // the upper four come out of a second window, that starts at a whole byte
      const int bit = lane < 4 ? lane * bits : (lane - 4) * bits + 4 * bits % 8;
      shifts[lane] = bit % 8;
      for (int byte = 0; byte < 4; ++byte) picks[4 * lane + byte] = static_cast<std::uint8_t>(bit / 8 + byte);
    }
    const __m256i pick = _mm256_load_si256(reinterpret_cast<const __m256i*>(picks));
    const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1), low = _mm256_set1_epi32(main_mask), width = _mm256_set1_epi32(part.vector);
    const char* from = reinterpret_cast<const char*>(stream) + first / 8 * bits;
    for (; at < count; at += 8, from += bits) {
      const __m256i raw = _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(from + bits / 2), reinterpret_cast<const __m128i*>(from));
      const __m256i codes = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(raw, pick), shift), mask);
      _mm256_store_si256(reinterpret_cast<__m256i*>(to.main + at), _mm256_mullo_epi32(_mm256_and_si256(codes, low), width));
      if (part.residuals)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to.residual + at), _mm256_mullo_epi32(_mm256_srli_epi32(codes, main_bits), width));
    }
    return;
  }
#endif
  for (; at < count; ++at) {
    const std::uint32_t code = index_at(stream, first + at, bits);
    to.main[at] = (static_cast<std::int32_t>(code) & main_mask) * part.vector;
    to.residual[at] = part.residuals ? static_cast<std::int32_t>(code >> main_bits) * part.vector : 0;
  }
}

// One token times `Rows` neighbouring vectors, their rows one after the other in `out`; those past the end repeat the last. Blocks:
// whether the vectors may have codebooks of their own.
template <class L, int Pieces, int Rows, bool Residual, bool Blocks>
void vectors_times(const Codebooks& part, const float* x, std::int64_t first_row, float* out) {
  using Floats = typename L::Floats;
  Unpacked at[Rows];
  Floats sums[Rows][Pieces] = {};
  for (std::int64_t g = 0; g < part.groups; ++g) {
    const std::int64_t begin = part.group_begin(g), size = part.group_begin(g + 1) - begin;
    constexpr int kBooks = Blocks ? Rows : 1;
    const std::uint16_t *main[kBooks], *residual[kBooks];
    for (int r = 0; r < kBooks; ++r) {
      const std::int64_t row = first_row + r < part.vector_rows ? first_row + r : part.vector_rows - 1;
      main[r] = part.main_book(g, row);
      residual[r] = Residual ? part.residual_book(g, row) : nullptr;
    }
    const float* values = x + part.first_col + begin;
    for (std::int64_t c = 0; c < size; c += kChunk) {
      const int count = static_cast<int>(size - c < kChunk ? size - c : kChunk);
      for (int r = 0; r < Rows; ++r) {
        const std::int64_t row = first_row + r < part.vector_rows ? first_row + r : part.vector_rows - 1;
        unpack(part, part.stream(g, row), c, count, at[r]);
      }
      for (int i = 0; i < count; ++i) {
        const Floats value = values[c + i] - Floats{};
        for (int r = 0; r < Rows; ++r)
          for (int p = 0; p < Pieces; ++p) {
            Floats weights = L::fetch(main[Blocks ? r : 0] + at[r].main[i] + p * L::kWidthOf);
            if constexpr (Residual) weights += L::fetch(residual[Blocks ? r : 0] + at[r].residual[i] + p * L::kWidthOf);
            sums[r][p] += weights * value;
          }
      }
    }
  }
  for (int r = 0; r < Rows; ++r)  // in order: what a vector writes past its rows, the next one writes over
    for (int p = 0; p < Pieces; ++p) store(out + r * part.vector + p * L::kWidthOf, sums[r][p]);
}

// Calls f with the registers that fit a vector's length, and how many of them it takes.
template <class F>
MW_INLINE void with_lanes(int vector, F&& f) {
#if defined(__AVX512F__)
  if (vector <= 8) f(Lanes<8>{}, Index<1>{});
  else f(Lanes<16>{}, Index<1>{});
#elif defined(__AVX2__)
  if (vector <= 8) f(Lanes<8>{}, Index<1>{});
  else f(Lanes<8>{}, Index<2>{});
#else
  if (vector <= 4) f(Lanes<4>{}, Index<1>{});
  else if (vector <= 8) f(Lanes<4>{}, Index<2>{});
  else f(Lanes<4>{}, Index<4>{});
#endif
}

constexpr int kRowsTogether = kWidth == 16 ? 8 : 4;
constexpr int kStripRowsMost = kVectorsTogether * kMostVector;

// Adds one token times the rows [first_row, first_row + num_rows) of `part` to `sums`.
void add_rows(const Codebooks& part, const float* x, std::int64_t first_row, int num_rows, float* sums) {
  alignas(64) float out[kRowsTogether * kMostVector + 16];
  const std::int64_t last = (first_row + num_rows + part.vector - 1) / part.vector;
  for (std::int64_t row = first_row / part.vector; row < last && row < part.vector_rows; row += kRowsTogether) {
    with_lanes(part.vector, [&](auto lanes, auto pieces) {
      using L = decltype(lanes);
      constexpr int kPiecesOf = decltype(pieces)::value;
      const bool apart = part.block && row / part.block != (row + kRowsTogether - 1) / part.block;
      if (part.residuals && apart) vectors_times<L, kPiecesOf, kRowsTogether, true, true>(part, x, row, out);
      else if (part.residuals) vectors_times<L, kPiecesOf, kRowsTogether, true, false>(part, x, row, out);
      else if (apart) vectors_times<L, kPiecesOf, kRowsTogether, false, true>(part, x, row, out);
      else vectors_times<L, kPiecesOf, kRowsTogether, false, false>(part, x, row, out);
    });
    const std::int64_t start = row * part.vector - first_row;
    for (int i = 0; i < kRowsTogether * part.vector; ++i)
      if (start + i >= 0 && start + i < num_rows) sums[start + i] += out[i];
  }
}

// Decodes columns [first_col, first_col + num_cols) of `part` (of the part's own) for one strip of rows into a panel.
template <class L, int Pieces>
void part_panel(const Codebooks& part, std::int64_t first_row, std::int64_t first_col, int num_cols, float* panel) {
  constexpr int kMostVectors = kStripRows + 1;
  Unpacked at[kMostVectors];
  alignas(64) float column[kMostVector + kStripRows + kMostVector + 16];
  const std::int64_t first_vector = first_row / part.vector;
  const int before = static_cast<int>(first_row - first_vector * part.vector);
  std::int64_t end_vector = (first_row + kStripRows + part.vector - 1) / part.vector;
  if (end_vector > part.vector_rows) end_vector = part.vector_rows;
  const int vectors = static_cast<int>(end_vector - first_vector);
  for (std::int64_t g = 0; g < part.groups; ++g) {
    const std::int64_t begin = part.group_begin(g), end = part.group_begin(g + 1);
    const std::uint16_t *mains[kMostVectors], *residuals[kMostVectors];
    for (int r = 0; r < vectors; ++r) {
      mains[r] = part.main_book(g, first_vector + r);
      residuals[r] = part.residuals ? part.residual_book(g, first_vector + r) : nullptr;
    }
    std::int64_t from = first_col > begin ? first_col : begin;
    const std::int64_t to = first_col + num_cols < end ? first_col + num_cols : end;
    while (from < to) {
      const std::int64_t aligned = (from - begin) / 16 * 16;  // of the stream's columns
      const int skipped = static_cast<int>(from - begin - aligned);
      const int count = static_cast<int>(to - begin - aligned < kChunk ? to - begin - aligned : kChunk);
      for (int r = 0; r < vectors; ++r) unpack(part, part.stream(g, first_vector + r), aligned, count, at[r]);
      for (int i = skipped; i < count; ++i) {
        float* to_rows = column + kMostVector - before;
        for (int r = 0; r < vectors; ++r)
          for (int p = 0; p < Pieces; ++p) {
            auto weights = L::fetch(mains[r] + at[r].main[i] + p * L::kWidthOf);
            if (part.residuals) weights += L::fetch(residuals[r] + at[r].residual[i] + p * L::kWidthOf);
            store(to_rows + r * part.vector + p * L::kWidthOf, weights);
          }
        float* to_panel = panel + (begin + aligned + i - first_col) * kStripRows;
        for (int v = 0; v < kStripVectors; ++v) store(to_panel + v * kWidth, load<Vf>(column + kMostVector + v * kWidth));
      }
      from = begin + aligned + count;
    }
  }
}

}  // namespace

void codebook_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  const CodebookMatrix& books = *m.codebooks;
  const int strip_rows = kVectorsTogether * books.rest.vector;
  for (std::int64_t strip = begin; strip < end; ++strip) {
    alignas(64) float sums[kStripRowsMost];
    for (float& sum : sums) sum = input.offsets ? input.offsets[0] : 0.0f;
    if (books.outliers.cols) add_rows(books.outliers, input.x, strip * strip_rows, strip_rows, sums);
    if (books.rest.cols) add_rows(books.rest, input.x, strip * strip_rows, strip_rows, sums);
    write_rows(sums, 0, strip * strip_rows, strip_rows, out);
  }
}

// Rows of one strip, columns after one another in kStripRows floats each: what is looked up, without scale and offset.
void codebook_panel(const Matrix& m, std::int64_t first_row, std::int64_t first_col, int num_cols, float* panel) {
  for (const Codebooks* part : {&m.codebooks->outliers, &m.codebooks->rest}) {
    const std::int64_t part_end = part->first_col + part->cols;
    const std::int64_t from = first_col > part->first_col ? first_col : part->first_col;
    const std::int64_t to = first_col + num_cols < part_end ? first_col + num_cols : part_end;
    if (from >= to) continue;
    with_lanes(part->vector, [&](auto lanes, auto pieces) {
      part_panel<decltype(lanes), decltype(pieces)::value>(*part, first_row, from - part->first_col, static_cast<int>(to - from),
                                                           panel + (from - first_col) * kStripRows);
    });
  }
}

}  // namespace mw::MW_ISA
