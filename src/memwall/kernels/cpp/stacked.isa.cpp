// Products with stacks of sign blocks (formats/bitstack.py), always in float32; no matrix is ever decoded whole.
//
// Few tokens: y_r = sum over blocks and ranks of A[r,k] * sum over columns of S[r,c] B[c,k] x_c. The inner sum of four columns can
// take 16 values per rank, one for each pattern of signs; they are made once for many rows, with ranks along the lanes, and a row
// then adds one vector for each four of its signs instead of multiplying four times.
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kRanks = 16;  // ranks worked together; what the last ones lack is zero
constexpr int kVectors = kRanks / kWidth;
constexpr int kPatterns = 16, kGroups = kStackColumns / 4;
constexpr int kMostRows = 256;

struct StackWork {
  alignas(64) float tables[kGroups][kPatterns][kRanks];
  alignas(64) float sums[kMostRows][kRanks];
  alignas(64) float totals[kMostRows][kRanks];
  alignas(64) float values[kMostRows + 4];
};
static_assert(sizeof(StackWork) <= kWorkerScratchBytes);

struct Ranks {
  Vf part[kVectors];
};

MW_INLINE Ranks load_ranks(const float* from) {
  Ranks found;
  for (int i = 0; i < kVectors; ++i) found.part[i] = load<Vf>(from + i * kWidth);
  return found;
}
MW_INLINE void store_ranks(float* to, const Ranks& ranks) {
  for (int i = 0; i < kVectors; ++i) store(to + i * kWidth, ranks.part[i]);
}
MW_INLINE Ranks sum(Ranks a, const Ranks& b) {
  for (int i = 0; i < kVectors; ++i) a.part[i] += b.part[i];
  return a;
}

// `count` factors of one row or column, the rest zero.
MW_INLINE Ranks factors(const std::uint16_t* from, int count) {
  std::uint16_t padded[kRanks] = {};
  if (count < kRanks) {
    for (int k = 0; k < count; ++k) padded[k] = from[k];
    from = padded;
  }
  Ranks found;
  for (int i = 0; i < kVectors; ++i) found.part[i] = load_half(from + i * kWidth);
  return found;
}

MW_INLINE std::uint64_t sign_word(const std::uint8_t* from, int bytes) {
  std::uint64_t word = 0;
  if (bytes == 8) __builtin_memcpy(&word, from, 8);
  else
    for (int i = 0; i < bytes; ++i) word |= std::uint64_t{from[i]} << (8 * i);
  return word;
}

// Signed sums of four columns, by pattern: minus all of them, plus twice those whose bit is set. width: columns that there are.
void make_tables(const Matrix& m, int block, int first_rank, int count, const float* x, std::int64_t first_col, int width,
                 float (*tables)[kPatterns][kRanks]) {
  const std::uint16_t* right = m.right_factors(block) + first_col * m.rank + first_rank;
  for (int g = 0; 4 * g < width; ++g) {
    Ranks twice[4] = {}, held[kPatterns] = {};
    for (int j = 0; j < 4 && 4 * g + j < width; ++j) {
      const float value = x[first_col + 4 * g + j];
      twice[j] = factors(right + (4 * g + j) * m.rank, count);
      for (int i = 0; i < kVectors; ++i) {
        twice[j].part[i] *= value;
        held[0].part[i] -= twice[j].part[i];
        twice[j].part[i] += twice[j].part[i];
      }
    }
    store_ranks(tables[g][0], held[0]);
    for (int p = 1; p < kPatterns; ++p) {
      held[p] = sum(held[p & (p - 1)], twice[__builtin_ctz(static_cast<unsigned>(p))]);
      store_ranks(tables[g][p], held[p]);
    }
  }
}

// Adds what the signs of one row pick to its sums; two chains, as one would wait for itself.
template <int Groups>
MW_INLINE void add_row(const float (*tables)[kPatterns][kRanks], std::uint64_t word, float* sums) {
  Ranks even = load_ranks(sums), odd{};
  static_for<Groups>([&](auto index) __attribute__((always_inline)) {
    constexpr int g = decltype(index)::value;
    const Ranks picked = load_ranks(tables[g][word >> (4 * g) & 15]);
    if constexpr (g % 2 == 0) even = sum(even, picked);
    else odd = g == 1 ? picked : sum(odd, picked);
  });
  store_ranks(sums, Groups > 1 ? sum(even, odd) : even);
}

