// A number of a minifloat, its bits set at the right place of a float16, is that float16 times a power of two: the processor's own
// conversion decodes it, subnormals too, and the power is multiplied once for a whole row.
#include "row_scores.h"

#include <cmath>
#include <cstring>

#include "vector.h"

namespace mw::MW_ISA {
namespace {

typedef std::uint8_t Lane8 __attribute__((vector_size(kWidth)));
typedef std::uint8_t Lane4 __attribute__((vector_size(kWidth / 2)));
typedef std::int16_t Half __attribute__((vector_size(2 * kWidth)));
typedef std::uint32_t Pairs __attribute__((vector_size(2 * kWidth)));

MW_INLINE Vf of_halves(Half v) {
#if defined(__AVX512F__)
  return (Vf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__AVX2__)
  return (Vf)_mm256_cvtph_ps((__m128i)v);
#else
  std::uint16_t lane[kWidth];
  std::memcpy(lane, &v, sizeof lane);
  return load_half(lane);
#endif
}

// A form: bytes that kWidth columns take, what they are times 1 / kUnit.
template <class T>
struct Plain {
  static constexpr int kBytes = kWidth * static_cast<int>(sizeof(typename T::Element));
  static constexpr float kUnit = 1.0f;
  static MW_INLINE Vf decode(const std::uint8_t* from) { return T::vector(reinterpret_cast<const typename T::Element*>(from)); }
};
// Bytes as 16-bit numbers, in the high half.
MW_INLINE Half widened(const std::uint8_t* from) {
#if defined(__AVX512F__)
  return (Half)_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))) << 8;
#elif defined(__AVX2__)
  return (Half)_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))) << 8;
#else
  return __builtin_convertvector(load<Lane8>(from), Half) << 8;
#endif
}
struct E4m3 {
  static constexpr int kBytes = kWidth;
  static constexpr float kUnit = 256.0f;  // biases of 15 and 7
  static MW_INLINE Vf decode(const std::uint8_t* from) { return of_halves((widened(from) >> 1) & static_cast<std::int16_t>(0xbfff)); }
};
struct E5m2 {
  static constexpr int kBytes = kWidth;
  static constexpr float kUnit = 1.0f;
  static MW_INLINE Vf decode(const std::uint8_t* from) { return of_halves(widened(from)); }
};
struct E2m1 {
  static constexpr int kBytes = kWidth / 2;
  static constexpr float kUnit = 16384.0f;  // biases of 15 and 1
  static MW_INLINE Vf decode(const std::uint8_t* from) {
#if defined(__AVX512F__)
    const Pairs both = (Pairs)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    std::int32_t four;
    std::memcpy(&four, from, sizeof four);
    const Pairs both = (Pairs)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
#else
    const Pairs both = __builtin_convertvector(load<Lane4>(from), Pairs);
#endif
    const Half high = (Half)((both << 12 & 0xf000u) | (both << 24 & 0xf0000000u));
    return of_halves((high >> 3) & static_cast<std::int16_t>(0x8e00));
  }
};
struct Bytes {
  static constexpr int kBytes = kWidth;
  static constexpr float kUnit = 1.0f;
  static MW_INLINE Vf decode(const std::uint8_t* from) {
#if defined(__AVX512F__)
    return to_float((Vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return to_float((Vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return to_float(__builtin_convertvector(load<Lane8>(from), Vi));
#endif
  }
};

constexpr int kSums = 4;  // that grow apart, so that additions need not wait for each other

// f(numbers, first column, which sum) over a row; the last vector is read from a copy, so that nothing after it is touched.
template <class Form, bool Steps, class F>
MW_INLINE void each_vector(const RowTask& task, const std::uint8_t* row, F&& f) {
  const auto numbers = [&](const std::uint8_t* from, std::int64_t col) {
    Vf v = Form::decode(from);
    if constexpr (Steps) v = v * (load<Vf>(task.steps + col) * Form::kUnit) + load<Vf>(task.offsets + col);
    return v;
  };
  std::int64_t col = 0;
  for (; col + kSums * kWidth <= task.cols; col += kSums * kWidth, row += kSums * Form::kBytes)
    static_for<kSums>([&](auto i) { f(numbers(row + i.value * Form::kBytes, col + i.value * kWidth), col + i.value * kWidth, i); });
  for (; col + kWidth <= task.cols; col += kWidth, row += Form::kBytes) f(numbers(row, col), col, Index<0>{});
  if (col < task.cols) {
    std::uint8_t last[Form::kBytes] = {};
    std::memcpy(last, row, static_cast<std::size_t>(packed_row_bytes(task.form, task.cols - col)));
    f(numbers(last, col), col, Index<1>{});
  }
}

MW_INLINE float divided(float product, float squares, bool cosine) {
  if (!cosine) return product;
  return squares > 0 ? product / std::sqrt(squares) : 0.0f;
}

template <class Form, bool Steps>
void one_query(const RowTask& task, std::int64_t begin, std::int64_t end) {
  const float unit = task.cosine || Steps ? 1.0f : Form::kUnit;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::uint8_t* row = task.rows + r * task.row_bytes;
    Vf dot[kSums] = {}, squares[kSums] = {};
    each_vector<Form, Steps>(task, row, [&](Vf v, std::int64_t col, auto i) {
      dot[i.value] += v * load<Vf>(task.queries + col);
      squares[i.value] += v * v;
    });
    const Vf both = sums_of(dot[0] + dot[1], dot[2] + dot[3], squares[0] + squares[1], squares[2] + squares[3]);
    task.scores[r] = divided((both[0] + both[1]) * unit, both[2] + both[3], task.cosine);
  }
}

// products[row][query] of a panel's rows with Queries queries
template <int Queries>
MW_INLINE void panel_products(const float* panel, const float* queries, std::int64_t cols, float (*products)[Queries]) {
  Vf sum[kPanelRows][Queries] = {};
  for (std::int64_t col = 0; col < cols; col += kWidth)
    for (int q = 0; q < Queries; ++q) {
      const Vf x = load<Vf>(queries + q * cols + col);
      for (int r = 0; r < kPanelRows; ++r) sum[r][q] += x * load<Vf>(panel + r * cols + col);
    }
  for (int r = 0; r < kPanelRows; ++r)
    for (int q = 0; q < Queries; ++q) products[r][q] = sum_of(sum[r][q]);
}

template <class Form, bool Steps>
void several_queries(const RowTask& task, std::int64_t begin, std::int64_t end, float* panel) {
  const std::int64_t cols = padded_cols(task.cols);
  const float unit = Steps ? 1.0f : Form::kUnit;
  std::memset(panel, 0, sizeof(float) * static_cast<std::size_t>(kPanelRows * cols));  // what no column fills stays zero
  for (; begin < end; begin += kPanelRows) {
    const int rows = static_cast<int>(end - begin < kPanelRows ? end - begin : kPanelRows);
    float factors[kPanelRows] = {};
    for (int r = 0; r < rows; ++r) {
      Vf squares[kSums] = {};
      each_vector<Form, Steps>(task, task.rows + (begin + r) * task.row_bytes, [&](Vf v, std::int64_t col, auto i) {
        squares[i.value] += v * v;
        store(panel + r * cols + col, v);
      });
      const float whole = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3]));
      factors[r] = divided(task.cosine ? 1.0f : unit, whole, task.cosine);
    }
    const auto multiply = [&](auto count, std::int64_t query) {
      constexpr int kQueries = decltype(count)::value;
      float products[kPanelRows][kQueries];
      panel_products<kQueries>(panel, task.queries + query * cols, cols, products);
      for (int q = 0; q < kQueries; ++q)
        for (int r = 0; r < rows; ++r) task.scores[(query + q) * task.num_rows + begin + r] = products[r][q] * factors[r];
    };
    std::int64_t query = 0;
    for (; query + 2 <= task.num_queries; query += 2) multiply(Index<2>{}, query);
    if (query < task.num_queries) multiply(Index<1>{}, query);
  }
}

