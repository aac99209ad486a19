// Rows of numbers kept in few bits, and attention over keys and values that exist for one block of tokens only.
//
// A code q stands for (q - z) * s, with a float16 scale s and a one-byte zero point z for each group. Groups run along the
// channels of one token, or along the tokens of one channel; codes of a row follow one another, lowest bits first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

struct LatentForm {
  int width = 0;  // numbers of a row
  int bits = 0;   // 2, 3, 4 or 8
  int group = 0;  // numbers that share a scale
  bool along_tokens = false;
  bool zero_inside = false;  // zero points are codes themselves, so that every group's range holds zero

  std::int64_t row_bytes() const { return (width + 7) / 8 * bits; }
  std::int64_t scales() const { return along_tokens ? width : (width + group - 1) / group; }
  std::int64_t tokens() const { return along_tokens ? group : 1; }  // of one record
  std::int64_t record_bytes() const { return tokens() * row_bytes() + 3 * scales(); }  // codes, scales, zero points
  int lowest_zero() const { return zero_inside ? 0 : -((255 - ((1 << bits) - 1)) / 2); }
  int highest_zero() const { return zero_inside ? (1 << bits) - 1 : lowest_zero() + 255; }
};

// Weighted sums of values [tokens][value_heads][value_dim] under the softmax of q . k, added to what earlier blocks left.
struct LatentAttention {
  const float* q = nullptr;  // [queries][heads][dim]
  const float* k = nullptr;  // [tokens][kv_heads][dim]
  const float* v = nullptr;
  float* out = nullptr;    // [queries][heads][value_dim], not divided by the sum
  float* stats = nullptr;  // [queries][heads][2]: largest logit, sum of exponentials; a sum of 0 is a fresh start
  std::int64_t queries = 0, heads = 0, kv_heads = 0, dim = 0, tokens = 0, value_heads = 0, value_dim = 0;
  float scale = 1.0f;
  std::int64_t first_key = 0;  // of query 0; query i sees tokens from first_key + i on
};

constexpr int kMostLatentTokens = 512;  // of one block

struct LatentKernels {
  void (*encode)(const LatentForm&, const float* rows, std::uint8_t* record);  // one record
  // rows [begin, end) of one record
  void (*decode)(const LatentForm&, const std::uint8_t* record, std::int64_t begin, std::int64_t end, float* rows);
  // `count` heads of one query from `head` on, which share their keys or at least their values
  void (*attend)(const LatentAttention&, std::int64_t query, std::int64_t head, int count);
  void (*widen)(const std::uint16_t* halves, std::int64_t count, float* to);
};

void latent_encode(const LatentForm&, const float* rows, std::int64_t count, std::uint8_t* records);
void latent_decode(const LatentForm&, const std::uint8_t* records, std::int64_t first, std::int64_t count, float* rows);
void latent_attend(const LatentAttention&);
void latent_widen(const std::uint16_t* halves, std::int64_t count, float* to);
// The same on the calling thread alone.
void latent_decode_here(const LatentForm&, const std::uint8_t* records, std::int64_t first, std::int64_t count, float* rows);
void latent_attend_here(const LatentAttention&);

}  // namespace mw
