// A range coder over static distributions: many short streams, each of one channel, coded and decoded side by side.
//
// A plane holds symbols [tokens, channels]; the symbols of one channel over up to `cut` tokens are one stream. Symbol i of a stream
// is drawn from the channel's distribution, or, where i is a multiple of `group`, from its distribution of anchors. A distribution
// over S symbols is S cumulative counts in units of 2^-16: the first is 0, each is larger than the one before, and 2^16 follows.
//
// Streams end with as few bytes as tell them apart when zeros follow: a decoder reads zeros past the end.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

struct Distributions {
  const std::uint16_t* starts;  // [planes, channels, symbols]
  int symbols;                  // 1 to 256
};

struct RangeTask {
  std::int64_t planes, tokens, channels;
  int cut;    // tokens of a stream
  int group;  // every group-th symbol of a stream is an anchor, from the first on; 0 without anchors
  Distributions plain, anchors;

  std::int64_t cuts() const { return (tokens + cut - 1) / cut; }
  std::int64_t num_streams() const { return planes * cuts() * channels; }
  // The most bytes that a stream can take: no symbol costs more than 16 bits.
  std::size_t most_bytes() const { return 2 * static_cast<std::size_t>(cut) + 8; }
};

constexpr int kMaxCut = 4096;

// Whether every distribution is one: counts that grow from 0, so that no symbol has none.
bool distributions_hold(const Distributions& tables, std::int64_t count);
// Codes symbols [planes, tokens, channels] into out, most_bytes() apart, and writes the length of each stream; streams are in the
// order plane, cut, channel. False when a symbol lies outside its alphabet.
bool range_encode(const RangeTask& task, const std::uint8_t* symbols, std::uint8_t* out, std::uint32_t* sizes);
// Streams of `sizes` bytes lie one after the other in `bytes`.
void range_decode(const RangeTask& task, const std::uint8_t* bytes, const std::uint32_t* sizes, const std::uint64_t* offsets, std::uint8_t* symbols);

}  // namespace mw
