// Products of activations with weight matrices, dense or in packed integer tiles.
//
// Weight tiles (formats/integer.py defines them): 16 rows by `group` columns. Inside, 64 bytes - a lane vector - hold 16 rows by
// 4 columns, so each 32-bit lane belongs to one row: a dot-product instruction of 4 bytes per lane adds 4 columns of 16 rows at
// once, and no sum across lanes is ever needed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

constexpr int kTileRows = 16;
constexpr int kUnitColumns = 32;   // columns between two changes of bit plane
constexpr int kLaneVectorBytes = 64;
constexpr int kMaxTokens = 256;    // a call with more is cut in blocks: bounds the scratch, and costs 1/256 of the unpacking

enum class Form : int { float32, float16, bfloat16, tiles };

// Borrowed pointers; the Python object Matrix keeps the arrays alive.
struct Matrix {
  Form form = Form::float32;
  std::int64_t rows = 0, cols = 0;
  const void* data = nullptr;  // row-major numbers, or tile codes
  // tiles only
  int bits = 0, group = 0;
  std::int64_t row_tiles = 0, groups = 0;
  const std::uint16_t* scales = nullptr;  // float16 [row_tiles, groups, 16]
  const std::uint16_t* mins = nullptr;    // the same; null when symmetric

  std::int64_t group_bytes() const { return std::int64_t{2} * bits * group; }
  std::int64_t tile_bytes() const { return groups * group_bytes(); }
  const std::uint8_t* tile(std::int64_t index) const { return static_cast<const std::uint8_t*>(data) + index * tile_bytes(); }
  std::int64_t nbytes() const;
};

// Activations as 8-bit integers, one scale per group of columns. `block` tokens are interleaved, 4 columns of each in turn,
// so that a kernel walks them with one pointer: codes[token / block][column / 4][token % block][4].
struct Activations {
  std::int8_t* codes = nullptr;
  float* scales = nullptr;        // [token / block][group][token % block]
  std::int32_t* sums = nullptr;   // sum of the codes of a group, the same order
  int block = 1, group = 0;
  std::int64_t groups = 0;

  std::int64_t padded_cols() const { return groups * group; }
};

struct Input {
  const float* x = nullptr;  // [tokens, cols]
  std::int64_t tokens = 0, cols = 0;
  Activations coded;  // unset for products in float
};

struct Output {
  float* data = nullptr;  // [tokens, rows]
  std::int64_t rows = 0;
  const float* bias = nullptr;
  bool accumulate = false;
};

constexpr std::size_t kWorkerScratchBytes = 72 * 1024;

// Computes rows [begin * strip, end * strip) of one output. `scratch` is this worker's alone.
using StripKernel = void (*)(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char* scratch);

struct LinearKernels {
  int token_block;      // tokens interleaved in Activations when there are several
  int strip_tiles;      // row tiles per strip in the kernels for several tokens; one-token kernels take strips of one tile
  // quantizes `count` tokens (at most block) of x into block number `index` of `to`
  void (*quantize)(const float* x, std::int64_t cols, int count, std::int64_t index, const Activations& to);
  StripKernel tiles_one, tiles_many, tiles_exact;
  StripKernel float_one[3], float_many[3];  // by Form
};

// Bytes of scratch that `linear` holds now; part of the process's byte ledger.
std::size_t linear_scratch_bytes();
// What it would hold after products of `tokens` tokens of `cols` columns with weights in groups of `group` (0: dense weights).
std::size_t linear_scratch_bytes_for(std::int64_t tokens, std::int64_t cols, int group, int threads);

struct Product {
  const Matrix* matrix;
  Output output;
};

// All matrices read the same input, in one parallel region where their forms allow.
void linear(const float* x, std::int64_t tokens, std::int64_t cols, const Product* products, std::size_t count, bool exact);

// One row of any form, as float32.
void decode_row(const Matrix& matrix, std::int64_t row, float* out);
void gather_rows(const Matrix& matrix, const std::int64_t* ids, std::int64_t count, float* out);

}  // namespace mw
