// Range coding: the encoder, and the sharing of streams among threads.
#include "range_coder.h"

#include <algorithm>
#include <atomic>

#include "dispatch.h"
#include "threads.h"

MW_KERNEL_TABLE(RangeKernels, range_kernels)

namespace mw {
namespace {

constexpr std::uint32_t kLeastRange = 1u << 24;

// Writes one stream. `low` keeps 32 bits; what carries out of them is added to the bytes already written.
class Encoder {
 public:
  explicit Encoder(std::uint8_t* out) : begin_(out), out_(out) {}

  void put(std::uint32_t start, std::uint32_t end) {
    const std::uint32_t unit = range_ >> 16;
    low_ += static_cast<std::uint64_t>(unit) * start;
    range_ = unit * (end - start);
    carry();
    while (range_ < kLeastRange) {
      shift();
      range_ <<= 8;
    }
  }

  // The range is at least 2^24 wide, so a number in it that ends in 24 zero bits exists.
  std::uint32_t finish() {
    low_ = (low_ + kLeastRange - 1) & ~static_cast<std::uint64_t>(kLeastRange - 1);
    carry();
    shift();
    while (out_ != begin_ && out_[-1] == 0) --out_;
    return static_cast<std::uint32_t>(out_ - begin_);
  }

 private:
  void carry() {
    if (low_ >> 32 == 0) return;
    for (std::uint8_t* byte = out_ - 1; ++*byte == 0; --byte) {
    }
    low_ &= 0xffffffffu;
  }

  void shift() {
    *out_++ = static_cast<std::uint8_t>(low_ >> 24);
    low_ = (low_ & 0xffffffu) << 8;
  }

  std::uint8_t *begin_, *out_;
  std::uint64_t low_ = 0;
  std::uint32_t range_ = 0xffffffffu;
};

bool put_symbol(Encoder& encoder, const Distributions& tables, std::int64_t place, int symbol) {
  if (symbol >= tables.symbols) return false;
  const std::uint16_t* starts = tables.starts + place * tables.symbols;
  encoder.put(starts[symbol], symbol + 1 == tables.symbols ? 1u << 16 : starts[symbol + 1]);
  return true;
}

}  // namespace

bool distributions_hold(const Distributions& tables, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint16_t* starts = tables.starts + i * tables.symbols;
    if (starts[0] != 0) return false;
    for (int symbol = 1; symbol < tables.symbols; ++symbol)
      if (starts[symbol] <= starts[symbol - 1]) return false;
  }
  return true;
}

bool range_encode(const RangeTask& task, const std::uint8_t* symbols, std::uint8_t* out, std::uint32_t* sizes) {
  std::atomic<bool> good{true};
  const std::int64_t cuts = task.cuts();
  parallel_for(static_cast<std::size_t>(task.num_streams()), 32, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t stream = begin; stream < end; ++stream) {
      const auto index = static_cast<std::int64_t>(stream);
      const std::int64_t channel = index % task.channels, first = index / task.channels % cuts * task.cut;
      const std::int64_t plane = index / task.channels / cuts, last = std::min(first + task.cut, task.tokens);
      Encoder encoder(out + stream * task.most_bytes());
      for (std::int64_t token = first; token < last; ++token) {
        const bool anchor = task.group && (token - first) % task.group == 0;
        const int symbol = symbols[(plane * task.tokens + token) * task.channels + channel];
        if (!put_symbol(encoder, anchor ? task.anchors : task.plain, plane * task.channels + channel, symbol)) good.store(false);
      }
      sizes[stream] = encoder.finish();
    }
  });
  return good.load();
}

void range_decode(const RangeTask& task, const std::uint8_t* bytes, const std::uint32_t* sizes, const std::uint64_t* offsets, std::uint8_t* symbols) {
  const auto kernel = range_kernels_in_use().decode;
  const std::int64_t cuts = task.cuts(), blocks = (task.channels + kRangeLanes - 1) / kRangeLanes;
  parallel_for(static_cast<std::size_t>(task.planes * cuts * blocks), 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t piece = begin; piece < end; ++piece) {
      const auto index = static_cast<std::int64_t>(piece);
      const std::int64_t channel = index % blocks * kRangeLanes, first = index / blocks % cuts * task.cut;
      const std::int64_t plane = index / blocks / cuts, last = std::min(first + task.cut, task.tokens);
      const int lanes = static_cast<int>(std::min<std::int64_t>(kRangeLanes, task.channels - channel));
      const std::int64_t stream = index / blocks * task.channels + channel;
      const std::uint8_t* places[kRangeLanes];
      for (int lane = 0; lane < lanes; ++lane) places[lane] = bytes + offsets[stream + lane];
      kernel(task, plane, channel, lanes, static_cast<int>(last - first), places, sizes + stream,
             symbols + (plane * task.tokens + first) * task.channels + channel);
    }
  });
}

}  // namespace mw
