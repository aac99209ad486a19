// Range coding. The decoder takes sixteen neighbouring streams in step: their divisions, searches and loads do not wait for each
// other, so the processor overlaps them. There is one build of it for all processors: gathers of AVX2 make it slower (measured on
// an AMD EPYC: 80 million symbols a second and core without, 58 with).
#include "range_coder.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "threads.h"

namespace mw {
namespace {

constexpr std::uint32_t kLeastRange = 1u << 24;
constexpr int kLanes = 16;

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

// Up to kLanes neighbouring channels of one cut; out is the first symbol of the first of them.
void decode_lanes(const RangeTask& task, std::int64_t plane, std::int64_t channel, int lanes, int tokens, const std::uint8_t* const* bytes,
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
    alignas(64) std::uint32_t unit[kLanes], count[kLanes], symbol[kLanes], start[kLanes], width[kLanes], shift[kLanes], ahead[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      unit[lane] = range[lane] >> 16;
      // signed conversions, which every vector unit has. The quotient is exact: no rounded one crosses a whole number.
      const double dividend = static_cast<double>(static_cast<std::int32_t>(code[lane] ^ 0x80000000u)) + 2147483648.0;
      const auto quotient = static_cast<std::int32_t>(dividend / static_cast<double>(static_cast<std::int32_t>(unit[lane])));
      count[lane] = static_cast<std::uint32_t>(quotient < 65535 ? quotient : 65535);
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
      shift[lane] = (range[lane] < 1u << 24 ? 8u : 0u) + (range[lane] < 1u << 16 ? 8u : 0u);
      range[lane] <<= shift[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(ahead + lane, streams + next[lane], 4);
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint32_t bytes_ahead = __builtin_bswap32(ahead[lane]);
      code[lane] = code[lane] << shift[lane] | (bytes_ahead >> 8) >> (24 - shift[lane]);
      next[lane] += shift[lane] >> 3;
    }
    for (int lane = 0; lane < lanes; ++lane) out[lane] = static_cast<std::uint8_t>(symbol[lane]);
  }
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
  const std::int64_t cuts = task.cuts(), blocks = (task.channels + kLanes - 1) / kLanes;
  parallel_for(static_cast<std::size_t>(task.planes * cuts * blocks), 1, [&](std::size_t begin, std::size_t end, int) {
    for (std::size_t piece = begin; piece < end; ++piece) {
      const auto index = static_cast<std::int64_t>(piece);
      const std::int64_t channel = index % blocks * kLanes, first = index / blocks % cuts * task.cut;
      const std::int64_t plane = index / blocks / cuts, last = std::min(first + task.cut, task.tokens);
      const int lanes = static_cast<int>(std::min<std::int64_t>(kLanes, task.channels - channel));
      const std::int64_t stream = index / blocks * task.channels + channel;
      const std::uint8_t* places[kLanes];
      for (int lane = 0; lane < lanes; ++lane) places[lane] = bytes + offsets[stream + lane];
      decode_lanes(task, plane, channel, lanes, static_cast<int>(last - first), places, sizes + stream,
             symbols + (plane * task.tokens + first) * task.channels + channel);
    }
  });
}

}  // namespace mw
