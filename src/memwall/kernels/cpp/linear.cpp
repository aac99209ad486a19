// Drives the product kernels: quantizes activations once per call, cuts the work in strips of rows, shares them among threads.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>

#include "dispatch.h"
#include "half.h"
#include "stripes.h"
#include "threads.h"

MW_KERNEL_TABLE(LinearKernels, linear_kernels)

namespace mw {
namespace {

// Memory that only ever grows, so that a step of decoding allocates nothing. Guarded by g_mutex.
class Scratch {
 public:
  char* at_least(std::size_t bytes) {
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, rounded(bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = rounded(bytes);
    }
    return data_;
  }
  std::size_t bytes() const { return bytes_; }
  static std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  char* data_ = nullptr;
  std::size_t bytes_ = 0;
};

std::mutex g_mutex;  // one product at a time: two Python threads may call, and there is one scratch and one thread pool
Scratch g_activations[5], g_planes[2 * kMaxPlanes], g_ordered, g_columns, g_turned, g_turning, g_workers, g_parts;
float g_offsets[kMaxTokens];  // what offsets of columns make of each token
std::int64_t g_products = 0, g_striped = 0;

// Below this a call runs on its own thread: waking another costs about as much.
constexpr double kInlineSeconds = 20e-6;
constexpr double kLeastChunkSeconds = 2e-6;  // a shorter one costs more to hand out than it saves at the end
// Rough speeds of one core, for the size of chunks only.
constexpr double kBytesPerSecond = 15e9, kMultipliesPerSecond = 150e9;
constexpr double kMultipliesPerLookup = 150.0;
constexpr double kBitsPerMultiply = 1.0;  // pairs of bits that are compared and counted in the time of one multiply

double strip_seconds(const Matrix& m, std::int64_t strip_rows, std::int64_t tokens) {
  const double bytes = static_cast<double>(m.nbytes()) / std::max<std::int64_t>(m.rows, 1);
  double multiplies = static_cast<double>(m.cols) * static_cast<double>(tokens);
  if (m.form == Form::codebook) multiplies *= kMultipliesPerLookup / m.codebooks->rest.vector;
  if (m.form == Form::planes) multiplies *= m.bits * m.activation_bits / kBitsPerMultiply;
  if (m.form == Form::stacked) multiplies *= m.num_blocks * m.rank * (tokens <= kFewTokens ? 1.0 : static_cast<double>(kFewTokens) / static_cast<double>(tokens));
  return static_cast<double>(strip_rows) * std::max(bytes / kBytesPerSecond, multiplies / kMultipliesPerSecond);
}

// From so many tokens on a matrix unit takes the products of tiles: fewer are multiplied from the tiles themselves.
constexpr std::int64_t kLeastUnitTokens = 13;
bool by_unit(std::int64_t tokens, int group) { return active_isa() == Isa::amx && tokens >= kLeastUnitTokens && group != kBilevelGroup; }

int tokens_together(const LinearKernels& kernels, std::int64_t tokens, int group) {
  return tokens == 1 ? 1 : by_unit(tokens, group) ? kUnitTokens : kernels.token_block;
}

// Of the tokens of one block, some of which may not be there.
void clear_statistics(const Activations& a, std::int64_t block) {
  const std::int64_t first = block * a.block * a.groups, count = a.block * a.groups;
  std::fill_n(a.scales + first, count, 0.0f);
  std::fill_n(a.sums + first, count, 0);
}

// Bytes of codes, scales and sums.
std::size_t activation_bytes(std::int64_t tokens, std::int64_t cols, int group, int block) {
  const std::int64_t entries = (tokens + block - 1) / block * block * ((cols + group - 1) / group);
  return static_cast<std::size_t>(entries) * (group + sizeof(float) + sizeof(std::int32_t));
}

// Lays codes, scales and sums of `tokens` tokens out in one piece of scratch and quantizes into it. ordered: a matrix in whose order
// columns are taken.
Activations quantize(const LinearKernels& kernels, const Input& input, int group, Scratch& scratch, const Matrix* ordered = nullptr) {
  Activations a;
  a.group = group;
  a.groups = (input.cols + group - 1) / group;
  a.block = tokens_together(kernels, input.tokens, group);
  a.rows = by_unit(input.tokens, group);
  const std::int64_t blocks = (input.tokens + a.block - 1) / a.block, entries = blocks * a.block * a.groups;
  a.codes = reinterpret_cast<std::int8_t*>(scratch.at_least(activation_bytes(input.tokens, input.cols, group, a.block)));
  a.scales = reinterpret_cast<float*>(a.codes + entries * group);
  a.sums = reinterpret_cast<std::int32_t*>(a.scales + entries);
  if (a.rows) clear_statistics(a, blocks - 1);
  const std::size_t grain = std::max<std::int64_t>(1, (1 << 16) / (a.block * input.cols + 1));
  parallel_for(static_cast<std::size_t>(blocks), grain, [&](std::size_t begin, std::size_t end, int) {
    for (auto b = static_cast<std::int64_t>(begin); b < static_cast<std::int64_t>(end); ++b) {
      const std::int64_t first = b * a.block;
      const int count = static_cast<int>(std::min<std::int64_t>(a.block, input.tokens - first));
      if (ordered != nullptr) kernels.quantize_ordered(input.x + first * input.cols, *ordered, count, b, a);
      else kernels.quantize(input.x + first * input.cols, input.cols, count, b, a);
    }
  });
  return a;
}

// The same for activations of mixed widths, in the order that the matrix reads them in.
Activations quantize_mixed(const LinearKernels& kernels, const float* x, std::int64_t tokens, const Matrix& m, Scratch& scratch) {
  Activations a;
  a.group = m.group;
  a.groups = m.groups;
  const int block = a.block = tokens_together(kernels, tokens, m.group);
  a.rows = by_unit(tokens, m.group);
  a.token_bytes = a.rows ? a.padded_cols() : mixed_code_bytes(m);
  const std::int64_t blocks = (tokens + block - 1) / block, entries = blocks * block * a.groups, code_bytes = blocks * block * a.token_bytes;
  a.codes = reinterpret_cast<std::int8_t*>(scratch.at_least(static_cast<std::size_t>(code_bytes + 8 * entries)));
  a.scales = reinterpret_cast<float*>(a.codes + code_bytes);
  a.sums = reinterpret_cast<std::int32_t*>(a.scales + entries);
  if (a.rows) clear_statistics(a, blocks - 1);
  const std::size_t grain = std::max<std::int64_t>(1, (1 << 15) / (block * m.cols + 1));
  parallel_for(static_cast<std::size_t>(blocks), grain, [&](std::size_t begin, std::size_t end, int) {
    for (auto b = static_cast<std::int64_t>(begin); b < static_cast<std::int64_t>(end); ++b) {
      const std::int64_t first = b * block;
      kernels.quantize_mixed(x + first * m.cols, m, static_cast<int>(std::min<std::int64_t>(block, tokens - first)), b, a);
    }
  });
  return a;
}

// Bytes of the words of activations in `bits` planes and of their scales.
std::size_t plane_bytes(std::int64_t tokens, std::int64_t cols, int bits, bool grouped) {
  const std::int64_t words = (cols + kWordBits - 1) / kWordBits;
  return static_cast<std::size_t>(tokens) * (words * bits * sizeof(std::uint64_t) + (grouped ? words : 1) * sizeof(float));
}

// Where the activations that such weights are multiplied with are kept: by their bits, those with a scale for every word apart.
int plane_slot(const Matrix& m) { return m.activation_bits - 1 + (m.plane_groups() ? kMaxPlanes : 0); }

void round_to_planes(Input& input, const Matrix& m) {
  const int bits = m.activation_bits;
  char* at = g_planes[plane_slot(m)].at_least(plane_bytes(input.tokens, input.cols, bits, m.plane_groups()));
  auto* words = reinterpret_cast<std::uint64_t*>(at);
  input.planes = {words, input.tokens, input.cols, bits};
  auto* scales = reinterpret_cast<float*>(words + input.tokens * bits * input.planes.row_words());
  input.plane_scales = scales;
  pack_planes(input.x, input.tokens, input.cols, bits, m.plane_groups(), words, scales);
}

// Whether two such matrices read one input: columns in one order, as those that read the same input mostly do.
bool same_order(const Matrix& a, const Matrix& b) {
  if (a.wide_groups || b.wide_groups) {
    if (!a.wide_groups || !b.wide_groups || a.group != b.group || std::memcmp(a.wide_groups, b.wide_groups, static_cast<std::size_t>(a.groups))) return false;
  }
  if (a.form == Form::tiles && a.group != b.group) return false;
  if (a.form != b.form || a.turned || b.turned || (a.codebooks && (a.codebooks->scale || b.codebooks->scale))) return false;
  if (a.order == b.order) return true;
  if (a.order == nullptr || b.order == nullptr || a.wide != b.wide) return false;
  return std::memcmp(a.order, b.order, static_cast<std::size_t>(a.cols) * (a.wide ? 4 : 2)) == 0;
}

std::size_t ordered_bytes(std::int64_t tokens, std::int64_t cols) { return static_cast<std::size_t>(tokens * cols) * sizeof(float); }

std::int64_t column_stride(std::int64_t tokens) { return (tokens + kColumnTokens - 1) / kColumnTokens * kColumnTokens; }
std::size_t column_bytes(std::int64_t tokens, std::int64_t cols) {
  return tokens <= 1 ? 0 : static_cast<std::size_t>(column_stride(tokens) * cols) * sizeof(float);
}

// The input by columns, which outliers are multiplied with.
void turn(Input& input) {
  const std::int64_t stride = input.column_stride = column_stride(input.tokens);
  auto* columns = reinterpret_cast<float*>(g_columns.at_least(column_bytes(input.tokens, input.cols)));
  input.columns = columns;
  const std::size_t grain = std::max<std::int64_t>(1, (1 << 14) / stride);
  parallel_for(static_cast<std::size_t>(input.cols), grain, [&](std::size_t begin, std::size_t end, int) {
    for (std::int64_t t = 0; t < stride; ++t)
      for (auto c = static_cast<std::int64_t>(begin); c < static_cast<std::int64_t>(end); ++c)
        columns[c * stride + t] = t < input.tokens ? input.x[t * input.cols + c] : 0.0f;
  });
}

// Integer tiles whose columns stand in another order.
bool ordered_tiles(const Matrix& m) { return m.form == Form::tiles && m.order != nullptr && m.wide_groups == nullptr; }

// Whether a matrix reads the input in an order of its own, or rounded by groups that no other form has.
bool reads_its_own(const Matrix& m) {
  return m.form == Form::bilevel || m.form == Form::codebook || (m.form == Form::masked && m.order != nullptr) || m.turned || m.wide_groups || ordered_tiles(m);
}

// Room of each thread for turns of up to n numbers.
std::size_t turning_bytes(std::int64_t n, int threads) { return Scratch::rounded(static_cast<std::size_t>(2 * n) * sizeof(float)) * threads; }

// f(token, room) for all tokens, each thread with room for a turn of n numbers.
template <class F>
void for_turns(std::int64_t tokens, std::int64_t n, F&& f) {
  char* room = g_turning.at_least(turning_bytes(n, num_threads()));
  const std::size_t each = turning_bytes(n, 1), grain = std::max<std::int64_t>(1, (1 << 12) / (n + 1));
  parallel_for(static_cast<std::size_t>(tokens), grain, [&](std::size_t begin, std::size_t end, int worker) {
    for (auto t = static_cast<std::int64_t>(begin); t < static_cast<std::int64_t>(end); ++t) f(t, reinterpret_cast<float*>(room + worker * each));
  });
}

// The input as turned tiles read it.
Input turned_input(const LinearKernels& kernels, const Input& plain, const Matrix& m, bool rounded) {
  Input input = plain;
  auto* turned = reinterpret_cast<float*>(g_ordered.at_least(ordered_bytes(plain.tokens, plain.cols)));
  for_turns(plain.tokens, plain.cols, [&](std::int64_t t, float* room) {
    kernels.turn(m.into, plain.x + t * plain.cols, m.columns, turned + t * plain.cols, room);
  });
  input.x = turned;
  if (rounded) input.coded = quantize(kernels, input, m.group, g_activations[3]);
  return input;
}

// What turned tiles gave, turned back and written where it belongs. Overwrites `found`.
void turn_output_back(const LinearKernels& kernels, const Matrix& m, float* found, std::int64_t tokens, const Output& out) {
  for_turns(tokens, m.rows, [&](std::int64_t t, float* room) {
    float *values = found + t * m.rows, *to = out.data + t * m.rows;
    kernels.turn_back(m.back, values, m.scale, values, room);
    for (std::int64_t r = 0; r < m.rows; ++r) {
      const float value = out.bias ? values[r] + out.bias[r] : values[r];
      to[r] = out.accumulate ? to[r] + value : value;
    }
  });
}

// The input as such a matrix reads it: columns in its order, and rounded beside that; of several tokens by columns too.
Input own_input(const LinearKernels& kernels, const Input& plain, const Matrix& m, bool rounded) {
  if (m.turned) return turned_input(kernels, plain, m, rounded);
  Input input = plain;
  if (m.wide_groups != nullptr && rounded) {
    input.coded = quantize_mixed(kernels, plain.x, plain.tokens, m, g_activations[3]);
    return input;
  }
  if (ordered_tiles(m) && rounded) {
    input.coded = quantize(kernels, plain, m.group, g_activations[3], &m);
    return input;
  }
  if (m.order != nullptr) {
    auto* ordered = reinterpret_cast<float*>(g_ordered.at_least(ordered_bytes(plain.tokens, plain.cols)));
    const std::size_t grain = std::max<std::int64_t>(1, (1 << 14) / (plain.cols + 1));
    parallel_for(static_cast<std::size_t>(plain.tokens), grain, [&](std::size_t begin, std::size_t end, int) {
      for (auto t = static_cast<std::int64_t>(begin); t < static_cast<std::int64_t>(end); ++t)
        for (std::int64_t c = 0; c < plain.cols; ++c) ordered[t * plain.cols + c] = plain.x[t * plain.cols + m.column_at(c)];
    });
    input.x = ordered;
  }
  if (m.form == Form::tiles) return input;
  const bool bilevel = m.form == Form::bilevel;
  if (!bilevel && input.tokens > 1) return input;
  if (rounded) input.coded = quantize(kernels, input, bilevel ? kBilevelGroup : kMaskedGroup, g_activations[3]);
  if (rounded && input.tokens > 1) turn(input);
  return input;
}

// The input as codebooks are multiplied with it: columns in their order, scaled, and what offsets make of each token.
Input codebook_input(const Input& plain, const Matrix& m) {
  Input input = plain;
  const std::uint16_t *scale = m.codebooks->scale, *offset = m.codebooks->offset;
  if (m.order == nullptr && scale == nullptr) return input;
  auto* ordered = reinterpret_cast<float*>(g_ordered.at_least(ordered_bytes(plain.tokens, plain.cols)));
  const std::size_t grain = std::max<std::int64_t>(1, (1 << 14) / (plain.cols + 1));
  parallel_for(static_cast<std::size_t>(plain.tokens), grain, [&](std::size_t begin, std::size_t end, int) {
    for (auto t = static_cast<std::int64_t>(begin); t < static_cast<std::int64_t>(end); ++t) {
      const float* x = plain.x + t * plain.cols;
      float* to = ordered + t * plain.cols;
      double sum = 0;
      for (std::int64_t c = 0; c < plain.cols; ++c) {
        const float value = x[m.column_at(c)];
        to[c] = scale ? value * half_to_float(scale[c]) : value;
        if (offset) sum += static_cast<double>(value) * half_to_float(offset[c]);
      }
      g_offsets[t] = static_cast<float>(sum);
    }
  });
  input.x = ordered;
  if (offset) input.offsets = g_offsets;
  return input;
}

// One product and where its strips stand in the row of all strips of the call.
struct Job {
  const Matrix* matrix;
  Output output;
  StripKernel kernel;
  const Input* input;
  std::int64_t first_strip, num_strips;
};

constexpr std::size_t kMaxJobs = 8;  // products of one parallel region; a call with more takes several

// Each thread's own, and that of stripes beside it, so that what products hold is known whatever they need.
char* panel_scratch() {
  g_parts.at_least(kStripeScratchBytes * num_threads());
  return g_workers.at_least(kWorkerScratchBytes * num_threads());
}

// Decoding multiplies by the same matrices in the same order for every token: what followed a call follows it again. So threads can
// fetch the next weights while the caller is at a norm, an activation or in Python, or while attention keeps them busy with arithmetic:
// else nothing, or little, would be read in a tenth of a step. A call goes by the address of its first matrix, which may be gone.
constexpr int kMostCalls = 509, kAheadWorkers = 8;
constexpr std::size_t kAheadBytes = std::size_t{1} << 20;  // of each thread: what a second-level cache holds
struct Call {
  const void* first = nullptr;
  const void* next = nullptr;           // first matrix of the call that came after it
  Ahead::Span begins[kAheadWorkers];  // where each thread's run begins
};
Call g_calls[kMostCalls];
const void* g_last_call = nullptr;

Call& call_at(const void* first) { return g_calls[reinterpret_cast<std::uintptr_t>(first) / 64 % kMostCalls]; }

// What a thread reads whose run of strips is [strip, end).
Ahead::Span read_by(const Job* jobs, std::size_t count, std::int64_t strip, std::int64_t end) {
  const Job* job = jobs;
  while (job + 1 < jobs + count && strip >= job->first_strip + job->num_strips) ++job;
  const Matrix& m = *job->matrix;
  if (m.form != Form::tiles && m.form > Form::bfloat16) return {};
  const std::int64_t each = (m.form == Form::tiles ? m.row_tiles * m.tile_bytes() : m.nbytes()) / std::max<std::int64_t>(job->num_strips, 1);
  const std::int64_t from = strip - job->first_strip, to = std::min(end - job->first_strip, job->num_strips);
  return {static_cast<const char*>(m.data) + each * from, static_cast<std::size_t>(each * (to - from))};
}

// Notes this call, and gives what each thread is to read after it.
void expect_next(const Job* jobs, std::size_t count, std::int64_t strips, Ahead (&ahead)[kAheadWorkers]) {
  const void* first = jobs->matrix->data;
  if (g_last_call != nullptr) call_at(g_last_call).next = first;
  g_last_call = first;
  Call& call = call_at(first);
  if (call.first != first) call = {};
  call.first = first;
  const int workers = std::min(num_threads(), kAheadWorkers);
  const auto begin_of = [&](int w) { return static_cast<std::int64_t>(run_begin(static_cast<std::size_t>(strips), w, num_threads())); };
  for (int w = 0; w < workers; ++w) call.begins[w] = read_by(jobs, count, begin_of(w), begin_of(w + 1));
  for (int w = 0; w < workers; ++w) {
    std::size_t room = kAheadBytes;
    const Call* at = &call;
    for (int i = 0; i < Ahead::kSpans && at->next != nullptr && call_at(at->next).first == at->next; ++i) {
      at = &call_at(at->next);
      ahead[w].spans[i] = {at->begins[w].at, std::min(room, at->begins[w].bytes)};
      room -= ahead[w].spans[i].bytes;
    }
  }
}

void run_jobs(const Job* jobs, std::size_t count, double seconds) {
  const std::int64_t strips = jobs[count - 1].first_strip + jobs[count - 1].num_strips;
  if (strips == 0) return;
  const double chunk = std::max(1.0, kLeastChunkSeconds / (seconds / static_cast<double>(strips)));
  const std::size_t least = seconds < kInlineSeconds ? strips : static_cast<std::size_t>(std::min<double>(chunk, strips));
  char* scratch = panel_scratch();
  Ahead next[kAheadWorkers];
  expect_next(jobs, count, strips, next);
  parallel_runs(strips, least, [&](std::size_t begin, std::size_t end, int worker) {
    for (const Job* job = jobs; job != jobs + count; ++job) {
      const std::int64_t first = std::max<std::int64_t>(begin, job->first_strip) - job->first_strip;
      const std::int64_t last = std::min<std::int64_t>(end, job->first_strip + job->num_strips) - job->first_strip;
      if (first < last) job->kernel(*job->matrix, *job->input, first, last, job->output, scratch + worker * kWorkerScratchBytes);
    }
  }, next, kAheadWorkers);
}

// Up to so many blocks of tokens a tile is unpacked again for each; with more of them a panel is unpacked once for all. What is
// quicker was measured: it depends on how many operations a product takes, and on the planes that codes are put together from.
int few_blocks(const LinearKernels& kernels, const Matrix& m) {
  const bool one_plane = (m.bits & (m.bits - 1)) == 0;
  if (m.form == Form::sparse || kernels.token_block < 4) return 1;
  if (kernels.token_block == 4) return one_plane && m.bits < 8 ? 1 : 2;
  return one_plane ? 4 : 2;
}

// At most kMaxTokens tokens and kMaxJobs products.
void linear_block(const Input& plain, const Product* products, std::size_t count, bool exact, std::int64_t first_token) {
  const LinearKernels& kernels = linear_kernels_in_use();
  const bool one = plain.tokens == 1, few = plain.tokens <= kFewTokens;
  Input inputs[5] = {plain, plain, plain, plain, plain};  // by group 32, 64, 128, none (without codes) and 256
  Input in_planes[2 * kMaxPlanes];                 // by `plane_slot`
  Input own;                                       // as `in_order` reads it
  const Matrix* in_order = nullptr;
  Job jobs[kMaxJobs];
  double seconds = 0;
  std::int64_t strips = 0;
  std::size_t num_jobs = 0;
  Output turned_output;  // of `in_order`, where that is turned
  const auto run_waiting = [&] {
    if (num_jobs > 0) run_jobs(jobs, num_jobs, seconds);
    if (num_jobs > 0 && in_order != nullptr && in_order->turned)
      turn_output_back(kernels, *in_order, reinterpret_cast<float*>(g_turned.at_least(0)), plain.tokens, turned_output);
    num_jobs = 0, strips = 0, seconds = 0;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const Matrix& m = *products[i].matrix;
    if (reads_its_own(m) && (in_order == nullptr || !same_order(*in_order, m))) {
      if (in_order != nullptr) run_waiting();  // what waits reads the input in another order
      own = m.form == Form::codebook ? codebook_input(plain, m) : own_input(kernels, plain, m, !exact);
      in_order = &m;
    }
    Job& job = jobs[num_jobs++];
    job.matrix = &m;
    job.output = products[i].output;
    job.output.data += first_token * m.rows;
    job.input = &inputs[3];
    bool side_by_side = false;  // all tokens at once, a tile of rows at a time
    if (m.form == Form::planes && !exact) {
      Input& input = in_planes[plane_slot(m)];
      if (input.x == nullptr) round_to_planes(input = plain, m);
      job.input = &input;
      job.kernel = kernels.planes;
    } else if (m.form == Form::planes) {
      job.kernel = kernels.planes_exact;
    } else if (m.form == Form::bilevel) {
      job.input = &own;
      job.kernel = exact ? kernels.bilevel_exact : one ? kernels.bilevel_one : kernels.bilevel_many;
    } else if (m.turned) {
      turned_output = job.output;
      job.output = {reinterpret_cast<float*>(g_turned.at_least(ordered_bytes(plain.tokens, m.rows))), m.rows, nullptr, false};
      job.input = &own;
      job.kernel = exact ? kernels.tiles_exact : one ? kernels.tiles_one : kernels.tiles_many;
    } else if (m.wide_groups) {
      job.input = &own;
      job.kernel = exact ? kernels.tiles_exact : one ? kernels.mixed_one : kernels.mixed_many;
    } else if (m.form == Form::masked) {
      const bool rounded = one && !exact;
      if (rounded && m.order == nullptr && inputs[2].coded.codes == nullptr) inputs[2].coded = quantize(kernels, plain, kMaskedGroup, g_activations[2]);
      job.input = m.order ? &own : &inputs[rounded ? 2 : 3];
      job.kernel = rounded ? kernels.masked_one : kernels.masked_exact;
    } else if (m.form == Form::codebook) {
      job.input = &own;
      job.kernel = one ? kernels.codebook_one : kernels.codebook_many;
    } else if (m.form == Form::stacked) {
      job.kernel = few ? kernels.stacked_few : kernels.stacked_many;
    } else if (m.form != Form::tiles && m.form != Form::sparse) {
      job.kernel = (one ? kernels.float_one : kernels.float_many)[static_cast<int>(m.form)];
    } else if (exact) {
      if (ordered_tiles(m)) job.input = &own;
      side_by_side = m.form == Form::tiles && m.levels == nullptr && plain.tokens <= kernels.token_block;
      job.kernel = side_by_side ? kernels.tiles_exact_few : m.form == Form::sparse ? kernels.sparse_exact : kernels.tiles_exact;
    } else {
      const int slot = m.group == 32 ? 0 : m.group == 64 ? 1 : m.group == 128 ? 2 : 4;
      const bool ordered = ordered_tiles(m);
      if (!ordered && inputs[slot].coded.codes == nullptr) inputs[slot].coded = quantize(kernels, plain, m.group, g_activations[slot]);
      job.input = ordered ? &own : &inputs[slot];
      side_by_side = !by_unit(plain.tokens, m.group) && plain.tokens <= kernels.token_block * few_blocks(kernels, m) && m.bytes() <= 1;
      if (one) job.kernel = m.form == Form::sparse ? kernels.sparse_one : kernels.tiles_one;
      else job.kernel = side_by_side ? kernels.tiles_few : kernels.tiles_many;
    }
    const bool single_tile = one && !(exact && (m.form == Form::tiles || m.form == Form::planes || m.form == Form::bilevel || m.form == Form::masked || m.form == Form::sparse));
    std::int64_t strip_rows = kTileRows * ((single_tile && m.form != Form::stacked) || side_by_side ? 1 : kernels.strip_tiles);
    if (one && m.form == Form::codebook) strip_rows = kVectorsTogether * m.codebooks->rest.vector;
    if (m.form == Form::stacked && few) strip_rows = m.stack_rows();
    job.first_strip = strips;
    job.num_strips = (m.rows + strip_rows - 1) / strip_rows;
    if (job.kernel == kernels.tiles_many && !m.turned && wants_stripes(job.num_strips, plain.tokens, num_threads()) &&
        strip_seconds(m, strip_rows, plain.tokens) * static_cast<double>(job.num_strips) > 2 * kInlineSeconds) {
      char* panels = panel_scratch();
      run_in_stripes(kernels, m, *job.input, job.output, panels, reinterpret_cast<float*>(g_parts.at_least(0)));
      ++g_striped;
      --num_jobs;
      continue;
    }
    strips += job.num_strips;
    seconds += strip_seconds(m, strip_rows, plain.tokens) * static_cast<double>(job.num_strips);
  }
  run_waiting();
}

// A scale or minimum of a row and group; group_scale() in tiles.h is the same for vectors.
float scale_at(const Matrix& m, std::int64_t tile, std::int64_t g, std::int64_t row) {
  const std::int64_t at = (tile * m.groups + g) * kTileRows + row;
  switch (m.scale_form) {
    case ScaleForm::half: return half_to_float(static_cast<const std::uint16_t*>(m.scales)[at]);
    case ScaleForm::one: return 1.0f;
    case ScaleForm::single: return static_cast<const float*>(m.scales)[at];
    case ScaleForm::exponent: {
      const int byte = static_cast<const std::uint8_t*>(m.scales)[at];
      return byte == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, byte - 127);
    }
    default: {
      const float level = dynamic_levels[static_cast<const std::uint8_t*>(m.scales)[at]];
      return level * m.nested[tile * ((m.groups + kNestedGroups - 1) / kNestedGroups) + g / kNestedGroups] + m.offsets[tile];
    }
  }
}

// The code of a unit of tiles at (row, col): bit planes come widest first and hold the low bits first.
int unit_code(const std::uint8_t* unit, int bits, std::int64_t row, std::int64_t col) {
  const std::int64_t block = col % kUnitColumns / 4;
  const std::uint8_t* at = unit + 4 * (row % kTileRows) + col % 4;
  int code = 0, low = 0, left = bits;
  for (int width = 8; width > 0; width /= 2) {
    if ((left & width) == 0) continue;
    const int per_byte = 8 / width;
    const int byte = at[kLaneVectorBytes * (block / per_byte)];
    code |= ((byte >> (width * (block % per_byte))) & ((1 << width) - 1)) << low;
    at += kLaneVectorBytes * width;
    low += width;
    left -= width;
  }
  return code;
}

int tile_code(const Matrix& m, std::int64_t row, std::int64_t col) {
  return unit_code(m.tile(row / kTileRows) + col / kUnitColumns * kLaneVectorBytes * m.bits, m.bits, row, col);
}

// A row of a bilevel matrix. Outliers are added to numbers that were stored, so that no processor fuses the two roundings.
void decode_bilevel(const Matrix& m, std::int64_t row, float* out) {
  const std::int64_t lane = row % kTileRows;
  const std::uint8_t* at = m.bilevel_statistics(row / kTileRows);
  float scale = 0.0f, zero = 0.0f;
  for (std::int64_t place = 0; place < m.cols; ++place) {
    if (place % kBilevelGroup == 0) {
      std::uint64_t codes[2];
      std::uint16_t halves[4];
      std::memcpy(&codes[0], at, 8);
      std::memcpy(&codes[1], at + kBilevelCodeBytes, 8);
      std::memcpy(halves, at + 2 * kBilevelCodeBytes, sizeof halves);
      scale = half_to_float(halves[0]) * static_cast<float>(codes[0] >> (3 * lane) & 7) + half_to_float(halves[1]);
      zero = half_to_float(halves[2]) * static_cast<float>(codes[1] >> (3 * lane) & 7) + half_to_float(halves[3]);
      at += kBilevelStatisticBytes;
    }
    out[m.column_at(place)] = scale * (static_cast<float>(tile_code(m, row, place)) - zero);
  }
  if (m.row_offsets == nullptr) return;
  for (std::uint32_t e = m.row_offsets[row]; e < m.row_offsets[row + 1]; ++e) {
    const std::int64_t place = m.wide ? static_cast<const std::uint32_t*>(m.outlier_columns)[e] : static_cast<const std::uint16_t*>(m.outlier_columns)[e];
    out[m.column_at(place)] += half_to_float(m.outlier_values[e]);
  }
}

// A row of codebooks; sums and products are rounded one by one, as NumPy has them.
void decode_codebook(const Matrix& m, std::int64_t row, float* out) {
  const CodebookMatrix& books = *m.codebooks;
  for (const Codebooks* part : {&books.outliers, &books.rest}) {
    const std::int64_t vector = row / part->vector, lane = row % part->vector;
    for (std::int64_t g = 0; g < part->groups; ++g) {
      const std::int64_t begin = part->group_begin(g), end = part->group_begin(g + 1);
      for (std::int64_t c = begin; c < end; ++c) {
        const std::uint32_t code = index_at(part->stream(g, vector), c - begin, part->bits());
        const std::uint32_t main = code & ((std::uint32_t{1} << part->main_bits) - 1);
        float value = half_to_float(part->main_book(g, vector)[main * part->vector + lane]);
        if (part->residuals) value += half_to_float(part->residual_book(g, vector)[(code >> part->main_bits) * part->vector + lane]);
        const std::int64_t place = part->first_col + c;
        if (books.scale) value = value * half_to_float(books.scale[place]) + half_to_float(books.offset[place]);
        out[m.column_at(place)] = value;
      }
    }
  }
}

// Low bits of the row's salient weights in one group, by walking the bytes of its tile in the order they are stored in.
void low_bits(const Matrix& m, std::int64_t row, std::int64_t g, std::uint8_t* low) {
  const std::int64_t tile = row / kTileRows, lane = row % kTileRows;
  const std::uint8_t* at = m.rest + m.starts[tile * m.groups + g];
  const std::uint8_t* codes = m.tile(tile) + g * m.group_bytes();
  for (int c = 0; c < kMaskedGroup; c += 4) {
    const std::uint8_t* bytes = codes + c / 16 * kLaneVectorBytes;
    for (int byte = 0; byte < kLaneVectorBytes; ++byte)
      if (bytes[byte] >> (c % 16 / 2 + 1) & 1) {
        if (byte / 4 == lane) low[c + byte % 4] = *at;
        ++at;
      }
  }
}

// A row of a matrix of signs and masks.
void decode_masked(const Matrix& m, std::int64_t row, float* out) {
  const std::int64_t tile = row / kTileRows, lane = row % kTileRows;
  float params[kBillmParams];
  std::uint8_t low[kMaskedGroup];
  const auto around = [](float mean, float scale, bool above) { return above ? mean + scale : mean - scale; };
  for (std::int64_t place = 0; place < m.cols; ++place) {
    const std::int64_t g = place / kMaskedGroup, within = place % kMaskedGroup;
    if (within == 0) {
      for (int i = 0; i < (m.rest ? kPbLlmParams : kBillmParams); ++i) params[i] = half_to_float(m.masked_params(tile, g)[i * kTileRows + lane]);
      if (m.rest) low_bits(m, row, g, low);
    }
    const int code = tile_code(m, row, place);
    const bool sign = code & 1, mask = code & 2;
    float& value = out[m.column_at(place)];
    if (m.rest && mask) {
      const float* steps = m.masked_steps(tile) + lane;
      value = steps[0] * (static_cast<float>(low[within] | (sign ? 128 : 0)) - steps[kTileRows]);
    } else if (!m.rest && within < m.salient[g]) {
      value = around(around(params[4], params[5], sign), params[6], mask);
    } else {
      value = mask ? around(params[2], params[3], sign) : around(params[0], params[1], sign);
    }
  }
}

// A row of a matrix of which two of every four columns are kept.
void decode_sparse(const Matrix& m, std::int64_t row, float* out) {
  const std::int64_t tile = row / kTileRows;
  std::fill(out, out + m.cols, 0.0f);
  for (std::int64_t kept = 0; kept < (m.cols + 3) / 4 * 2; ++kept) {
    const std::uint8_t* unit = m.tile(tile) + kept / kUnitColumns * kLaneVectorBytes * (m.bits + kPositionBits);
    const std::int64_t g = 2 * kept / m.group, col = kept / 2 * 4 + unit_code(unit + kLaneVectorBytes * m.bits, kPositionBits, row, kept);
    const int zero = m.zeros ? m.zeros[(tile * m.groups + g) * kTileRows + row % kTileRows] : m.low_offset();
    if (col < m.cols) out[col] = scale_at(m, tile, g, row % kTileRows) * static_cast<float>(unit_code(unit, m.bits, row, kept) - zero);
  }
}

void decode_stacked(const Matrix& m, std::int64_t row, float* out) {
  std::fill(out, out + m.cols, 0.0f);
  for (int b = 0; b < m.num_blocks; ++b) {
    const std::uint16_t *left = m.left_factors(b) + row * m.rank, *right = m.right_factors(b);
    for (std::int64_t col = 0; col < m.cols; ++col, right += m.rank) {
      const std::int64_t first = col / kStackColumns * kStackColumns;
      float magnitude = 0.0f;
      for (int k = 0; k < m.rank; ++k) magnitude += half_to_float(left[k]) * half_to_float(right[k]);
      const bool positive = m.signs(b, row, first)[(col - first) / 8] >> (col % 8) & 1;
      out[col] += positive ? magnitude : -magnitude;
    }
  }
}

}  // namespace

