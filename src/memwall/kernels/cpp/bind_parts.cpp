// Python face of attention_parts.h: one layer of one cache as an object, and what several of them do for a token each.
#include <nanobind/stl/vector.h>

#include "attention_parts.h"
#include "bind_attention.h"

namespace {

using Jobs = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Rows of exact tokens, as many as may ever come, and blocks of coded ones if there are any.
class CachePart {
 public:
  CachePart(const Room& k, const Room& v) : keys_(k), values_(v) {
    require(k.shape(1) == v.shape(1) && k.shape(1) > 0, "keys and values must have the same number of heads");
    key_rows = rows_of(k, "k", true), value_rows = rows_of(v, "v", true);
    kv_heads = static_cast<int>(k.shape(1)), key_dim = static_cast<int>(dim_of(k)), head_dim = static_cast<int>(dim_of(v));
    require(head_dim > 0 && head_dim <= 1024 && key_dim > 0 && key_dim <= 1024, "head_dim and key_dim must be 1 to 1024");
  }

  static CachePart kivi(const Room& k, const Room& v, const OutBlocks& key_blocks, const OutBlocks& value_blocks, int bits, int group, int key_group,
                        bool integers) {
    CachePart part = coded(k, v, key_blocks, value_blocks);
    part.form = form_of(bits, group, static_cast<std::size_t>(part.head_dim));
    require(!integers || bits == 2 || bits == 4, "integers: codes of 2 or 4 bits");
    part.form.integers = integers;
    part.form.key_group = form_of(bits, key_group, 0).group;
    return part;
  }

  static CachePart floating(const Room& k, const Room& v, const OutBlocks& key_blocks, const OutBlocks& value_blocks, std::optional<Order> order,
                            int bits, int value_bits, int block, bool by_token, bool raise_top) {
    CachePart part = coded(k, v, key_blocks, value_blocks);
    require(part.key_dim == part.head_dim, "keys and values must have the same width");
    part.bfp = bfp_form(bits, value_bits, block, by_token, order, k.shape(1), static_cast<std::size_t>(part.key_dim));
    part.top = raise_top ? mw::BfpTop::raise : mw::BfpTop::clamp;
    part.order_ = std::move(order);
    return part;
  }

  mw::Rows key_rows, value_rows;
  mw::KiviForm form;
  mw::BfpForm bfp;
  mw::BfpTop top = mw::BfpTop::clamp;
  int kv_heads = 0, key_dim = 0, head_dim = 0;

  std::int64_t rows(bool keys) const { return static_cast<std::int64_t>((keys ? keys_ : values_).shape(0)); }
  std::uint8_t* blocks(bool keys) const {
    const auto& held = keys ? key_blocks_ : value_blocks_;
    return held ? held->data() : nullptr;
  }
  // bytes of one block of all heads, and its tokens
  std::size_t block_bytes(bool keys) const {
    const std::size_t size = bfp.bits ? (keys ? bfp.key_bytes(key_dim) : bfp.value_bytes(head_dim))
                                      : (keys ? form.key_block_bytes(key_dim) : form.value_block_bytes(head_dim));
    return size * static_cast<std::size_t>(kv_heads);
  }
  std::int64_t block_tokens(bool keys) const {
    if (bfp.bits) return keys ? mw::BfpForm::kTokens : bfp.value_tokens();
    return keys ? form.key_tokens() : mw::KiviForm::kValueBlock;
  }
  // tokens that are coded together
  std::int64_t unit(bool keys) const {
    if (bfp.bits) return keys || bfp.by_token ? 1 : bfp.block;
    return keys ? form.key_tokens() : 1;
  }
  // whether the blocks have room for so many tokens
  bool codes(bool keys, std::int64_t tokens) const {
    const auto& held = keys ? key_blocks_ : value_blocks_;
    if (!held) return tokens == 0;
    const std::int64_t per = block_tokens(keys);
    return tokens >= 0 && held->size() >= static_cast<std::size_t>((tokens + per - 1) / per) * block_bytes(keys);
  }
  // rows from `place` on
  mw::Rows from(bool keys, std::int64_t place) const {
    mw::Rows rows = keys ? key_rows : value_rows;
    const std::int64_t size = rows.type == mw::Real::float32 ? 4 : rows.type == mw::Real::int8 ? 1 : 2;
    const std::int64_t width = static_cast<std::int64_t>(kv_heads) * ((keys ? key_dim : head_dim) + (rows.type == mw::Real::int8 ? mw::kScaleBytes : 0));
    rows.data = static_cast<const char*>(rows.data) + place * (rows.stride ? rows.stride : width) * size;
    return rows;
  }

