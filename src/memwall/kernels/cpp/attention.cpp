// Splits an attention over threads, and merges what they found.
#include "attention.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_parts.h"
#include "attention_table.h"
#include "attention_work.h"
#include "dispatch.h"
#include "threads.h"

namespace mw {
namespace {

constexpr std::int64_t kBytesPerMicrosecond = 10000;  // a core reads about this much; waking a thread costs a few microseconds
constexpr std::int64_t kInlineMicroseconds = 20;
constexpr int kFewQueries = 12;

std::size_t bytes_of(Real type) { return type == Real::float32 ? 4 : type == Real::int8 ? 1 : 2; }

// bytes that one query reads between two token numbers
std::int64_t traffic(const Attention& a, std::int64_t begin, std::int64_t end) {
  const auto part = [&](std::int64_t coded, Real type, int dim) {
    const std::int64_t exact = std::max<std::int64_t>(end - std::max(begin, coded), 0);
    const std::int64_t row = static_cast<std::int64_t>(a.num_kv_heads) * dim;
    return exact * row * static_cast<std::int64_t>(bytes_of(type)) + (end - begin - exact) * row * std::max(std::max(a.form.bits + 1, 1), a.bfp.bits) / 8;
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

// runs of tokens that one query's attention is cut into at most
std::int64_t most_chunks(int threads) { return threads > 1 ? 2 * threads : 1; }

// floats of `chunks` partial results, and of the scaled queries before them
std::size_t shared_scratch(const Attention& a, std::int64_t chunks) {
  return static_cast<std::size_t>(a.num_heads) * a.padded_key() + partial_stride(a) * static_cast<std::size_t>(chunks);
}

// How one query's attention is cut into runs of tokens; depends on its own cache alone, so that a sequence is summed in the same
// order whatever else is worked at the same time.
struct Cut {
  std::int64_t begin, end, chunk, chunks;
  Cut(const Attention& a, int threads) {
    end = std::min(a.query_key + 1, a.length);
    begin = std::max<std::int64_t>(a.first_key, 0) / kStep * kStep;
    const std::int64_t steps = std::max<std::int64_t>((end - begin + kStep - 1) / kStep, 1);
    chunks = 1;
    if (end > begin && traffic(a, begin, end) > kInlineMicroseconds * kBytesPerMicrosecond)
      chunks = std::min<std::int64_t>(steps, most_chunks(threads));
    chunk = (steps + chunks - 1) / chunks * kStep;
    chunks = (steps * kStep + chunk - 1) / chunk;
  }
};

// one query token of each of up to kSequencesTogether sequences
void attend_each(const Attention* sequences, int count, const AttentionKernels& kernels) {
  struct Task {
    int sequence;
    bool alone;  // all of its sequence's tokens
    std::int64_t from, to;
    std::size_t q, partial;  // places in the shared scratch, in floats
  };
  static thread_local std::vector<Task> tasks;
  static thread_local std::vector<std::size_t> firsts;
  tasks.clear(), firsts.clear();
  std::size_t floats = 0, scratch = 0;
  std::int64_t bytes = 0;
  bool cut_up = false;
  for (int s = 0; s < count; ++s) {
    const Attention& a = sequences[s];
    assert(a.places == nullptr);  // `attend` has moved the one query to its place
    const Cut cut(a, num_threads());
    firsts.push_back(tasks.size());
    const std::size_t q = floats;
    floats += static_cast<std::size_t>(a.num_heads) * a.padded_key() + kernels.prepared(a);
    for (std::int64_t c = 0; c < cut.chunks; ++c, floats += partial_stride(a)) {
      const std::int64_t from = cut.begin + c * cut.chunk;
      tasks.push_back({s, cut.chunks == 1, from, std::max(std::min(from + cut.chunk, cut.end), from), q, floats});
    }
    cut_up = cut_up || cut.chunks > 1;
    if (cut.end > cut.begin) bytes += traffic(a, cut.begin, cut.end);
    scratch = std::max(scratch, kernels.decode_scratch(a));
  }
  firsts.push_back(tasks.size());
  float* shared = t_shared.get(floats);
  const auto ready = [&](const Task& task) {
    scale_queries(sequences[task.sequence], shared + task.q);
    kernels.prepare(sequences[task.sequence], shared + task.q);
  };
  const auto join = [&](const Task& first, std::size_t chunks) {
    merge(sequences[first.sequence], shared + first.partial, partial_stride(sequences[first.sequence]), static_cast<int>(chunks));
  };
  for (int s = 0; s < count; ++s)
    if (const Task& task = tasks[firsts[static_cast<std::size_t>(s)]]; !task.alone) ready(task);
  const Task* list = tasks.data();  // workers have thread-local lists of their own
  const auto body = [&, list](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const Task& task = list[i];
      const Attention& a = sequences[task.sequence];
      float* at = shared + task.partial;
      if (task.alone) ready(task);
      kernels.decode(a, shared + task.q, task.from, task.to, {at, at + a.num_heads, at + 2 * a.num_heads}, work);
      if (task.alone) join(task, 1);
    }
  };
  if (tasks.size() == 1 || (!cut_up && bytes <= kInlineMicroseconds * kBytesPerMicrosecond)) body(0, tasks.size(), 0);
  else parallel_for(tasks.size(), 1, body);
  for (std::size_t s = 0; s + 1 < firsts.size(); ++s)
    if (const Task& task = tasks[firsts[s]]; !task.alone) join(task, firsts[s + 1] - firsts[s]);
}

// heads: what to attend over by kv head, where these hold different tokens
void attend_many(const Attention& a, const AttentionKernels& kernels, const Attention* heads = nullptr) {
  const int queries = prompt_queries(a, num_threads());
  const int blocks = (a.num_tokens + queries - 1) / queries;
  const std::size_t scratch = kernels.prefill_scratch(a, queries);
  const auto body = [&](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const int block = blocks - 1 - static_cast<int>(i) / a.num_kv_heads;  // the last queries see most keys: long tasks first
      const int head = static_cast<int>(i) % a.num_kv_heads;
      kernels.prefill(heads != nullptr ? heads[head] : a, head, block * queries, std::min((block + 1) * queries, a.num_tokens), work);
    }
  };
  parallel_for(static_cast<std::size_t>(a.num_kv_heads * blocks), 1, body);
}

// Queries one by one, each by the code for a single one.
void attend_singly(const Attention& a, const AttentionKernels& kernels) {
  const auto query = [&](std::size_t i) {
    Attention one = a;
    const std::int64_t place = a.place(static_cast<int>(i));
    one.num_tokens = 1, one.places = nullptr, one.first_key += place, one.query_key += place;
    one.q += i * static_cast<std::size_t>(a.num_heads) * static_cast<std::size_t>(a.key_dim);
    one.out += i * static_cast<std::size_t>(a.num_heads) * static_cast<std::size_t>(a.head_dim);
    if (a.stats != nullptr) one.stats += 2 * i * static_cast<std::size_t>(a.num_heads);
    return one;
  };
  const auto count = static_cast<std::size_t>(a.num_tokens);
  if (a.num_tokens < num_threads()) {  // all threads over one query's keys
    for (std::size_t i = 0; i < count; ++i) {
      const Attention one = query(i);
      attend_each(&one, 1, kernels);
    }
    return;
  }
  const std::size_t q_floats = static_cast<std::size_t>(a.num_heads) * a.padded_key(), partial = (partial_stride(a) + 15) / 16 * 16;
  const std::size_t scratch = single_scratch(a, kernels);
  parallel_for(count, 1, [&](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const Attention one = query(i);
      const Cut cut(one, 1);
      float* at = work + q_floats;
      scale_queries(one, work);
      kernels.decode(one, work, cut.begin, std::max(cut.end, cut.begin), {at, at + a.num_heads, at + 2 * a.num_heads}, at + partial);
      merge(one, at, partial, 1);
    }
  });
}

// Whether that is the way for KIVI's codes: few queries do not pay for turning codes into tiles of floats, and tiles know no integers.
bool singly(const Attention& a) {
  if (a.form.bits == 0 || a.waiting != nullptr || a.coded_keys + a.coded_values == 0) return false;
  return a.form.integers || a.num_tokens <= kFewQueries;
}

// One worker's share of a ragged decode: a run of one head's past, or of the tail, which all heads share (head -1).
struct Run {
  int head;
  std::int64_t begin, end;
  std::size_t at;  // of its partial, in floats
};

Rows rows_from(const Rows& rows, std::int64_t values) {
  return {static_cast<const std::uint8_t*>(rows.data) + values * static_cast<std::int64_t>(bytes_of(rows.type)), rows.type};
}

// Runs of about the same number of rows, so that heads of different lengths keep all threads busy.
std::vector<Run> cut_runs(const Ragged& r, std::size_t begin) {
  const Attention& a = r.tail;
  const std::int64_t tail = std::min(a.query_key + 1, a.length), rows = r.offsets[a.num_kv_heads] + tail * a.num_kv_heads;
  const std::int64_t row_bytes = 2 * a.head_dim * static_cast<std::int64_t>(bytes_of(r.past_keys.type));
  const bool inline_all = rows * row_bytes <= kInlineMicroseconds * kBytesPerMicrosecond || num_threads() == 1;
  const std::int64_t share = inline_all ? rows : rows / (4 * num_threads()) + 1;
  std::vector<Run> runs;
  const auto cut = [&](int head, std::int64_t length, std::int64_t most, int heads) {
    const std::int64_t step = std::max<std::int64_t>((most + kStep - 1) / kStep * kStep, kStep);
    for (std::int64_t from = 0; from < length; from += step) {
      runs.push_back({head, from, std::min(from + step, length), begin});
      begin += static_cast<std::size_t>(heads) * (2 + static_cast<std::size_t>(a.padded_dim()));
    }
  };
  for (int h = 0; h < a.num_kv_heads; ++h) cut(h, r.offsets[h + 1] - r.offsets[h], share, a.queries_per_kv_head());
  cut(-1, tail, share / a.num_kv_heads + 1, a.num_heads);
  return runs;
}

void merge_runs(const Attention& a, const std::vector<Run>& runs, const float* shared) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_dim();
  for (int h = 0; h < a.num_heads; ++h) {
    float peak = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    float* out = a.out + static_cast<std::size_t>(h) * a.head_dim;
    std::fill(out, out + a.head_dim, 0.0f);
    const auto each = [&](auto&& body) {
      for (const Run& run : runs) {
        if (run.head >= 0 && run.head != h / rep) continue;
        const int heads = run.head < 0 ? a.num_heads : rep, i = run.head < 0 ? h : h % rep;
        const float* part = shared + run.at;
        if (part[heads + i] > 0.0f) body(part[i], part[heads + i], part + 2 * heads + static_cast<std::size_t>(i) * padded);
      }
    };
    each([&](float top, float, const float*) { peak = std::max(peak, top); });
    each([&](float top, float part_sum, const float* from) {
      const float weight = std::exp(top - peak);
      sum += weight * part_sum;
      for (int d = 0; d < a.head_dim; ++d) out[d] += weight * from[d];
    });
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int d = 0; d < a.head_dim; ++d) out[d] *= inverse;
    if (a.stats != nullptr) a.stats[2 * h] = peak, a.stats[2 * h + 1] = sum;
  }
}

