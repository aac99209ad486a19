// Python face of attention.h: checks shapes and types, lets go of the interpreter's lock, calls.
#include "bind_attention.h"

#include <algorithm>
#include <stdexcept>

#include "program.h"

namespace {

void attend_float(const Float3& q, const Spread& k, const Spread& v, const Out3& out, float scale, std::int64_t first_position,
                  std::optional<std::int64_t> window, std::int64_t key_start, std::optional<Out3> stats) {
  mw::Attention a = prepare(q, k, v, out, stats, scale, first_position, window, key_start, true);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of tokens");
  a.length = static_cast<std::int64_t>(k.shape(0));
  nb::gil_scoped_release release;
  mw::attend(a);
}

// One token of a sequence whose rows lie in k, v [capacity, kv_heads, ..]: stored at place[0], which is read at every run, and attended
// with all tokens before it.
mw::Step attend_next(Float3 q, Float3 new_k, Float3 new_v, Room k, Room v, Place place, Out3 out, float scale, std::optional<std::int64_t> window) {
  const mw::Attention a = prepare(q, k, v, out, std::nullopt, scale, 0, window, 0, true);
  const std::int64_t capacity = static_cast<std::int64_t>(std::min(k.shape(0), v.shape(0)));
  const auto is_row = [&](const Float3& row, int dim) {
    return row.shape(0) == 1 && row.shape(1) == k.shape(1) && row.shape(2) == static_cast<std::size_t>(dim);
  };
  require(q.shape(0) == 1 && is_row(new_k, a.key_dim) && is_row(new_v, a.head_dim), "attend_next: one token's query, key and value");
  require(place.shape(0) == 1, "attend_next: place holds one number");
  return [=] {
    const std::int64_t at = place.data()[0];
    if (at < 0 || at >= capacity) throw std::out_of_range("attend_next: place " + std::to_string(at) + " of " + std::to_string(capacity));
    (void)out, (void)k, (void)v, (void)q;  // held
    mw::attend_next(a, new_k.data(), new_v.data(), at, window.value_or(0));
  };
}

// queries at any ascending positions, over keys that start at position 0
void attend_scattered(const Float3& q, const Spread& k, const Spread& v, const Offsets& positions, const Out3& out, float scale,
                      std::optional<std::int64_t> window, std::optional<Out3> stats) {
  mw::Attention a = prepare(q, k, v, out, stats, scale, 0, window, 0, true);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of tokens");
  require(positions.size() == q.shape(0), "one position for each query");
  for (std::size_t i = 0; i < positions.size(); ++i)
    require(positions.data()[i] >= (i > 0 ? positions.data()[i - 1] : 0), "positions must not fall");
  a.length = static_cast<std::int64_t>(k.shape(0)), a.places = positions.data();
  nb::gil_scoped_release release;
  mw::attend(a);
}

// k, v: pools of pages of `page_tokens` rows; token t lies in page table[t / page_tokens]
void attend_paged(const Float3& q, const Cache& k, const Cache& v, const Table& table, int page_tokens, std::int64_t length,
                  const Out3& out, float scale, std::int64_t first_position, std::optional<std::int64_t> window,
                  std::optional<Out3> stats) {
  mw::Attention a = prepare(q, k, v, out, stats, scale, first_position, window, 0, true);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of pages");
  a.keys.page_shift = a.values.page_shift = shift_of(page_tokens);
  check_table(table.data(), table.shape(0), length, page_tokens, static_cast<std::int64_t>(k.shape(0)) / page_tokens);
  a.look_up(table.data(), length);
  nb::gil_scoped_release release;
  mw::attend(a);
}

// the same for one query of each of several sequences, which is its last token: row i of `tables` finds the pages of sequence i
void attend_paged_sequences(const Float3& q, const Cache& k, const Cache& v, const Tables& tables, const Offsets& lengths,
                            int page_tokens, const Out3& out, float scale, std::optional<std::int64_t> window) {
  mw::Attention all = prepare(q, k, v, out, std::nullopt, scale, 0, window, 0, true);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of pages");
  all.keys.page_shift = all.values.page_shift = shift_of(page_tokens);
  over_sequences(all, tables, lengths, page_tokens, static_cast<std::int64_t>(k.shape(0)) / page_tokens, window);
}

// own, prefixes: rows of (row, count, place of the table in `tables`, length, query_key); see attention.h
void attend_shared(const Float3& q, const Cache& k, const Cache& v, const Table& tables, const Pieces& own, const Pieces& prefixes,
                   int page_tokens, const Out3& out, float scale, std::optional<std::int64_t> window) {
  mw::Attention all = prepare(q, k, v, out, std::nullopt, scale, 0, window, 0, true);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of pages");
  all.keys.page_shift = all.values.page_shift = shift_of(page_tokens);
  over_prefixes(all, tables, own, prefixes, page_tokens, static_cast<std::int64_t>(k.shape(0)) / page_tokens, window);
}

void attend_kivi(const Float3& q, const Blocks& key_blocks, const Blocks& value_blocks, std::int64_t coded_keys,
                 std::int64_t coded_values, const Cache& k, const Cache& v, const Out3& out, int bits, int group, int key_group,
                 bool integers, float scale, std::int64_t first_position, std::optional<std::int64_t> window, std::int64_t key_start,
                 std::optional<Out3> stats) {
  mw::Attention a = prepare(q, k, v, out, stats, scale, first_position, window, key_start);
  a.form = form_of(bits, group, v.shape(2));
  require(!integers || bits == 2 || bits == 4, "integers: codes of 2 or 4 bits");
  a.form.integers = integers;
  a.form.key_group = form_of(bits, key_group, 0).group;
  const std::size_t kv_heads = k.shape(1);
  require(coded_keys >= 0 && coded_keys % key_group == 0, "coded keys must be whole groups of tokens");
  require(coded_values >= 0, "coded_values must not be negative");
  const auto blocks = [&](std::int64_t tokens, int per) { return static_cast<std::size_t>((tokens + per - 1) / per) * kv_heads; };
  require(key_blocks.size() >= blocks(coded_keys, key_group) * a.form.key_block_bytes(a.key_dim), "key_blocks is too short for coded_keys");
  require(value_blocks.size() >= blocks(coded_values, mw::KiviForm::kValueBlock) * a.form.value_block_bytes(a.head_dim),
          "value_blocks is too short for coded_values");
  a.length = coded_keys + static_cast<std::int64_t>(k.shape(0));
  require(a.length == coded_values + static_cast<std::int64_t>(v.shape(0)), "keys and values must cover the same tokens");
  a.key_blocks = key_blocks.data(), a.value_blocks = value_blocks.data();
  a.coded_keys = coded_keys, a.coded_values = coded_values;
  nb::gil_scoped_release release;
  mw::attend(a);
}

void attend_ragged(const Float3& q, const Flat& past_k, const Flat& past_v, const Offsets& offsets, const Cache& k, const Cache& v,
                   const Out3& out, float scale, std::int64_t first_query, std::optional<Out3> stats) {
  mw::Ragged r;
  r.tail = prepare(q, k, v, out, stats, scale, first_query, std::nullopt, 0);
  require(k.shape(0) == v.shape(0), "k and v must hold the same number of tokens");
  require(past_k.shape(1) == q.shape(2) && past_v.shape(1) == q.shape(2), "past rows must be [rows, head_dim]");
  require(offsets.size() == k.shape(1) + 1, "offsets must be [kv_heads + 1]");
  for (std::size_t h = 0; h < k.shape(1); ++h) require(offsets.data()[h] <= offsets.data()[h + 1], "offsets must not fall");
  const auto last = static_cast<std::size_t>(offsets.data()[k.shape(1)]);
  require(offsets.data()[0] == 0 && last <= past_k.shape(0) && last <= past_v.shape(0), "offsets lie outside the past rows");
  r.tail.length = static_cast<std::int64_t>(k.shape(0));
  r.past_keys = rows_of(past_k, "past_k"), r.past_values = rows_of(past_v, "past_v");
  r.offsets = offsets.data();
  nb::gil_scoped_release release;
  mw::attend_ragged(r);
}

void encode_keys(const Cache& k, const OutBlocks& blocks, int bits, int group) {
  const mw::KiviForm form = form_of(bits, group, 0);
  const int kv_heads = static_cast<int>(k.shape(1)), dim = static_cast<int>(k.shape(2));
  require(k.shape(0) % static_cast<std::size_t>(group) == 0, "keys are coded in whole groups of tokens");
  require(blocks.size() >= k.shape(0) / group * k.shape(1) * form.key_block_bytes(dim), "blocks is too short");
  const mw::Rows rows = rows_of(k, "k");
  nb::gil_scoped_release release;
  mw::kivi_encode_keys(rows, form, kv_heads, dim, static_cast<std::int64_t>(k.shape(0)), blocks.data());
}

void encode_values(const Cache& v, std::int64_t first, const OutBlocks& blocks, int bits, int group) {
  const mw::KiviForm form = form_of(bits, group, v.shape(2));
  const int kv_heads = static_cast<int>(v.shape(1)), dim = static_cast<int>(v.shape(2));
  require(first >= 0, "first must not be negative");
  const std::size_t last = (static_cast<std::size_t>(first) + v.shape(0) + 31) / 32;
  require(blocks.size() >= last * v.shape(1) * form.value_block_bytes(dim), "blocks is too short");
  const mw::Rows rows = rows_of(v, "v");
  nb::gil_scoped_release release;
  mw::kivi_encode_values(rows, form, kv_heads, dim, first, static_cast<std::int64_t>(v.shape(0)), blocks.data());
}

// floats of coded tokens [first, first + out.shape(0))
void decode_blocks(bool keys, const Blocks& blocks, std::int64_t first, const Out3& out, int bits, int group) {
  mw::Attention a;
  a.form = form_of(bits, group, keys ? 0 : out.shape(2));
  a.num_kv_heads = static_cast<int>(out.shape(1)), a.key_dim = a.head_dim = static_cast<int>(out.shape(2));
  const std::int64_t end = first + static_cast<std::int64_t>(out.shape(0)), per = keys ? group : mw::KiviForm::kValueBlock;
  const std::size_t size = keys ? a.form.key_block_bytes(a.head_dim) : a.form.value_block_bytes(a.head_dim);
  require(first >= 0, "first must not be negative");
  require(blocks.size() >= static_cast<std::size_t>((end + per - 1) / per) * out.shape(1) * size, "blocks is too short");
  a.key_blocks = a.value_blocks = blocks.data();
  const auto tile = keys ? mw::attention_kernels().key_tile : mw::attention_kernels().value_tile;
  for (int h = 0; h < a.num_kv_heads; ++h)
    tile(a, h, first, end, out.data() + static_cast<std::size_t>(h) * out.shape(2), static_cast<int>(out.shape(1) * out.shape(2)));
}

}  // namespace

