// Shares the rows of low-rank factors among threads, and brings adapters from their files into pages.
#include "lora.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "dispatch.h"
#include "half.h"
#include "threads.h"

MW_KERNEL_TABLE(LoraKernels, lora_kernels)

namespace mw {
namespace {

// Rows of a factor, or units of its outputs, that one thread takes at a time: about 5 us of work each.
constexpr double kChunkNumbers = 32e3;
// Below this a call runs on its own thread: waking another costs about as much.
constexpr double kInlineNumbers = 128e3;

LoraRows rows_of(const LoraPool& pool, const LoraAdapter& adapter, std::int64_t layer, const LoraTarget& t, bool second) {
  LoraRows rows;
  rows.layer = pool.base + layer * pool.layer_bytes;
  rows.pages = adapter.pages.data();
  rows.page_bytes = pool.page_bytes, rows.unit_bytes = pool.unit_bytes, rows.block_shift = pool.block_shift;
  rows.width = second ? t.out : t.in;
  rows.row_units = adapter.row_units(pool, rows.width);
  rows.first_unit = t.first_unit + (second ? t.rank * adapter.row_units(pool, t.in) : 0);
  rows.unit_values = pool.unit_bytes / adapter.itemsize();
  return rows;
}

// Some rows of a factor (or units of its outputs) for the tokens of one segment.
struct Task {
  const LoraSegment* segment;
  const LoraOutput* output;
  std::int64_t first, count;       // rows of the call
  std::int64_t scratch_at;         // where the target's numbers begin in a row of the scratch
  std::int64_t begin, end;
};

struct Tasks {
  std::vector<Task> shrink, expand;
  double numbers = 0;
};

std::mutex g_mutex;  // one call at a time: the lists below only ever grow, so that a step of decoding allocates nothing
Tasks g_tasks;

void cut(std::vector<Task>& tasks, Task task, std::int64_t whole, double numbers_each) {
  const auto step = std::max<std::int64_t>(4, static_cast<std::int64_t>(kChunkNumbers / (numbers_each + 1)));
  for (task.begin = 0; task.begin < whole; task.begin = task.end) {
    task.end = std::min(whole, task.begin + step);
    tasks.push_back(task);
  }
}

std::int64_t list_tasks(const LoraCall& call, Tasks& tasks) {
  tasks.shrink.clear(), tasks.expand.clear(), tasks.numbers = 0;
  std::int64_t multiplies = 0;
  for (std::size_t s = 0; s < call.num_segments; ++s) {
    const LoraSegment& segment = call.segments[s];
    const std::int64_t first = std::max(segment.first, call.first_row) - call.first_row;
    const std::int64_t end = std::min(segment.first + segment.count, call.first_row + call.rows) - call.first_row;
    if (first >= end) continue;
    std::int64_t at = 0;
    for (std::size_t o = 0; o < call.num_outputs; ++o) {
      const LoraTarget& t = segment.adapter->targets[call.outputs[o].target];
      if (t.rank == 0) continue;
      const Task task{&segment, &call.outputs[o], first, end - first, at, 0, 0};
      const double tokens = static_cast<double>(end - first);
      // reading a number costs about as much as multiplying it with four tokens
      const double work = std::max(1.0, tokens / 4);
      cut(tasks.shrink, task, t.rank, static_cast<double>(t.in) * work);
      const std::int64_t units = segment.adapter->row_units(*call.pool, t.out);
      cut(tasks.expand, task, units, static_cast<double>(t.rank * t.out) / static_cast<double>(units) * work);
      tasks.numbers += static_cast<double>(t.rank * (t.in + t.out)) * work;
      multiplies += (end - first) * t.rank * (t.in + t.out);
      at += t.rank;
    }
  }
  return multiplies;
}

// The outputs that a task has finished, by what their rows of the weight are lengthened.
void lengthen(const LoraCall& call, const Task& task, std::int64_t unit_values) {
  const std::vector<float>& table = task.segment->adapter->rows[task.output->target];
  if (table.empty()) return;
  const std::int64_t width = task.output->width, begin = task.begin * unit_values, end = std::min(width, task.end * unit_values);
  const float* change = table.data() + call.layer * 2 * width;
  const float* shift = change + width;
  for (std::int64_t n = 0; n < task.count; ++n) {
    float* y = task.output->data + (task.first + n) * width;
    for (std::int64_t i = begin; i < end; ++i) y[i] += change[i] * y[i] + shift[i];
  }
}

}  // namespace

std::int64_t add_lora(const LoraCall& call) {
  if (call.num_segments == 0) return 0;
  std::lock_guard<std::mutex> guard(g_mutex);
  Tasks& tasks = g_tasks;
  const std::int64_t multiplies = list_tasks(call, tasks);
  const LoraKernels& kernels = lora_kernels_in_use();
  const bool alone = tasks.numbers < kInlineNumbers;
  parallel_for(tasks.shrink.size(), alone ? std::max<std::size_t>(tasks.shrink.size(), 1) : 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t i = begin; i < end; ++i) {
      const Task& task = tasks.shrink[i];
      const LoraAdapter& adapter = *task.segment->adapter;
      const LoraRows rows = rows_of(*call.pool, adapter, call.layer, adapter.targets[task.output->target], false);
      kernels.shrink[static_cast<int>(adapter.form)](rows, call.x + task.first * call.in, call.in, task.count, task.begin, task.end,
                                                     call.scratch + task.first * call.scratch_width + task.scratch_at, call.scratch_width);
    }
  });
  parallel_for(tasks.expand.size(), alone ? std::max<std::size_t>(tasks.expand.size(), 1) : 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t i = begin; i < end; ++i) {
      const Task& task = tasks.expand[i];
      const LoraAdapter& adapter = *task.segment->adapter;
      const LoraTarget& t = adapter.targets[task.output->target];
      const LoraRows rows = rows_of(*call.pool, adapter, call.layer, t, true);
      kernels.expand[static_cast<int>(adapter.form)](rows, call.scratch + task.first * call.scratch_width + task.scratch_at, call.scratch_width,
                                                     task.count, t.rank, adapter.scale, task.begin, task.end,
                                                     task.output->data + task.first * task.output->width, task.output->width);
      lengthen(call, task, rows.unit_values);
    }
  });
  return multiplies;
}

