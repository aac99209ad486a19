// Low-rank additions to products: y += scale * B (A x) for rows of a batch that belong to different adapters.
//
// Adapters lie in pages of a shared pool. A page holds, for every layer, one block of units of `unit_bytes`, a power
// of two of them; unit u of an adapter is unit u % (units of a block) of the page number u / (units of a block) of its table. A row of A (one of
// `rank`, over the inputs) or of B transposed (one of `rank`, over the outputs) takes whole units, the last one padded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "linear.h"

namespace mw {

constexpr int kLoraTargets = 7;  // q, k, v, o, gate, up, down
constexpr int kMostLoraRank = 512;

struct LoraTarget {
  std::int64_t rank = 0;  // 0: the adapter leaves this product alone
  std::int64_t in = 0, out = 0;
  std::int64_t first_unit = 0;  // rows of A from here, then rows of B transposed
};

struct LoraPool {
  std::uint8_t* base = nullptr;
  std::int64_t pages = 0, page_bytes = 0;
  std::int64_t layer_bytes = 0, unit_bytes = 0;
  int block_shift = 0;  // a page's block has 1 << block_shift units of a layer
};

struct LoraAdapter {
  Form form = Form::float16;  // of its numbers: float32, float16 or bfloat16
  float scale = 1.0f;
  LoraTarget targets[kLoraTargets];
  std::vector<std::int32_t> pages;
  std::vector<float> rows[kLoraTargets];  // [layers, 2, out]: y += rows[0] y + rows[1] once all is added (DoRA); empty: as it is

  std::int64_t itemsize() const { return form == Form::float32 ? 4 : 2; }
  std::int64_t row_units(const LoraPool& pool, std::int64_t width) const {
    return (width * itemsize() + pool.unit_bytes - 1) / pool.unit_bytes;
  }
  std::int64_t units(const LoraPool& pool, const LoraTarget& t) const {
    return t.rank * (row_units(pool, t.in) + row_units(pool, t.out));
  }
};

// Rows of one kind (A or B transposed) of one adapter, target and layer, as kernels read them.
struct LoraRows {
  const std::uint8_t* layer = nullptr;  // the layer's block of page 0 of the pool
  const std::int32_t* pages = nullptr;
  std::int64_t page_bytes = 0, unit_bytes = 0;
  int block_shift = 0;
  std::int64_t first_unit = 0, row_units = 0;
  std::int64_t unit_values = 0, width = 0;  // numbers of a whole unit, and of a row

  const std::uint8_t* unit(std::int64_t row, std::int64_t at) const {
    const std::int64_t u = first_unit + row * row_units + at;
    return layer + pages[u >> block_shift] * page_bytes + (u & ((std::int64_t{1} << block_shift) - 1)) * unit_bytes;
  }
};

struct LoraKernels {
  // t[b][j] = sum of x[b] * row j, for rows [begin, end); by Form
  void (*shrink[3])(const LoraRows&, const float* x, std::int64_t x_stride, std::int64_t tokens, std::int64_t begin, std::int64_t end,
                    float* t, std::int64_t t_stride);
  // y[b] += scale * sum over rows of t[b][j] * row j, for units [begin, end) of the rows; by Form
  void (*expand[3])(const LoraRows&, const float* t, std::int64_t t_stride, std::int64_t tokens, std::int64_t rank, float scale,
                    std::int64_t begin, std::int64_t end, float* y, std::int64_t y_stride);
};

// Rows [first, first + count) of the batch belong to one adapter.
struct LoraSegment {
  std::int64_t first = 0, count = 0;
  const LoraAdapter* adapter = nullptr;
};

struct LoraOutput {
  int target = 0;
  float* data = nullptr;  // [rows, width]
  std::int64_t width = 0;
};

// What one call works on: rows [first_row, first_row + rows) of the batch, one input, the outputs of up to three products of it.
struct LoraCall {
  const LoraPool* pool = nullptr;
  const LoraSegment* segments = nullptr;
  std::size_t num_segments = 0;
  std::int64_t layer = 0, first_row = 0, rows = 0;
  const float* x = nullptr;
  std::int64_t in = 0;
  const LoraOutput* outputs = nullptr;
  std::size_t num_outputs = 0;
  float* scratch = nullptr;  // [rows, scratch_width], as wide as the ranks of all outputs of an adapter together
  std::int64_t scratch_width = 0;
};

// Adds to every output, and lengthens its numbers where the adapter says so; gives the number of multiplications that were done.
std::int64_t add_lora(const LoraCall& call);

// Reads an adapter's tensors from a file into its pages. offsets: [layers, targets, 2], the byte where A [rank, in] and
// B [out, rank] of each begin, or -1 for zeros. stored: the file's number format; a float32 file may become float16. Gives the
// bytes read, or -1 - errno.
std::int64_t fetch_lora(const LoraPool& pool, const LoraAdapter& adapter, int file, Form stored, const std::int64_t* offsets, std::int64_t layers);

}  // namespace mw