 private:
  static CachePart coded(const Room& k, const Room& v, const OutBlocks& key_blocks, const OutBlocks& value_blocks) {
    CachePart part(k, v);
    require(part.key_rows.type != mw::Real::int8 && part.value_rows.type != mw::Real::int8, "rows beside codes must be floats");
    require(tight(k) && tight(v), "rows beside codes must follow each other");
    part.key_blocks_ = key_blocks, part.value_blocks_ = value_blocks;
    return part;
  }
  static bool tight(const Room& rows) {
    return rows.shape(0) < 2 || rows.stride(0) == static_cast<std::int64_t>(rows.shape(1) * rows.shape(2));
  }

  Room keys_, values_;
  std::optional<OutBlocks> key_blocks_, value_blocks_;
  std::optional<Order> order_;
};

using Parts = std::vector<const CachePart*>;

void check(const Parts& parts, std::size_t rows) {
  require(parts.size() == rows, "one row for each part");
  for (const CachePart* part : parts) require(part != nullptr, "parts must be CachePart");
}

// places: int64 [n, 2], the rows of each part that its new key and value go to
void append(const Parts& parts, const Float3& k, const Float3& v, const Jobs& places) {
  check(parts, k.shape(0));
  require(v.shape(0) == parts.size() && places.shape(0) == parts.size() && places.shape(1) == 2, "one row of k, v and places [n, 2] for each part");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const CachePart& part = *parts[i];
    const std::int64_t* at = places.data() + 2 * i;
    require(k.shape(1) == static_cast<std::size_t>(part.kv_heads) && k.shape(2) == static_cast<std::size_t>(part.key_dim) &&
                v.shape(1) == static_cast<std::size_t>(part.kv_heads) && v.shape(2) == static_cast<std::size_t>(part.head_dim),
            "k and v must be [n, kv_heads, key_dim] and [n, kv_heads, head_dim] of the parts");
    require(at[0] >= 0 && at[0] < part.rows(true) && at[1] >= 0 && at[1] < part.rows(false), "a place lies outside of a part's rows");
  }
  nb::gil_scoped_release release;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const CachePart& part = *parts[i];
    mw::store_row(part.key_rows, places.data()[2 * i], k.data() + i * k.shape(1) * k.shape(2), part.kv_heads, part.key_dim);
    mw::store_row(part.value_rows, places.data()[2 * i + 1], v.data() + i * v.shape(1) * v.shape(2), part.kv_heads, part.head_dim);
  }
}

// places: int64 [n, 8] of (coded keys, coded values, the block token that they begin at, first exact row of keys, of values, tokens in
// all, last token and first token that the query sees)
void attend(const Parts& parts, const Float3& q, const Jobs& places, const Out3& out, float scale, std::optional<std::int64_t> window,
            std::optional<Out3> stats) {
  check(parts, q.shape(0));
  const std::size_t heads = q.shape(1);
  require(places.shape(0) == parts.size() && places.shape(1) == 8, "places must be [n, 8]");
  require(out.shape(0) == parts.size() && out.shape(1) == heads, "out must be [n, heads, head_dim]");
  require(!stats || (stats->shape(0) == parts.size() && stats->shape(1) == heads && stats->shape(2) == 2), "stats must be [n, heads, 2]");
  require(!window || *window > 0, "window must be positive");
  static thread_local std::vector<mw::Attention> all;
  all.assign(parts.size(), {});
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const CachePart& part = *parts[i];
    const std::int64_t* p = places.data() + 8 * i;
    mw::Attention& a = all[i];
    require(heads % static_cast<std::size_t>(part.kv_heads) == 0, "query heads cannot share the key-value heads of a part evenly");
    require(q.shape(2) == static_cast<std::size_t>(part.key_dim) && out.shape(2) == static_cast<std::size_t>(part.head_dim),
            "q must be [n, heads, key_dim] and out [n, heads, head_dim] of the parts");
    a.num_tokens = 1, a.num_heads = static_cast<int>(heads), a.num_kv_heads = part.kv_heads, a.key_dim = part.key_dim, a.head_dim = part.head_dim;
    a.q = q.data() + i * heads * q.shape(2), a.out = out.data() + i * heads * out.shape(2);
    if (stats) a.stats = stats->data() + i * heads * 2;
    a.scale = scale, a.form = part.form, a.bfp = part.bfp;
    a.coded_keys = p[0], a.coded_values = p[1], a.length = p[5], a.query_key = p[6], a.first_key = p[7];
    if (window) a.first_key = std::max(a.first_key, a.query_key - *window + 1);
    require(a.coded_keys >= 0 && a.coded_values >= 0 && a.coded_keys <= a.length && a.coded_values <= a.length, "coded tokens must be some of all");
    require(p[2] >= 0 && part.codes(true, p[2] + a.coded_keys) && part.codes(false, p[2] + a.coded_values), "coded tokens lie outside of a part's blocks");
    require(p[3] >= 0 && p[3] + a.length - a.coded_keys <= part.rows(true) && p[4] >= 0 && p[4] + a.length - a.coded_values <= part.rows(false),
            "exact tokens lie outside of a part's rows");
    a.keys = part.from(true, p[3]), a.values = part.from(false, p[4]);
    if (part.blocks(true) == nullptr) continue;
    require(a.coded_keys % part.unit(true) == 0 && a.coded_values % part.unit(false) == 0 && p[2] % part.block_tokens(true) == 0 && p[2] % part.block_tokens(false) == 0,
            "coded tokens must be whole units, and begin where blocks do");
    a.key_blocks = part.blocks(true) + static_cast<std::size_t>(p[2] / part.block_tokens(true)) * part.block_bytes(true);
    a.value_blocks = part.blocks(false) + static_cast<std::size_t>(p[2] / part.block_tokens(false)) * part.block_bytes(false);
  }
  nb::gil_scoped_release release;
  mw::attend_sequences(all.data(), static_cast<int>(all.size()));
}

