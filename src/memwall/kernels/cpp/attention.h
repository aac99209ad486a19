// Attention over a cache whose past may be coded and whose recent part is exact.
//
// Token t of the cache: keys [0, coded_keys) live in coded blocks (KIVI's, or block floating point), the rest in `keys`; values
// likewise with their own split (KIVI holds another number of exact values than of exact keys). A full-precision cache has no coded part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bfp_form.h"

namespace mw {

enum class Real : int { float32 = 0, float16 = 1, bfloat16 = 2, int8 = 3 };

// Rows of exact numbers [token][kv head][key_dim or head_dim]; row 0 is the first token after the coded part. Rows of several layers may
// lie in turn (`stride`), or pages of 2^page_shift rows anywhere in `data` (`table`: the page that holds tokens p * 2^page_shift on).
// int8: behind the codes of each head its scale in half precision, kScaleBytes; all strides count bytes.
constexpr int kScaleBytes = 2;

struct Rows {
  const void* data = nullptr;
  Real type = Real::float32;
  std::int64_t stride = 0;  // numbers from one token to the next; 0: no gap
  const std::int32_t* table = nullptr;
  int page_shift = 0;
};

// How a KIVI cache is cut; see kivi.isa.cpp for the layout of a block.
struct KiviForm {
  int bits = 0;
  int group = 0;
  int key_group = 0;  // tokens of a key block where they are not as many as the channels of a value's group
  bool integers = false;  // of 2 or 4 bits: queries and shares are rounded to 8 bits, and their products with codes summed in 32

  int key_tokens() const { return key_group > 0 ? key_group : group; }
  // bytes of the codes, then of scales and minima, of one key block (`key_tokens` tokens) of one kv head
  std::size_t key_code_bytes(int key_dim) const { return plane_bytes(key_dim, key_tokens()); }
  std::size_t key_block_bytes(int key_dim) const { return key_code_bytes(key_dim) + 4u * static_cast<unsigned>(key_dim); }
  // the same of one value block (kValueBlock tokens)
  std::size_t value_code_bytes(int head_dim) const {
    return static_cast<std::size_t>(bits) * static_cast<unsigned>(head_dim) * kValueBlock / 8;
  }
  std::size_t value_block_bytes(int head_dim) const {
    return value_code_bytes(head_dim) + 4u * static_cast<unsigned>(head_dim / group) * kValueBlock;
  }
  static constexpr int kValueBlock = 32;
  // Whether the last row of words of a plane, `per_word` channels in each, has words of 16 bits: where channels were dropped,
  // and half a word does.
  static bool half_row(int channels, int per_word) {
    return channels % 16 != 0 && channels % per_word != 0 && channels % per_word <= per_word / 2;
  }

 private:
  std::size_t plane_bytes(int channels, int tokens) const;
};

// Coded blocks that lie in pages anywhere in `data`: the page that holds tokens p * 2^shift on is table[p]. One layer of a page has its
// key blocks, behind them (`values_at`) its value blocks; see pages.h.
struct CodedPages {
  const std::uint8_t* data = nullptr;
  std::size_t stride = 0, values_at = 0;  // bytes from one page to the next, and to the values of one
  const std::int32_t* table = nullptr;
  int shift = 0;

  const std::uint8_t* page(std::int64_t token) const { return data + static_cast<std::size_t>(table[token >> shift]) * stride; }
  // which block of `tokens` tokens of its page a token is in
  std::size_t block(std::int64_t token, int tokens) const {
    return static_cast<std::size_t>((token & ((std::int64_t{1} << shift) - 1)) / tokens);
  }
};

struct Attention {
  const float* q = nullptr;  // [num_tokens][num_heads][key_dim]
  float* out = nullptr;      // [num_tokens][num_heads][head_dim]
  float* stats = nullptr;    // [num_tokens][num_heads][2]: maximum logit, sum of exponentials; may be null
  int num_tokens = 0, num_heads = 0, num_kv_heads = 0;
  int key_dim = 0, head_dim = 0;  // numbers in a head's key (any width: channels may have been dropped) and in its value
  float scale = 1.0f;
  std::int64_t length = 0;      // tokens in the cache
  std::int64_t first_key = 0;   // index of the first key that query 0 may see ...
  std::int64_t query_key = 0;   // ... and of the last one: query i sees [first_key + p, query_key + p], cut to [0, length), p its place
  const std::int64_t* places = nullptr;  // ascending, of each query; null where query i has place i
  Rows keys, values;
  KiviForm form;
  BfpForm bfp;
  const std::uint8_t* key_blocks = nullptr;    // [block][kv head][key_block_bytes]
  const std::uint8_t* value_blocks = nullptr;  // [block][kv head][value_block_bytes]
  CodedPages pages;  // where KIVI's blocks lie instead, if it has any
  std::int64_t coded_keys = 0, coded_values = 0;
  // prefill over pages: keys from here up to `coded_keys` wait in int8 rows for their block to be full
  const void* waiting = nullptr;
  std::int64_t first_waiting = 0;
  // prefill of one head of a ragged cache: its past rows [token][head_dim], coded_keys = coded_values of them, before the tail
  Rows past_keys, past_values;
  bool exact = false;  // queries and shares are not to be rounded, however many queries there are

