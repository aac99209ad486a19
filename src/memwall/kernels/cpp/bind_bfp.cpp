// Python face of block floating point caches: checks shapes and types, lets go of the interpreter's lock, calls.
#include "bind_attention.h"

namespace {

std::size_t coded_bytes(bool keys, const mw::BfpForm& form, std::int64_t tokens, std::size_t kv_heads, int dim) {
  const int per = keys ? mw::BfpForm::kTokens : form.value_tokens();
  return static_cast<std::size_t>((tokens + per - 1) / per) * kv_heads * (keys ? form.key_bytes(dim) : form.value_bytes(dim));
}

// blocks along tokens are coded whole, others token by token
bool whole(bool keys, const mw::BfpForm& form, std::int64_t tokens) { return keys || form.by_token || tokens % form.block == 0; }

void attend(const Float3& q, const Blocks& key_blocks, const Blocks& value_blocks, std::int64_t coded_keys, std::int64_t coded_values,
            const Cache& k, const Cache& v, const std::optional<Order>& order, const Out3& out, int bits, int value_bits, int block,
            bool by_token, float scale, std::int64_t first_position, std::optional<std::int64_t> window, std::optional<Out3> stats) {
  mw::Attention a = prepare(q, k, v, out, stats, scale, first_position, window, 0);
  require(a.key_dim == a.head_dim, "keys and values must have the same width");
  a.bfp = bfp_form(bits, value_bits, block, by_token, order, k.shape(1), k.shape(2));
  require(coded_keys >= 0 && coded_values >= 0, "coded tokens must not be negative");
  require(whole(false, a.bfp, coded_values), "coded values must be whole blocks of tokens");
  require(key_blocks.size() >= coded_bytes(true, a.bfp, coded_keys, k.shape(1), a.key_dim), "key_blocks is too short for coded_keys");
  require(value_blocks.size() >= coded_bytes(false, a.bfp, coded_values, k.shape(1), a.head_dim), "value_blocks is too short for coded_values");
  a.length = coded_keys + static_cast<std::int64_t>(k.shape(0));
  require(a.length == coded_values + static_cast<std::int64_t>(v.shape(0)), "keys and values must cover the same tokens");
  a.key_blocks = key_blocks.data(), a.value_blocks = value_blocks.data();
  a.coded_keys = coded_keys, a.coded_values = coded_values;
  nb::gil_scoped_release release;
  mw::attend(a);
}

void encode(bool keys, const Cache& rows, std::int64_t first, const OutBlocks& to, const std::optional<Order>& order, int bits, int block, bool by_token,
            bool raise) {
  const mw::BfpForm form = bfp_form(bits, bits, block, by_token, order, rows.shape(1), rows.shape(2));
  const auto tokens = static_cast<std::int64_t>(rows.shape(0));
  const int kv_heads = static_cast<int>(rows.shape(1)), dim = static_cast<int>(rows.shape(2));
  require(first >= 0, "first must not be negative");
  require(whole(keys, form, tokens) && whole(keys, form, first), "values are coded in whole blocks of tokens");
  require(to.size() >= coded_bytes(keys, form, first + tokens, rows.shape(1), dim), "the buffer is too short");
  const mw::Rows from = rows_of(rows, "rows");
  require(tokens < 2 || from.stride == static_cast<std::int64_t>(kv_heads) * dim, "tokens must follow each other");
  nb::gil_scoped_release release;
  mw::bfp_encode(keys, {from.data, from.type}, form, raise ? mw::BfpTop::raise : mw::BfpTop::clamp, kv_heads, dim, first, tokens, to.data());
}

// floats of coded tokens [first, first + out.shape(0))
void decode(bool keys, const Blocks& coded, std::int64_t first, const Out3& out, const std::optional<Order>& order, int bits, int block,
            bool by_token) {
  mw::Attention a;
  a.bfp = bfp_form(bits, bits, block, by_token, order, out.shape(1), out.shape(2));
  a.num_kv_heads = static_cast<int>(out.shape(1)), a.key_dim = a.head_dim = static_cast<int>(out.shape(2));
  const std::int64_t end = first + static_cast<std::int64_t>(out.shape(0));
  require(first >= 0, "first must not be negative");
  require(coded.size() >= coded_bytes(keys, a.bfp, end, out.shape(1), a.head_dim), "the buffer is too short");
  a.key_blocks = a.value_blocks = coded.data();
  const auto tile = keys ? mw::attention_kernels().key_tile : mw::attention_kernels().value_tile;
  for (int h = 0; h < a.num_kv_heads; ++h)
    tile(a, h, first, end, out.data() + static_cast<std::size_t>(h) * out.shape(2), static_cast<int>(out.shape(1) * out.shape(2)));
}

}  // namespace

mw::BfpForm bfp_form(int bits, int value_bits, int block, bool by_token, const std::optional<Order>& order, std::size_t kv_heads,
                     std::size_t dim) {
  for (int width : {bits, value_bits})
    require(width == 3 || width == 4 || width == 6 || width == 8, "bits must be 3, 4, 6 or 8, not " + std::to_string(width));
  require(block == 16 || block == 32 || block == 64 || block == 128, "block must be 16, 32, 64 or 128, not " + std::to_string(block));
  require(dim % 32 == 0 && dim <= 1024 && dim % static_cast<std::size_t>(block) == 0,
          "the head dimension must be a multiple of 32 and of the block, at most 1024, not " + std::to_string(dim));
  mw::BfpForm form{bits, block, value_bits, by_token, nullptr};
  if (order) {
    require(order->shape(0) == kv_heads && order->shape(1) == dim, "order must be [kv_heads, key_dim]");
    for (std::size_t i = 0; i < kv_heads * dim; ++i)
      require(order->data()[i] >= 0 && static_cast<std::size_t>(order->data()[i]) < dim, "order names a channel that is not there");
    form.order = order->data();
  }
  return form;
}

void bind_bfp(nb::module_& m) {
  m.def("attend_bfp", &attend, "q"_a, "key_blocks"_a, "value_blocks"_a, "coded_keys"_a, "coded_values"_a, "k"_a, "v"_a, "order"_a.none(),
        "out"_a, "bits"_a, "value_bits"_a, "block"_a, "by_token"_a, "scale"_a, "first_position"_a, "window"_a.none(), "stats"_a.none());
  m.def("bfp_encode", &encode, "keys"_a, "rows"_a, "first"_a, "to"_a, "order"_a.none(), "bits"_a, "block"_a, "by_token"_a, "raise_top"_a);
  m.def("bfp_decode", &decode, "keys"_a, "coded"_a, "first"_a, "out"_a, "order"_a.none(), "bits"_a, "block"_a, "by_token"_a);
}
