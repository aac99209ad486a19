// Integer products by the matrix unit of a core (Intel AMX): sums of 16 tokens times 16 rows of weights at a time.
//
// The avx512 build has it, the processor may lack it, and Isa::amx says whether it is used. Activations lie by rows for it
// (Activations.rows), weights as in every panel: four columns of all rows of a strip side by side, which is how the unit reads its
// right operand.
#pragma once

#include "linear_kernels.h"
#include "tiles.h"

namespace mw::MW_ISA {

// The unit of this thread, set up for groups of so many columns while the object lives. Where it is not wanted, as in builds that
// have none, nothing is done.
class MatrixUnit {
 public:
  using Sums = std::int32_t[kUnitTokens][kTileRows];

  // signed_weights: whether bytes of weights are signed.
  MatrixUnit(bool wanted, int group, bool signed_weights)
      : wanted_(wanted), signed_(signed_weights), columns_(group < kMostColumns ? group : kMostColumns), steps_(group / columns_) {
#if defined(__AMX_INT8__)
    if (!wanted) return;
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    shape.rows[0] = kUnitTokens, shape.row_bytes[0] = kLaneVectorBytes;  // sums
    shape.rows[1] = kUnitTokens, shape.row_bytes[1] = static_cast<std::uint16_t>(columns_);
    shape.rows[2] = static_cast<std::uint8_t>(columns_ / 4), shape.row_bytes[2] = kLaneVectorBytes;
    asm volatile("" ::"r"(&shape) : "memory");  // compilers take the next line to read no more than its first bytes
    _tile_loadconfig(&shape);
#endif
  }
  ~MatrixUnit() {
#if defined(__AMX_INT8__)
    if (wanted_) _tile_release();
#endif
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  // finish(group, sums) for each group in turn, while the next one is multiplied: codes of 16 tokens times those of one row tile of a
  // panel.
  template <class Finish>
  MW_INLINE void for_groups(const std::int8_t* x, const std::uint8_t* codes, int num_groups, Finish&& finish) const {
    alignas(64) Sums sums[2];
    const int group = columns_ * steps_;
    multiply(x, codes, sums[0]);
    for (int g = 0; g < num_groups; ++g) {
      const std::int64_t next = std::int64_t{g + 1} * group;
      if (g + 1 < num_groups) multiply(x + next * kUnitTokens, codes + next * kStripRows, sums[(g + 1) % 2]);
      finish(g, sums[g % 2]);
    }
  }

 private:
  MW_INLINE void multiply([[maybe_unused]] const std::int8_t* x, [[maybe_unused]] const std::uint8_t* codes, [[maybe_unused]] Sums& to) const {
#if defined(__AMX_INT8__)
    constexpr std::int64_t kFour = kStripTiles * kLaneVectorBytes;  // bytes of four columns of a strip
    _tile_zero(0);
    for (int step = 0; step < steps_; ++step, x += columns_, codes += columns_ / 4 * kFour) {
      _tile_loadd(1, x, columns_ * steps_);
      _tile_loadd(2, codes, kFour);
      if (signed_) _tile_dpbssd(0, 1, 2);
      else _tile_dpbsud(0, 1, 2);
    }
    _tile_stored(0, to, sizeof to[0]);
#endif
  }

  static constexpr int kMostColumns = 64;
  bool wanted_, signed_;
  int columns_, steps_;
};

}  // namespace mw::MW_ISA
