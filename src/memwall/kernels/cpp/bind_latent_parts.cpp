// Python face of latent_parts.h: one layer of one latent cache as an object, and what several of them do for a token each.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind_matrix.h"
#include "latent_parts.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Records = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Room = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using In = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Places = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

// Records that may ever come, and the rows that wait behind them, float16 [group, width].
struct Store {
  mw::LatentStore view;
  Records records;
  Halves tail;

  Store(Records all, Halves waiting, int width, int bits, int group, bool along_tokens, bool zero_inside) : records(std::move(all)), tail(std::move(waiting)) {
    require(width > 0 && width <= 1 << 24 && group > 0 && group <= 1 << 24, "rows must have 1 to 2^24 numbers, and groups too");
    require(bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16 || bits == 32, "bits must be 2, 3, 4, 8, 16 or 32, not " + std::to_string(bits));
    require(tail.shape(0) == 0 || static_cast<int>(tail.shape(1)) == width, "waiting rows must be as wide as the others");
    view = {{width, bits, group, along_tokens, zero_inside}, records.data(), tail.data()};
  }
  // whether there can be so many tokens, so many of them coded
  bool holds(std::int64_t coded, std::int64_t tokens) const {
    return coded >= 0 && coded <= tokens && view.bytes(coded) <= static_cast<std::int64_t>(records.size()) && tokens - coded <= static_cast<std::int64_t>(tail.shape(0)) &&
           (!view.coded() || coded == tokens || coded % view.form.tokens() == 0);
  }
};

struct Part {
  mw::LatentPart view;
  nb::object owners[10];
};

// a bias or a norm's weights of so many numbers
const float* vector_of(const std::optional<Vector>& values, std::int64_t size, const char* name) {
  if (!values) return nullptr;
  require(static_cast<std::int64_t>(values->shape(0)) == size, std::string(name) + " has another size than the model asks for");
  return values->data();
}

float* room_of(const Room& room, std::int64_t rows, std::int64_t width, const char* name) {
  require(static_cast<std::int64_t>(room.shape(0)) >= rows && static_cast<std::int64_t>(room.shape(1)) == width, std::string("no room for ") + name);
  return room.data();
}

Part part_of(const Store& keys, const Store& values, std::pair<int, int> heads, const PyMatrix& to_keys, const PyMatrix& to_values,
             std::optional<Vector> key_bias, std::optional<Vector> value_bias, std::optional<Vector> key_norm, float eps, Room key_rows, Room value_rows,
             Room rebuilt, Room mixed, Room sums) {
  Part part;
  mw::LatentPart& p = part.view;
  p.heads = heads.first, p.kv_heads = heads.second;
  require(p.kv_heads > 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "query heads cannot share the key-value heads evenly");
  const std::int64_t row = to_keys.view.rows;
  p.dim = row / p.kv_heads, p.eps = eps;
  require(p.dim > 0 && p.dim % 2 == 0 && row % p.kv_heads == 0 && to_values.view.rows == row, "keys and values must have a row of every head");
  require(to_keys.view.cols == keys.view.form.width && to_values.view.cols == values.view.form.width, "matrices must take rows as wide as they are kept");
  p.keys = &keys.view, p.values = &values.view;
  p.key_norm = vector_of(key_norm, p.dim, "the norm");
  p.key_rows = room_of(key_rows, mw::kRebuiltTokens, keys.view.form.width, "rows of keys");
  p.value_rows = room_of(value_rows, mw::kRebuiltTokens, values.view.form.width, "rows of values");
  p.rebuilt = room_of(rebuilt, mw::kRebuiltTokens, row, "keys"), p.mixed = room_of(mixed, p.heads, row, "values");
  p.sums = room_of(sums, p.heads, values.view.form.width, "sums");
  p.to_keys = {&to_keys.view, {p.rebuilt, row, vector_of(key_bias, row, "a bias"), false}};
  p.to_values = {&to_values.view, {p.mixed, row, vector_of(value_bias, row, "a bias"), false}};
  int at = 0;
  for (const nb::object& owner : {nb::find(keys), nb::find(values), nb::find(to_keys), nb::find(to_values)}) part.owners[at++] = owner;
  for (const Room& room : {key_rows, value_rows, rebuilt, mixed, sums}) part.owners[at++] = nb::cast(room);
  part.owners[at] = nb::make_tuple(key_bias, value_bias, key_norm);
  return part;
}

