// Products of activations with weight matrices, dense or in packed integer tiles.
//
// Weight tiles (formats/integer.py defines them): 16 rows by `group` columns. Inside, 64 bytes - a lane vector - hold 16 rows by
// 4 columns, so each 32-bit lane belongs to one row: a dot-product instruction of 4 bytes per lane adds 4 columns of 16 rows at
// once, and no sum across lanes is ever needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "codebook.h"
#include "half.h"
#include "planes.h"

namespace mw {

constexpr int kTileRows = 16;
constexpr int kUnitColumns = 32;   // columns between two changes of bit plane
constexpr int kLaneVectorBytes = 64;
constexpr std::int64_t kMostMixedColumns = 65536;  // of weights for mixed activations: one token's, widened, fit in a thread's scratch
constexpr int kUnitTokens = 16;    // that a matrix unit multiplies at once, those that are missing with scales and sums of zero
constexpr int kMaxTokens = 256;    // a call with more is cut in blocks: bounds the scratch, and costs 1/256 of the unpacking

enum class Form : int { float32, float16, bfloat16, tiles, planes, bilevel, codebook, masked, stacked, sparse };

// How the scales of tiles are stored (formats/scales.py): in the last two forms a byte is a power of two, or an index of
// dynamic levels that one float per 256 scales and an offset per row tile make a scale of; the last has no scales.
enum class ScaleForm : int { half, single, exponent, nested, one };

// What levels with a sign bit are made of. bytes: of one byte of 63 at most. digits: of low + 32 * high, 31 and 32 at most.
// far_digits: of low + 128 * high, 127 and 32. ranges: of low for the lower half of the codes and upper_units * high for the others;
// with codes of 6 bits 31 and 63 at most, of 7 bits 63 and 127.
enum class Magnitudes : int { none, bytes, digits, far_digits, ranges };

// What levels without a sign bit may be made of besides their bytes. affine: step * code - offset. one: low - offset, low at most
// 128. two: low + 32 * high - offset, both at most 31; the last two with codes of 4 bits.
enum class Digits : int { none, affine, one, two };

// What codes mean where they are not integers. Exact products read `values`; products with 8-bit activations the bytes: a code
// stands for (low - low_offset) units, or with two bytes for (low - low_offset) + 256 * (high - high_offset) of them. Where
// scales come in pairs, the high byte is that of the second scale, and `values` those of the first.
struct Levels {
  alignas(64) std::uint8_t low[256], high[256];  // periodic in the number of codes, so that any byte shuffle can read them
  alignas(64) float values[256], second[256];
  float unit = 1.0f;
  int low_offset = 0, high_offset = 0;
  int bytes = 1;        // 0: codes are their own low bytes
  bool pairs = false;   // there are second scales
  // Levels of two bytes that are linear in the low four bits of a code: base by the high bits, plus step times the low ones.
  bool linear = false;
  alignas(64) std::uint8_t base_low[16], base_high[16];  // of a signed 16-bit count
  alignas(64) std::int8_t step[16];
  // Minifloats: a code in the high bits of a 16-bit word, shifted right by half_shift with its sign and masked, is a float16 of
  // which the level is half_unit times as much. half_unit 0: it is not.
  int half_shift = 0;
  std::uint16_t half_mask = 0;
  float half_unit = 0.0f;
  // Levels whose highest bit is a sign: what the other bits of codes stand for in units.
  alignas(64) std::uint8_t magnitude_low[64], magnitude_high[64];
  Magnitudes magnitudes = Magnitudes::none;
  float upper_units = 1.0f;
  bool twos = false;  // codes of negative levels are the two's complement of their magnitude's
  Digits digits = Digits::none;
  alignas(16) std::uint8_t digit_low[16], digit_high[16];
  int digit_step = 1, digit_offset = 0;
};

// Bilevel tiles (formats/spqr.py defines them): statistics of 16 rows by 16 columns are 16 scale codes and 16 zero codes of 3 bits
// and four float16; the codes lie as in tiles of 32 columns.
constexpr int kColumnTokens = 16;  // tokens of one column that outliers are multiplied with at once
constexpr int kBilevelGroup = 16, kBilevelCodeBytes = 6, kBilevelStatisticBytes = 20;
// Weights of a sign and a mask bit (formats/sign_mask.py defines them): parameters per row and block of 128 columns.
constexpr int kMaskedGroup = 128, kBillmParams = 7, kPbLlmParams = 2;

// Tiles of which two of every four columns are kept (formats/sparse.py defines them): a unit holds the kept codes of 64 columns and,
// behind them, their positions of 2 bits.
constexpr int kSparseUnitColumns = 64, kPositionBits = 2;

// A turn of n = p * q numbers (formats/quip.py): what lies at `order` is laid out as p x q, multiplied by left [p, p] from the left
// and by right [q, q] from the right; a turn back does it the other way round.
struct Turn {
  std::int64_t p = 0, q = 0;
  const float *left = nullptr, *right = nullptr;
  const std::int32_t* order = nullptr;

