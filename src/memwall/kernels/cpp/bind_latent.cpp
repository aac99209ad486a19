// Python face of latent.h.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "latent.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <int Dimensions>
using In = nb::ndarray<const float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Out = nb::ndarray<float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Records = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutRecords = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

mw::LatentForm form_of(std::size_t width, int bits, int group, bool along_tokens, bool zero_inside) {
  require(width > 0 && width <= std::size_t{1} << 24, "rows must have 1 to 2^24 numbers");
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, not " + std::to_string(bits));
  require(group > 0 && group <= 1 << 24, "group must be positive");
  return {static_cast<int>(width), bits, group, along_tokens, zero_inside};
}

void encode(const In<2>& rows, const OutRecords& records, int bits, int group, bool along_tokens, bool zero_inside) {
  const mw::LatentForm form = form_of(rows.shape(1), bits, group, along_tokens, zero_inside);
  const auto count = static_cast<std::int64_t>(rows.shape(0));
  require(count % form.tokens() == 0, "groups along tokens are coded whole");
  require(static_cast<std::int64_t>(records.size()) >= count / form.tokens() * form.record_bytes(), "records is too short");
  nb::gil_scoped_release release;
  mw::latent_encode(form, rows.data(), count, records.data());
}

void decode(const Records& records, std::int64_t first, const Out<2>& rows, int bits, int group, bool along_tokens, bool zero_inside) {
  const mw::LatentForm form = form_of(rows.shape(1), bits, group, along_tokens, zero_inside);
  const auto count = static_cast<std::int64_t>(rows.shape(0));
  require(first >= 0, "first must not be negative");
  require(static_cast<std::int64_t>(records.size()) >= (first + count + form.tokens() - 1) / form.tokens() * form.record_bytes(),
          "records is too short");
  nb::gil_scoped_release release;
  mw::latent_decode(form, records.data(), first, count, rows.data());
}

void attend(const In<3>& q, const In<3>& k, const In<3>& v, const Out<3>& out, const Out<3>& stats, float scale, std::int64_t first_key) {
  mw::LatentAttention a;
  a.queries = static_cast<std::int64_t>(q.shape(0)), a.heads = static_cast<std::int64_t>(q.shape(1));
  a.dim = static_cast<std::int64_t>(q.shape(2)), a.tokens = static_cast<std::int64_t>(k.shape(0));
  a.kv_heads = static_cast<std::int64_t>(k.shape(1)), a.value_heads = static_cast<std::int64_t>(v.shape(1));
  a.value_dim = static_cast<std::int64_t>(v.shape(2));
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "query heads cannot share the key-value heads evenly");
  require(a.tokens <= mw::kMostLatentTokens, "a block holds at most " + std::to_string(mw::kMostLatentTokens) + " tokens");
  require(k.shape(2) == q.shape(2), "k must be [tokens, kv_heads, dim] of q's dim");
  require(v.shape(0) == k.shape(0) && (a.value_heads == 1 || a.value_heads == a.kv_heads), "v must be [tokens, 1 or kv_heads, any]");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == v.shape(2), "out must be [queries, heads, width of v]");
  require(stats.shape(0) == q.shape(0) && stats.shape(1) == q.shape(1) && stats.shape(2) == 2, "stats must be [queries, heads, 2]");
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data(), a.stats = stats.data();
  a.scale = scale, a.first_key = first_key;
  nb::gil_scoped_release release;
  mw::latent_attend(a);
}

}  // namespace

void bind_latent(nb::module_& m) {
  m.def("latent_encode", &encode, "rows"_a.noconvert(), "records"_a.noconvert(), "bits"_a, "group"_a, "along_tokens"_a, "zero_inside"_a);
  m.def("latent_decode", &decode, "records"_a.noconvert(), "first"_a, "rows"_a.noconvert(), "bits"_a, "group"_a, "along_tokens"_a,
        "zero_inside"_a);
  m.def("latent_attend", &attend, "q"_a.noconvert(), "k"_a.noconvert(), "v"_a.noconvert(), "out"_a.noconvert(), "stats"_a.noconvert(),
        "scale"_a, "first_key"_a);
}
