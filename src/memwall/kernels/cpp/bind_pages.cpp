// Python face of pages.h: checks shapes and types, lets go of the interpreter's lock, calls.
#include "pages.h"

#include "bind_attention.h"

namespace {

using Pool = nb::ndarray<nb::ro, const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutPool = nb::ndarray<std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

mw::PageForm page_form(int kv_heads, int head_dim, int page_tokens, int bits, int group) {
  require(bits == 2 || bits == 3 || bits == 4, "bits must be 2, 3 or 4, not " + std::to_string(bits));
  require(group == 16 || group == 32 || group == 64 || group == 128, "group must be 16, 32, 64 or 128, not " + std::to_string(group));
  require(kv_heads > 0 && head_dim > 0 && head_dim <= 1024 && head_dim % group == 0,
          "group " + std::to_string(group) + " does not divide the head dimension " + std::to_string(head_dim));
  require(shift_of(page_tokens) >= 5, "page_tokens must be 32 at least");
  return {{bits, group, mw::PageForm::kKeys}, kv_heads, head_dim, page_tokens};
}

template <typename Array>
void check_pool(const Array& pool, const mw::PageForm& form, std::int64_t offset) {
  require(offset >= 0 && offset % 4 == 0 && static_cast<std::size_t>(offset) + form.layer_bytes() <= pool.shape(1),
          "the layer does not lie inside a page");
}

mw::Attention queries(const mw::PageForm& form, const Pool& pool, std::int64_t offset, const Float3& q, const Out3& out, float scale) {
  check_pool(pool, form, offset);
  mw::Attention a;
  const std::size_t tokens = q.shape(0), heads = q.shape(1), dim = static_cast<std::size_t>(form.head_dim);
  require(heads % static_cast<std::size_t>(form.kv_heads) == 0 && heads > 0,
          std::to_string(heads) + " query heads cannot share " + std::to_string(form.kv_heads) + " key-value heads");
  require(q.shape(2) == dim, "q must be [tokens, heads, head_dim] of the pages' head_dim");
  require(out.shape(0) == tokens && out.shape(1) == heads && out.shape(2) == dim, "out must have the shape of q");
  a.q = q.data(), a.out = out.data(), a.scale = scale;
  a.num_tokens = static_cast<int>(tokens), a.num_heads = static_cast<int>(heads);
  a.first_key = -(std::int64_t{1} << 40);
  mw::look_into(a, form, pool.data() + offset, pool.shape(1), shift_of(form.page_tokens));
  return a;
}

void store(const mw::PageForm& form, const OutPool& pool, std::int64_t offset, const Float3& k, const Float3& v, const Offsets& places) {
  check_pool(pool, form, offset);
  const std::size_t rows = k.shape(0);
  for (const Float3& x : {k, v})
    require(x.shape(0) == rows && x.shape(1) == static_cast<std::size_t>(form.kv_heads) && x.shape(2) == static_cast<std::size_t>(form.head_dim),
            "k and v must be [rows, kv_heads, head_dim] of the pages' heads");
  require(places.size() == rows, "one place for each row");
  const std::int64_t held = static_cast<std::int64_t>(pool.shape(0)) * form.page_tokens;
  for (std::size_t i = 0; i < rows; ++i) require(places.data()[i] >= 0 && places.data()[i] < held, "a place is not in the pool");
  nb::gil_scoped_release release;
  mw::store_pages(form, pool.data() + offset, pool.shape(1), k.data(), v.data(), places.data(), static_cast<std::int64_t>(rows));
}

// k, v: the last rows as they came, attended to as they are, if they are not in the pages yet
void attend(const mw::PageForm& form, const Pool& pool, std::int64_t offset, const Float3& q, const std::optional<Float3>& k,
            const std::optional<Float3>& v, const Table& table, std::int64_t length, const Out3& out, float scale,
            std::int64_t first_position, std::optional<std::int64_t> window, std::optional<Out3> stats) {
  mw::Attention a = queries(form, pool, offset, q, out, scale);
  require(k.has_value() == v.has_value(), "keys and values come together");
  require(!window || *window > 0, "window must be positive");
  if (stats) {
    require(stats->shape(0) == q.shape(0) && stats->shape(1) == q.shape(1) && stats->shape(2) == 2, "stats must be [tokens, heads, 2]");
    a.stats = stats->data();
  }
  a.query_key = first_position;
  if (window) a.first_key = first_position - *window + 1;
  std::int64_t held = length;
  if (k) {
    for (const Float3& x : {*k, *v})
      require(x.shape(0) == k->shape(0) && x.shape(1) == static_cast<std::size_t>(form.kv_heads) && x.shape(2) == static_cast<std::size_t>(form.head_dim),
              "k and v must be [rows, kv_heads, head_dim] of the pages' heads");
    held -= static_cast<std::int64_t>(k->shape(0));
  }
  check_table(table.data(), table.shape(0), held, form.page_tokens, static_cast<std::int64_t>(pool.shape(0)));
  a.look_up(table.data(), held);
  if (k) {
    if (a.coded_keys < held) a.waiting = a.keys.data, a.first_waiting = a.coded_keys;
    a.coded_keys = held, a.length = length;
    a.keys = {k->data(), mw::Real::float32}, a.values = {v->data(), mw::Real::float32};
  }
  nb::gil_scoped_release release;
  mw::attend(a);
}

void attend_sequences(const mw::PageForm& form, const Pool& pool, std::int64_t offset, const Float3& q, const Tables& tables,
                      const Offsets& lengths, const Out3& out, float scale, std::optional<std::int64_t> window) {
  const mw::Attention all = queries(form, pool, offset, q, out, scale);
  require(!window || *window > 0, "window must be positive");
  over_sequences(all, tables, lengths, form.page_tokens, static_cast<std::int64_t>(pool.shape(0)), window);
}

void attend_shared(const mw::PageForm& form, const Pool& pool, std::int64_t offset, const Float3& q, const Table& tables, const Pieces& own,
                   const Pieces& prefixes, const Out3& out, float scale, std::optional<std::int64_t> window) {
  const mw::Attention all = queries(form, pool, offset, q, out, scale);
  require(!window || *window > 0, "window must be positive");
  over_prefixes(all, tables, own, prefixes, form.page_tokens, static_cast<std::int64_t>(pool.shape(0)), window);
}

// tokens [0, length) of a table as floats
void read_tokens(const mw::PageForm& form, const Pool& pool, std::int64_t offset, const Table& table, const Out3& k, const Out3& v) {
  check_pool(pool, form, offset);
  const auto length = static_cast<std::int64_t>(k.shape(0));
  for (const Out3& x : {k, v})
    require(x.shape(0) == k.shape(0) && x.shape(1) == static_cast<std::size_t>(form.kv_heads) && x.shape(2) == static_cast<std::size_t>(form.head_dim),
            "k and v must be [tokens, kv_heads, head_dim] of the pages' heads");
  check_table(table.data(), table.shape(0), length, form.page_tokens, static_cast<std::int64_t>(pool.shape(0)));
  mw::Attention a;
  mw::look_into(a, form, pool.data() + offset, pool.shape(1), shift_of(form.page_tokens));
  a.look_up(table.data(), length);
  if (a.coded_keys < length) a.waiting = a.keys.data, a.first_waiting = a.coded_keys;
  const mw::AttentionKernels& kernels = mw::attention_kernels();
  const int width = form.kv_heads * form.head_dim;
  nb::gil_scoped_release release;
  for (int h = 0; h < form.kv_heads && length > 0; ++h) {
    kernels.key_tile(a, h, 0, length, k.data() + h * form.head_dim, width);
    kernels.value_tile(a, h, 0, length, v.data() + h * form.head_dim, width);
  }
}

void cut(const mw::PageForm& form, const OutPool& pool, std::int64_t offset, std::int64_t page, int tokens) {
  check_pool(pool, form, offset);
  require(page >= 0 && page < static_cast<std::int64_t>(pool.shape(0)) && tokens >= 0 && tokens <= form.page_tokens, "there is no such page or token");
  mw::cut_page(form, pool.data() + static_cast<std::size_t>(page) * pool.shape(1) + offset, tokens);
}

}  // namespace