float dynamic_levels[256];

std::int64_t Matrix::nbytes() const {
  if (form == Form::float32) return rows * cols * 4;
  if (form == Form::bilevel) {
    const std::int64_t index = wide ? 4 : 2, outliers = row_offsets ? (rows + 1) * 4 + row_offsets[rows] * (index + 2) : 0;
    return row_tiles * groups * (std::int64_t{64} * bits + 2 * kBilevelStatisticBytes) + (order ? cols * index : 0) + outliers;
  }
  if (form == Form::codebook) return codebooks->nbytes(cols) + (order ? cols * (wide ? 4 : 2) : 0);
  if (form == Form::masked) {
    const std::int64_t blocks = row_tiles * groups;
    const std::int64_t beside = rest ? row_tiles * 2 * kTileRows * 4 + blocks * 4 + rest_bytes : groups + cols * (wide ? 4 : 2);
    return row_tiles * tile_bytes() + blocks * kTileRows * 2 * (rest ? kPbLlmParams : kBillmParams) + beside;
  }
  if (form == Form::stacked) return num_blocks * (rows * ((cols + 7) / 8) + 2 * rank * (rows + cols));
  if (form == Form::planes) return rows * (bits * planes().row_words() * 8 + (plane_groups() ? 2 * planes().row_words() : 4));
  if (form == Form::sparse) return row_tiles * (tile_bytes() + groups * kTileRows * (zeros ? 3 : 2));
  if (form != Form::tiles) return rows * cols * 2;
  if (turned) return row_tiles * tile_bytes() + 2 * cols + 12;
  if (wide_groups) return row_tiles * (tile_bytes() + groups * kTileRows * 2) + groups + (order ? cols * (wide ? 4 : 2) : 0);
  const int scale_bytes = scale_form == ScaleForm::half ? 2 : scale_form == ScaleForm::single ? 4 : 1;
  const std::int64_t nested_bytes = nested ? 4 * ((groups + kNestedGroups - 1) / kNestedGroups + 1) : 0;
  const std::int64_t shift_bytes = shifts ? 4 * ((groups + kNestedGroups - 1) / kNestedGroups) : 0;
  const std::int64_t order_bytes = order ? cols * (wide ? 4 : 2) : 0;
  return order_bytes + row_tiles * (tile_bytes() + groups * kTileRows * (scale_bytes + (mins ? 2 : 0) + (second ? 2 : 0) + (shifts ? 1 : 0)) + nested_bytes + shift_bytes);
}