void decode_ragged(const Ragged& r, const AttentionKernels& kernels) {
  const Attention& a = r.tail;
  const int rep = a.queries_per_kv_head(), padded = a.padded_dim();
  const std::size_t q_floats = static_cast<std::size_t>(a.num_heads) * padded;
  const std::vector<Run> runs = cut_runs(r, q_floats);
  const std::size_t most = static_cast<std::size_t>(a.num_heads) * (2 + static_cast<std::size_t>(padded));
  float* shared = t_shared.get(runs.empty() ? q_floats : runs.back().at + most);
  for (int h = 0; h < a.num_heads; ++h)
    for (int d = 0; d < padded; ++d)
      shared[static_cast<std::size_t>(h) * padded + d] = d < a.head_dim ? a.q[static_cast<std::size_t>(h) * a.head_dim + d] * a.scale : 0.0f;
  const std::size_t scratch = kernels.decode_scratch(a);
  const auto body = [&](std::size_t first, std::size_t last, int) {
    float* work = t_work.get(scratch);
    for (std::size_t i = first; i < last; ++i) {
      const Run& run = runs[i];
      const int heads = run.head < 0 ? a.num_heads : rep;
      float* at = shared + run.at;
      const Partial partial{at, at + heads, at + 2 * heads};
      if (run.head < 0) {
        kernels.decode(a, shared, run.begin, run.end, partial, work);
        continue;
      }
      Attention mine = a;
      mine.num_heads = rep, mine.num_kv_heads = 1;
      mine.keys = rows_from(r.past_keys, r.offsets[run.head] * a.head_dim);
      mine.values = rows_from(r.past_values, r.offsets[run.head] * a.head_dim);
      kernels.decode(mine, shared + static_cast<std::size_t>(run.head * rep) * padded, run.begin, run.end, partial, work);
    }
  };
  if (runs.size() <= 1) body(0, runs.size(), 0);
  else parallel_for(runs.size(), 1, body);
  merge_runs(a, runs, shared);
}

