// Decoding of neighbouring streams in step: each loop over lanes is one vector operation where the processor has it.
#include <algorithm>
#include <cstring>

#include "range_coder.h"

namespace mw::MW_ISA {
namespace {

constexpr int kLanes = kRangeLanes;
constexpr int kMostBytes = 2 * kMaxCut + 8;

// A distribution per lane, [symbol][lane], filled up to a power of two with counts that no code reaches.
class Tables {
 public:
  void set(const Distributions& tables, std::int64_t place, int lanes) {
    symbols_ = tables.symbols;
    for (half_ = 1; 2 * half_ < symbols_;) half_ *= 2;
    const int size = 2 * half_;
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint16_t* starts = tables.starts + (place + std::min(lane, lanes - 1)) * symbols_;
      for (int symbol = 0; symbol < size; ++symbol) starts_[symbol * kLanes + lane] = symbol < symbols_ ? starts[symbol] : kNever;
    }
    for (int lane = 0; lane < kLanes; ++lane) starts_[size * kLanes + lane] = kNever;
  }

  // What `count` of each lane falls on: symbol, its first count, its number of counts.
  void find(const std::uint32_t* count, std::uint32_t* symbol, std::uint32_t* start, std::uint32_t* width) const {
    std::uint32_t place[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) place[lane] = lane;
    for (int step = half_; step; step /= 2)
      for (int lane = 0; lane < kLanes; ++lane) {
        const std::uint32_t next = place[lane] + step * kLanes;
        place[lane] = starts_[next] <= count[lane] ? next : place[lane];
      }
    for (int lane = 0; lane < kLanes; ++lane) {
      symbol[lane] = place[lane] / kLanes;
      start[lane] = starts_[place[lane]];
      width[lane] = std::min(starts_[place[lane] + kLanes], 65536u) - start[lane];
    }
  }

 private:
  static constexpr std::uint32_t kNever = 1u << 24;
  int symbols_ = 0, half_ = 1;
  alignas(64) std::uint32_t starts_[257 * kLanes];
};

void decode(const RangeTask& task, std::int64_t plane, std::int64_t channel, int lanes, int tokens, const std::uint8_t* const* bytes,
            const std::uint32_t* sizes, std::uint8_t* out) {
  thread_local Tables plain, anchors;
  alignas(64) thread_local std::uint8_t streams[kLanes * kMostBytes];
  const std::int64_t place = plane * task.channels + channel;
  plain.set(task.plain, place, lanes);
  if (task.group) anchors.set(task.anchors, place, lanes);
  // zeros behind each stream, as far as a broken one can run
  const std::size_t stride = 2 * static_cast<std::size_t>(tokens) + 8;
  alignas(64) std::uint32_t code[kLanes], range[kLanes], next[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    std::uint8_t* stream = streams + lane * stride;
    const std::size_t size = lane < lanes ? std::min<std::size_t>(sizes[lane], stride) : 0;
    if (size) std::memcpy(stream, bytes[lane], size);
    std::memset(stream + size, 0, stride - size);
    code[lane] = static_cast<std::uint32_t>(stream[0]) << 24 | stream[1] << 16 | stream[2] << 8 | stream[3];
    range[lane] = 0xffffffffu;
    next[lane] = static_cast<std::uint32_t>(lane * stride + 4);
  }
  int until_anchor = 0;
  for (int token = 0; token < tokens; ++token, out += task.channels) {
    alignas(64) std::uint32_t unit[kLanes], count[kLanes], symbol[kLanes], start[kLanes], width[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      unit[lane] = range[lane] >> 16;
      // exact: both have few enough bits that no rounded quotient crosses a whole number
      const auto quotient = static_cast<std::int64_t>(static_cast<double>(code[lane]) / static_cast<double>(unit[lane]));
      count[lane] = static_cast<std::uint32_t>(std::min<std::int64_t>(quotient, 65535));
    }
    if (task.group && until_anchor == 0) {
      anchors.find(count, symbol, start, width);
      until_anchor = task.group;
    } else {
      plain.find(count, symbol, start, width);
    }
    --until_anchor;
    for (int lane = 0; lane < kLanes; ++lane) {
      code[lane] -= unit[lane] * start[lane];
      range[lane] = unit[lane] * width[lane];
      const std::uint32_t shift = (range[lane] < 1u << 24 ? 8 : 0) + (range[lane] < 1u << 16 ? 8 : 0);
      std::uint32_t ahead;
      std::memcpy(&ahead, streams + next[lane], 4);
      ahead = __builtin_bswap32(ahead);
      code[lane] = code[lane] << shift | (ahead >> 8) >> (24 - shift);
      range[lane] <<= shift;
      next[lane] += shift >> 3;
    }
    for (int lane = 0; lane < lanes; ++lane) out[lane] = static_cast<std::uint8_t>(symbol[lane]);
  }
}

}  // namespace

extern const RangeKernels range_kernels;
const RangeKernels range_kernels = {decode};

}  // namespace mw::MW_ISA
