// What the ways to split an attention over threads share: scratch that threads keep, and how a prompt is cut into tasks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"

namespace mw {

// Grows, is never given back before its thread ends: a few hundred kilobytes, and no call allocates after the first.
class Buffer {
 public:
  static std::size_t rounded(std::size_t floats) { return (floats + 4095) / 4096 * 4096; }

  float* get(std::size_t floats) {
    if (floats > size_) {
      floats = rounded(floats);
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

inline thread_local Buffer t_shared, t_work;  // of the caller, for all workers; of each worker

constexpr int kPromptRows = 128;

// queries of a prompt that one task takes: as many as fill the registers, fewer where threads would go without
inline int prompt_queries(const Attention& a, int threads) {
  const int rep = a.queries_per_kv_head();
  int queries = std::max(1, std::min(kPromptRows / rep, a.num_tokens));
  const auto tasks = [&] { return a.num_kv_heads * ((a.num_tokens + queries - 1) / queries); };
  while (tasks() < 2 * threads && queries * rep > 16 && queries > 1) queries = (queries + 1) / 2;
  return queries;
}

// floats of one query's partial result, all heads
inline std::size_t partial_stride(const Attention& a) { return static_cast<std::size_t>(a.num_heads) * (2 + a.padded_dim()); }

inline void scale_queries(const Attention& a, float* q) {
  const int padded_key = a.padded_key();
  for (int h = 0; h < a.num_heads; ++h)
    for (int d = 0; d < padded_key; ++d)
      q[static_cast<std::size_t>(h) * padded_key + d] = d < a.key_dim ? a.q[static_cast<std::size_t>(h) * a.key_dim + d] * a.scale : 0.0f;
}

// floats that `attend_shared` keeps for all workers, over so many rows, and for each of them
inline std::size_t shared_rows_scratch(const Attention& a, std::size_t rows) {
  return rows * static_cast<std::size_t>(a.num_heads) * (static_cast<std::size_t>(a.head_dim) + 4);
}
inline std::size_t single_scratch(const Attention& a, const AttentionKernels& kernels) {
  return static_cast<std::size_t>(a.num_heads) * a.padded_key() + (partial_stride(a) + 15) / 16 * 16 + kernels.decode_scratch(a);
}

}  // namespace mw