using Parts = std::vector<const Part*>;

// what all parts do for a token each; q where it is looked at
std::vector<mw::LatentToken>& tokens_of(const Parts& parts, const float* q, const Out& stats) {
  static thread_local std::vector<mw::LatentToken> all;
  all.clear();
  require(stats.shape(0) == parts.size() && stats.shape(2) == 2, "stats must be [n, heads, 2]");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    require(parts[i] != nullptr, "parts must be LatentPart");
    const mw::LatentPart& p = parts[i]->view;
    require(static_cast<std::int64_t>(stats.shape(1)) == p.heads && p.dim == parts[0]->view.dim, "parts must have the same heads");
    all.push_back({&p, q == nullptr ? nullptr : q + static_cast<std::int64_t>(i) * p.heads * p.dim, stats.data() + static_cast<std::int64_t>(i) * p.heads * 2});
  }
  return all;
}

// places: int64 [n, 4] of (coded keys, coded values, tokens, first token that the query sees)
void attend(const Parts& parts, const In& q, const Places& places, const Out& stats, std::int64_t begin, const Table& cos, const Table& sin, float scale) {
  auto& all = tokens_of(parts, q.data(), stats);
  if (all.empty()) return;
  const auto end = begin + static_cast<std::int64_t>(cos.shape(0));
  require(q.shape(0) == parts.size() && q.shape(1) == stats.shape(1) && static_cast<std::int64_t>(q.shape(2)) == all[0].part->dim, "q must be [n, heads, head_dim]");
  require(places.shape(0) == parts.size() && places.shape(1) == 4, "places must be [n, 4]");
  require(begin >= 0 && begin % mw::kRebuiltTokens == 0 && cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1) &&
              static_cast<std::int64_t>(cos.shape(1)) == all[0].part->dim / 2,
          "cos and sin must be [tokens, head_dim / 2], from a whole block on");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::int64_t* p = places.data() + 4 * i;
    mw::LatentToken& token = all[i];
    token.coded_keys = p[0], token.coded_values = p[1], token.length = p[2], token.first = p[3];
    const auto& [keys, values] = std::pair(token.part->keys, token.part->values);
    require(nb::cast<const Store&>(parts[i]->owners[0]).holds(p[0], p[2]) && (keys == values || nb::cast<const Store&>(parts[i]->owners[1]).holds(p[1], p[2])),
            "tokens lie outside of a part's rows");
  }
  nb::gil_scoped_release release;
  mw::attend_latent_blocks(all.data(), all.size(), begin, end, cos.data(), sin.data(), scale);
}

void finish(const Parts& parts, const Out& stats, const Out& out) {
  auto& all = tokens_of(parts, nullptr, stats);
  if (all.empty()) return;
  require(out.shape(0) == parts.size() && out.shape(1) == stats.shape(1) && static_cast<std::int64_t>(out.shape(2)) == all[0].part->dim, "out must be [n, heads, head_dim]");
  nb::gil_scoped_release release;
  mw::finish_latent_blocks(all.data(), all.size(), out.data());
}

}  // namespace

void bind_latent_parts(nb::module_& m) {
  nb::class_<Store>(m, "LatentStore", "Rows of one layer of one latent cache")
      .def(nb::init<Records, Halves, int, int, int, bool, bool>(), "records"_a.noconvert(), "tail"_a.noconvert(), "width"_a, "bits"_a, "group"_a,
           "along_tokens"_a, "zero_inside"_a);
  nb::class_<Part>(m, "LatentPart", "One layer of one latent cache: its rows, how they become keys and values, and room to do so");
  m.def("latent_part", &part_of, "keys"_a, "values"_a, "heads"_a, "to_keys"_a, "to_values"_a, "key_bias"_a.none(), "value_bias"_a.none(),
        "key_norm"_a.none(), "eps"_a, "key_rows"_a.noconvert(), "value_rows"_a.noconvert(), "rebuilt"_a.noconvert(), "mixed"_a.noconvert(), "sums"_a.noconvert());
  m.def("attend_latent_parts", &attend, "parts"_a, "q"_a.noconvert(), "places"_a.noconvert(), "stats"_a.noconvert(), "begin"_a, "cos"_a.noconvert(),
        "sin"_a.noconvert(), "scale"_a);
  m.def("finish_latent_parts", &finish, "parts"_a, "stats"_a.noconvert(), "out"_a.noconvert());
}