  std::int64_t place(int query) const { return places != nullptr ? places[query] : query; }
  int queries_per_kv_head() const { return num_heads / num_kv_heads; }
  const std::uint8_t* key_block(std::int64_t token) const {
    const int tokens = form.key_tokens();
    const std::size_t size = form.key_block_bytes(key_dim) * static_cast<unsigned>(num_kv_heads);
    if (pages.data != nullptr) return pages.page(token) + pages.block(token, tokens) * size;
    return key_blocks + static_cast<std::size_t>(token / tokens) * size;
  }
  const std::uint8_t* value_block(std::int64_t token) const {
    const std::size_t size = form.value_block_bytes(head_dim) * static_cast<unsigned>(num_kv_heads);
    if (pages.data != nullptr) return pages.page(token) + pages.values_at + pages.block(token, KiviForm::kValueBlock) * size;
    return value_blocks + static_cast<std::size_t>(token / KiviForm::kValueBlock) * size;
  }
  // The first `tokens` tokens are those of a table's pages, which `keys` and `values`, or `pages`, lie in.
  void look_up(const std::int32_t* table, std::int64_t tokens);
  int padded_dim() const { return (head_dim + 15) / 16 * 16; }
  int padded_key() const { return (key_dim + 15) / 16 * 16; }
};

// A cache whose kv heads hold different tokens: a past of flat rows, head by head, and a tail that all heads share.
struct Ragged {
  Attention tail;  // query_key counts inside the tail: the past lies before every query
  Rows past_keys, past_values;              // [row][head_dim]
  const std::int64_t* offsets = nullptr;    // [num_kv_heads + 1]: rows offsets[h] .. offsets[h + 1] are head h's
};

// What one worker found over one run of tokens: for each query head maximum, sum and the unnormalized output.
struct Partial {
  float* peak;  // [num_heads]
  float* sum;   // [num_heads]
  float* out;   // [num_heads][padded_dim]
};

struct AttentionKernels {
  // one query token, cache tokens [begin, end), begin a multiple of kStep; q is scaled and padded
  void (*decode)(const Attention&, const float* q, std::int64_t begin, std::int64_t end, const Partial&, float* scratch);
  std::size_t (*decode_scratch)(const Attention&);  // floats
  // what a coded form makes of the scaled queries, once for all runs of tokens; it lies right behind them
  std::size_t (*prepared)(const Attention&);  // floats
  void (*prepare)(const Attention&, float* q);
  // query tokens [begin, end) of one kv head
  void (*prefill)(const Attention&, int kv_head, int begin, int end, float* scratch);
  std::size_t (*prefill_scratch)(const Attention&, int queries);
  // a prompt of so many tokens or more over rows of bfloat16 has its queries and shares rounded to that (attention_pairs.h); 0: none has
  int (*paired_tokens)();
  // exact rows [tokens][kv head][head_dim] -> blocks; key rows: one whole block; value rows: tokens [slot, slot + count) of a block
  void (*encode_keys)(const Rows&, const KiviForm&, int kv_heads, int key_dim, std::uint8_t* block);
  void (*encode_values)(const Rows&, const KiviForm&, int kv_heads, int head_dim, int slot, int count, std::uint8_t* block);
  // the same in block floating point: tokens [slot, slot + count) of the block that starts at `to`
  void (*bfp_keys)(const Rows&, const BfpForm&, BfpTop, int kv_heads, int dim, int slot, int count, std::uint8_t* to);
  void (*bfp_values)(const Rows&, const BfpForm&, BfpTop, int kv_heads, int dim, int slot, int count, std::uint8_t* to);
  // float form of coded tokens [begin, end) of one kv head
  void (*key_tile)(const Attention&, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
  void (*value_tile)(const Attention&, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld);
};

constexpr int kStep = 128;  // tokens scored before their values are summed: scores stay in the first cache

const AttentionKernels& attention_kernels();
void attend(const Attention&);
// the one query of `a` over the tokens before `place` and its own, whose key and value [kv heads][dim] are stored there first; the
// rows are without a coded part, as wide as two dims say and writable. window: 0 for none
void attend_next(Attention a, const float* key, const float* value, std::int64_t place, std::int64_t window);
void attend_ragged(const Ragged&);

constexpr int kSequencesTogether = 16;  // more go in turns: what they share scratch for is bounded
// one query token of each of several sequences, all in one parallel region
void attend_sequences(const Attention* sequences, int count);

// Rows [row, row + count) of a batch over the tokens that a table finds: row i of them sees [0, query_key + i], cut to `length`.
struct Piece {
  int row = 0, count = 0;
  const std::int32_t* table = nullptr;
  std::int64_t length = 0, query_key = 0;
};
// Rows of several sequences of which some go on from keys that others share. `all` has queries, outputs and the pool of pages;
// every row is in one piece of `own`, and in one of `prefixes` at most. A prefix is read once for all its rows. All pieces' tasks
// are one list, the longest first, in one parallel region; what a row found in both is then joined. window: 0 for none.
void attend_shared(const Attention& all, const Piece* own, int num_own, const Piece* prefixes, int num_prefixes, std::int64_t window);

// what `attend` holds between calls, over all threads, once it has seen `tokens` queries at once and a long cache,
// `attend_sequences` that many sequences, and `attend_shared` that many rows
std::size_t attention_scratch_bytes_for(int num_heads, int num_kv_heads, int head_dim, int tokens, int threads, int sequences = 1,
                                        int shared_rows = 0);

// rows = exact tokens; encodes `count` tokens of keys (whole blocks) from the start of `blocks`, of values from token `first`
void kivi_encode_keys(const Rows&, const KiviForm&, int kv_heads, int key_dim, std::int64_t count, std::uint8_t* blocks);
void kivi_encode_values(const Rows&, const KiviForm&, int kv_heads, int head_dim, std::int64_t first, std::int64_t count,
                        std::uint8_t* blocks);
// rows = exact tokens; encodes `count` of them as tokens first ... of `blocks` (blocks along tokens: whole ones)
void bfp_encode(bool keys, const Rows& rows, const BfpForm&, BfpTop, int kv_heads, int dim, std::int64_t first, std::int64_t count,
                std::uint8_t* blocks);

}  // namespace mw