namespace {

bool read_all(int file, std::uint8_t* to, std::int64_t count, std::int64_t at) {
  while (count > 0) {
    const ssize_t got = ::pread(file, to, static_cast<std::size_t>(count), at);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) errno = EIO;  // the file ended early
    if (got <= 0) return false;
    to += got, at += got, count -= got;
  }
  return true;
}

void put(std::uint8_t* to, Form form, const std::uint8_t* from, Form stored) {
  if (form == stored) {
    std::memcpy(to, from, form == Form::float32 ? 4 : 2);
    return;
  }
  float value;
  std::memcpy(&value, from, 4);
  const std::uint16_t half = float_to_half(value);
  std::memcpy(to, &half, 2);
}

// rows[j][i] = values[j * row_step + i * step]; what is left of the last unit of a row is zero
void scatter(const LoraRows& rows, std::int64_t rank, const LoraAdapter& adapter, Form stored, const std::uint8_t* values,
             std::int64_t row_step, std::int64_t step) {
  const std::int64_t from_bytes = stored == Form::float32 ? 4 : 2, to_bytes = adapter.itemsize();
  for (std::int64_t j = 0; j < rank; ++j)
    for (std::int64_t u = 0; u < rows.row_units; ++u) {
      auto* to = const_cast<std::uint8_t*>(rows.unit(j, u));
      const std::int64_t first = u * rows.unit_values, count = std::min(rows.unit_values, rows.width - first);
      if (values == nullptr) {
        std::memset(to, 0, static_cast<std::size_t>(rows.unit_bytes));
        continue;
      }
      const std::uint8_t* from = values + (j * row_step + first * step) * from_bytes;
      if (adapter.form == stored && step == 1) std::memcpy(to, from, static_cast<std::size_t>(count * to_bytes));
      else
        for (std::int64_t i = 0; i < count; ++i) put(to + i * to_bytes, adapter.form, from + i * step * from_bytes, stored);
      std::memset(to + count * to_bytes, 0, static_cast<std::size_t>(rows.unit_bytes - count * to_bytes));
    }
}

}  // namespace

std::int64_t fetch_lora(const LoraPool& pool, const LoraAdapter& adapter, int file, Form stored, const std::int64_t* offsets, std::int64_t layers) {
  std::vector<std::uint8_t> tensor;
  std::int64_t total = 0;
  for (std::int64_t layer = 0; layer < layers; ++layer)
    for (int target = 0; target < kLoraTargets; ++target) {
      const LoraTarget& t = adapter.targets[target];
      for (int second = 0; second < 2 && t.rank > 0; ++second) {
        const LoraRows rows = rows_of(pool, adapter, layer, t, second != 0);
        const std::int64_t at = offsets[(layer * kLoraTargets + target) * 2 + second];
        const std::int64_t nbytes = t.rank * rows.width * (stored == Form::float32 ? 4 : 2);
        if (at >= 0) {
          tensor.resize(static_cast<std::size_t>(nbytes));
          if (!read_all(file, tensor.data(), nbytes, at)) return -1 - errno;
          total += nbytes;
        }
        // A [rank, in] lies as it will; B [out, rank] is turned
        scatter(rows, t.rank, adapter, stored, at < 0 ? nullptr : tensor.data(), second ? 1 : rows.width, second ? t.rank : 1);
      }
    }
  return total;
}

}  // namespace mw