// Tokens first ... first + count of blocks of `per` tokens, rows of `values` numbers each: encode(rows, block, slot in it, tokens).
template <typename Encode>
void encode_by_blocks(const Rows& rows, std::int64_t per, std::size_t values, std::int64_t first, std::int64_t count, Encode&& encode) {
  if (count <= 0) return;
  const std::size_t row = values * bytes_of(rows.type);
  const std::int64_t first_block = first / per, num_blocks = (first + count - 1) / per - first_block + 1;
  parallel_for(static_cast<std::size_t>(num_blocks), 2, [&](std::size_t lo, std::size_t hi, int) {
    for (std::size_t i = lo; i < hi; ++i) {
      const std::int64_t block = first_block + static_cast<std::int64_t>(i);
      const std::int64_t from = std::max(first, block * per), to = std::min(first + count, (block + 1) * per);
      encode({static_cast<const std::uint8_t*>(rows.data) + static_cast<std::size_t>(from - first) * row, rows.type}, block,
             static_cast<int>(from - block * per), static_cast<int>(to - from));
    }
  });
}

}  // namespace

std::size_t KiviForm::plane_bytes(int channels, int tokens) const {
  const auto row_bytes = [&](int width) {
    const int per_word = 32 / width, rows = (channels + per_word - 1) / per_word;
    return static_cast<std::size_t>(4 * rows - (half_row(channels, per_word) ? 2 : 0));
  };
  return (bits == 3 ? row_bytes(2) + row_bytes(1) : row_bytes(bits)) * static_cast<std::size_t>(tokens);
}