mw::KiviForm form_of(int bits, int group, std::size_t head_dim) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, not " + std::to_string(bits));
  require(group == 16 || group == 32 || group == 64 || group == 128, "group must be 16, 32, 64 or 128, not " + std::to_string(group));
  require(head_dim % static_cast<std::size_t>(group) == 0,  // of values; keys may have any width
          "group " + std::to_string(group) + " does not divide the head dimension " + std::to_string(head_dim));
  return {bits, group, 0};
}

int shift_of(int page_tokens) {
  require(page_tokens >= 16 && (page_tokens & (page_tokens - 1)) == 0, "page_tokens must be a power of two from 16 on");
  int shift = 4;
  while ((1 << shift) < page_tokens) ++shift;
  return shift;
}

void check_table(const std::int32_t* table, std::size_t entries, std::int64_t length, int page_tokens, std::int64_t held) {
  const std::int64_t pages = (length + page_tokens - 1) / page_tokens;
  require(length >= 0 && static_cast<std::int64_t>(entries) >= pages, "a table is too short for its length");
  for (std::int64_t i = 0; i < pages; ++i) require(table[i] >= 0 && table[i] < held, "the table names a page that is not there");
}

void over_sequences(const mw::Attention& all, const Tables& tables, const Offsets& lengths, int page_tokens, std::int64_t held,
                    std::optional<std::int64_t> window) {
  const auto count = static_cast<std::size_t>(all.num_tokens), heads = static_cast<std::size_t>(all.num_heads);
  require(tables.shape(0) == count && lengths.size() == count, "one table and one length for each query");
  std::vector<mw::Attention> sequences(count, all);
  for (std::size_t s = 0; s < count; ++s) {
    mw::Attention& a = sequences[s];
    const std::int64_t length = lengths.data()[s];
    const std::int32_t* table = tables.data() + s * tables.shape(1);
    require(length > 0, "a sequence needs a token");
    check_table(table, tables.shape(1), length, page_tokens, held);
    a.num_tokens = 1, a.query_key = length - 1;
    a.first_key = window ? a.query_key - *window + 1 : a.first_key;
    a.q += s * heads * static_cast<std::size_t>(a.key_dim), a.out += s * heads * static_cast<std::size_t>(a.head_dim);
    a.look_up(table, length);
  }
  nb::gil_scoped_release release;
  mw::attend_sequences(sequences.data(), static_cast<int>(count));
}

