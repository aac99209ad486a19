// Turns of one token by two small matrices (formats/quip.py).
#include "linear_kernels.h"

namespace mw::MW_ISA {
namespace {

// to [rows, cols] = a [rows, inner] b [inner, cols], row-major; four rows share what is loaded of b.
void multiply(const float* a, const float* b, std::int64_t rows, std::int64_t inner, std::int64_t cols, float* to) {
  constexpr std::int64_t kRows = 4;
  for (std::int64_t r = 0; r < rows; r += kRows) {
    const std::int64_t count = rows - r < kRows ? rows - r : kRows;
    std::int64_t c = 0;
    for (; c + kWidth <= cols; c += kWidth) {
      Vf sums[kRows] = {};
      for (std::int64_t i = 0; i < inner; ++i) {
        const Vf held = load<Vf>(b + i * cols + c);
        for (std::int64_t k = 0; k < kRows; ++k) sums[k] += splat(a[(r + (k < count ? k : 0)) * inner + i]) * held;
      }
      for (std::int64_t k = 0; k < count; ++k) store(to + (r + k) * cols + c, sums[k]);
    }
    for (; c < cols; ++c)
      for (std::int64_t k = 0; k < count; ++k) {
        float sum = 0.0f;
        for (std::int64_t i = 0; i < inner; ++i) sum += a[(r + k) * inner + i] * b[i * cols + c];
        to[(r + k) * cols + c] = sum;
      }
  }
}

}  // namespace

void turn_token(const Turn& turn, const float* x, const std::uint16_t* columns, float* to, float* room) {
  for (std::int64_t i = 0; i < turn.size(); ++i) to[i] = x[turn.order[i]] * half_to_float(columns[turn.order[i]]);
  multiply(turn.left, to, turn.p, turn.p, turn.q, room);
  multiply(room, turn.right, turn.p, turn.q, turn.q, to);
}

void turn_token_back(const Turn& turn, const float* x, float scale, float* to, float* room) {
  float* second = room + turn.size();
  multiply(turn.left, x, turn.p, turn.p, turn.q, room);
  multiply(room, turn.right, turn.p, turn.q, turn.q, second);
  for (std::int64_t i = 0; i < turn.size(); ++i) to[turn.order[i]] = second[i] * scale;
}

}  // namespace mw::MW_ISA