void Attention::look_up(const std::int32_t* table, std::int64_t tokens) {
  length = tokens;
  if (pages.data == nullptr) {
    keys.table = values.table = table;
    return;
  }
  pages.table = table;
  coded_keys = tokens - tokens % form.key_tokens(), coded_values = tokens;
  keys = {nullptr, Real::int8};  // what waits for its block to be full lies in that block's place
  if (coded_keys < tokens) keys.data = key_block(coded_keys);
}

const AttentionKernels& attention_kernels() {
#if defined(MW_X86)
  if (active_isa() >= Isa::avx512) return avx512::attention_table();
  if (active_isa() == Isa::avx2) return avx2::attention_table();
#endif
  return portable::attention_table();
}

void attend(const Attention& a) {
  if (a.num_tokens == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  if (a.num_tokens > 1 && singly(a)) return attend_singly(a, kernels);
  if (a.num_tokens > 1 || a.waiting != nullptr) return attend_many(a, kernels);
  Attention one = a;
  one.first_key += a.place(0), one.query_key += a.place(0), one.places = nullptr;
  attend_each(&one, 1, kernels);
}

void attend_next(Attention a, const float* key, const float* value, std::int64_t place, std::int64_t window) {
  store_row(a.keys, place, key, a.num_kv_heads, a.key_dim);
  store_row(a.values, place, value, a.num_kv_heads, a.head_dim);
  a.length = place + 1, a.query_key = place;
  a.first_key = window > 0 ? place - window + 1 : 0;
  attend_each(&a, 1, attention_kernels());
}

void attend_sequences(const Attention* sequences, int count) {
  const AttentionKernels& kernels = attention_kernels();
  for (int s = 0; s < count; s += kSequencesTogether) attend_each(sequences + s, std::min(kSequencesTogether, count - s), kernels);
}

void attend_ragged(const Ragged& r) {
  const Attention& a = r.tail;
  if (a.num_tokens == 0) return;
  const AttentionKernels& kernels = attention_kernels();
  if (a.num_tokens == 1) return decode_ragged(r, kernels);
  std::vector<Attention> heads(static_cast<std::size_t>(a.num_kv_heads), a);
  for (int h = 0; h < a.num_kv_heads; ++h) {
    Attention& mine = heads[static_cast<std::size_t>(h)];
    const std::int64_t past = r.offsets[h + 1] - r.offsets[h];
    mine.past_keys = rows_from(r.past_keys, r.offsets[h] * a.head_dim);
    mine.past_values = rows_from(r.past_values, r.offsets[h] * a.head_dim);
    mine.coded_keys = mine.coded_values = past;
    mine.length += past, mine.query_key += past;
  }
  attend_many(a, kernels, heads.data());
}

std::size_t attention_scratch_bytes_for(int num_heads, int num_kv_heads, int head_dim, int tokens, int threads, int sequences,
                                        int shared_rows) {
  Attention a;
  a.num_heads = num_heads, a.num_kv_heads = num_kv_heads, a.key_dim = a.head_dim = head_dim, a.num_tokens = tokens;
  // coded caches take a little more than others, at any number of bits
  a.form.bits = 2;
  a.bfp.bits = 4, a.bfp.block = 16;
  const AttentionKernels& kernels = attention_kernels();
  std::size_t work = kernels.decode_scratch(a);
  if (tokens > 1) work = std::max({work, kernels.prefill_scratch(a, prompt_queries(a, threads)), single_scratch(a, kernels)});
  const auto together = static_cast<std::size_t>(std::clamp(sequences, 1, kSequencesTogether));
  std::size_t shared = (shared_scratch(a, most_chunks(threads)) + kernels.prepared(a)) * together;
  if (shared_rows > 0) {
    shared = std::max(shared, shared_rows_scratch(a, static_cast<std::size_t>(shared_rows)));
    work = std::max(work, single_scratch(a, kernels));
  }
  return (Buffer::rounded(shared) + Buffer::rounded(work) * static_cast<std::size_t>(threads)) * sizeof(float);
}

void kivi_encode_keys(const Rows& rows, const KiviForm& form, int kv_heads, int key_dim, std::int64_t count,
                      std::uint8_t* blocks) {
  const AttentionKernels& kernels = attention_kernels();
  const std::size_t size = form.key_block_bytes(key_dim) * static_cast<std::size_t>(kv_heads);
  const std::size_t row = static_cast<std::size_t>(kv_heads) * key_dim * bytes_of(rows.type);
  parallel_for(static_cast<std::size_t>(count / form.key_tokens()), 2, [&](std::size_t first, std::size_t last, int) {
    for (std::size_t b = first; b < last; ++b) {
      const Rows from{static_cast<const std::uint8_t*>(rows.data) + b * form.key_tokens() * row, rows.type};
      kernels.encode_keys(from, form, kv_heads, key_dim, blocks + b * size);
    }
  });
}

void bfp_encode(bool keys, const Rows& rows, const BfpForm& form, BfpTop rule, int kv_heads, int dim, std::int64_t first,
                std::int64_t count, std::uint8_t* blocks) {
  const AttentionKernels& kernels = attention_kernels();
  const auto encode = keys ? kernels.bfp_keys : kernels.bfp_values;
  const std::size_t size = (keys ? form.key_bytes(dim) : form.value_bytes(dim)) * static_cast<std::size_t>(kv_heads);
  const std::int64_t per = keys ? BfpForm::kTokens : form.value_tokens();
  encode_by_blocks(rows, per, static_cast<std::size_t>(kv_heads) * dim, first, count,
                   [&](const Rows& from, std::int64_t block, int slot, int tokens) {
                     encode(from, form, rule, kv_heads, dim, slot, tokens, blocks + static_cast<std::size_t>(block) * size);
                   });
}

void kivi_encode_values(const Rows& rows, const KiviForm& form, int kv_heads, int head_dim, std::int64_t first,
                        std::int64_t count, std::uint8_t* blocks) {
  const AttentionKernels& kernels = attention_kernels();
  const std::size_t size = form.value_block_bytes(head_dim) * static_cast<std::size_t>(kv_heads);
  encode_by_blocks(rows, KiviForm::kValueBlock, static_cast<std::size_t>(kv_heads) * head_dim, first, count,
                   [&](const Rows& from, std::int64_t block, int slot, int tokens) {
                     kernels.encode_values(from, form, kv_heads, head_dim, slot, tokens, blocks + static_cast<std::size_t>(block) * size);
                   });
}

}  // namespace mw
