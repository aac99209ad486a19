// The next token of several latent caches: rows of each are rebuilt and attended to a block at a time, all caches' beside each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "latent.h"
#include "linear.h"

namespace mw {

constexpr std::int64_t kRebuiltTokens = 128;  // of one block

// Rows in codes, or as floats where `form` has 16 or 32 bits; behind the coded ones those that wait for their group, float16 [group][width].
struct LatentStore {
  LatentForm form;
  const std::uint8_t* records = nullptr;
  const std::uint16_t* tail = nullptr;

  bool coded() const { return form.bits <= 8; }
  std::int64_t bytes(std::int64_t tokens) const {
    return coded() ? (tokens + form.tokens() - 1) / form.tokens() * form.record_bytes() : tokens * form.width * form.bits / 8;
  }
};

// One layer of one cache, and room that no other part which comes with it may have.
struct LatentPart {
  const LatentStore *keys = nullptr, *values = nullptr;  // the same ones where keys and values come from the same rows
  Product to_keys, to_values;                            // into `rebuilt` and `mixed`
  const float* key_norm = nullptr;
  float eps = 0.0f;
  std::int64_t heads = 0, kv_heads = 0, dim = 0;
  float *key_rows = nullptr, *value_rows = nullptr;  // [kRebuiltTokens][width]
  float *rebuilt = nullptr, *mixed = nullptr;        // [kRebuiltTokens][kv_heads][dim], [heads][kv_heads][dim]
  float* sums = nullptr;                             // [heads][width of a row of values]
};

// A query sees tokens [first, length), of which `coded_keys` and `coded_values` are coded.
struct LatentToken {
  const LatentPart* part = nullptr;
  const float* q = nullptr;  // [heads][dim]
  float* stats = nullptr;    // [heads][2], as `LatentAttention` has them
  std::int64_t coded_keys = 0, coded_values = 0, length = 0, first = 0;
};

// Adds to each part's sums what its query finds in tokens [begin, end), from whole blocks on. cos, sin [end - begin][dim / 2] turn keys there.
void attend_latent_blocks(const LatentToken* list, std::size_t count, std::int64_t begin, std::int64_t end, const float* cos, const float* sin,
                          float scale);
// The sums divided, and made values of: out [count][heads][dim].
void finish_latent_blocks(const LatentToken* list, std::size_t count, float* out);

}  // namespace mw
