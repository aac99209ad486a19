// Stores tokens in pages of coded blocks; see pages.h.
#include "pages.h"

#include <cstring>
#include <vector>

#include "elementwise.h"
#include "half.h"
#include "threads.h"

namespace mw {
namespace {

std::uint32_t full_blocks(const PageForm& form, const std::uint8_t* layer) {
  std::uint32_t count;
  std::memcpy(&count, layer + form.count_at(), sizeof count);
  return count;
}
void set_full_blocks(const PageForm& form, std::uint8_t* layer, std::uint32_t count) {
  std::memcpy(layer + form.count_at(), &count, sizeof count);
}

std::uint8_t* waiting_rows(const PageForm& form, std::uint8_t* layer, int block) {
  return layer + static_cast<std::size_t>(block) * form.key_block();
}

// the first `count` keys of a coded block as floats [count][kv head][head_dim]
void read_block(const PageForm& form, const std::uint8_t* block, int count, float* rows) {
  Attention a;
  a.form = form.codes, a.num_kv_heads = form.kv_heads, a.key_dim = a.head_dim = form.head_dim, a.key_blocks = block;
  const AttentionKernels& kernels = attention_kernels();
  for (int h = 0; h < form.kv_heads; ++h)
    kernels.key_tile(a, h, 0, count, rows + h * form.head_dim, form.kv_heads * form.head_dim);
}

// int8 rows as floats
void read_rows(const PageForm& form, const std::uint8_t* rows, int count, float* to) {
  for (int i = 0; i < count * form.kv_heads; ++i, rows += form.head_dim + kScaleBytes, to += form.head_dim) {
    std::uint16_t half;
    std::memcpy(&half, rows + form.head_dim, sizeof half);
    const float scale = half_to_float(half);
    for (int d = 0; d < form.head_dim; ++d) to[d] = scale * static_cast<float>(static_cast<std::int8_t>(rows[d]));
  }
}

// The block's first `count` keys wait again, as their codes have them.
void uncode(const PageForm& form, std::uint8_t* layer, int block, int count) {
  static thread_local std::vector<float> rows;
  rows.resize(static_cast<std::size_t>(PageForm::kKeys) * form.kv_heads * form.head_dim);
  std::uint8_t* to = waiting_rows(form, layer, block);
  read_block(form, to, count, rows.data());
  to_int8_rows(rows.data(), static_cast<std::int64_t>(count) * form.kv_heads, form.head_dim, reinterpret_cast<std::int8_t*>(to));
}

// keys [count][kv head][head_dim] of one page, from its token `slot` on
void store_keys(const PageForm& form, std::uint8_t* layer, const float* k, int slot, int count) {
  const AttentionKernels& kernels = attention_kernels();
  const auto width = static_cast<std::size_t>(form.kv_heads) * static_cast<unsigned>(form.head_dim);
  static thread_local std::vector<std::uint8_t> codes;
  static thread_local std::vector<float> rows;
  codes.resize(PageForm::kKeys * form.row());
  rows.resize(PageForm::kKeys * width);
  while (count > 0) {
    const int block = slot / PageForm::kKeys, first = slot % PageForm::kKeys, n = std::min(count, PageForm::kKeys - first);
    std::uint8_t* place = waiting_rows(form, layer, block);
    if (first > 0 && full_blocks(form, layer) > static_cast<std::uint32_t>(block)) uncode(form, layer, block, first);
    const bool fills = first + n == PageForm::kKeys;
    // whatever pieces they came in, keys are coded from their int8 rows, so that a page's bytes do not tell
    std::uint8_t* to = fills ? codes.data() : place;
    if (fills) std::memcpy(to, place, static_cast<std::size_t>(first) * form.row());
    to_int8_rows(k, static_cast<std::int64_t>(n) * form.kv_heads, form.head_dim, reinterpret_cast<std::int8_t*>(to + static_cast<std::size_t>(first) * form.row()));
    if (fills) {
      read_rows(form, to, PageForm::kKeys, rows.data());
      kernels.encode_keys({rows.data(), Real::float32}, form.codes, form.kv_heads, form.head_dim, place);
    }
    set_full_blocks(form, layer, static_cast<std::uint32_t>(block + fills));
    k += static_cast<std::size_t>(n) * width, slot += n, count -= n;
  }
}

void store_values(const PageForm& form, std::uint8_t* layer, const float* v, int slot, int count) {
  const AttentionKernels& kernels = attention_kernels();
  const auto width = static_cast<std::size_t>(form.kv_heads) * static_cast<unsigned>(form.head_dim);
  constexpr int kBlock = KiviForm::kValueBlock;
  while (count > 0) {
    const int n = std::min(count, kBlock - slot % kBlock);
    std::uint8_t* block = layer + form.values_at() + static_cast<std::size_t>(slot / kBlock) * form.value_block();
    kernels.encode_values({v, Real::float32}, form.codes, form.kv_heads, form.head_dim, slot % kBlock, n, block);
    v += static_cast<std::size_t>(n) * width, slot += n, count -= n;
  }
}

}  // namespace

void store_pages(const PageForm& form, std::uint8_t* data, std::size_t stride, const float* k, const float* v, const std::int64_t* places,
                 std::int64_t rows) {
  struct Run {
    std::int64_t row, count;
  };
  static thread_local std::vector<Run> runs;  // neighbours in one page
  runs.clear();
  for (std::int64_t i = 0; i < rows; ++i) {
    const bool follows = i > 0 && places[i] == places[i - 1] + 1 && places[i] % form.page_tokens != 0;
    if (follows) ++runs.back().count;
    else runs.push_back({i, 1});
  }
  const Run* list = runs.data();  // workers have thread-local lists of their own
  const auto width = static_cast<std::size_t>(form.kv_heads) * static_cast<unsigned>(form.head_dim);
  const std::size_t few = std::max<std::size_t>(1, (std::size_t{1} << 14) / (width * static_cast<std::size_t>(rows) / std::max<std::size_t>(runs.size(), 1) + 1));
  parallel_for(runs.size(), few, [&, list](std::size_t begin, std::size_t end, int) {
    for (std::size_t i = begin; i < end; ++i) {
      const Run& run = list[i];
      const std::int64_t place = places[run.row];
      std::uint8_t* layer = data + static_cast<std::size_t>(place / form.page_tokens) * stride;
      const int slot = static_cast<int>(place % form.page_tokens), count = static_cast<int>(run.count);
      store_keys(form, layer, k + static_cast<std::size_t>(run.row) * width, slot, count);
      store_values(form, layer, v + static_cast<std::size_t>(run.row) * width, slot, count);
    }
  });
}

void cut_page(const PageForm& form, std::uint8_t* layer, int tokens) {
  const int block = tokens / PageForm::kKeys, left = tokens % PageForm::kKeys;
  if (full_blocks(form, layer) <= static_cast<std::uint32_t>(block)) return;
  if (left > 0) uncode(form, layer, block, left);
  set_full_blocks(form, layer, static_cast<std::uint32_t>(block));
}

void look_into(Attention& a, const PageForm& form, const std::uint8_t* data, std::size_t stride, int shift) {
  a.num_kv_heads = form.kv_heads, a.key_dim = a.head_dim = form.head_dim, a.form = form.codes;
  a.pages = {data, stride, form.values_at(), nullptr, shift};
}

}  // namespace mw