  std::int64_t size() const { return p * q; }
};

// Stacks of sign blocks (formats/bitstack.py defines them): a block is its factors as float16, [rows, rank] and [cols, rank], then
// signs in panels of 64 columns, in a panel eight bytes per row (fewer in a last panel that is narrower).
constexpr int kStackColumns = 64;
constexpr std::int64_t kFewTokens = 4;  // up to so many, signed sums are looked up; with more, weights are decoded once for all

// Borrowed pointers; the Python object Matrix keeps the arrays alive.
struct Matrix {
  Form form = Form::float32;
  std::int64_t rows = 0, cols = 0;
  const void* data = nullptr;  // row-major numbers, tile codes, or words of bit planes
  // tiles only
  int bits = 0, group = 0;
  std::int64_t row_tiles = 0, groups = 0;
  ScaleForm scale_form = ScaleForm::half;
  const void* scales = nullptr;           // [row_tiles, groups, 16]
  const std::uint16_t* mins = nullptr;    // float16, the same shape; null when symmetric
  const std::uint16_t* second = nullptr;  // float16, the same shape: second scales, else null
  const float* nested = nullptr;          // [row_tiles, (groups + 15) / 16], for nested scales
  const float* offsets = nullptr;         // [row_tiles], for nested scales
  const std::uint8_t* shifts = nullptr;   // dynamic levels, the shape of scales, of `shift_peaks`, like nested: what is added to each number; else null
  const float* shift_peaks = nullptr;
  const Levels* levels = nullptr;         // null for integers
  const std::uint8_t* zeros = nullptr;    // sparse only, the shape of scales: the code that stands for zero; null when symmetric
  // planes only, beside data, bits and scales (float32 [rows], or float16 [rows, words of a row] where scale_form is half): bits
  // that activations are rounded to
  int activation_bits = 0;
  const CodebookMatrix* codebooks = nullptr;  // codebook only, beside order
  // bilevel only, beside data, bits and groups (which count units of 32 columns): `scales` are the statistics
  const void* order = nullptr;                    // codebook and integer tiles too: [cols], the column at each stored place; null where they stand in order
  const std::uint32_t* row_offsets = nullptr;     // [rows + 1], null without outliers
  const void* outlier_columns = nullptr;          // stored places
  const std::uint16_t* outlier_values = nullptr;  // float16
  bool wide = false;                              // order and outlier_columns have 32 bits, not 16
  // masked only, beside data, groups of 128 columns, `scales` (the parameters) and `order`: the columns of each group that are
  // salient, or the low bits of single weights, where those of each tile and group start, and their steps
  const std::uint8_t* salient = nullptr;
  const std::uint8_t* rest = nullptr;
  const std::uint32_t* starts = nullptr;
  const float* steps = nullptr;
  std::int64_t rest_bytes = 0;
  // integer tiles of 4 bits only, beside `order`: set where activations are rounded by group, to 8 bits where this is 1, else to 4
  const std::uint8_t* wide_groups = nullptr;  // [groups]

  // turned tiles only: inputs are multiplied by `columns` (float16) and turned, outputs are turned back and multiplied by `scale`
  bool turned = false;
  Turn into, back;
  const std::uint16_t* columns = nullptr;
  float scale = 1.0f;
  // stacked only
  const std::uint8_t* const* blocks = nullptr;
  int num_blocks = 0, rank = 0;

