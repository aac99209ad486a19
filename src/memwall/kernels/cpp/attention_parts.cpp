#include "attention_parts.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "elementwise.h"
#include "threads.h"

namespace mw {
namespace {

std::size_t bytes_of(Real type) { return type == Real::float32 ? 4 : type == Real::int8 ? 1 : 2; }

// tokens of one job that one block has
struct Task {
  std::size_t job;
  std::int64_t from, to;
};

// of a job: tokens of a block, and bytes of one of all heads
std::int64_t block_tokens(const Encoding& job) {
  if (job.bfp.bits) return job.keys ? BfpForm::kTokens : job.bfp.value_tokens();
  return job.keys ? job.form.key_tokens() : KiviForm::kValueBlock;
}
std::size_t block_bytes(const Encoding& job) {
  const std::size_t size = job.bfp.bits ? (job.keys ? job.bfp.key_bytes(job.dim) : job.bfp.value_bytes(job.dim))
                                        : (job.keys ? job.form.key_block_bytes(job.dim) : job.form.value_block_bytes(job.dim));
  return size * static_cast<std::size_t>(job.kv_heads);
}

constexpr std::int64_t kInlineTokens = 8;  // so few are coded sooner than another thread is there

}  // namespace

void store_row(const Rows& rows, std::int64_t place, const float* x, int heads, int dim) {
  const std::int64_t count = static_cast<std::int64_t>(heads) * dim, width = count + (rows.type == Real::int8 ? heads * kScaleBytes : 0);
  auto* at = static_cast<char*>(const_cast<void*>(rows.data)) + place * (rows.stride ? rows.stride : width) * static_cast<std::int64_t>(bytes_of(rows.type));
  constexpr std::int64_t kFirst = 0;
  switch (rows.type) {
    case Real::float32: return void(std::copy(x, x + count, reinterpret_cast<float*>(at)));
    case Real::float16: return store_half(x, count, reinterpret_cast<std::uint16_t*>(at));
    case Real::bfloat16: return store_bfloat(x, count, reinterpret_cast<std::uint16_t*>(at));
    case Real::int8: return store_int8(x, &kFirst, 1, heads, dim, reinterpret_cast<std::int8_t*>(at));
  }
}

void encode_each(const Encoding* list, std::size_t count) {
  const AttentionKernels& kernels = attention_kernels();
  static thread_local std::vector<Task> held;
  std::vector<Task>& tasks = held;
  tasks.clear();
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Encoding& job = list[i];
    const std::int64_t per = block_tokens(job), end = job.first + job.count;
    for (std::int64_t from = job.first; from < end; from = (from / per + 1) * per)
      tasks.push_back({i, from, std::min(end, (from / per + 1) * per)});
    tokens += job.count;
  }
  const Task* all = tasks.data();  // workers have lists of their own
  const auto body = [&, all](std::size_t first, std::size_t last, int) {
    for (std::size_t i = first; i < last; ++i) {
      const Task& task = all[i];
      const Encoding& job = list[task.job];
      const std::int64_t row = static_cast<std::int64_t>(job.kv_heads) * job.dim * static_cast<std::int64_t>(bytes_of(job.rows.type));
      const Rows from{static_cast<const std::uint8_t*>(job.rows.data) + (task.from - job.first) * row, job.rows.type};
      const std::int64_t block = task.from / block_tokens(job);
      const int slot = static_cast<int>(task.from - block * block_tokens(job)), taken = static_cast<int>(task.to - task.from);
      std::uint8_t* to = job.blocks + static_cast<std::size_t>(block) * block_bytes(job);
      if (job.bfp.bits) (job.keys ? kernels.bfp_keys : kernels.bfp_values)(from, job.bfp, job.top, job.kv_heads, job.dim, slot, taken, to);
      else if (job.keys) kernels.encode_keys(from, job.form, job.kv_heads, job.dim, to);
      else kernels.encode_values(from, job.form, job.kv_heads, job.dim, slot, taken, to);
    }
  };
  if (tokens <= kInlineTokens) body(0, tasks.size(), 0);
  else parallel_for(tasks.size(), std::max<std::size_t>(tasks.size() / (4 * static_cast<std::size_t>(num_threads())), 1), body);
}

void join_pieces(const float* outs, const float* stats, const std::int64_t* ends, int queries, int heads, int dim, float* out, float* joined) {
  const std::size_t row = static_cast<std::size_t>(heads) * dim;
  for (int i = 0; i < queries; ++i) {
    const std::int64_t begin = i > 0 ? ends[i - 1] : 0, end = ends[i];
    for (int h = 0; h < heads; ++h) {
      const auto found = [&](std::int64_t piece) { return stats + 2 * (static_cast<std::size_t>(piece) * heads + h); };
      float peak = -std::numeric_limits<float>::infinity(), sum = 0.0f;
      for (std::int64_t p = begin; p < end; ++p)
        if (found(p)[1] > 0.0f) peak = std::max(peak, found(p)[0]);
      float* to = out + static_cast<std::size_t>(i) * row + static_cast<std::size_t>(h) * dim;
      std::fill(to, to + dim, 0.0f);
      for (std::int64_t p = begin; p < end; ++p) {
        if (!(found(p)[1] > 0.0f)) continue;
        const float weight = found(p)[1] * std::exp(found(p)[0] - peak);
        sum += weight;
        const float* from = outs + static_cast<std::size_t>(p) * row + static_cast<std::size_t>(h) * dim;
        for (int d = 0; d < dim; ++d) to[d] += weight * from[d];
      }
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int d = 0; d < dim; ++d) to[d] *= inverse;
      if (joined != nullptr) joined[2 * (static_cast<std::size_t>(i) * heads + h)] = peak, joined[2 * (static_cast<std::size_t>(i) * heads + h) + 1] = sum;
    }
  }
}

}  // namespace mw
