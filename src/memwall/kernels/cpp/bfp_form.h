// Block floating point rows of a cache: signed mantissas of a few bits, and one exponent of 8 bits a block.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mw {

// A coded row is one head's numbers of one token: codes, 32 channels at a time, then the exponents of its blocks. Codes are
// mantissas shifted to be unsigned (m + 2^(bits - 1)), except 8 bits, which are signed bytes. Of 32 channels:
//   4 bits: 16 bytes, channel c < 16 in the low half of byte c, channel 16 + c in the high half
//   3 bits: 8 bytes with the low two bits of channels c, 8 + c, 16 + c, 24 + c from the lowest on; 4 bytes, a bit a channel
//   6 bits: 16 bytes as at 4 bits, with the low four bits; 8 bytes as at 3 bits, with the high two
//   8 bits: 32 bytes
struct BfpForm {
  int bits = 0;   // of a key's mantissa; 0: keys are not in this form
  int block = 0;  // numbers that share an exponent
  int value_bits = 0;
  bool by_token = true;  // values: blocks along a token's channels; else along `block` tokens of a channel
  const std::int16_t* order = nullptr;  // [kv head][key_dim]: the channel at each place of a coded key; null: as it is

  static std::size_t code_bytes(int bits, int dim) { return static_cast<std::size_t>(bits) * static_cast<unsigned>(dim) / 8; }
  std::size_t key_row_bytes(int dim) const { return row_bytes(bits, dim); }
  // one value row, or one block of `block` rows
  std::size_t value_bytes(int dim) const {
    if (by_token) return row_bytes(value_bits, dim);
    return code_bytes(value_bits, dim) * static_cast<unsigned>(block) + static_cast<unsigned>(dim);
  }
  int value_tokens() const { return by_token ? 1 : block; }

 private:
  std::size_t row_bytes(int width, int dim) const { return code_bytes(width, dim) + static_cast<unsigned>(dim / block); }
};

// What encoding needs beside the form: whether a largest number that rounds up to 2^(bits - 1) raises the exponent or is cut.
enum class BfpTop : int { clamp = 0, raise = 1 };

}  // namespace mw