void over_prefixes(const mw::Attention& all, const Table& tables, const Pieces& own, const Pieces& prefixes, int page_tokens,
                   std::int64_t held, std::optional<std::int64_t> window) {
  const std::int64_t places = static_cast<std::int64_t>(tables.shape(0));
  const auto read = [&](const Pieces& list, const char* name, bool all_rows) {
    std::vector<mw::Piece> pieces;
    std::int64_t next = 0;
    for (std::size_t i = 0; i < list.shape(0); ++i) {
      const std::int64_t* p = list.data() + 5 * i;
      require(p[0] >= next && p[1] > 0 && p[0] + p[1] <= all.num_tokens && (!all_rows || p[0] == next),
              std::string(name) + ": pieces must follow each other over the rows");
      next = p[0] + p[1];
      require(p[3] > 0 && p[3] < (std::int64_t{1} << 24) && p[2] >= 0 && p[2] <= places, std::string(name) + ": a table is too short for its length");
      require(p[4] >= 0, std::string(name) + ": query_key must not be negative");
      check_table(tables.data() + p[2], static_cast<std::size_t>(places - p[2]), p[3], page_tokens, held);
      pieces.push_back({static_cast<int>(p[0]), static_cast<int>(p[1]), tables.data() + p[2], p[3], p[4]});
    }
    require(!all_rows || next == all.num_tokens, std::string(name) + ": every row needs a piece");
    return pieces;
  };
  const std::vector<mw::Piece> mine = read(own, "own", true), shared = read(prefixes, "prefixes", false);
  nb::gil_scoped_release release;
  mw::attend_shared(all, mine.data(), static_cast<int>(mine.size()), shared.data(), static_cast<int>(shared.size()), window.value_or(0));
}

