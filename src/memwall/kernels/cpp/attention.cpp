// Splits an attention over threads, and merges what they found.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "attention_table.h"
#include "dispatch.h"
#include "threads.h"

namespace mw {
namespace {

constexpr std::int64_t kBytesPerMicrosecond = 10000;  // a core reads about this much; waking a thread costs a few microseconds
constexpr std::int64_t kInlineMicroseconds = 20;
constexpr int kPromptRows = 128;

// Grows, is never given back before its thread ends: a few hundred kilobytes, and no call allocates after the first.
class Buffer {
 public:
  float* get(std::size_t floats) {
    if (floats > size_) {
      floats = (floats + 4095) / 4096 * 4096;
      data_.reset(static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))));
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  std::size_t size_ = 0;
};

thread_local Buffer t_shared, t_work;  // of the caller, for all workers; of each worker

std::size_t bytes_of(Real type) { return type == Real::float32 ? 4 : 2; }

// bytes that one query reads between two token numbers
std::int64_t traffic(const Attention& a, std::int64_t begin, std::int64_t end) {
  const auto part = [&](std::int64_t coded, Real type, int dim) {
    const std::int64_t exact = std::max<std::int64_t>(end - std::max(begin, coded), 0);
    const std::int64_t row = static_cast<std::int64_t>(a.num_kv_heads) * dim;
    return exact * row * static_cast<std::int64_t>(bytes_of(type)) + (end - begin - exact) * row * std::max(a.form.bits + 1, 1) / 8;
  };
  return part(a.coded_keys, a.keys.type, a.key_dim) + part(a.coded_values, a.values.type, a.head_dim);
}

void merge(const Attention& a, const float* partials, std::size_t stride, int chunks) {
  const int heads = a.num_heads, padded = a.padded_dim();
  for (int h = 0; h < heads; ++h) {
    float peak = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    for (int c = 0; c < chunks; ++c)
      if (partials[c * stride + heads + h] > 0.0f) peak = std::max(peak, partials[c * stride + h]);
    float* out = a.out + static_cast<std::size_t>(h) * a.head_dim;
    std::fill(out, out + a.head_dim, 0.0f);
    for (int c = 0; c < chunks; ++c) {
      const float* part = partials + c * stride;
      if (!(part[heads + h] > 0.0f)) continue;
      const float weight = std::exp(part[h] - peak);
      sum += weight * part[heads + h];
      const float* from = part + 2 * heads + static_cast<std::size_t>(h) * padded;
      for (int d = 0; d < a.head_dim; ++d) out[d] += weight * from[d];
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int d = 0; d < a.head_dim; ++d) out[d] *= inverse;
    if (a.stats != nullptr) a.stats[2 * h] = peak, a.stats[2 * h + 1] = sum;
  }
}

void attend_one(const Attention& a, const AttentionKernels& kernels) {
  const std::int64_t end = std::min(a.query_key + 1, a.length);
  const std::int64_t begin = std::max<std::int64_t>(a.first_key, 0) / kStep * kStep;
  const int heads = a.num_heads, padded = a.padded_dim(), padded_key = a.padded_key();
  const std::int64_t steps = std::max<std::int64_t>((end - begin + kStep - 1) / kStep, 1);
  std::int64_t chunks = 1;
  if (end > begin && traffic(a, begin, end) > kInlineMicroseconds * kBytesPerMicrosecond)
    chunks = std::min<std::int64_t>(steps, num_threads() > 1 ? 2 * num_threads() : 1);
  const std::int64_t chunk = (steps + chunks - 1) / chunks * kStep;
  chunks = (steps * kStep + chunk - 1) / chunk;

  const std::size_t stride = static_cast<std::size_t>(heads) * (2 + padded);
  const std::size_t q_size = static_cast<std::size_t>(heads) * padded_key;
  float* shared = t_shared.get(q_size + stride * static_cast<std::size_t>(chunks));
  float *q = shared, *partials = shared + q_size;
  for (int h = 0; h < heads; ++h)
    for (int d = 0; d < padded_key; ++d)
      q[static_cast<std::size_t>(h) * padded_key + d] = d < a.key_dim ? a.q[static_cast<std::size_t>(h) * a.key_dim + d] * a.scale : 0.0f;

  const std::size_t scratch = kernels.decode_scratch(a);
  const auto body = [&](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t c = first; c < last; ++c) {
      float* at = partials + c * stride;
      const std::int64_t from = begin + static_cast<std::int64_t>(c) * chunk;
      kernels.decode(a, q, from, std::max(std::min(from + chunk, end), from), {at, at + heads, at + 2 * heads}, work);
    }
  };
  if (chunks == 1) body(0, 1, 0);
  else parallel_for(static_cast<std::size_t>(chunks), 1, body);
  merge(a, partials, stride, static_cast<int>(chunks));
}

