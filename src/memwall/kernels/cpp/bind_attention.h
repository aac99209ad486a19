// What the Python faces of the attentions share: array types, and the checks that all of them make.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "attention.h"

namespace nb = nanobind;
using namespace nb::literals;

using Float3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Out3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Cache = nb::ndarray<nb::ro, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Spread = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using Room = nb::ndarray<nb::ndim<3>, nb::device::cpu>;  // rows that are written
using Place = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pieces = nb::ndarray<const std::int64_t, nb::shape<-1, 5>, nb::c_contig, nb::device::cpu>;
using Flat = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Blocks = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBlocks = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using Order = nb::ndarray<const std::int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // of a coded key's channels

inline void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

// rows of codes, whose heads have their scales behind them: bytes of signed numbers
template <typename Array>
bool is_coded(const Array& array) { return array.dtype() == nb::dtype<std::int8_t>(); }
// numbers of a head in an array [tokens, heads, ...]
template <typename Array>
std::size_t dim_of(const Array& array) {
  const std::size_t behind = is_coded(array) ? mw::kScaleBytes : 0;
  return array.shape(2) > behind ? array.shape(2) - behind : 0;
}

template <typename Array>
mw::Rows rows_of(const Array& array, const char* name, bool codes = false) {
  mw::Rows rows;
  rows.data = array.data();
  const bool heads = array.ndim() == 3;  // rows of one head alone follow each other
  rows.stride = heads && array.shape(0) > 1 ? array.stride(0) : 0;
  // an array without tokens has whatever strides its maker liked
  require(!heads || array.shape(0) == 0 || (array.stride(2) == 1 && array.stride(1) == static_cast<std::int64_t>(array.shape(2)) && rows.stride >= 0),
          std::string(name) + ": the heads of a token must lie beside each other");
  if (array.dtype() == nb::dtype<float>()) rows.type = mw::Real::float32;
  else if (array.dtype().code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && array.dtype().bits == 16)
    rows.type = mw::Real::float16;
  else if (array.dtype() == nb::dtype<std::uint16_t>()) rows.type = mw::Real::bfloat16;
  else if (codes && is_coded(array)) rows.type = mw::Real::int8;
  else require(false, std::string(name) + " must be float32, float16, " + (codes ? "int8 with scales, " : "") + "or bfloat16 seen as uint16");
  return rows;
}

// the fields that every attention has
template <typename Array>
mw::Attention prepare(const Float3& q, const Array& k, const Array& v, const Out3& out, const std::optional<Out3>& stats,
                      float scale, std::int64_t first_position, std::optional<std::int64_t> window, std::int64_t key_start,
                      bool codes = false) {
  mw::Attention a;
  const std::size_t tokens = q.shape(0), heads = q.shape(1), key_dim = q.shape(2), dim = dim_of(v), kv_heads = k.shape(1);
  require(kv_heads > 0 && heads % kv_heads == 0,
          std::to_string(heads) + " query heads cannot share " + std::to_string(kv_heads) + " key-value heads");
  require(dim_of(k) == key_dim && v.shape(1) == kv_heads, "k must be [tokens, kv_heads, key_dim] of the same key_dim as q, v [tokens, kv_heads, head_dim]");
  require(dim > 0 && dim <= 1024 && key_dim > 0 && key_dim <= 1024, "head_dim and key_dim must be 1 to 1024");
  require(out.shape(0) == tokens && out.shape(1) == heads && out.shape(2) == dim, "out must be [tokens, heads, head_dim] of the head_dim of v");
  if (stats) {
    require(stats->shape(0) == tokens && stats->shape(1) == heads && stats->shape(2) == 2, "stats must be [tokens, heads, 2]");
    a.stats = stats->data();
  }
  require(!window || *window > 0, "window must be positive");
  a.q = q.data(), a.out = out.data();
  a.num_tokens = static_cast<int>(tokens), a.num_heads = static_cast<int>(heads);
  a.num_kv_heads = static_cast<int>(kv_heads), a.key_dim = static_cast<int>(key_dim), a.head_dim = static_cast<int>(dim);
  a.scale = scale;
  a.query_key = first_position - key_start;
  a.first_key = window ? a.query_key - *window + 1 : -(std::int64_t{1} << 40);
  a.keys = rows_of(k, "k", codes), a.values = rows_of(v, "v", codes);
  return a;
}

// how numbers are coded; head_dim: of values, 0 where there are none
mw::KiviForm form_of(int bits, int group, std::size_t head_dim);
mw::BfpForm bfp_form(int bits, int value_bits, int block, bool by_token, const std::optional<Order>& order, std::size_t kv_heads, std::size_t dim);

// log2 of the tokens of a page
int shift_of(int page_tokens);
// a table must have the pages of `length` tokens, and these must be among the `held` ones
void check_table(const std::int32_t* table, std::size_t entries, std::int64_t length, int page_tokens, std::int64_t held);
// `all` but for its pages: one query of each of several sequences, its last token; rows of sequences that share prefixes
void over_sequences(const mw::Attention& all, const Tables& tables, const Offsets& lengths, int page_tokens, std::int64_t held,
                    std::optional<std::int64_t> window);
void over_prefixes(const mw::Attention& all, const Table& tables, const Pieces& own, const Pieces& prefixes, int page_tokens,
                   std::int64_t held, std::optional<std::int64_t> window);