std::size_t linear_scratch_bytes() {
  std::lock_guard<std::mutex> guard(g_mutex);
  std::size_t bytes = g_workers.bytes() + g_parts.bytes();
  for (const auto& scratch : g_activations) bytes += scratch.bytes();
  bytes += g_ordered.bytes() + g_columns.bytes() + g_turned.bytes() + g_turning.bytes();
  for (const auto& scratch : g_planes) bytes += scratch.bytes();
  return bytes;
}

std::size_t linear_scratch_bytes_for(std::int64_t tokens, std::int64_t cols, int group, int threads) {
  const std::size_t workers = Scratch::rounded(kWorkerScratchBytes * threads) + Scratch::rounded(kStripeScratchBytes * threads);
  if (group == 0 || tokens == 0) return workers;
  tokens = std::min<std::int64_t>(tokens, kMaxTokens);
  if (group == 3 || group == 4)  // outputs are taken to be as wide as inputs can be
    return workers + 2 * Scratch::rounded(ordered_bytes(tokens, cols)) + turning_bytes(cols, threads) +
           (group == 3 ? Scratch::rounded(activation_bytes(tokens, cols, kMaskedGroup, tokens_together(linear_kernels_in_use(), tokens, kMaskedGroup))) : 0);
  if (group >= kMixedRounding) {  // all groups in 8 bits, and the columns put in order where products are exact
    const int width = group - kMixedRounding;
    return workers + Scratch::rounded(activation_bytes(tokens, cols, width, tokens_together(linear_kernels_in_use(), tokens, width)));
  }
  if (group == 2) return workers + Scratch::rounded(activation_bytes(1, cols, kMaskedGroup, 1));
  if (group == 1) return workers + Scratch::rounded(ordered_bytes(tokens, cols));
  if (group == kBilevelGroup)
    return workers + Scratch::rounded(activation_bytes(tokens, cols, group, tokens_together(linear_kernels_in_use(), tokens, group))) +
           Scratch::rounded(column_bytes(tokens, cols));
  if (group < 0) {
    const bool grouped = -group > kMaxPlanes;
    return workers + Scratch::rounded(plane_bytes(tokens, cols, grouped ? -group - kMaxPlanes : -group, grouped));
  }
  return workers + Scratch::rounded(activation_bytes(tokens, cols, group, tokens_together(linear_kernels_in_use(), tokens, group)));
}

