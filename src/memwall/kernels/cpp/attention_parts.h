// Caches that lie apart: what each of several does for its next token, all in one parallel region.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace mw {

// one token's numbers to their place among rows of any type, which must be writable
void store_row(const Rows& rows, std::int64_t place, const float* x, int heads, int dim);

// `count` exact tokens are coded as tokens `first` ... of `blocks`: KIVI's, of keys whole groups, or block floating point, along tokens whole
// blocks.
struct Encoding {
  bool keys = false;
  Rows rows;
  KiviForm form;
  BfpForm bfp;
  BfpTop top = BfpTop::clamp;
  int kv_heads = 0, dim = 0;
  std::int64_t first = 0, count = 0;
  std::uint8_t* blocks = nullptr;
};
void encode_each(const Encoding* list, std::size_t count);

// Joins what the same queries found in tokens that lie apart: pieces ends[i - 1] ... ends[i] belong to query i. outs [pieces][heads]
// [dim], stats [pieces][heads][2] as `Attention` leaves them; out [queries][heads][dim], joined [queries][heads][2] or null.
void join_pieces(const float* outs, const float* stats, const std::int64_t* ends, int queries, int heads, int dim, float* out, float* joined);

}  // namespace mw
