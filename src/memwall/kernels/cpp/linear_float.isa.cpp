// Products in float32: dense matrices of any float type, and packed tiles decoded on the way (the exact path).
#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kPrefetchBytes = 4096;

// Rows as they lie in memory: lanes run along the columns and are added up at the end. A block of Rows by Tokens is computed
// together, so that each vector loaded is used several times; a single product has Chains sums to hide their latency.
template <class Type, int Rows, int Tokens>
void row_block(const Matrix& m, const Input& input, std::int64_t row, std::int64_t token, const Output& out) {
  constexpr int kChains = Rows * Tokens == 1 ? 4 : Rows * Tokens < 4 ? 2 : 1, kStep = kChains * kWidth;
  const std::int64_t cols = m.cols, whole = cols / kStep * kStep;
  const auto* w = static_cast<const typename Type::Element*>(m.data) + row * cols;
  const float* x = input.x + token * cols;
  Vf sums[Rows][Tokens][kChains] = {};
  for (std::int64_t c = 0; c < whole; c += kStep) {
    if constexpr (Tokens == 1)  // all of the time goes to reading, into the next rows too
      for (int r = 0; r < Rows; ++r)
        for (std::size_t byte = 0; byte < kStep * sizeof(*w); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(w + r * cols + c) + kPrefetchBytes + byte);
    for (int i = 0; i < kChains; ++i) {
      Vf weights[Rows];
      for (int r = 0; r < Rows; ++r) weights[r] = Type::vector(w + r * cols + c + i * kWidth);
      for (int t = 0; t < Tokens; ++t) {
        const Vf values = load<Vf>(x + t * cols + c + i * kWidth);
        for (int r = 0; r < Rows; ++r) sums[r][t][i] += weights[r] * values;
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) {
      Vf all = sums[r][t][0];
      for (int i = 1; i < kChains; ++i) all += sums[r][t][i];
      float value = sum_of(all);
      for (std::int64_t c = whole; c < cols; ++c) value += Type::scalar(w[r * cols + c]) * x[t * cols + c];
      write_rows(&value, token + t, row + r, 1, out);
    }
}

// Four short rows of a single product: the input is loaded once for all, and their lanes are added up together, which would
// otherwise take as long as multiplying. Long rows are better read one after the other: the hardware's prefetch sees one stream.
constexpr int kSingleRows = 4, kShortColumns = 512;
// An input longer than half a first-level cache would be read again for each row: four rows share it.
constexpr int kLongColumns = 4096;

template <class Type>
void single_block(const Matrix& m, const Input& input, std::int64_t row, const Output& out) {
  constexpr int kChains = 2, kUnit = 32 / kWidth, kStep = 32, kAhead = kSingleRows * kStep * sizeof(typename Type::Element);
  const std::int64_t cols = m.cols, whole = cols / kStep * kStep;
  const auto* w = static_cast<const typename Type::Element*>(m.data) + row * cols;
  const char* ahead = reinterpret_cast<const char*>(w) + kPrefetchBytes;  // in the order of memory, as prefetch hardware likes it
  const float* x = input.x;
  Vf sums[kSingleRows][kChains] = {};
  for (std::int64_t c = 0; c < whole; c += kStep) {
    for (int byte = 0; byte < kAhead; byte += 64) __builtin_prefetch(ahead + byte);
    ahead += kAhead;
    for (int i = 0; i < kUnit; ++i) {
      const Vf values = load<Vf>(x + c + i * kWidth);
      for (int r = 0; r < kSingleRows; ++r) sums[r][i % kChains] += Type::vector(w + r * cols + c + i * kWidth) * values;
    }
  }
  alignas(kVectorBytes) float total[kWidth];
  store(total, sums_of(sums[0][0] + sums[0][1], sums[1][0] + sums[1][1], sums[2][0] + sums[2][1], sums[3][0] + sums[3][1]));
  for (int r = 0; r < kSingleRows; ++r)
    for (std::int64_t c = whole; c < cols; ++c) total[r] += Type::scalar(w[r * cols + c]) * x[c];
  write_rows(total, 0, row, kSingleRows, out);
}

constexpr int kBlockRows = kWidth == 16 ? 4 : 2, kBlockTokens = 4;
// with more tokens, transposing the weights costs less than adding up lanes
constexpr int kMostRowTokens = 16;

template <class Type, int Rows>
void row_tokens(const Matrix& m, const Input& input, std::int64_t row, const Output& out) {
  std::int64_t token = 0;
  for (; token + kBlockTokens <= input.tokens; token += kBlockTokens) row_block<Type, Rows, kBlockTokens>(m, input, row, token, out);
  static_for<kBlockTokens>([&](auto index) {
    constexpr int count = decltype(index)::value;
    if constexpr (count > 0)
      if (input.tokens - token == count) row_block<Type, Rows, count>(m, input, row, token, out);
  });
}

template <class Type>
void row_products(const Matrix& m, const Input& input, std::int64_t row, std::int64_t end_row, const Output& out) {
  for (; input.tokens == 1 && m.cols <= kShortColumns && row + kSingleRows <= end_row; row += kSingleRows) single_block<Type>(m, input, row, out);
  for (; input.tokens == 1 && m.cols > kLongColumns && row + kSingleRows <= end_row; row += kSingleRows) row_block<Type, kSingleRows, 1>(m, input, row, 0, out);
  for (; input.tokens > 1 && row + kBlockRows <= end_row; row += kBlockRows) row_tokens<Type, kBlockRows>(m, input, row, out);
  for (; row < end_row; ++row) row_tokens<Type, 1>(m, input, row, out);
}

// A panel: the weights of one strip, some columns of them, column after column, so that lanes are rows as in tiles.
constexpr int kPanelColumns = 256;
struct FloatPanel {
  alignas(64) float weights[kPanelColumns][kStripRows];
  alignas(64) float sums[kMaxTokens][kStripRows];
  alignas(64) float row[4][kPanelColumns];
};
static_assert(sizeof(FloatPanel) <= kWorkerScratchBytes);

// Apart: these columns are summed up by themselves and then added to what is there.
template <int Tokens, bool Apart>
void panel_block(const float* panel, const float* x, std::int64_t stride, int num_cols, float (*sums)[kStripRows]) {
  Vf total[Tokens][kStripVectors] = {};
  for (int t = 0; t < Tokens && !Apart; ++t)
    for (int v = 0; v < kStripVectors; ++v) total[t][v] = load<Vf>(sums[t] + v * kWidth);
  for (int c = 0; c < num_cols; ++c, panel += kStripRows) {
    Vf weights[kStripVectors];
    for (int v = 0; v < kStripVectors; ++v) weights[v] = load<Vf>(panel + v * kWidth);
    for (int t = 0; t < Tokens; ++t) {
      const Vf value = splat(x[t * stride + c]);
      for (int v = 0; v < kStripVectors; ++v) total[t][v] += weights[v] * value;
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kStripVectors; ++v) {
      if (Apart) total[t][v] += load<Vf>(sums[t] + v * kWidth);
      store(sums[t] + v * kWidth, total[t][v]);
    }
}

// Columns of the panel from `begin` on times those of the input from first_col on.
template <bool Apart>
void panel_products(const FloatPanel& panel, int begin, const Input& input, std::int64_t first_col, int num_cols, float (*sums)[kStripRows]) {
  const int tokens = static_cast<int>(input.tokens);
  const float* weights = panel.weights[begin];
  int t = 0;
  for (; t + kTokenBlock <= tokens; t += kTokenBlock)
    panel_block<kTokenBlock, Apart>(weights, input.x + t * input.cols + first_col, input.cols, num_cols, sums + t);
  static_for<kTokenBlock>([&](auto index) {
    constexpr int count = decltype(index)::value;
    if constexpr (count > 0)
      if (tokens - t == count) panel_block<count, Apart>(weights, input.x + t * input.cols + first_col, input.cols, num_cols, sums + t);
  });
}

typedef float Four __attribute__((vector_size(16)));

// Four rows of `row` into columns `to` and on of the panel.
void transpose_rows(const float (*row)[kPanelColumns], int num_cols, int to, FloatPanel& panel) {
  for (int c = 0; c < num_cols; c += 4) {
    const Four a = load<Four>(row[0] + c), b = load<Four>(row[1] + c), d = load<Four>(row[2] + c), e = load<Four>(row[3] + c);
    const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four de_low = __builtin_shufflevector(d, e, 0, 4, 1, 5), de_high = __builtin_shufflevector(d, e, 2, 6, 3, 7);
    store(panel.weights[c] + to, __builtin_shufflevector(ab_low, de_low, 0, 1, 4, 5));
    store(panel.weights[c + 1] + to, __builtin_shufflevector(ab_low, de_low, 2, 3, 6, 7));
    store(panel.weights[c + 2] + to, __builtin_shufflevector(ab_high, de_high, 0, 1, 4, 5));
    store(panel.weights[c + 3] + to, __builtin_shufflevector(ab_high, de_high, 2, 3, 6, 7));
  }
}

template <class Type>
void transpose_panel(const Matrix& m, std::int64_t first_row, std::int64_t first_col, int num_cols, FloatPanel& panel) {
  for (int r = 0; r < kStripRows; r += 4) {
    for (int i = 0; i < 4; ++i) {
      float* to = panel.row[i];
      if (first_row + r + i >= m.rows) {
        __builtin_memset(to, 0, sizeof panel.row[i]);
        continue;
      }
      const auto* from = static_cast<const typename Type::Element*>(m.data) + (first_row + r + i) * m.cols + first_col;
      int c = 0;
      for (; c + kWidth <= num_cols; c += kWidth) store(to + c, Type::vector(from + c));
      for (; c < num_cols; ++c) to[c] = Type::scalar(from[c]);
    }
    transpose_rows(panel.row, num_cols, r, panel);
  }
}

// Numbers of dense matrices are summed up so many columns at a time: one sum over all columns loses twice as much to rounding where
// the largest come first. Packed ones are not, whose few tokens are summed in one run (exact.isa.cpp) and must get the same bits.
constexpr int kSumColumns = 64;

// Fills the panel strip by strip and column chunk by column chunk; `fill(strip, first_col, num_cols)` writes it.
template <bool Dense = false, class Fill>
void panel_strips(const Input& input, std::int64_t begin, std::int64_t end, const Output& out, FloatPanel& panel, Fill fill) {
  const int tokens = static_cast<int>(input.tokens);
  for (std::int64_t strip = begin; strip < end; ++strip) {
    for (int t = 0; t < tokens; ++t)
      for (int v = 0; v < kStripVectors; ++v) store(panel.sums[t] + v * kWidth, input.offsets ? splat(input.offsets[t]) : Vf{});
    for (std::int64_t c = 0; c < input.cols; c += kPanelColumns) {
      const int num_cols = static_cast<int>(input.cols - c < kPanelColumns ? input.cols - c : kPanelColumns);
      fill(strip, c, num_cols);
      if (!Dense) panel_products<false>(panel, 0, input, c, num_cols, panel.sums);
      for (int at = 0; Dense && at < num_cols; at += kSumColumns)
        panel_products<true>(panel, at, input, c + at, num_cols - at < kSumColumns ? num_cols - at : kSumColumns, panel.sums);
    }
    for (int t = 0; t < tokens; ++t) write_rows(panel.sums[t], t, strip * kStripRows, kStripRows, out);
  }
}

// Decodes columns of one tile into the panel: byte c of each 32-bit lane is column c of the lane's row.
template <int Bits>
void decode_tile(const Matrix& m, std::int64_t tile, std::int64_t first_col, int num_cols, int slot, FloatPanel& panel) {
  const std::int64_t first_group = first_col / m.group;
  const std::uint8_t* unit = m.tile(tile) + first_group * m.group_bytes();
  const std::int32_t zero = m.low_offset();
  for (int c = 0; c < num_cols; c += kUnitColumns, unit += kLaneVectorBytes * Bits) {
    const std::int64_t g = first_group + c / m.group, at = (tile * m.groups + g) * kTileRows;
    for (int p = 0; p < kPieces; ++p) {
      const Vf scale = group_scale(m, tile, g, p);
      const Vf least = group_least(m, tile, g, p);
      const Vf second = m.second ? load_half(m.second + at + p * kWidth) : Vf{};
      static_for<kUnitBlocks>([&](auto block) __attribute__((always_inline)) {
        constexpr int I = decltype(block)::value;
        const Vi codes = (Vi)code_block<Bits, I>(unit + p * kVectorBytes);
        for (int byte = 0; byte < 4; ++byte) {
          const Vi code = (codes >> (8 * byte)) & 0xff;
          Vf value;
          if (m.levels == nullptr) value = scale * to_float(code - zero) + least;
          else value = scale * look_up<Bits>(m.levels->values, code) + least;
          if (m.second) value += second * look_up<Bits>(m.levels->second, code);
          store(panel.weights[c + 4 * I + byte] + slot * kTileRows + p * kWidth, value);
        }
      });
    }
  }
}

template <class Type>
void float_one(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char*) {
  const std::int64_t end_row = end * kTileRows < m.rows ? end * kTileRows : m.rows;
  row_products<Type>(m, input, begin * kTileRows, end_row, out);
}

template <class Type>
void float_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  const std::int64_t end_row = end * kStripRows < m.rows ? end * kStripRows : m.rows;
  if (input.tokens <= kMostRowTokens) return row_products<Type>(m, input, begin * kStripRows, end_row, out);
  FloatPanel& panel = *reinterpret_cast<FloatPanel*>(scratch);
  panel_strips<true>(input, begin, end, out, panel, [&](std::int64_t strip, std::int64_t first_col, int num_cols) {
    transpose_panel<Type>(m, strip * kStripRows, first_col, num_cols, panel);
  });
}

}  // namespace

void tiles_exact(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  FloatPanel& panel = *reinterpret_cast<FloatPanel*>(scratch);
  panel_strips(input, begin, end, out, panel, [&](std::int64_t strip, std::int64_t first_col, int num_cols) {
    for (int slot = 0; slot < kStripTiles; ++slot) {
      const std::int64_t tile = strip * kStripTiles + slot;
      if (tile < m.row_tiles)
        with_bits(m.bits, [&](auto bits) { decode_tile<decltype(bits)::value>(m, tile, first_col, num_cols, slot, panel); });
    }
  });
}

namespace {

using TilePanel = void (*)(const Matrix&, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride);

template <TilePanel Fill>
void panels_of(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  FloatPanel& panel = *reinterpret_cast<FloatPanel*>(scratch);
  panel_strips(input, begin, end, out, panel, [&](std::int64_t strip, std::int64_t first_col, int num_cols) {
    for (int slot = 0; slot < kStripTiles; ++slot) {
      const std::int64_t tile = strip * kStripTiles + slot;
      if (tile < m.row_tiles) Fill(m, tile, first_col, num_cols, panel.weights[0] + slot * kTileRows, kStripRows);
    }
  });
}

void codebook_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  FloatPanel& panel = *reinterpret_cast<FloatPanel*>(scratch);
  panel_strips(input, begin, end, out, panel, [&](std::int64_t strip, std::int64_t first_col, int num_cols) {
    codebook_panel(m, strip * kStripRows, first_col, num_cols, panel.weights[0]);
  });
}

void stacked_many(const Matrix& m, const Input& input, std::int64_t begin, std::int64_t end, const Output& out, char* scratch) {
  FloatPanel& panel = *reinterpret_cast<FloatPanel*>(scratch);
  panel_strips(input, begin, end, out, panel, [&](std::int64_t strip, std::int64_t first_col, int num_cols) {
    for (int c = 0; c < num_cols; c += kStackColumns)
      stacked_panel(m, strip * kStripRows, first_col + c, num_cols - c < kStackColumns ? num_cols - c : kStackColumns, panel.weights + c);
  });
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    kTokenBlock,
    kStripTiles,
    quantize_block,
    quantize_ordered,
    tiles_one,
    tiles_few,
    tiles_many,
    tiles_exact,
    {float_one<Float32>, float_one<Float16>, float_one<BFloat16>},
    {float_many<Float32>, float_many<Float16>, float_many<BFloat16>},
    planes_rounded,
    planes_exact,
    bilevel_one,
    bilevel_many,
    panels_of<bilevel_panel>,
    codebook_one,
    codebook_many,
    turn_token,
    turn_token_back,
    masked_one,
    panels_of<masked_panel>,
    stacked_few,
    stacked_many,
    tiles_part,
    tiles_exact_few,
    sparse_one,
    panels_of<sparse_panel>,
    quantize_mixed,
    mixed_one,
    mixed_many,
    mixed_part,
    widen_codes,
};

}  // namespace mw::MW_ISA
