// Attention of one head whose tiles are the caller's: what a choice of tiles is measured with.
#pragma once

#include <cstdint>

namespace mw {

constexpr int kTilePad = 16;  // key tiles and head sizes are multiples of this

struct TiledAttention {
  const float* q;  // [rows, size]
  const float* k;  // [keys, size]
  const float* v;  // [keys, size]
  float* out;      // [rows, size]
  std::int64_t rows, keys;
  int size;
  std::int64_t row_tile, key_tile;
  float scale;
  bool causal;     // row i sees keys 0 .. keys - rows + i
  float* scratch;  // [scratch_size()]

  // a tile of keys by coordinate, a tile of scores, maximum and sum of each of its rows
  std::int64_t scratch_size() const { return key_tile * size + row_tile * key_tile + 2 * row_tile; }
};

struct TiledAttentionKernels {
  void (*attend)(const TiledAttention&);
};

// In the calling thread alone.
void tiled_attention(const TiledAttention& task);

}  // namespace mw
