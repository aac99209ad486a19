// Rounds rows of numbers to codes, group by group, and packs the codes into tiles.
//
// Each step is the float32 operation that formats/integer.py or formats/leveled.py does, in its order; those files say why.
#include "encode.h"

#include "tiles.h"

namespace mw::MW_ISA {
namespace {

constexpr int kMaxGroup = 128;

struct Statistics {
  float high, low;
  bool finite;
};

Statistics statistics_of(const float* x, int count) {
  Vf high = load<Vf>(x), low = high;
  Vi worst{};
  for (int i = 0; i < count; i += kWidth) {
    const Vf values = load<Vf>(x + i);
    const Vi magnitude = (Vi)values & 0x7fffffff;
    high = vmax(high, values);
    low = vmin(low, values);
    worst = worst > magnitude ? worst : magnitude;
  }
  const std::int32_t largest = across(worst, [](Vi a, Vi b) { return a > b ? a : b; });
  return {max_of(high), -max_of(-low), largest < 0x7f800000};
}

// float16 with one encoding of zero; sets `good` to false on overflow.
std::uint16_t checked_half(float value, bool& good) {
  const std::uint16_t half = float_to_half(value);
  if ((half & 0x7c00u) == 0x7c00u) good = false;
  return half == 0x8000u ? 0 : half;
}

// Codes of one row of one group, written to byte 4 * row + column % 4 of lane vector column / 4.
void write_codes(const float* x, int group, float scale, float least, int zero, int largest_code, int row, std::uint8_t* lanes) {
  typedef std::uint8_t Bytes __attribute__((vector_size(kWidth)));
  const Vf bound = splat(1024.0f);  // far outside the codes, and small enough for round_to_int
  for (int i = 0; i < group; i += kWidth) {
    const Vf quotient = (load<Vf>(x + i) - least) / scale;
    Vi codes = round_to_int(vmax(vmin(quotient, bound), -bound)) + zero;
    codes = codes < 0 ? Vi{} : codes;
    codes = codes > largest_code ? splat(largest_code) : codes;
    std::uint8_t bytes[kWidth];
    store(bytes, __builtin_convertvector(codes, Bytes));
    for (int j = 0; j < kWidth; j += 4) __builtin_memcpy(lanes + (i + j) / 4 * kLaneVectorBytes + 4 * row, bytes + j, 4);
  }
}

// One row of one group: finds and stores its scale and minimum, then its codes. `count` numbers of x are real.
bool encode_group(const EncodeTask& task, float* x, int count, int row, std::uint16_t* scale, std::uint16_t* least,
                  std::uint8_t* lanes) {
  for (int i = count; i < task.group; ++i) x[i] = x[count - 1];
  const Statistics found = statistics_of(x, task.group);
  bool good = found.finite;
  const int levels = 1 << task.bits, zero = least ? 0 : levels / 2;
  const float width = least ? (found.high - found.low) / static_cast<float>(levels - 1)
                            : (found.high > -found.low ? found.high : found.low) / -static_cast<float>(zero);
  *scale = checked_half(width, good);
  if (least) *least = checked_half(found.low, good);
  if (good && *scale != 0) {
    write_codes(x, task.group, half_to_float(*scale), least ? half_to_float(*least) : 0.0f, zero, levels - 1, row, lanes);
    // padding has the code of zero
    for (int i = count; i < task.group; ++i)
      lanes[i / 4 * kLaneVectorBytes + 4 * row + i % 4] = static_cast<std::uint8_t>(zero);
  }
  return good;
}

// How many thresholds a number has reached, one number per lane: all are compared where they are few, else by halves.
MW_INLINE Vi level_index(const LevelSearch& search, Vf x) {
  Vi index{};
  if (search.num_levels <= 16) {
    for (int i = 0; i < search.num_levels - 1; ++i) index -= x >= splat(search.thresholds[i]);
    return index;
  }
  for (int step = 128; step > 0; step /= 2) {
    const Vi next = index + step;
    index = x >= look_up<8>(search.thresholds, next - 1) ? next : index;
  }
  return index;
}

// One row of one group of a level format.
void encode_levels(const LevelSearch& search, const float* x, int count, int group, float inverse, int row, std::uint8_t* lanes) {
  for (int i = 0; i < group; i += kWidth) {
    std::int32_t index[kWidth];
    store(index, level_index(search, load<Vf>(x + i) * inverse));
    for (int j = 0; j < kWidth; ++j)
      lanes[(i + j) / 4 * kLaneVectorBytes + 4 * row + j % 4] = i + j < count ? search.codes[index[j]] : search.zero_code;
  }
}

// Lane vectors of 8-bit codes to bit planes, the inverse of code_block().
void pack_unit(const std::uint8_t* lanes, int bits, std::uint8_t* unit) {
  int low = 0;
  for (int width = 8; width > 0; width /= 2) {
    if ((bits & width) == 0) continue;
    const int per_byte = 8 / width;
    const Vh mask = Vh{} + static_cast<std::uint16_t>(((1 << width) - 1) * 0x0101);
    for (int vector = 0; vector < width; ++vector, unit += kLaneVectorBytes)
      for (int at = 0; at < kLaneVectorBytes; at += kVectorBytes) {
        Vh packed{};
        for (int i = 0; i < per_byte; ++i)
          packed |= ((load<Vh>(lanes + (vector * per_byte + i) * kLaneVectorBytes + at) >> low) & mask) << (width * i);
        store(unit + at, packed);
      }
    low += width;
  }
}

template <class Type>
bool encode_tile(const EncodeTask& task, std::int64_t tile) {
  alignas(64) std::uint8_t lanes[kMaxGroup / 4 * kLaneVectorBytes];
  alignas(64) float x[kMaxGroup];
  const std::int64_t groups = (task.cols + task.group - 1) / task.group, unit_bytes = kLaneVectorBytes * task.bits;
  const int units = task.group / kUnitColumns;
  const int middle = task.levels ? task.levels->zero_code : task.mins ? 0 : 1 << (task.bits - 1);
  const std::uint8_t zero = static_cast<std::uint8_t>(middle);
  const auto* values = static_cast<const typename Type::Element*>(task.values);
  for (std::int64_t g = 0; g < groups; ++g) {
    __builtin_memset(lanes, zero, sizeof lanes);
    const std::int64_t first = g * task.group;
    const int count = static_cast<int>(task.cols - first < task.group ? task.cols - first : task.group);
    for (int row = 0; row < kTileRows; ++row) {
      const std::int64_t at = (tile * groups + g) * kTileRows + row;
      if (tile * kTileRows + row >= task.rows) {
        if (task.scales) task.scales[at] = 0;
        if (task.mins) task.mins[at] = 0;
        continue;
      }
      const auto* from = values + (tile * kTileRows + row) * task.cols + first;
      int i = 0;
      for (; i + kWidth <= count; i += kWidth) store(x + i, Type::vector(from + i));
      for (; i < count; ++i) x[i] = Type::scalar(from[i]);
      if (task.levels) {
        const float inverse = task.levels->inverses[(tile * kTileRows + row) * groups + g];
        encode_levels(*task.levels, x, count, task.group, inverse, row, lanes);
        continue;
      }
      if (!encode_group(task, x, count, row, task.scales + at, task.mins ? task.mins + at : nullptr, lanes)) return false;
    }
    std::uint8_t* to = task.codes + (tile * groups + g) * units * unit_bytes;
    for (int u = 0; u < units; ++u) pack_unit(lanes + u * kUnitColumns / 4 * kLaneVectorBytes, task.bits, to + u * unit_bytes);
  }
  return true;
}

bool encode(const EncodeTask& task, std::int64_t begin, std::int64_t end) {
  const auto one = task.from == Form::float32   ? encode_tile<Float32>
                   : task.from == Form::float16 ? encode_tile<Float16>
                                                : encode_tile<BFloat16>;
  for (std::int64_t tile = begin; tile < end; ++tile)
    if (!one(task, tile)) return false;
  return true;
}

}  // namespace

extern const EncodeKernels encode_kernels;
const EncodeKernels encode_kernels = {encode};

}  // namespace mw::MW_ISA