template <class Form, bool Steps>
void of_form(const RowTask& task, std::int64_t begin, std::int64_t end, float* panel) {
  if (task.num_queries == 1) one_query<Form, Steps>(task, begin, end);
  else several_queries<Form, Steps>(task, begin, end, panel);
}

void scores(const RowTask& task, std::int64_t begin, std::int64_t end, float* panel) {
  const bool steps = task.steps != nullptr;
  switch (task.form) {
    case RowForm::float32: return of_form<Plain<Float32>, false>(task, begin, end, panel);
    case RowForm::float16: return of_form<Plain<Float16>, false>(task, begin, end, panel);
    case RowForm::bfloat16: return of_form<Plain<BFloat16>, false>(task, begin, end, panel);
    case RowForm::e4m3: return of_form<E4m3, false>(task, begin, end, panel);
    case RowForm::e5m2: return of_form<E5m2, false>(task, begin, end, panel);
    case RowForm::e2m1: return steps ? of_form<E2m1, true>(task, begin, end, panel) : of_form<E2m1, false>(task, begin, end, panel);
    case RowForm::bytes: return steps ? of_form<Bytes, true>(task, begin, end, panel) : of_form<Bytes, false>(task, begin, end, panel);
    case RowForm::count: return;
  }
}

MW_INLINE std::uint64_t word_at(const std::uint8_t* from, std::int64_t bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, from, static_cast<std::size_t>(bytes));
  return word;
}

void bits(const BitTask& task, std::int64_t begin, std::int64_t end) {
  for (std::int64_t r = begin; r < end; ++r) {
    const std::uint8_t* row = task.rows + r * task.row_bytes;
    for (std::int64_t q = 0; q < task.num_queries; ++q) {
      const std::uint8_t* query = task.queries + q * task.row_bytes;
      std::int64_t row_ones = 0, query_ones = 0, common = 0, at = 0;
      const auto add = [&](std::uint64_t a, std::uint64_t b) {
        row_ones += __builtin_popcountll(a);
        query_ones += __builtin_popcountll(b);
        common += __builtin_popcountll(task.signs ? a ^ b : a & b);
      };
      for (; at + 8 <= task.row_bytes; at += 8) add(word_at(row + at, 8), word_at(query + at, 8));
      if (at < task.row_bytes) add(word_at(row + at, task.row_bytes - at), word_at(query + at, task.row_bytes - at));
      float& score = task.scores[q * task.num_rows + r];
      if (task.signs) score = static_cast<float>(task.cols - 2 * common) / static_cast<float>(task.cols);
      else score = common > 0 ? static_cast<float>(common) / std::sqrt(static_cast<float>(row_ones) * static_cast<float>(query_ones)) : 0.0f;
    }
  }
}

}  // namespace

extern const RowKernels row_kernels;
const RowKernels row_kernels = {scores, bits};

}  // namespace mw::MW_ISA
