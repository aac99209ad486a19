// A tile of rows stays while tiles of keys and values pass (Q outer). Lanes run along the keys for scores, along the head's
// numbers for what comes out; each tile of keys is turned once for all rows of the tile.
#include "tiled_attention.h"

#include "exponential.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kRows = kWidth == 16 ? 8 : 4, kVectors = kTilePad / kWidth > 2 ? 2 : kTilePad / kWidth, kGroup = kVectors * kWidth;
static_assert(kTilePad % kGroup == 0);

// out[row][column] (+)= sum over i of a[row][i] * b[i][column], for columns that are a multiple of kGroup
template <int Rows>
void product_rows(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride, std::int64_t depth, float* out,
                  std::int64_t out_stride, std::int64_t columns, float scale, bool add) {
  for (std::int64_t c = 0; c < columns; c += kGroup) {
    Vf sum[Rows][kVectors];
    for (int r = 0; r < Rows; ++r)
      for (int x = 0; x < kVectors; ++x) sum[r][x] = add ? load<Vf>(out + r * out_stride + c + x * kWidth) : Vf{};
    for (std::int64_t i = 0; i < depth; ++i) {
      Vf line[kVectors];
      for (int x = 0; x < kVectors; ++x) line[x] = load<Vf>(b + i * b_stride + c + x * kWidth);
      for (int r = 0; r < Rows; ++r) {
        const Vf factor = splat(a[r * a_stride + i]);
        for (int x = 0; x < kVectors; ++x) sum[r][x] += factor * line[x];
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int x = 0; x < kVectors; ++x) store(out + r * out_stride + c + x * kWidth, sum[r][x] * scale);
  }
}

void product(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride, std::int64_t depth, float* out,
             std::int64_t out_stride, std::int64_t rows, std::int64_t columns, float scale, bool add) {
  std::int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_rows<kRows>(a + r * a_stride, a_stride, b, b_stride, depth, out + r * out_stride, out_stride, columns, scale, add);
  for (; r < rows; ++r)
    product_rows<1>(a + r * a_stride, a_stride, b, b_stride, depth, out + r * out_stride, out_stride, columns, scale, add);
}

// One row's scores become exponentials relative to its maximum so far; what it has gathered is brought to the same maximum.
void soften(float* scores, std::int64_t columns, float& most, float& sum, float* out, int size) {
  Vf top = splat(most);
  for (std::int64_t c = 0; c < columns; c += kWidth) top = vmax(top, load<Vf>(scores + c));
  const float now = max_of(top);
  if (now > most) {
    const float less = exponential(splat(most - now))[0];
    sum *= less;
    for (int i = 0; i < size; i += kWidth) store(out + i, load<Vf>(out + i) * less);
    most = now;
  }
  Vf added{};
  for (std::int64_t c = 0; c < columns; c += kWidth) {
    const Vf weight = exponential(load<Vf>(scores + c) - now);
    store(scores + c, weight);
    added += weight;
  }
  sum += sum_of(added);
}

constexpr float kMasked = -3.0e38f;  // its exponential is about 1e-38 beside any score, and nothing beside a sum of them

void attend_rows(const TiledAttention& t, std::int64_t first, std::int64_t rows) {
  float* turned = t.scratch;
  float* scores = turned + t.key_tile * t.size;
  float* most = scores + t.row_tile * t.key_tile;
  float* sums = most + t.row_tile;
  float* out = t.out + first * t.size;
  for (std::int64_t r = 0; r < rows; ++r) most[r] = kMasked, sums[r] = 0.0f;
  for (std::int64_t i = 0; i < rows * t.size; ++i) out[i] = 0.0f;
  const std::int64_t offset = t.keys - t.rows, end = t.causal ? first + rows + offset : t.keys;
  for (std::int64_t begin = 0; begin < end; begin += t.key_tile) {
    const std::int64_t keys = end - begin < t.key_tile ? end - begin : t.key_tile;
    const std::int64_t columns = (keys + kTilePad - 1) / kTilePad * kTilePad;
    for (std::int64_t c = 0; c < columns; ++c)
      for (int i = 0; i < t.size; ++i) turned[i * t.key_tile + c] = c < keys ? t.k[(begin + c) * t.size + i] : 0.0f;
    product(t.q + first * t.size, t.size, turned, t.key_tile, t.size, scores, t.key_tile, rows, columns, t.scale, false);
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t sees = t.causal ? first + r + offset + 1 - begin : keys;
      for (std::int64_t c = sees < 0 ? 0 : sees < keys ? sees : keys; c < columns; ++c) scores[r * t.key_tile + c] = kMasked;
      soften(scores + r * t.key_tile, columns, most[r], sums[r], out + r * t.size, t.size);
    }
    product(scores, t.key_tile, t.v + begin * t.size, t.size, keys, out, t.size, rows, t.size, 1.0f, true);
  }
  for (std::int64_t r = 0; r < rows; ++r)
    for (int i = 0; i < t.size; i += kWidth) store(out + r * t.size + i, load<Vf>(out + r * t.size + i) * (1.0f / sums[r]));
}

void attend(const TiledAttention& task) {
  for (std::int64_t first = 0; first < task.rows; first += task.row_tile)
    attend_rows(task, first, task.rows - first < task.row_tile ? task.rows - first : task.row_tile);
}

}  // namespace

extern const TiledAttentionKernels tiled_attention_kernels;
const TiledAttentionKernels tiled_attention_kernels = {attend};

}  // namespace mw::MW_ISA