// One token times rows [first_row, first_row + count): totals gets, per rank, what is left to add up.
void stack_rows(const Matrix& m, const float* x, std::int64_t first_row, int count, StackWork& work) {
  __builtin_memset(work.totals, 0, sizeof(float) * kRanks * count);
  for (int b = 0; b < m.num_blocks; ++b)
    for (int first_rank = 0; first_rank < m.rank; first_rank += kRanks) {
      const int ranks = m.rank - first_rank < kRanks ? m.rank - first_rank : kRanks;
      __builtin_memset(work.sums, 0, sizeof(float) * kRanks * count);
      for (std::int64_t c = 0; c < m.cols; c += kStackColumns) {
        const int width = m.cols - c < kStackColumns ? static_cast<int>(m.cols - c) : kStackColumns;
        make_tables(m, b, first_rank, ranks, x, c, width, work.tables);
        const int bytes = m.sign_bytes(c), groups = (width + 3) / 4;
        const std::uint8_t* signs = m.signs(b, first_row, c);
        if (width == kStackColumns)
          for (int r = 0; r < count; ++r) add_row<kGroups>(work.tables, sign_word(signs + 8 * r, 8), work.sums[r]);
        else
          for (int r = 0; r < count; ++r) {
            const std::uint64_t word = sign_word(signs + bytes * r, bytes);
            for (int g = 0; g < groups; ++g) add_row<1>(work.tables + g, word >> (4 * g), work.sums[r]);
          }
      }
      const std::uint16_t* left = m.left_factors(b) + first_row * m.rank + first_rank;
      for (int r = 0; r < count; ++r, left += m.rank) {
        const Ranks each = factors(left, ranks);
        Ranks total = load_ranks(work.totals[r]);
        for (int i = 0; i < kVectors; ++i) total.part[i] += each.part[i] * load<Vf>(work.sums[r] + i * kWidth);
        store_ranks(work.totals[r], total);
      }
    }
}

MW_INLINE Vf folded(const float* totals) {
  Vf all = load<Vf>(totals);
  for (int i = 1; i < kVectors; ++i) all += load<Vf>(totals + i * kWidth);
  return all;
}

}  // namespace

void stacked_few(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  auto& work = *reinterpret_cast<StackWork*>(scratch);
  const std::int64_t strip_rows = m.stack_rows();
  for (std::int64_t strip = begin; strip < end; ++strip) {
    const std::int64_t first_row = strip * strip_rows;
    const int count = static_cast<int>(m.rows - first_row < strip_rows ? m.rows - first_row : strip_rows);
    for (std::int64_t t = 0; t < input.tokens; ++t) {
      stack_rows(m, input.x + t * input.cols, first_row, count, work);
      for (int r = 0; r < count; r += 4) {
        Vf four[4] = {};
        for (int i = 0; i < 4 && r + i < count; ++i) four[i] = folded(work.totals[r + i]);
        const Vf sums = sums_of(four[0], four[1], four[2], four[3]);
        for (int i = 0; i < 4; ++i) work.values[r + i] = sums[i];
      }
      write_rows(work.values, t, first_row, count, out);
    }
  }
}

void stacked_panel(const Matrix& m, std::int64_t first_row, std::int64_t first_col, int num_cols, float (*panel)[kStripRows]) {
  constexpr int kTogether = 4;  // columns whose sums stay in registers while the rows' factors pass
  const int count = m.rows - first_row < kStripRows ? static_cast<int>(m.rows - first_row) : kStripRows;
  const int bytes = m.sign_bytes(first_col);
  __builtin_memset(panel, 0, sizeof(float) * kStripRows * num_cols);
  for (int b = 0; b < m.num_blocks; ++b) {
    alignas(64) std::int32_t halves[2][kStripRows] = {};
    const std::uint8_t* signs = m.signs(b, first_row, first_col);
    for (int r = 0; r < count; ++r) {
      const std::uint64_t word = ~sign_word(signs + r * bytes, bytes);
      halves[0][r] = static_cast<std::int32_t>(word);
      halves[1][r] = static_cast<std::int32_t>(word >> 32);
    }
    for (int first_rank = 0; first_rank < m.rank; first_rank += kRanks) {
      const int ranks = m.rank - first_rank < kRanks ? m.rank - first_rank : kRanks;
      alignas(64) float left[kRanks][kStripRows] = {}, right[kTogether][kRanks];
      for (int r = 0; r < count; ++r) {
        alignas(64) float each[kRanks];
        store_ranks(each, factors(m.left_factors(b) + (first_row + r) * m.rank + first_rank, ranks));
        for (int k = 0; k < ranks; ++k) left[k][r] = each[k];
      }
      for (int c = 0; c < num_cols; c += kTogether) {
        const int together = num_cols - c < kTogether ? num_cols - c : kTogether;
        for (int j = 0; j < kTogether; ++j) {
          const int column = c + (j < together ? j : 0);
          store_ranks(right[j], factors(m.right_factors(b) + (first_col + column) * m.rank + first_rank, ranks));
        }
        Vf sums[kTogether][kStripVectors] = {};
        for (int k = 0; k < ranks; ++k) {
          Vf rows[kStripVectors];
          for (int v = 0; v < kStripVectors; ++v) rows[v] = load<Vf>(left[k] + v * kWidth);
          for (int j = 0; j < kTogether; ++j)
            for (int v = 0; v < kStripVectors; ++v) sums[j][v] += rows[v] * right[j][k];
        }
        for (int j = 0; j < together; ++j) {
          const int column = c + j;
          for (int v = 0; v < kStripVectors; ++v) {
            // a bit that is not set, moved to where floats have their sign
            const Vi flips = (Vi)((Vu)load<Vi>(halves[column / 32] + v * kWidth) << (31 - column % 32)) & splat(static_cast<std::int32_t>(0x80000000u));
            float* to = panel[column] + v * kWidth;
            store(to, load<Vf>(to) + (Vf)((Vi)sums[j][v] ^ flips));
          }
        }
      }
    }
  }
}

}  // namespace mw::MW_ISA