void bind_pages(nb::module_& m) {
  nb::class_<mw::PageForm>(m, "PageForm", "How pages of coded blocks are cut")
      .def_prop_ro("layer_bytes", &mw::PageForm::layer_bytes)
      .def_ro("page_tokens", &mw::PageForm::page_tokens)
      .def_ro("kv_heads", &mw::PageForm::kv_heads)
      .def_ro("head_dim", &mw::PageForm::head_dim);
  m.def("page_form", &page_form, "kv_heads"_a, "head_dim"_a, "page_tokens"_a, "bits"_a, "group"_a);
  m.def("store_pages", &store, "form"_a, "pool"_a, "offset"_a, "k"_a, "v"_a, "places"_a);
  m.def("attend_pages", &attend, "form"_a, "pool"_a, "offset"_a, "q"_a, "k"_a.none(), "v"_a.none(), "table"_a, "length"_a, "out"_a,
        "scale"_a, "first_position"_a, "window"_a.none(), "stats"_a.none());
  m.def("attend_pages_sequences", &attend_sequences, "form"_a, "pool"_a, "offset"_a, "q"_a, "tables"_a, "lengths"_a, "out"_a, "scale"_a,
        "window"_a.none());
  m.def("attend_pages_shared", &attend_shared, "form"_a, "pool"_a, "offset"_a, "q"_a, "tables"_a, "own"_a, "prefixes"_a, "out"_a,
        "scale"_a, "window"_a.none());
  m.def("read_pages", &read_tokens, "form"_a, "pool"_a, "offset"_a, "table"_a, "k"_a, "v"_a);
  m.def("cut_page", &cut, "form"_a, "pool"_a, "offset"_a, "page"_a, "tokens"_a);
}
