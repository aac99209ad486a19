// Four vectors are compared with a query at a time, so that their sums are brought together at once.
#include "vector_distances.h"

#include <cstring>

#include "vector.h"

namespace mw::MW_ISA {
namespace {

typedef std::uint8_t Narrow __attribute__((vector_size(kWidth)));
typedef std::int8_t Signed __attribute__((vector_size(kWidth)));

struct Int8 {
  using Element = std::int8_t;
  static MW_INLINE Vf vector(const std::int8_t* from) {
#if defined(__AVX512F__)
    return to_float((Vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return to_float((Vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return to_float(__builtin_convertvector(load<Signed>(from), Vi));
#endif
  }
  static MW_INLINE float scalar(std::int8_t value) { return static_cast<float>(value); }
};
struct UInt8 {
  using Element = std::uint8_t;
  static MW_INLINE Vf vector(const std::uint8_t* from) {
#if defined(__AVX512F__)
    return to_float((Vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
    return to_float((Vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    return to_float(__builtin_convertvector(load<Narrow>(from), Vi));
#endif
  }
  static MW_INLINE float scalar(std::uint8_t value) { return static_cast<float>(value); }
};

// Vectors lie at any byte: an id may stand before each, so a number is never read through a pointer of its own type.
template <class T>
MW_INLINE Vf numbers(const std::uint8_t* row, int col) {
  return T::vector(reinterpret_cast<const typename T::Element*>(row + col * static_cast<int>(sizeof(typename T::Element))));
}
template <class T>
MW_INLINE Vf last_numbers(const std::uint8_t* row, int col, int left) {
  alignas(64) std::uint8_t copy[kWidth * sizeof(typename T::Element)] = {};
  std::memcpy(copy, row + col * static_cast<int>(sizeof(typename T::Element)), static_cast<std::size_t>(left) * sizeof(typename T::Element));
  return numbers<T>(copy, 0);
}

template <class T, int Rows>
MW_INLINE void group(const std::uint8_t* const* row, const float* query, int size, float* out) {
  Vf sum[4] = {};
  int col = 0;
  for (; col + kWidth <= size; col += kWidth) {
    const Vf q = load<Vf>(query + col);
    for (int r = 0; r < Rows; ++r) {
      const Vf apart = numbers<T>(row[r], col) - q;
      sum[r] += apart * apart;
    }
  }
  if (col < size) {
    const Vf q = load<Vf>(query + col);
    for (int r = 0; r < Rows; ++r) {
      const Vf apart = last_numbers<T>(row[r], col, size - col) - q;
      sum[r] += apart * apart;
    }
  }
  const Vf all = sums_of(sum[0], sum[1], sum[2], sum[3]);
  for (int r = 0; r < Rows; ++r) out[r] = all[r];
}

template <class T>
void squared(const VectorRows& rows, const float* query, const std::int32_t* ids, std::int64_t count, float* out) {
  const auto at = [&](std::int64_t i) { return rows.row(ids ? ids[i] : i); };
  const std::int64_t bytes = rows.size * static_cast<std::int64_t>(sizeof(typename T::Element));
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    if (ids)
      for (std::int64_t next = i + 4; next < i + 8 && next < count; ++next)
        for (std::int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at(next) + line);
    const std::uint8_t* const row[4] = {at(i), at(i + 1), at(i + 2), at(i + 3)};
    group<T, 4>(row, query, rows.size, out + i);
  }
  for (; i < count; ++i) {
    const std::uint8_t* const row[1] = {at(i)};
    group<T, 1>(row, query, rows.size, out + i);
  }
}

template <class T>
void decode(const VectorRows& rows, std::int64_t at, float* query) {
  const std::uint8_t* row = rows.row(at);
  for (int col = 0; col < rows.size; ++col) {
    typename T::Element value;
    std::memcpy(&value, row + col * sizeof value, sizeof value);
    query[col] = T::scalar(value);
  }
  for (int col = rows.size; col < rows.padded(); ++col) query[col] = 0.0f;
}

}  // namespace

extern const DistanceKernels vector_distance_kernels;
const DistanceKernels vector_distance_kernels = {{squared<Float32>, squared<Float16>, squared<Int8>, squared<UInt8>},
                                                 {decode<Float32>, decode<Float16>, decode<Int8>, decode<UInt8>}};

}  // namespace mw::MW_ISA
