// Attention of a batch whose sequences share prefixes: one list of tasks for prefixes and for what each sequence has of its own.
//
// A prefix meets all rows of its group in one pass, as a product of matrices; what a row has of its own is read for it alone. Both
// kinds leave normalized outputs with (maximum, sum), and are joined by these: no task waits for another.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "attention_work.h"
#include "threads.h"

namespace mw {
namespace {

constexpr int kFewRows = 4;             // rows of queries below which reading keys once for each beats a tile of 16
constexpr std::int64_t kInlineWork = 100000;  // products that are done before another thread is awake

struct Task {
  const Attention* piece;
  int head;        // kv head; -1: all heads of one query, walking the cache once
  int begin, end;  // queries
  std::int64_t cost;
};

Attention over(const Attention& all, const Piece& piece, std::int64_t window, float* out, float* stats) {
  Attention a = all;
  const auto row = static_cast<std::size_t>(piece.row), heads = static_cast<std::size_t>(all.num_heads);
  a.q = all.q + row * heads * static_cast<std::size_t>(all.key_dim);
  a.out = out + row * heads * static_cast<std::size_t>(all.head_dim);
  a.stats = stats + row * heads * 2;
  a.num_tokens = piece.count, a.query_key = piece.query_key;
  a.first_key = window > 0 ? piece.query_key - window + 1 : -(std::int64_t{1} << 40);
  a.look_up(piece.table, piece.length);
  return a;
}

std::int64_t seen(const Attention& a, int begin, int end) {
  const std::int64_t first = std::max<std::int64_t>(a.first_key + begin, 0);
  return std::max<std::int64_t>(std::min(a.query_key + end, a.length) - first, 0);
}

void add_tasks(const Attention& a, std::vector<Task>& tasks) {
  const int rep = a.queries_per_kv_head();
  if (a.num_tokens == 1 || a.num_tokens * rep <= kFewRows) {
    for (int i = 0; i < a.num_tokens; ++i) tasks.push_back({&a, -1, i, i + 1, seen(a, i, i + 1) * a.num_heads});
    return;
  }
  const int queries = prompt_queries(a, num_threads());
  for (int begin = 0; begin < a.num_tokens; begin += queries) {
    const int end = std::min(begin + queries, a.num_tokens);
    const std::int64_t rows = ((end - begin) * rep + 15) / 16 * 16;
    for (int h = 0; h < a.num_kv_heads; ++h) tasks.push_back({&a, h, begin, end, seen(a, begin, end) * rows});
  }
}

// one query, all heads, from its first visible key to its last
void attend_one(const Attention& piece, int query, const AttentionKernels& kernels, float* work) {
  Attention a = piece;
  const auto heads = static_cast<std::size_t>(a.num_heads), row = static_cast<std::size_t>(query);
  a.q += row * heads * static_cast<std::size_t>(a.key_dim), a.out += row * heads * static_cast<std::size_t>(a.head_dim);
  a.stats += row * heads * 2, a.first_key += query, a.query_key += query, a.num_tokens = 1;
  const std::int64_t end = std::min(a.query_key + 1, a.length), begin = std::max<std::int64_t>(a.first_key, 0) / kStep * kStep;
  float* q = work;
  float* at = q + heads * static_cast<std::size_t>(a.padded_key());
  const Partial part{at, at + heads, at + 2 * heads};
  scale_queries(a, q);
  kernels.decode(a, q, begin, std::max(begin, end), part, at + (partial_stride(a) + 15) / 16 * 16);
  for (std::size_t h = 0; h < heads; ++h) {
    const float sum = part.sum[h], inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    const float* from = part.out + h * static_cast<std::size_t>(a.padded_dim());
    for (int d = 0; d < a.head_dim; ++d) a.out[h * static_cast<std::size_t>(a.head_dim) + static_cast<std::size_t>(d)] = from[d] * inverse;
    a.stats[2 * h] = sum > 0.0f ? part.peak[h] : -std::numeric_limits<float>::infinity();
    a.stats[2 * h + 1] = sum;
  }
}

// out = (out, own) joined with (other, theirs), for rows [begin, end) of heads
void join(const Attention& all, const float* own, const float* other, const float* theirs, std::size_t begin, std::size_t end) {
  const auto dim = static_cast<std::size_t>(all.head_dim);
  for (std::size_t i = begin; i < end; ++i) {
    const float sum = own[2 * i + 1], more = theirs[2 * i + 1];
    if (!(more > 0.0f)) continue;
    const float peak = std::max(sum > 0.0f ? own[2 * i] : theirs[2 * i], theirs[2 * i]);
    const float mine = sum > 0.0f ? sum * std::exp(own[2 * i] - peak) : 0.0f, yours = more * std::exp(theirs[2 * i] - peak);
    const float a = mine / (mine + yours), b = yours / (mine + yours);
    for (std::size_t d = 0; d < dim; ++d) all.out[i * dim + d] = a * all.out[i * dim + d] + b * other[i * dim + d];
  }
}

}  // namespace

void attend_shared(const Attention& all, const Piece* own, int num_own, const Piece* prefixes, int num_prefixes, std::int64_t window) {
  const AttentionKernels& kernels = attention_kernels();
  const auto rows = static_cast<std::size_t>(all.num_tokens), heads = static_cast<std::size_t>(all.num_heads);
  float* other = t_shared.get(shared_rows_scratch(all, rows));
  float *stats = other + rows * heads * static_cast<std::size_t>(all.head_dim), *theirs = stats + rows * heads * 2;
  static thread_local std::vector<Attention> pieces;
  static thread_local std::vector<Task> tasks;
  pieces.clear(), tasks.clear();
  pieces.reserve(static_cast<std::size_t>(num_own + num_prefixes));  // tasks point into it
  for (int i = 0; i < num_own; ++i) pieces.push_back(over(all, own[i], window, all.out, stats));
  for (int i = 0; i < num_prefixes; ++i) {
    pieces.push_back(over(all, prefixes[i], window, other, theirs));
    pieces.back().exact = true;  // rows of several sequences: what one gets is not to depend on how many others there are
  }
  std::size_t scratch = single_scratch(all, kernels);
  std::int64_t cost = 0;
  for (const Attention& a : pieces) {
    add_tasks(a, tasks);
    if (a.num_tokens > 1) scratch = std::max(scratch, kernels.prefill_scratch(a, prompt_queries(a, num_threads())));
  }
  for (const Task& task : tasks) cost += task.cost;
  std::sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  const Task* list = tasks.data();  // workers have thread-local lists of their own
  const auto body = [&, list](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const Task& task = list[i];
      if (task.head < 0) attend_one(*task.piece, task.begin, kernels, work);
      else kernels.prefill(*task.piece, task.head, task.begin, task.end, work);
    }
  };
  if (cost * (all.key_dim + all.head_dim) <= kInlineWork) body(0, tasks.size(), 0);
  else parallel_for(tasks.size(), 1, body);
  for (int i = 0; i < num_prefixes; ++i) {
    const auto first = static_cast<std::size_t>(prefixes[i].row) * heads;
    join(all, stats, other, theirs, first, first + static_cast<std::size_t>(prefixes[i].count) * heads);
  }
}

}  // namespace mw
