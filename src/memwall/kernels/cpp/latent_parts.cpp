#include "latent_parts.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "elementwise.h"
#include "half.h"
#include "threads.h"

MW_KERNEL_TABLE(ElementwiseKernels, elementwise_kernels)

namespace mw {
namespace {

// Floats of `bits` as they lie in memory.
void widen(const std::uint8_t* from, int bits, std::int64_t count, float* to) {
  if (bits == 32) std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  else latent_widen(reinterpret_cast<const std::uint16_t*>(from), count, to);
}

// Tokens [begin, end), `coded` of all being coded. here: on the calling thread alone.
void read_rows(const LatentStore& store, std::int64_t coded, std::int64_t begin, std::int64_t end, float* to, bool here) {
  const std::int64_t width = store.form.width, cut = std::min(std::max(coded, begin), end);
  if (!store.coded()) widen(store.records + store.bytes(begin), store.form.bits, (cut - begin) * width, to);
  else if (cut > begin) (here ? latent_decode_here : latent_decode)(store.form, store.records, begin, cut - begin, to);
  if (cut < end) latent_widen(store.tail + (cut - coded) * width, (end - cut) * width, to + (cut - begin) * width);
}

// What one part does with its block of tokens [begin, end).
struct Block {
  const LatentToken* token;
  std::int64_t begin, end;

  std::int64_t rows() const { return end - begin; }
  void read(bool here) const {
    const LatentPart& part = *token->part;
    read_rows(*part.keys, token->coded_keys, begin, end, part.key_rows, here);
    if (part.values != part.keys) read_rows(*part.values, token->coded_values, begin, end, part.value_rows, here);
  }
  void multiply() const {
    const LatentPart& part = *token->part;
    linear(part.key_rows, rows(), part.keys->form.width, &part.to_keys, 1, false);
  }
  LatentAttention attention(float scale) const {
    const LatentPart& part = *token->part;
    LatentAttention a;
    a.q = token->q, a.k = part.rebuilt, a.v = part.values == part.keys ? part.key_rows : part.value_rows, a.out = part.sums, a.stats = token->stats;
    a.queries = 1, a.heads = part.heads, a.kv_heads = part.kv_heads, a.dim = part.dim, a.tokens = rows(), a.value_heads = 1;
    a.value_dim = part.values->form.width, a.scale = scale, a.first_key = token->first - begin;
    return a;
  }
  // cos and sin of the block's first token
  void attend(const float* cos, const float* sin, float scale, bool here) const {
    const LatentPart& part = *token->part;
    const std::int64_t row = part.kv_heads * part.dim, half = part.dim / 2;
    if (here) {
      const ElementwiseKernels& kernels = elementwise_kernels_in_use();
      if (part.key_norm) kernels.rms_norm(part.rebuilt, part.key_norm, part.eps, rows() * part.kv_heads, part.dim, part.rebuilt);
      for (std::int64_t t = 0; t < rows(); ++t) kernels.rope(part.rebuilt + t * row, cos + t * half, sin + t * half, part.kv_heads, part.dim, half);
      latent_attend_here(attention(scale));
    } else {
      if (part.key_norm) rms_norm(part.rebuilt, part.key_norm, part.eps, rows() * part.kv_heads, part.dim, part.rebuilt);
      rope(part.rebuilt, cos, sin, rows(), part.kv_heads, part.dim, half);
      latent_attend(attention(scale));
    }
  }
};

}  // namespace

void attend_latent_blocks(const LatentToken* list, std::size_t count, std::int64_t begin, std::int64_t end, const float* cos, const float* sin,
                          float scale) {
  static thread_local std::vector<Block> held;
  std::vector<Block>& blocks = held;
  for (std::int64_t at = begin; at < end; at += kRebuiltTokens) {
    blocks.clear();
    for (std::size_t i = 0; i < count; ++i)
      if (list[i].first < at + kRebuiltTokens && list[i].length > at) blocks.push_back({list + i, at, std::min(list[i].length, at + kRebuiltTokens)});
    if (blocks.empty()) continue;
    const Block* all = blocks.data();  // workers have lists of their own
    // with fewer blocks than threads, each block's work is shared
    const bool apart = blocks.size() >= static_cast<std::size_t>(num_threads());
    const auto each = [&](auto&& f) {
      const auto some = [&](std::size_t first, std::size_t last, int) {
        for (std::size_t i = first; i < last; ++i) f(all[i], apart);
      };
      if (apart) parallel_for(blocks.size(), 1, some);
      else some(0, blocks.size(), 0);
    };
    const std::int64_t half = list->part->dim / 2;
    each([](const Block& block, bool here) { block.read(here); });
    for (const Block& block : blocks) block.multiply();
    each([&](const Block& block, bool here) { block.attend(cos + (at - begin) * half, sin + (at - begin) * half, scale, here); });
  }
}

void finish_latent_blocks(const LatentToken* list, std::size_t count, float* out) {
  for (std::size_t i = 0; i < count; ++i) {
    const LatentPart& part = *list[i].part;
    const std::int64_t width = part.values->form.width, row = part.kv_heads * part.dim;
    for (std::int64_t h = 0; h < part.heads; ++h) {
      const float sum = list[i].stats[2 * h + 1];
      float* to = part.sums + h * width;
      for (std::int64_t w = 0; w < width && sum > 0.0f; ++w) to[w] /= sum;
    }
    linear(part.sums, part.heads, width, &part.to_values, 1, false);
    for (std::int64_t h = 0; h < part.heads; ++h) {
      const float* from = part.mixed + h * row + h / (part.heads / part.kv_heads) * part.dim;
      std::copy(from, from + part.dim, out + (static_cast<std::int64_t>(i) * part.heads + h) * part.dim);
    }
  }
}

}  // namespace mw
