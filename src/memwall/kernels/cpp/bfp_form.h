// Block floating point rows of a cache: signed mantissas of a few bits, and one exponent of 8 bits a block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

// Codes are mantissas shifted to be unsigned (m + 2^(bits - 1)). A byte never holds codes of two tokens.
//
// Keys: blocks of kTokens tokens of one kv head, laid out for products of four channels with one token in each lane. Of 32 channels:
//   8 bits: 8 vectors [token][channel % 4]
//   4 bits: 4 vectors [token][channel % 4], four channels in the low halves and the next four in the high ones
//   3 bits: 2 vectors of two bits, channels 4 s + ... at bits 2 s; then one of the highest bits, at bit s
//   6 bits: as 4 bits with the low four; then as the two bits of 3 with the high two
// then exponents [key_dim / block][token].
//
// Values: tokens one after another, each of its 32 channels packed by value_bits (bfp_codes.h). Blocks along channels: kTokens tokens
// and exponents [head_dim / block][token]. Blocks along tokens: `block` tokens and exponents [head_dim].
struct BfpForm {
  int bits = 0;   // of a key's mantissa; 0: keys are not in this form
  int block = 0;  // numbers that share an exponent
  int value_bits = 0;
  bool by_token = true;  // values: blocks along a token's channels; else along `block` tokens of a channel
  const std::int16_t* order = nullptr;  // [kv head][key_dim]: the channel at each place of a coded key; null: as it is

  static constexpr int kTokens = 16;
  static std::size_t code_bytes(int bits, int dim) { return static_cast<std::size_t>(bits) * static_cast<unsigned>(dim) / 8; }
  std::size_t key_code_bytes(int dim) const { return kTokens * code_bytes(bits, dim); }
  std::size_t key_bytes(int dim) const { return key_code_bytes(dim) + kTokens * static_cast<unsigned>(dim / block); }
  int value_tokens() const { return by_token ? kTokens : block; }
  std::size_t value_code_bytes(int dim) const { return static_cast<unsigned>(value_tokens()) * code_bytes(value_bits, dim); }
  std::size_t value_bytes(int dim) const { return value_code_bytes(dim) + static_cast<unsigned>(by_token ? kTokens * (dim / block) : dim); }
};

// What encoding needs beside the form: whether a largest number that rounds up to 2^(bits - 1) raises the exponent or is cut.
enum class BfpTop : int { clamp = 0, raise = 1 };

}  // namespace mw