  std::int64_t group_bytes() const { return form == Form::sparse ? std::int64_t{bits + kPositionBits} * group : std::int64_t{2} * bits * group; }
  std::int64_t tile_bytes() const { return groups * group_bytes(); }
  const std::uint8_t* tile(std::int64_t index) const { return static_cast<const std::uint8_t*>(data) + index * tile_bytes(); }
  const std::uint8_t* bilevel_statistics(std::int64_t tile) const {
    return static_cast<const std::uint8_t*>(scales) + tile * groups * 2 * kBilevelStatisticBytes;
  }
  std::int64_t column_at(std::int64_t place) const {
    if (order == nullptr) return place;
    return wide ? static_cast<const std::uint32_t*>(order)[place] : static_cast<const std::uint16_t*>(order)[place];
  }
  const std::uint16_t* masked_params(std::int64_t tile, std::int64_t g) const {
    return static_cast<const std::uint16_t*>(scales) + (tile * groups + g) * kTileRows * (rest ? kPbLlmParams : kBillmParams);
  }
  const float* masked_steps(std::int64_t tile) const { return steps + tile * 2 * kTileRows; }
  const std::uint16_t* left_factors(int block) const { return reinterpret_cast<const std::uint16_t*>(blocks[block]); }
  const std::uint16_t* right_factors(int block) const { return left_factors(block) + rows * rank; }
  // signs of a row in the panel that begins at column `first`, and how many bytes they are
  int sign_bytes(std::int64_t first) const { return cols - first >= kStackColumns ? 8 : static_cast<int>((cols - first + 7) / 8); }
  const std::uint8_t* signs(int block, std::int64_t row, std::int64_t first) const {
    return reinterpret_cast<const std::uint8_t*>(right_factors(block) + cols * rank) + rows * (first / 8) + row * sign_bytes(first);
  }
  // rows whose products are looked up together: the tables are made once for them, and threads still find enough to share
  std::int64_t stack_rows() const { return rows >= 2048 ? 256 : rows >= 512 ? 128 : 64; }
  int bytes() const { return levels ? levels->bytes : 0; }
  Planes planes() const { return {static_cast<const std::uint64_t*>(data), rows, cols, bits}; }
  bool plane_groups() const { return scale_form == ScaleForm::half; }  // of bit planes: a scale for every word
  float plane_scale(std::int64_t row, std::int64_t word) const {
    if (!plane_groups()) return static_cast<const float*>(scales)[row];
    return half_to_float(static_cast<const std::uint16_t*>(scales)[row * planes().row_words() + word]);
  }
  // what is taken off a code, or off its low byte
  int low_offset() const { return levels ? levels->low_offset : mins || zeros ? 0 : 1 << (bits - 1); }
  float unit() const { return levels ? levels->unit : 1.0f; }
  bool adds() const { return mins || shifts; }
  std::int64_t nbytes() const;
};

constexpr int kNestedGroups = 16;  // groups of one row tile that share a float
// The 256 levels of nested scales; set once by the binding, which has them from formats/levels.py.
extern float dynamic_levels[256];

// Activations as 8-bit integers, one scale per group of columns. `block` tokens are interleaved, 4 columns of each in turn,
// so that a kernel walks them with one pointer: codes[token / block][column / 4][token % block][4].
//
// For mixed activations a group of 8 bits lies like that, and one of 4 bits as [column / 8][token % block][4]: a byte has a column
// in its low nibble and the fourth one after it in its high one.
//
// With `rows`, as a matrix unit reads them, a token's codes of a group lie side by side: codes[token / block][group][token % block]
// [column % group]; mixed ones of 4 bits are bytes there too, 16 times the code.
struct Activations {
  std::int8_t* codes = nullptr;
  float* scales = nullptr;        // [token / block][group][token % block]
  std::int32_t* sums = nullptr;   // sum of the codes of a group, the same order
  int block = 1, group = 0;
  std::int64_t groups = 0;
  std::int64_t token_bytes = 0;  // of mixed ones: bytes of a token's codes
  bool rows = false;

