// Pages whose tokens come one by one and are coded as they come: KIVI's blocks, keys by 16 tokens, values token by token.
//
// One layer of a page: key blocks [page_tokens / 16][kv head], value blocks [page_tokens / 32][kv head] (see kivi.isa.cpp), and how many
// key blocks are full. A key block takes 16 tokens at once; until they are there, its keys wait in int8 rows [token][kv head][dim + 2]
// that begin where the block will be. They are longer than codes: after the last block there is room for what they take more.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention.h"

namespace mw {

struct PageForm {
  static constexpr int kKeys = 16;  // tokens of a key block
  KiviForm codes;
  int kv_heads = 0, head_dim = 0, page_tokens = 0;

  std::size_t key_block() const { return codes.key_block_bytes(head_dim) * static_cast<unsigned>(kv_heads); }
  std::size_t value_block() const { return codes.value_block_bytes(head_dim) * static_cast<unsigned>(kv_heads); }
  std::size_t row() const { return static_cast<std::size_t>(kv_heads) * static_cast<unsigned>(head_dim + kScaleBytes); }
  std::size_t values_at() const {
    const std::size_t last = std::max(key_block(), (kKeys - 1) * row());
    return rounded(static_cast<std::size_t>(page_tokens / kKeys - 1) * key_block() + last);
  }
  std::size_t count_at() const { return values_at() + static_cast<std::size_t>(page_tokens / KiviForm::kValueBlock) * value_block(); }
  std::size_t layer_bytes() const { return rounded(count_at() + sizeof(std::uint32_t)); }

 private:
  static std::size_t rounded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }
};

// Rows i of k, v [rows][kv head][head_dim] become token places[i] % page_tokens of page places[i] / page_tokens; `data` is the layer in
// page 0, `stride` the bytes to the next page. Tokens of a page come in order; one may come again, and then all after it.
void store_pages(const PageForm& form, std::uint8_t* data, std::size_t stride, const float* k, const float* v, const std::int64_t* places,
                 std::int64_t rows);
// The layer of a page holds its first `tokens` tokens and no more: keys of a block that is no longer full wait again.
void cut_page(const PageForm& form, std::uint8_t* layer, int tokens);
// an attention over such pages, but for queries and table
void look_into(Attention& a, const PageForm& form, const std::uint8_t* data, std::size_t stride, int shift);

}  // namespace mw
