// What the files linear_*.isa.cpp offer one another within one instruction set.
#pragma once

#include "linear.h"
#include "vector.h"

namespace mw::MW_ISA {

// Tokens computed together, and row tiles per strip, so that the accumulators fill the registers and no more.
#if defined(__AVX512F__)
constexpr int kTokenBlock = 8, kStripTiles = 2;
#elif defined(__AVX2__)
constexpr int kTokenBlock = 4, kStripTiles = 1;
#else
constexpr int kTokenBlock = 2, kStripTiles = 1;
#endif
constexpr int kStripRows = kStripTiles * kTileRows;
constexpr int kStripVectors = kStripRows / kWidth;
static_assert(kStripRows <= kMostStripRows && kStripeTokens % kTokenBlock == 0);

void quantize_block(const float* x, std::int64_t cols, int count, std::int64_t index, const Activations& to);
void quantize_ordered(const float* x, const Matrix&, int count, std::int64_t index, const Activations& to);

void tiles_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void tiles_few(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void tiles_many(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void tiles_exact_few(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void tiles_part(const Matrix&, const Input&, std::int64_t strip, std::int64_t first_group, std::int64_t end_group, std::int64_t first_token,
                int tokens, float* sums, char*);
void tiles_exact(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);

void planes_rounded(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void planes_exact(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);

void bilevel_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void bilevel_many(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void codebook_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void codebook_panel(const Matrix&, std::int64_t first_row, std::int64_t first_col, int num_cols, float* panel);

void turn_token(const Turn&, const float* x, const std::uint16_t* columns, float* to, float* room);
void turn_token_back(const Turn&, const float* x, float scale, float* to, float* room);

void masked_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void masked_panel(const Matrix&, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride);
void bilevel_panel(const Matrix&, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride);

void sparse_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
// Writes the codes of some groups of a tile, those of pruned weights too: 16 rows by 4 columns every `stride` bytes.
void sparse_codes(const Matrix&, std::int64_t tile, std::int64_t first_group, int num_groups, std::uint8_t* to, std::int64_t stride);
void sparse_panel(const Matrix&, std::int64_t tile, std::int64_t first_col, int num_cols, float* panel, int stride);
void quantize_mixed(const float* x, const Matrix&, int count, std::int64_t index, const Activations& to);
void mixed_one(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void mixed_many(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
void mixed_part(const Matrix&, const Input&, std::int64_t strip, std::int64_t first, std::int64_t last, float* sums, char*);
void widen_codes(const std::int8_t* packed, std::int64_t columns, std::int8_t* to);

void stacked_few(const Matrix&, const Input&, std::int64_t begin, std::int64_t end, const Output&, char*);
// Decodes kStripRows rows of some columns (at most a sign panel, which may end among them): panel[column][row].
void stacked_panel(const Matrix&, std::int64_t first_row, std::int64_t first_col, int num_cols, float (*panel)[kStripRows]);

}  // namespace mw::MW_ISA