void bind_attention(nb::module_& m, nb::class_<Program>& program) {
  bind_step(m, program, "attend_next", &attend_next, "q"_a.noconvert(), "new_k"_a.noconvert(), "new_v"_a.noconvert(), "k"_a.noconvert(),
            "v"_a.noconvert(), "place"_a.noconvert(), "out"_a.noconvert(), "scale"_a, "window"_a.none());
  m.def("attend_float", &attend_float, "q"_a, "k"_a, "v"_a, "out"_a, "scale"_a, "first_position"_a, "window"_a.none(),
        "key_start"_a, "stats"_a.none());
  m.def("attend_scattered", &attend_scattered, "q"_a, "k"_a, "v"_a, "positions"_a, "out"_a, "scale"_a, "window"_a.none(),
        "stats"_a.none());
  m.def("attend_paged", &attend_paged, "q"_a, "k"_a, "v"_a, "table"_a, "page_tokens"_a, "length"_a, "out"_a, "scale"_a,
        "first_position"_a, "window"_a.none(), "stats"_a.none());
  m.def("attend_paged_sequences", &attend_paged_sequences, "q"_a, "k"_a, "v"_a, "tables"_a, "lengths"_a, "page_tokens"_a, "out"_a,
        "scale"_a, "window"_a.none());
  m.def("attend_shared", &attend_shared, "q"_a, "k"_a, "v"_a, "tables"_a, "own"_a, "prefixes"_a, "page_tokens"_a, "out"_a,
        "scale"_a, "window"_a.none());
  m.def("attend_kivi", &attend_kivi, "q"_a, "key_blocks"_a, "value_blocks"_a, "coded_keys"_a, "coded_values"_a, "k"_a, "v"_a,
        "out"_a, "bits"_a, "group"_a, "key_group"_a, "integers"_a, "scale"_a, "first_position"_a, "window"_a.none(), "key_start"_a, "stats"_a.none());
  m.def("attend_ragged", &attend_ragged, "q"_a, "past_k"_a, "past_v"_a, "offsets"_a, "k"_a, "v"_a, "out"_a, "scale"_a,
        "first_query"_a, "stats"_a.none());
  m.def("attention_scratch_bytes_for", &mw::attention_scratch_bytes_for, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a,
        "tokens"_a, "threads"_a, "sequences"_a = 1, "shared_rows"_a = 0);
  m.def("paired_prompt_tokens", [] { return mw::attention_kernels().paired_tokens(); });
  m.def("kivi_encode_keys", &encode_keys, "k"_a, "blocks"_a, "bits"_a, "group"_a);
  m.def("kivi_encode_values", &encode_values, "v"_a, "first"_a, "blocks"_a, "bits"_a, "group"_a);
  m.def("kivi_decode", &decode_blocks, "keys"_a, "blocks"_a, "first"_a, "out"_a, "bits"_a, "group"_a);
  m.def("kivi_block_bytes", [](int bits, int group, int head_dim, int key_dim) {
    const mw::KiviForm form = form_of(bits, group, static_cast<std::size_t>(head_dim));
    return nb::make_tuple(form.key_block_bytes(key_dim), form.value_block_bytes(head_dim));
  }, "bits"_a, "group"_a, "head_dim"_a, "key_dim"_a);
}
