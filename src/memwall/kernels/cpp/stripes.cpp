// Striped partition, after MARLIN (arXiv 2408.11743, section 3.3; memwall/kernels/stripes.py has it as an object).
//
// A slice is a strip of rows times a block of tokens; it is cut along the columns in kSegments. All segments stand in one row, those
// of a slice side by side, and each thread takes an equal run of it, which may begin and end inside a slice. At most one slice is
// shared across each border between two runs; its segments meet in the room of the run in which the slice begins, and are summed up
// in order, so that the number of threads does not change a bit of the result.
#include "stripes.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace mw {
namespace {

constexpr double kMostWaiting = 1.1;        // time of the slowest thread over that of the mean
constexpr std::int64_t kManyStrips = 8;     // per thread; with more, what is left over at the end is little

struct Slices {
  const LinearKernels& kernels;
  const Matrix& m;
  const Input& input;
  const Output& out;
  std::int64_t blocks, groups_together, chunks;

  Slices(const LinearKernels& k, const Matrix& matrix, const Input& in, const Output& to)
      : kernels(k), m(matrix), input(in), out(to), blocks((in.tokens + kStripeTokens - 1) / kStripeTokens), groups_together(512 / matrix.group),
        chunks((matrix.groups + groups_together - 1) / groups_together) {}

  int strip_rows() const { return kTileRows * kernels.strip_tiles; }
  std::int64_t count() const { return (m.rows + strip_rows() - 1) / strip_rows() * blocks; }
  std::int64_t first_token(std::int64_t slice) const { return slice % blocks * kStripeTokens; }
  int tokens(std::int64_t slice) const { return static_cast<int>(std::min<std::int64_t>(kStripeTokens, input.tokens - first_token(slice))); }
  std::int64_t group_at(int segment) const { return std::min(m.groups, chunks * segment / kSegments * groups_together); }
  static float* room(float* parts, int index) { return parts + index * kStripeTokens * kMostStripRows; }

  void segment(std::int64_t slice, int index, float* sums, char* panel) const {
    kernels.tiles_part(m, input, slice / blocks, group_at(index), group_at(index + 1), first_token(slice), tokens(slice), sums, panel);
  }

  void add(std::int64_t slice, float* sums, const float* more) const {
    for (int i = 0; i < tokens(slice) * strip_rows(); ++i) sums[i] += more[i];
  }

  // A slice that one thread has all of.
  void own(std::int64_t slice, float* parts, char* panel) const {
    float *sums = room(parts, kSegments), *more = room(parts, kSegments + 1);
    for (int s = 0; s < kSegments; ++s) {
      segment(slice, s, s == 0 ? sums : more, panel);
      if (s > 0) add(slice, sums, more);
    }
    write(slice, sums);
  }

  // A slice whose segments several threads have left in its room.
  void finish(std::int64_t slice, float* parts) const {
    for (int s = 1; s < kSegments; ++s) add(slice, parts, room(parts, s));
    write(slice, parts);
  }

  void write(std::int64_t slice, const float* sums) const {
    const std::int64_t first_row = slice / blocks * strip_rows(), last = std::min<std::int64_t>(m.rows, first_row + strip_rows());
    for (int t = 0; t < tokens(slice); ++t) {
      float* to = out.data + (first_token(slice) + t) * out.rows;
      for (std::int64_t row = first_row; row < last; ++row) {
        float value = sums[t * strip_rows() + row - first_row];
        if (out.bias) value += out.bias[row];
        to[row] = out.accumulate ? to[row] + value : value;
      }
    }
  }
};

}  // namespace

bool wants_stripes(std::int64_t strips, std::int64_t tokens, int threads) {
  if (threads == 1 || strips == 0 || strips >= kManyStrips * threads) return false;
  const auto waiting = [&](std::int64_t units) {
    const std::int64_t most = (units + threads - 1) / threads;
    return static_cast<double>(most * threads) / static_cast<double>(units);
  };
  const std::int64_t blocks = (tokens + kStripeTokens - 1) / kStripeTokens;
  return waiting(strips) > kMostWaiting * waiting(strips * blocks * kSegments);
}

void run_in_stripes(const LinearKernels& kernels, const Matrix& m, const Input& input, const Output& out, char* panels, float* parts) {
  const Slices slices(kernels, m, input, out);
  const auto threads = static_cast<std::int64_t>(num_threads());
  const std::int64_t units = slices.count() * kSegments, stripe = (units + threads - 1) / threads;
  const auto room_of = [&](std::int64_t slice) {
    return parts + slice * kSegments / stripe * (kStripeScratchBytes / sizeof(float));
  };
  const auto is_shared = [&](std::int64_t slice) { return slice * kSegments / stripe != (slice * kSegments + kSegments - 1) / stripe; };
  parallel_for(static_cast<std::size_t>(threads), 1, [&](std::size_t begin, std::size_t end, int worker) {
    char* panel = panels + worker * kWorkerScratchBytes;
    for (auto index = static_cast<std::int64_t>(begin); index < static_cast<std::int64_t>(end); ++index)
      for (std::int64_t unit = index * stripe; unit < std::min(units, (index + 1) * stripe);) {
        const std::int64_t slice = unit / kSegments;
        if (!is_shared(slice)) {
          slices.own(slice, room_of(slice), panel);
          unit += kSegments;
        } else {
          const int segment = static_cast<int>(unit++ % kSegments);
          slices.segment(slice, segment, Slices::room(room_of(slice), segment), panel);
        }
      }
  });
  // at most one slice that begins in a stripe goes on behind it: its last
  parallel_for(static_cast<std::size_t>(threads), 1, [&](std::size_t begin, std::size_t end, int) {
    for (auto index = static_cast<std::int64_t>(begin); index < static_cast<std::int64_t>(end); ++index) {
      const std::int64_t stop = std::min(units, (index + 1) * stripe);
      if (stop <= index * stripe) continue;
      const std::int64_t slice = (stop - 1) / kSegments;
      if (slice * kSegments >= index * stripe && is_shared(slice)) slices.finish(slice, room_of(slice));
    }
  });
}

}  // namespace mw