  std::int64_t padded_cols() const { return groups * group; }
  // bytes between two fours of columns, and between two tokens of a block
  std::int64_t next_four() const { return rows ? 4 : 4 * block; }
  std::int64_t next_token() const { return rows ? group : 4; }
};

struct Input {
  const float* x = nullptr;  // [tokens, cols]
  std::int64_t tokens = 0, cols = 0;
  Activations coded;  // unset for products in float
  Planes planes;      // set for products with bit planes, with a scale per token, or for each of its words
  const float* plane_scales = nullptr;
  const float* columns = nullptr;  // set for several tokens times bilevel tiles: x by columns, [cols, column_stride]
  std::int64_t column_stride = 0;  // tokens, padded to kColumnTokens
  const float* offsets = nullptr;  // set for codebooks with offsets: what all rows get of a token, [tokens]
};

struct Output {
  float* data = nullptr;  // [tokens, rows]
  std::int64_t rows = 0;
  const float* bias = nullptr;
  bool accumulate = false;
};

constexpr std::size_t kWorkerScratchBytes = 72 * 1024;

// Products that are dealt in stripes (stripes.cpp) are cut in so many segments of columns and in blocks of so many tokens. Each
// stripe has room for the segments of one slice that it shares, and for two sums of those that are its own.
constexpr int kSegments = 4;
constexpr int kStripeTokens = 64;
constexpr int kMostStripRows = 32;
constexpr std::size_t kStripeScratchBytes = (kSegments + 2) * kStripeTokens * kMostStripRows * sizeof(float);

// Computes rows [begin * strip, end * strip) of one output. `scratch` is this worker's alone.
using StripKernel = void (*)(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char* scratch);

// Sums over the columns of groups [first_group, end_group) of one strip and some tokens (from a whole token block on): sums[token][row].
using PartKernel = void (*)(const Matrix&, const Input&, std::int64_t strip, std::int64_t first_group, std::int64_t end_group,
                            std::int64_t first_token, int tokens, float* sums, char* scratch);

struct LinearKernels {
  int token_block;      // tokens interleaved in Activations when there are several
  int strip_tiles;      // row tiles per strip in the kernels for several tokens; one-token kernels take strips of one tile
  // quantizes `count` tokens (at most block) of x into block number `index` of `to`
  void (*quantize)(const float* x, std::int64_t cols, int count, std::int64_t index, const Activations& to);
  void (*quantize_ordered)(const float* x, const Matrix&, int count, std::int64_t index, const Activations& to);  // columns in the order of a matrix
  StripKernel tiles_one, tiles_few, tiles_many, tiles_exact;  // few: up to a few blocks of them, where levels have a byte at most
  StripKernel float_one[3], float_many[3];  // by Form
  StripKernel planes, planes_exact;
  StripKernel bilevel_one, bilevel_many, bilevel_exact;
  StripKernel codebook_one, codebook_many;
  // one token: to [n] from x [n], with room for n floats; out: results to be multiplied by scale instead
  void (*turn)(const Turn&, const float* x, const std::uint16_t* columns, float* to, float* room);
  void (*turn_back)(const Turn&, const float* x, float scale, float* to, float* room);
  StripKernel masked_one, masked_exact;  // several tokens take the exact one: a panel of floats costs less than their rounding gains
  StripKernel stacked_few, stacked_many;  // strips of stack_rows() rows, and of strip_tiles; always in float
  PartKernel tiles_part;
  StripKernel tiles_exact_few;  // integers, up to token_block tokens
  StripKernel sparse_one, sparse_exact;  // several tokens take the kernels of dense tiles: what is pruned costs less there than picking activations
  // as `quantize`, in the widths and the order that a matrix asks for
  void (*quantize_mixed)(const float* x, const Matrix&, int count, std::int64_t index, const Activations& to);
  StripKernel mixed_one, mixed_many;
  // one strip's products with groups [first, last): sums [tokens, strip rows]; activations in blocks of token_block
  void (*mixed_part)(const Matrix&, const Input&, std::int64_t strip, std::int64_t first, std::int64_t last, float* sums, char* scratch);
  void (*widen_codes)(const std::int8_t* packed, std::int64_t columns, std::int8_t* to);
};

// Bytes of scratch that `linear` holds now; part of the process's byte ledger.
std::size_t linear_scratch_bytes();
// What it would hold after products of `tokens` tokens of `cols` columns with weights in groups of `group` (0: dense weights; -m:
// bit planes with activations of m bits; -m - kMaxPlanes: those with scales by groups; 16: bilevel tiles; kMixedRounding + g: mixed activations in groups of g; 2: signs and masks; 1: columns put in order; 3 or, exact, 4: turned tiles).
constexpr int kMixedRounding = 1000;
std::size_t linear_scratch_bytes_for(std::int64_t tokens, std::int64_t cols, int group, int threads);

struct Product {
  const Matrix* matrix;
  Output output;
};

// All matrices read the same input, in one parallel region where their forms allow.
void linear(const float* x, std::int64_t tokens, std::int64_t cols, const Product* products, std::size_t count, bool exact);

// Products that `linear` was called for since the start of the process; tests count with it.
std::int64_t linear_products();

// Those of them that were dealt in stripes.
std::int64_t linear_striped_products();
// Part of a product with mixed activations: strip number `strip` of product number `product`, groups [first, last).
struct MixedTile {
  std::int32_t product, strip, first, last;
};
// Products with mixed activations by a schedule. Worker w works tiles [starts[w], starts[w + 1]) in turn; with `steal` it then helps
// the one with the most left. Parts of a strip are kept apart and added up at the end, in the order of their groups. seconds:
// when each worker was done, from the start of the first. Inputs may differ in columns, not in tokens (at most kMaxTokens).
struct MixedProduct {
  const Matrix* matrix;
  const float* x;
  Output output;
};
void linear_scheduled(const MixedProduct* products, std::size_t count, std::int64_t tokens, const MixedTile* tiles, std::int64_t num_tiles,
                      const std::int32_t* starts, int workers, bool steal, double* seconds);
// Rows of a strip, by instruction set.
int mixed_strip_rows();
// Activations as mixed products store them: bytes of all codes; null pointers ask for the sizes only. Blocks of one token.
std::int64_t mixed_code_bytes(const Matrix& matrix);
void quantize_mixed(const Matrix& matrix, const float* x, std::int64_t tokens, std::int8_t* codes, float* scales, std::int32_t* sums);
void widen_codes(const std::int8_t* packed, std::int64_t columns, std::int8_t* to);

// One row of any form, as float32.
void decode_row(const Matrix& matrix, std::int64_t row, float* out);
void gather_rows(const Matrix& matrix, const std::int64_t* ids, std::int64_t count, float* out);

}  // namespace mw
