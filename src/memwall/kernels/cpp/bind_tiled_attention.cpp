// Python face of tiled_attention.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <vector>

#include "tiled_attention.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

void tiled_attention(Rows q, Rows k, Rows v, Out out, std::int64_t row_tile, std::int64_t key_tile, float scale, bool causal) {
  const auto rows = static_cast<std::int64_t>(q.shape(0)), keys = static_cast<std::int64_t>(k.shape(0));
  const std::size_t size = q.shape(1);
  require(size > 0 && size % mw::kTilePad == 0 && size <= 4096, "the head size must be a multiple of 16, 4096 at most");
  require(k.shape(1) == size && v.shape(1) == size && v.shape(0) == k.shape(0), "k and v must be [keys, size] of the size of q");
  require(out.shape(0) == q.shape(0) && out.shape(1) == size, "out must have the shape of q");
  require(keys > 0 && (!causal || keys >= rows), "there must be keys, under a causal mask no fewer than rows");
  require(row_tile > 0 && key_tile > 0 && key_tile % mw::kTilePad == 0, "tiles hold rows, and keys by the multiple of 16");
  // no larger than the arrays, so that scratch is bounded by them
  row_tile = row_tile < rows ? row_tile : rows;
  const std::int64_t most = (keys + mw::kTilePad - 1) / mw::kTilePad * mw::kTilePad;
  key_tile = key_tile < most ? key_tile : most;
  mw::TiledAttention task{q.data(), k.data(), v.data(), out.data(), rows,   keys,   static_cast<int>(size),
                          row_tile, key_tile, scale,    causal,     nullptr};
  nb::gil_scoped_release release;
  std::vector<float> scratch(static_cast<std::size_t>(task.scratch_size()));
  task.scratch = scratch.data();
  mw::tiled_attention(task);
}

}  // namespace

void bind_tiled_attention(nb::module_& m) {
  m.def("tiled_attention", &tiled_attention, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "out"_a.noconvert(),
        "row_tile"_a, "key_tile"_a, "scale"_a, "causal"_a);
}