// jobs: int64 [n, 6] of (exact row, tokens, block token that they become) of keys, and the same of values
void encode(const Parts& parts, const Jobs& jobs) {
  check(parts, jobs.shape(0));
  require(jobs.shape(1) == 6, "jobs must be [n, 6]");
  static thread_local std::vector<mw::Encoding> all;
  all.clear();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const CachePart& part = *parts[i];
    for (const bool keys : {true, false}) {
      const std::int64_t* job = jobs.data() + 6 * i + (keys ? 0 : 3);
      if (job[1] == 0) continue;
      require(job[0] >= 0 && job[1] > 0 && job[0] + job[1] <= part.rows(keys), "tokens to code lie outside of a part's rows");
      require(part.blocks(keys) != nullptr && job[2] >= 0 && part.codes(keys, job[2] + job[1]), "tokens to code lie outside of a part's blocks");
      require(job[1] % part.unit(keys) == 0 && job[2] % part.unit(keys) == 0, "tokens are coded in whole units");
      all.push_back({keys, part.from(keys, job[0]), part.form, part.bfp, part.top, part.kv_heads, keys ? part.key_dim : part.head_dim, job[2], job[1], part.blocks(keys)});
    }
  }
  nb::gil_scoped_release release;
  mw::encode_each(all.data(), all.size());
}

void join(const Float3& outs, const Float3& stats, const Offsets& ends, const Out3& out, std::optional<Out3> joined) {
  const std::size_t queries = out.shape(0), heads = out.shape(1), pieces = outs.shape(0);
  require(outs.shape(1) == heads && outs.shape(2) == out.shape(2), "outs must be [pieces, heads, head_dim] as out [queries, heads, head_dim]");
  require(stats.shape(0) == pieces && stats.shape(1) == heads && stats.shape(2) == 2, "stats must be [pieces, heads, 2]");
  require(!joined || (joined->shape(0) == queries && joined->shape(1) == heads && joined->shape(2) == 2), "joined must be [queries, heads, 2]");
  require(ends.size() == queries, "one end for each query");
  for (std::size_t i = 0; i < queries; ++i)
    require(ends.data()[i] >= (i > 0 ? ends.data()[i - 1] : 0) && ends.data()[i] <= static_cast<std::int64_t>(pieces), "ends must not fall, and lie among the pieces");
  nb::gil_scoped_release release;
  mw::join_pieces(outs.data(), stats.data(), ends.data(), static_cast<int>(queries), static_cast<int>(heads), static_cast<int>(out.shape(2)), out.data(),
                  joined ? joined->data() : nullptr);
}

}  // namespace

void bind_parts(nb::module_& m) {
  nb::class_<CachePart>(m, "CachePart", "One layer of one cache: rows of exact tokens, and blocks of coded ones if it has any")
      .def(nb::init<const Room&, const Room&>(), "k"_a.noconvert(), "v"_a.noconvert())
      .def_static("kivi", &CachePart::kivi, "k"_a.noconvert(), "v"_a.noconvert(), "key_blocks"_a.noconvert(), "value_blocks"_a.noconvert(), "bits"_a,
                  "group"_a, "key_group"_a, "integers"_a)
      .def_static("floating", &CachePart::floating, "k"_a.noconvert(), "v"_a.noconvert(), "key_blocks"_a.noconvert(), "value_blocks"_a.noconvert(),
                  "order"_a.noconvert().none(), "bits"_a, "value_bits"_a, "block"_a, "by_token"_a, "raise_top"_a);
  m.def("append_parts", &append, "parts"_a, "k"_a, "v"_a, "places"_a);
  m.def("attend_parts", &attend, "parts"_a, "q"_a, "places"_a, "out"_a.noconvert(), "scale"_a, "window"_a.none() = nb::none(), "stats"_a.noconvert().none() = nb::none());
  m.def("encode_parts", &encode, "parts"_a, "jobs"_a);
  m.def("join_pieces", &join, "outs"_a, "stats"_a, "ends"_a, "out"_a.noconvert(), "joined"_a.noconvert().none() = nb::none());
}