void attend_many(const Attention& a, const AttentionKernels& kernels) {
  const int rep = a.queries_per_kv_head();
  int queries = std::max(1, std::min(kPromptRows / rep, a.num_tokens));
  const auto tasks = [&] { return a.num_kv_heads * ((a.num_tokens + queries - 1) / queries); };
  while (tasks() < 2 * num_threads() && queries * rep > 16 && queries > 1) queries = (queries + 1) / 2;
  const int blocks = (a.num_tokens + queries - 1) / queries;
  const std::size_t scratch = kernels.prefill_scratch(a, queries);
  const auto body = [&](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const int block = blocks - 1 - static_cast<int>(i) / a.num_kv_heads;  // the last queries see most keys: long tasks first
      const int head = static_cast<int>(i) % a.num_kv_heads;
      kernels.prefill(a, head, block * queries, std::min((block + 1) * queries, a.num_tokens), work);
    }
  };
  parallel_for(static_cast<std::size_t>(tasks()), 1, body);
}

}  // namespace

std::size_t KiviForm::plane_bytes(int channels, int tokens) const {
  const auto row_bytes = [&](int width) {
    const int per_word = 32 / width, rows = (channels + per_word - 1) / per_word;
    return static_cast<std::size_t>(4 * rows - (half_row(channels, per_word) ? 2 : 0));
  };
  return (bits == 3 ? row_bytes(2) + row_bytes(1) : row_bytes(bits)) * static_cast<std::size_t>(tokens);
}

const AttentionKernels& attention_kernels() {
#if defined(MW_X86)
  if (active_isa() == Isa::avx512) return avx512::attention_table();
  if (active_isa() == Isa::avx2) return avx2::attention_table();
#endif
  return portable::attention_table();
}

void attend(const Attention& a) {
  if (a.num_tokens == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  if (a.num_tokens == 1) attend_one(a, kernels);
  else attend_many(a, kernels);
}

void kivi_encode_keys(const Rows& rows, const KiviForm& form, int kv_heads, int key_dim, std::int64_t count,
                      std::uint8_t* blocks) {
  const AttentionKernels& kernels = attention_kernels();
  const std::size_t size = form.key_block_bytes(key_dim) * static_cast<std::size_t>(kv_heads);
  const std::size_t row = static_cast<std::size_t>(kv_heads) * key_dim * bytes_of(rows.type);
  parallel_for(static_cast<std::size_t>(count / form.group), 2, [&](std::size_t first, std::size_t last, int) {
    for (std::size_t b = first; b < last; ++b) {
      const Rows from{static_cast<const std::uint8_t*>(rows.data) + b * form.group * row, rows.type};
      kernels.encode_keys(from, form, kv_heads, key_dim, blocks + b * size);
    }
  });
}

void kivi_encode_values(const Rows& rows, const KiviForm& form, int kv_heads, int head_dim, std::int64_t first,
                        std::int64_t count, std::uint8_t* blocks) {
  constexpr std::int64_t B = KiviForm::kValueBlock;
  const AttentionKernels& kernels = attention_kernels();
  const std::size_t size = form.value_block_bytes(head_dim) * static_cast<std::size_t>(kv_heads);
  const std::size_t row = static_cast<std::size_t>(kv_heads) * head_dim * bytes_of(rows.type);
  if (count <= 0) return;
  const std::int64_t first_block = first / B, num_blocks = (first + count - 1) / B - first_block + 1;
  parallel_for(static_cast<std::size_t>(num_blocks), 2, [&](std::size_t lo, std::size_t hi, int) {
    for (std::size_t i = lo; i < hi; ++i) {
      const std::int64_t block = first_block + static_cast<std::int64_t>(i);
      const std::int64_t from = std::max(first, block * B), to = std::min(first + count, (block + 1) * B);
      const Rows source{static_cast<const std::uint8_t*>(rows.data) + static_cast<std::size_t>(from - first) * row, rows.type};
      kernels.encode_values(source, form, kv_heads, head_dim, static_cast<int>(from - block * B), static_cast<int>(to - from),
                            blocks + static_cast<std::size_t>(block) * size);
    }
  });
}

}  // namespace mw