void linear(const float* x, std::int64_t tokens, std::int64_t cols, const Product* products, std::size_t count, bool exact) {
  std::lock_guard<std::mutex> guard(g_mutex);
  g_products += static_cast<std::int64_t>(count);
  for (std::int64_t token = 0; token < tokens; token += kMaxTokens) {
    Input input;
    input.x = x + token * cols;
    input.tokens = std::min<std::int64_t>(kMaxTokens, tokens - token);
    input.cols = cols;
    for (std::size_t i = 0; i < count; i += kMaxJobs)
      linear_block(input, products + i, std::min(kMaxJobs, count - i), exact, token);
  }
}

std::int64_t linear_products() {
  std::lock_guard<std::mutex> guard(g_mutex);
  return g_products;
}

std::int64_t linear_striped_products() {
  std::lock_guard<std::mutex> guard(g_mutex);
  return g_striped;
}

void decode_row(const Matrix& m, std::int64_t row, float* out) {
  const auto* halves = static_cast<const std::uint16_t*>(m.data) + row * m.cols;
  switch (m.form) {
    case Form::float32: {
      const float* from = static_cast<const float*>(m.data) + row * m.cols;
      std::copy(from, from + m.cols, out);
      return;
    }
    case Form::float16: return void(std::transform(halves, halves + m.cols, out, half_to_float));
    case Form::bfloat16: return void(std::transform(halves, halves + m.cols, out, bfloat_to_float));
    case Form::planes: return decode_planes(m.planes(), row, 0, m.cols, [&](std::int64_t word) { return m.plane_scale(row, word); }, out);
    case Form::bilevel: return decode_bilevel(m, row, out);
    case Form::codebook: return decode_codebook(m, row, out);
    case Form::masked: return decode_masked(m, row, out);
    case Form::stacked: return decode_stacked(m, row, out);
    case Form::sparse: return decode_sparse(m, row, out);
    case Form::tiles: break;
  }
  const std::int64_t tile = row / kTileRows, lane = row % kTileRows;
  float scale = 0.0f, least = 0.0f, second = 0.0f;
  for (std::int64_t col = 0; col < m.cols; ++col) {
    if (col % m.group == 0) {
      const std::int64_t g = col / m.group, at = (tile * m.groups + g) * kTileRows + lane;
      scale = scale_at(m, tile, g, lane);
      if (m.mins) least = half_to_float(m.mins[at]);
      if (m.shifts) least = dynamic_levels[m.shifts[at]] * m.shift_peaks[tile * ((m.groups + kNestedGroups - 1) / kNestedGroups) + g / kNestedGroups];
      if (m.second) second = half_to_float(m.second[at]);
    }
    const int code = tile_code(m, row, col);
    if (m.wide_groups) out[m.column_at(col)] = scale * static_cast<float>(code - m.low_offset());
    else if (m.levels == nullptr) out[m.column_at(col)] = scale * static_cast<float>(code - m.low_offset()) + least;
    else out[col] = scale * m.levels->values[code] + least;
    if (m.second) out[col] += second * m.levels->second[code];
  }
}

void gather_rows(const Matrix& m, const std::int64_t* ids, std::int64_t count, float* out) {
  const std::size_t grain = std::max<std::int64_t>(1, (1 << 14) / (m.cols + 1));
  parallel_for(static_cast<std::size_t>(count), grain, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t i = begin; i < end; ++i) decode_row(m, ids[i], out + static_cast<std::int64_t>(i) * m.cols);
  });
}

}  // namespace mw
