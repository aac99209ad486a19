// Weights as indices of vectors (formats/vptq.py defines them): an index names `vector` consecutive rows of one column.
#pragma once

#include <cstdint>

namespace mw {

// Indices and codebooks of some neighbouring columns, cut in groups that have a codebook each, or one per block of rows.
struct Codebooks {
  std::int64_t first_col = 0, cols = 0, groups = 0;
  int vector = 1;                             // rows that one index stands for
  int main_bits = 0, residual_bits = 0;       // of an index: the low bits name a centroid, the high ones what is added to it
  std::int64_t vector_rows = 0, words = 0;    // streams of a group, and 32-bit words of a stream
  std::int64_t block = 0;                     // rows of vectors that share codebooks; 0: all
  const std::uint32_t* indices = nullptr;     // [groups, vector_rows, words], and 64 bytes that vectors may read past them
  const std::uint16_t* centroids = nullptr;   // float16 [blocks, groups, 1 << main_bits, vector], and 32 bytes alike
  const std::uint16_t* residuals = nullptr;   // float16 [blocks, groups, 1 << residual_bits, vector], and 32 bytes; null without

  int bits() const { return main_bits + residual_bits; }
  std::int64_t group_begin(std::int64_t group) const { return group * cols / groups; }
  const std::uint32_t* stream(std::int64_t group, std::int64_t row) const { return indices + (group * vector_rows + row) * words; }
  std::int64_t blocks() const { return block ? (vector_rows + block - 1) / block : 1; }
  std::int64_t book(std::int64_t group, std::int64_t row) const { return block ? row / block * groups + group : group; }
  const std::uint16_t* main_book(std::int64_t group, std::int64_t row) const { return centroids + (book(group, row) << main_bits) * vector; }
  const std::uint16_t* residual_book(std::int64_t group, std::int64_t row) const { return residuals + (book(group, row) << residual_bits) * vector; }
  std::int64_t nbytes() const {
    if (groups == 0) return 0;
    const std::int64_t numbers = blocks() * groups * vector * ((std::int64_t{1} << main_bits) + (residuals ? std::int64_t{1} << residual_bits : 0));
    return groups * vector_rows * words * 4 + numbers * 2 + kIndexTailBytes + kBookTailBytes * (residuals ? 2 : 1);
  }

  static constexpr std::int64_t kIndexTailBytes = 64, kBookTailBytes = 32;
};

constexpr int kMostVector = 16, kVectorsTogether = 8;  // rows of a vector; vectors of a strip for one token

struct CodebookMatrix {
  Codebooks outliers, rest;                // outliers stand in the first columns; they may have none
  const std::uint16_t* scale = nullptr;    // float16 [cols], and the offset alike: weight = scale * looked up + offset
  const std::uint16_t* offset = nullptr;

  std::int64_t nbytes(std::int64_t cols) const { return outliers.nbytes() + rest.nbytes() + (scale ? 4 * cols : 0); }
};

// Index `at` of a stream of indices of `bits` bits.
static inline std::uint32_t index_at(const std::uint32_t* stream, std::int64_t at, int bits) {
  const std::int64_t bit = at * bits;
  std::uint64_t word;
  __builtin_memcpy(&word, stream + bit / 32, sizeof word);
  return static_cast<std::uint32_t>(word >> (bit % 32)) & static_cast<std::uint32_t>((std::uint64_t{1} << bits) - 1);
}

}  // namespace mw
