// Attention over full-precision rows, and the walk over a cache that may start with a coded part.
//
// Decoding (one query) reads every key and value once and is bound by memory, so the walk follows the order in memory: a few
// tokens at a time, all heads of them. A prompt (many queries) is bound by arithmetic: tiles of 64 keys against up to 128 rows
// of queries, logits kept transposed (key-major), so that the softmax runs down the columns with no sums across a vector.
#include "attention_columns.h"
#include "attention_isa.h"
#include "attention_pairs.h"
#include "attention_simd.h"

#include "attention_table.h"
#include "threads.h"

namespace mw::MW_ISA {
namespace {

constexpr float kNever = -1e30f;  // below every logit, and finite: differences of two of them stay numbers
#if defined(__AVX512F__)
constexpr int kHeads = 4;  // query heads that share one load of a key: as many as the registers hold
#else
constexpr int kHeads = 2;
#endif
// Where no instruction widens halves, that is done once for all query heads of a key; else doing it again costs less than reading back.
#if defined(__AVX2__)
template <typename T>
constexpr bool kWiden = false;
#else
template <typename T>
constexpr bool kWiden = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
#endif
constexpr int kMostWide = 128;  // numbers of a head that is widened
constexpr int kWindow = 16;  // value rows summed before moving to the next head
constexpr std::int64_t kAheadBytes = 4096, kLeastAhead = 8;  // of rows fetched ahead: what is worked on in the time that memory takes
constexpr int kTile = 64;
constexpr int kTurnedTokens = 64;  // turned at once at most

template <typename A, typename B>
inline auto smaller(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
inline auto larger(A a, B b) {
  return a > b ? a : b;
}
inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// body(number of heads, first head) over the query heads of one kv head: kHeads of them at a time, then those that are left at once
template <typename Body>
inline void by_heads(int head, int count, Body&& body) {
  for (; count >= kHeads; head += kHeads, count -= kHeads) body(std::integral_constant<int, kHeads>(), head);
  if (kHeads > 2 && count == 3) return body(std::integral_constant<int, 3>(), head);
  if (kHeads > 2 && count == 2) return body(std::integral_constant<int, 2>(), head);
  if (count == 1) body(std::integral_constant<int, 1>(), head);
}

// the same where sums of fewer numbers each leave room for those of more heads, which then share a load of a value
template <typename Body>
inline void by_sums(int head, int count, Body&& body) {
  if constexpr (kHeads == 4) {
    for (; count >= 8; head += 8, count -= 8) body(std::integral_constant<int, 8>(), head);
    if (count == 7) return body(std::integral_constant<int, 7>(), head);
    if (count == 6) return body(std::integral_constant<int, 6>(), head);
    if (count == 5) return body(std::integral_constant<int, 5>(), head);
  }
  by_heads(head, count, body);
}

template <typename T>
struct View {
  const T* data;
  std::int64_t stride;  // between tokens
  int dim;
  int width() const { return dim + kBehind<T>; }  // between heads
  const T* row(std::int64_t token, int kv_head) const { return data + token * stride + static_cast<std::int64_t>(kv_head) * width(); }
  const T* ahead(std::int64_t token) const { return row(token, 0); }  // to be fetched only: may lie past the end
  int run(std::int64_t, int count) const { return count; }            // rows from here on that follow each other in memory
};

// the same over pages that a table finds
template <typename T>
struct PagedView {
  const T* data;
  std::int64_t stride;
  int dim;
  const std::int32_t* table;
  int shift;
  std::int64_t last;
  std::int64_t place(std::int64_t token) const {
    return (static_cast<std::int64_t>(table[token >> shift]) << shift) + (token & ((std::int64_t{1} << shift) - 1));
  }
  int width() const { return dim + kBehind<T>; }
  const T* row(std::int64_t token, int kv_head) const { return data + place(token) * stride + static_cast<std::int64_t>(kv_head) * width(); }
  const T* ahead(std::int64_t token) const { return row(smaller(token, last), 0); }
  int run(std::int64_t token, int count) const {
    return static_cast<int>(smaller<std::int64_t, std::int64_t>(count, (std::int64_t{1} << shift) - (token & ((std::int64_t{1} << shift) - 1))));
  }
};

template <typename T, typename Body>
inline void with_view(const Rows& rows, const Attention& a, int dim, Body&& body) {
  const T* data = static_cast<const T*>(rows.data);
  const std::int64_t stride = rows.stride ? rows.stride : static_cast<std::int64_t>(a.num_kv_heads) * (dim + kBehind<T>);
  if (rows.table == nullptr) body(View<T>{data, stride, dim});
  else body(PagedView<T>{data, stride, dim, rows.table, rows.page_shift, a.length - 1});
}

template <typename Body>
inline void with_rows(const Rows& rows, const Attention& a, int dim, Body&& body) {
  if (rows.type == Real::float32) with_view<float>(rows, a, dim, body);
  else if (rows.type == Real::float16) with_view<f16>(rows, a, dim, body);
  else if (rows.type == Real::bfloat16) with_view<bf16>(rows, a, dim, body);
  else with_view<i8>(rows, a, dim, body);
}

// ---- decoding ----------------------------------------------------------------------------------------------------------

// Keys of a width that no vector divides: the last vector starts earlier, so that it ends with the row, and meets zeros where it
// overlaps the one before. [num_heads][W]; none where keys are too short for it.
const float* query_tails(const Attention& a, const float* q, float* tails) {
  const int rest = a.key_dim % W, padded = a.padded_key();
  if (rest == 0 || a.key_dim < W) return nullptr;
  for (int h = 0; h < a.num_heads; ++h)
    for (int i = 0; i < W; ++i) tails[h * W + i] = i < W - rest ? 0.0f : q[h * padded + a.key_dim - W + i];
  return tails;
}

// the scales of rows of codes go to their logits
template <int R, typename T>
inline void scale_logits(const T* const k[4], int dim, float* scores) {
  if constexpr (kScaled<T>) {
    const float scales[4] = {scale_of(k[0], dim), scale_of(k[1], dim), scale_of(k[2], dim), scale_of(k[3], dim)};
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < 4; ++t) scores[r * kStep + t] *= scales[t];
  }
}

// Logits of four tokens for R query heads of one kv head, whose keys are N whole vectors: known to the compiler, all sums stay in
// registers from the first product to the last shuffle.
template <int R, int N, typename T>
inline void dot_whole(const T* const k[4], const float* q, int padded, float* scores) {
  vf sum[R][4];
  for (int i = 0; i < N; ++i) {
    const vf key[4] = {vload(k[0] + i * W), vload(k[1] + i * W), vload(k[2] + i * W), vload(k[3] + i * W)};
    for (int r = 0; r < R; ++r) {
      const vf query = vload(q + r * padded + i * W);
      for (int t = 0; t < 4; ++t) sum[r][t] = i == 0 ? vmul(query, key[t]) : vfma(query, key[t], sum[r][t]);
    }
  }
  store_sums<R>(scores, kStep, sum);
  scale_logits<R>(k, N * W, scores);
}

// the same for keys of any width
template <int R, typename T>
inline void dot_tile(const T* const k[4], const float* q, const float* tails, int dim, int padded, float* scores) {
  if (dim == 32) return dot_whole<R, 32 / W>(k, q, padded, scores);
  if (dim == 64) return dot_whole<R, 64 / W>(k, q, padded, scores);
  if (dim == 128) return dot_whole<R, 128 / W>(k, q, padded, scores);
  vf sum[R][4];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < 4; ++t) sum[r][t] = vset(0.0f);
  const auto step = [&](const vf (&key)[4], const float* from, int stride) {
    for (int r = 0; r < R; ++r) {
      const vf query = vload(from + r * stride);
      for (int t = 0; t < 4; ++t) sum[r][t] = vfma(query, key[t], sum[r][t]);
    }
  };
  int d = 0;
  for (; d + W <= dim; d += W) {
    const vf key[4] = {vload(k[0] + d), vload(k[1] + d), vload(k[2] + d), vload(k[3] + d)};
    step(key, q + d, padded);
  }
  if (tails != nullptr) {
    d = dim - W;
    const vf key[4] = {vload(k[0] + d), vload(k[1] + d), vload(k[2] + d), vload(k[3] + d)};
    step(key, tails, W);
  } else if (d < dim) {
    const int n = dim - d;
    const vf key[4] = {vload_part(k[0] + d, n), vload_part(k[1] + d, n), vload_part(k[2] + d, n), vload_part(k[3] + d, n)};
    step(key, q + d, padded);
  }
  store_sums<R>(scores, kStep, sum);
  scale_logits<R>(k, dim, scores);
}

// Rows some places on: fetched while those before them are worked on, head by head, as more at once would wait for each other. Where a
// row lies is looked up once for all of its heads: in pages that costs as much as a head's share of the work.
template <typename Rows>
struct RowsAhead {
  const Rows& rows;
  std::int64_t far, bytes;  // tokens on; of one head
  RowsAhead(const Rows& all, int kv_heads, std::int64_t least) : rows(all), bytes(rows.width() * static_cast<std::int64_t>(sizeof(*rows.data))) {
    far = larger(least, kAheadBytes / (kv_heads * bytes));
  }
  const char* row(std::int64_t token) const { return reinterpret_cast<const char*>(rows.ahead(token + far)); }
  void fetch(const char* row, int kv_head) const {
    for (std::int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + kv_head * bytes + byte);
  }
  int lines() const { return static_cast<int>((bytes + 63) / 64); }
};

// The lines of `count` such rows of all heads, in the order of memory whatever the order of the work: where that takes many rows at
// once, lines of one head are too far from each other for what the processor fetches by itself.
struct LinesAhead {
  const char* const* at;
  int count;
  std::int64_t bytes, byte = 0;
  void fetch(int lines) {
    for (; lines > 0 && count > 0; --lines) {
      __builtin_prefetch(*at + byte);
      byte += 64;
      if (byte >= bytes) byte = 0, ++at, --count;
    }
  }
};

// Where many query heads share a key, arithmetic takes longer than reading it: so many lines of other things can be fetched for every
// four tokens of a head, at about a byte read in the time of a product.
template <typename T>
inline int lines_to_spare(const Attention& a, int at_once = 1) {
  const int products = 4 * a.queries_per_kv_head() * a.key_dim / at_once, own_bytes = 4 * (a.key_dim + a.head_dim) * static_cast<int>(sizeof(T));
  return larger(products - own_bytes, 0) / 64;
}

template <typename T>
inline bool widens(const Attention& a, int dim) {
  return kWiden<T> && a.queries_per_kv_head() > kHeads && dim <= kMostWide && dim % W == 0;
}

template <typename T>
inline const float* widen(const T* from, int dim, float* to) {
  for (int d = 0; d < dim; d += W) vstore(to + d, vload(from + d));
  return to;
}

template <template <typename> class V, typename T>
void exact_scores(const Attention& a, const V<T>& keys, const float* q, const float* tails, std::int64_t first, int count,
                  float* scores) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_key();
  const RowsAhead next(keys, a.num_kv_heads, kLeastAhead);
  Ahead& weights = ahead_here();
  const int spare = lines_to_spare<T>(a);
  const auto tails_of = [&](int head) { return tails == nullptr ? tails : tails + head * W; };
  for (int t = 0; t < count; t += 4) {
    const T* rows[4];
    const char* ahead[4];
    for (int i = 0; i < 4; ++i) {
      rows[i] = keys.row(first + smaller(t + i, count - 1), 0);  // the last row again instead of rows that are not there
      ahead[i] = next.row(first + t + i);
    }
    for (int h = 0; h < a.num_kv_heads; ++h) {
      const T* k[4];
      for (int i = 0; i < 4; ++i) {
        k[i] = rows[i] + static_cast<std::int64_t>(h) * keys.width();
        next.fetch(ahead[i], h);
      }
      const auto score = [&](const auto* const (&at)[4]) {
        by_heads(h * rep, rep, [&](auto heads, int head) {
          dot_tile<decltype(heads)::value>(at, q + head * padded, tails_of(head), a.key_dim, padded, scores + head * kStep + t);
        });
      };
      if (widens<T>(a, a.key_dim)) {
        alignas(64) float wide[4][kMostWide];
        const float* const at[4] = {widen(k[0], a.key_dim, wide[0]), widen(k[1], a.key_dim, wide[1]), widen(k[2], a.key_dim, wide[2]), widen(k[3], a.key_dim, wide[3])};
        score(at);
      } else {
        score(k);
      }
      weights.fetch(spare);
    }
  }
}

// What turning takes grows with a head's width; what it saves is the same for each query head, however wide.
inline bool turning_pays(const Attention& a) {
  return kTurns && a.key_dim % kTurned == 0 && a.queries_per_kv_head() >= (a.key_dim <= 64 ? 4 : 6);
}

// floats that it needs: the queries in the order of columns, and columns of kTurnedTokens
std::size_t turning_scratch(const Attention& a) {
  if (!turning_pays(a)) return 0;
  return static_cast<std::size_t>(a.num_heads + kTurnedTokens / 2) * static_cast<std::size_t>(a.key_dim);
}

#if defined(__AVX512F__)
// [kv head][column][query head of it]
void turn_queries(const Attention& a, const float* q, float* to) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_key();
  for (int h = 0; h < a.num_heads; h += rep)
    for (int c = 0; c < a.key_dim; ++c)
      for (int r = 0; r < rep; ++r) *to++ = q[(h + r) * padded + number_of_column(c)];
}

// body(heads, first head) over the query heads of one kv head, as many at a time as the registers hold for two columns or four
template <typename Body>
inline void by_columns(int rep, Body&& body) {
  int head = 0;
  const auto take = [&](auto heads) { body(heads, head), head += heads; };
  for (; rep - head >= 8;) take(std::integral_constant<int, 8>());
  if (rep - head == 7) return take(std::integral_constant<int, 7>());
  if (rep - head == 6) return take(std::integral_constant<int, 6>());
  if (rep - head == 5) return take(std::integral_constant<int, 5>());
  if (rep - head == 4) return take(std::integral_constant<int, 4>());
  if (rep - head == 3) return take(std::integral_constant<int, 3>());
  if (rep - head == 2) return take(std::integral_constant<int, 2>());
  if (rep - head == 1) return take(std::integral_constant<int, 1>());
}

template <template <typename> class V, typename T>
void turned_scores(const Attention& a, const V<T>& keys, const float* q, std::int64_t first, int count, float* scores, float* room) {
  const int rep = a.queries_per_kv_head(), dim = a.key_dim, most = rep < kFewColumns ? 4 : 2;
  const RowsAhead next(keys, a.num_kv_heads, most * W);
  Ahead& weights = ahead_here();
  const int spare = lines_to_spare<T>(a, 2) * most * W / 4 * kLanes / dim;  // two products take the time of one of rows
  auto* columns = reinterpret_cast<std::uint16_t*>(room);
  for (int t = 0; t < count; t += most * W) {
    const T* rows[kTurnedTokens];
    const char* ahead[kTurnedTokens];
    const int groups = smaller(most, (count - t + W - 1) / W);
    for (int i = 0; i < groups * W; ++i) {
      rows[i] = keys.row(first + smaller(t + i, count - 1), 0);  // the last row again instead of rows that are not there
      ahead[i] = next.row(first + t + i);
    }
    LinesAhead lines{ahead, groups * W, a.num_kv_heads * next.bytes};
    const int at_once = (groups * W * next.lines() * kLanes + dim - 1) / dim;
    for (int h = 0; h < a.num_kv_heads; ++h) {
      for (int g = 0; g < groups; ++g) {
        const std::uint16_t* at[W];
        for (int i = 0; i < W; ++i) at[i] = reinterpret_cast<const std::uint16_t*>(rows[g * W + i] + static_cast<std::int64_t>(h) * keys.width());
        turn_rows(at, dim, columns + g * dim * W);
      }
      by_columns(rep, [&](auto heads, int head) {
        constexpr int R = decltype(heads)::value;
        const float* queries = q + static_cast<std::int64_t>(h) * rep * dim + head;
        float* to = scores + (h * rep + head) * kStep + t;
        const auto fetch = [&] { lines.fetch(at_once), weights.fetch(spare); };
        constexpr int G = R < kFewColumns ? 4 : 2;
        int g = 0;
        for (; g + G <= groups; g += G) dot_columns<R, G, T>(columns + g * dim * W, dim, queries, rep, to + g * W, fetch);
        for (; g < groups; ++g) dot_columns<R, 1, T>(columns + g * dim * W, dim, queries, rep, to + g * W, fetch);
      });
    }
  }
}
#endif

// out[r][0 .. V * W) += sum over rows of p[r][row] * v[row]
// between() is called for every row.
template <int R, int V, typename T, typename Between>
inline void sum_tile(const T* v, std::int64_t stride, int count, const float* p, float* out, int padded, Between&& between) {
  vf sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sum[r][i] = vload(out + r * padded + i * W);
  for (int t = 0; t < count; ++t, v += stride) {
    vf value[V];
    for (int i = 0; i < V; ++i) value[i] = vload(v + i * W);
    for (int r = 0; r < R; ++r) {
      const vf weight = vset(p[r * kStep + t]);
      for (int i = 0; i < V; ++i) sum[r][i] = vfma(weight, value[i], sum[r][i]);
    }
    between();
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) vstore(out + r * padded + i * W, sum[r][i]);
}

// the same for the numbers behind the last whole vector
template <int R, typename T, typename Between>
inline void sum_rest(const T* v, std::int64_t stride, int count, const float* p, float* out, int rest, int padded, Between&& between) {
  vf sum[R];
  for (int r = 0; r < R; ++r) sum[r] = vload(out + r * padded);
  for (int t = 0; t < count; ++t, v += stride) {
    const vf value = vload_part(v, rest);
    for (int r = 0; r < R; ++r) sum[r] = vfma(vset(p[r * kStep + t]), value, sum[r]);
    between();
  }
  for (int r = 0; r < R; ++r) vstore(out + r * padded, sum[r]);
}

template <int R, typename T, typename Between>
inline void sum_rows(const T* v, std::int64_t stride, int count, const float* p, float* out, int dim, int padded, Between&& between) {
  int d = 0;
  alignas(64) float weights[kScaled<T> ? R * kStep : 1];
  if constexpr (kScaled<T>) {  // the scale of a row goes to its weights
    alignas(64) float scales[2 * kWindow];
    for (int t = 0; t < round_up(count, W); ++t) scales[t] = t < count ? scale_of(v + t * stride, dim) : 0.0f;
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < count; t += W) vstore(weights + r * kStep + t, vmul(vload(p + r * kStep + t), vload(scales + t)));
    p = weights;
  }
  if constexpr (R <= kHeads)
    for (; d + 4 * W <= dim; d += 4 * W) sum_tile<R, 4>(v + d, stride, count, p, out + d, padded, between);
  for (; d + 2 * W <= dim; d += 2 * W) sum_tile<R, 2>(v + d, stride, count, p, out + d, padded, between);
  for (; d + W <= dim; d += W) sum_tile<R, 1>(v + d, stride, count, p, out + d, padded, between);
  if (d < dim) sum_rest<R>(v + d, stride, count, p, out + d, dim - d, padded, between);
}

// how often the rows of a kv head are gone through
inline int value_calls(int rep, int dim) {
  const int heads = kHeads == 4 ? 8 : kHeads, vectors = rep > kHeads && kHeads == 4 ? 2 : 4;
  return (rep + heads - 1) / heads * ((dim + vectors * W - 1) / (vectors * W));
}

template <template <typename> class V, typename T>
void exact_values(const Attention& a, const V<T>& values, const float* p, std::int64_t first, int count, float* out) {
  const int rep = a.queries_per_kv_head(), padded = a.padded_dim();
  const bool spread = sizeof(T) == 2 && turning_pays(a);  // work between two lines of rows ahead
  const int window = spread ? 2 * kWindow : kWindow;
  const RowsAhead next(values, a.num_kv_heads, window);
  const int calls = value_calls(rep, a.head_dim), at_once = spread ? (next.lines() + calls - 1) / calls : 0;
  for (int t = 0, n = 0; t < count; t += n) {
    n = values.run(first + t, smaller(window, count - t));
    const T* row = values.row(first + t, 0);
    const char* ahead[2 * kWindow];
    for (int i = 0; i < n; ++i) ahead[i] = next.row(first + t + i);
    LinesAhead lines{ahead, n, a.num_kv_heads * next.bytes};
    for (int h = 0; h < a.num_kv_heads; ++h) {
      for (int i = 0; !spread && i < n; ++i) next.fetch(ahead[i], h);
      const T* v = row + static_cast<std::int64_t>(h) * values.width();
      const auto sum = [&](const auto* rows, std::int64_t stride) {
        by_sums(h * rep, rep, [&](auto heads, int head) {
          const auto add = [&](auto&& between) {
            sum_rows<decltype(heads)::value>(rows, stride, n, p + head * kStep + t, out + head * padded, a.head_dim, padded, between);
          };
          if (decltype(heads)::value >= kHeads && spread) add([&] { lines.fetch(at_once); });
          else add([] {});
        });
      };
      if (widens<T>(a, a.head_dim)) {
        alignas(64) float wide[kWindow][kMostWide];
        for (int i = 0; i < n; ++i) widen(v + i * values.stride, a.head_dim, wide[i]);
        sum(&wide[0][0], kMostWide);
      } else {
        sum(v, values.stride);
      }
    }
  }
}

// logits of one step become weights, relative to the highest logit so far; what was summed before is scaled down to it
void softmax_step(const Attention& a, float* scores, int count, int hidden, const Partial& part, float* peaks) {
  const int padded = a.padded_dim(), whole = round_up(count, 32);
  for (int h = 0; h < a.num_heads; ++h) {
    float* s = scores + h * kStep;
    for (int t = 0; t < hidden; ++t) s[t] = -__builtin_inff();
    for (int t = count; t < whole; ++t) s[t] = -__builtin_inff();
    vf top = vmax(vload(s), vload(s + W));
    for (int t = 2 * W; t < whole; t += W) top = vmax(top, vload(s + t));
    peaks[h] = hmax(top);
  }
  for (int h = 0; h < a.num_heads; ++h) {
    if (!(peaks[h] > part.peak[h])) continue;
    alignas(64) float lane[W];
    vstore(lane, vexp(vset(part.peak[h] - peaks[h])));
    part.sum[h] *= lane[0];
    for (int d = 0; d < padded; d += W) vstore(part.out + h * padded + d, vmul(vload(part.out + h * padded + d), vset(lane[0])));
    part.peak[h] = peaks[h];
  }
  for (int h = 0; h < a.num_heads; ++h) {
    float* s = scores + h * kStep;
    const vf peak = vset(part.peak[h]);
    vf sum[2] = {vset(0.0f), vset(0.0f)};
    for (int t = 0; t < whole; t += 2 * W)
      for (int i = 0; i < 2; ++i) {
        const vf weight = vexp(vsub(vload(s + t + i * W), peak));
        vstore(s + t + i * W, weight);
        sum[i] = vadd(sum[i], weight);
      }
    part.sum[h] += hsum(vadd(sum[0], sum[1]));
  }
}

std::size_t decode_scratch(const Attention& a) {
  return static_cast<std::size_t>(a.num_heads) * (kStep + W) + static_cast<std::size_t>(round_up(a.num_heads, 16)) + turning_scratch(a) + (a.form.bits ? kivi_scratch(a) : 0) + (a.bfp.bits ? bfp_scratch(a) : 0);
}

std::size_t prepared(const Attention& a) { return a.bfp.bits ? bfp_prepared(a) : 0; }

void prepare(const Attention& a, float* q) {
  if (a.bfp.bits) bfp_prepare(a, q, q + static_cast<std::size_t>(a.num_heads) * a.padded_key());
}

void decode(const Attention& a, const float* q, std::int64_t begin, std::int64_t end, const Partial& part, float* scratch) {
  float* scores = scratch;
  const float* tails = query_tails(a, q, scratch + static_cast<std::size_t>(a.num_heads) * kStep);
  float* peaks = scratch + static_cast<std::size_t>(a.num_heads) * (kStep + W);
  float *turned = peaks + round_up(a.num_heads, 16), *rest = turned + turning_scratch(a);
#if defined(__AVX512F__)
  float* columns = turned + static_cast<std::size_t>(a.num_heads) * static_cast<std::size_t>(a.key_dim);
  const bool turning = begin < end && turning_pays(a);
  if (turning) turn_queries(a, q, turned);
#endif
  for (int h = 0; h < a.num_heads; ++h) part.peak[h] = kNever, part.sum[h] = 0.0f;
  for (int i = 0; i < a.num_heads * a.padded_dim(); ++i) part.out[i] = 0.0f;
  const float* prepared = q + static_cast<std::size_t>(a.num_heads) * a.padded_key();
  for (std::int64_t step = begin; step < end; step += kStep) {
    const int count = static_cast<int>(smaller<std::int64_t, std::int64_t>(kStep, end - step));
    const auto coded_part = [&](std::int64_t coded) {
      return static_cast<int>(smaller<std::int64_t, std::int64_t>(larger<std::int64_t, std::int64_t>(coded - step, 0), count));
    };
    const int coded_keys = coded_part(a.coded_keys), coded_values = coded_part(a.coded_values);
    // exact first: four at a time, they may run over the end of the row, into places that the next one's coded keys fill
    if (coded_keys < count)
      with_rows(a.keys, a, a.key_dim, [&](const auto& keys) {
        const std::int64_t first = step + coded_keys - a.coded_keys;
#if defined(__AVX512F__)
        if constexpr (sizeof(*keys.data) == 2)
          if (turning) return turned_scores(a, keys, turned, first, count - coded_keys, scores + coded_keys, columns);
#endif
        exact_scores(a, keys, q, tails, first, count - coded_keys, scores + coded_keys);
      });
    if (coded_keys > 0) {
      if (a.bfp.bits) bfp_scores(a, prepared, step, step + coded_keys, scores);
      else kivi_scores(a, q, step, step + coded_keys, scores, rest);
    }
    const std::int64_t hidden = larger<std::int64_t, std::int64_t>(a.first_key - step, 0);
    softmax_step(a, scores, count, static_cast<int>(smaller<std::int64_t, std::int64_t>(hidden, count)), part, peaks);
    if (coded_values > 0) {
      if (a.bfp.bits) bfp_values(a, scores, step, step + coded_values, part.out, rest);
      else kivi_values(a, scores, step, step + coded_values, part.out, rest);
    }
    if (coded_values < count)
      with_rows(a.values, a, a.head_dim, [&](const auto& values) {
        exact_values(a, values, scores + coded_values, step + coded_values - a.coded_values, count - coded_values, part.out);
      });
  }
}

// ---- prompts -----------------------------------------------------------------------------------------------------------

// C[4][V * W] (+)= A[4][depth] * B[depth][V * W], of words; A is read one word at a time, at any strides
template <typename Kind, int V>
inline void multiply_tile(const typename Kind::Word* a, std::int64_t a_row, std::int64_t a_col, const typename Kind::Word* b, int ldb, float* c,
                          int ldc, int depth, bool add) {
  vf sum[4][V];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < V; ++j) sum[i][j] = add ? vload(c + i * ldc + j * W) : vset(0.0f);
  for (int k = 0; k < depth; ++k, a += a_col, b += ldb) {
    typename Kind::Vector right[V];
    for (int j = 0; j < V; ++j) right[j] = Kind::load(b + j * W);
    for (int i = 0; i < 4; ++i) {
      const auto left = Kind::spread(a + i * a_row);
      for (int j = 0; j < V; ++j) sum[i][j] = Kind::add(sum[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < V; ++j) vstore(c + i * ldc + j * W, sum[i][j]);
}

// rows a multiple of 4, columns of 16; depth and strides of a and b count words, which lie where floats would
template <typename Kind>
void multiply(const float* from_a, std::int64_t a_row, std::int64_t a_col, const float* from_b, int ldb, float* c, int ldc, int rows,
              int columns, int depth, bool add) {
#if defined(__AVX512F__)
  constexpr int V = 4;
#else
  constexpr int V = 2;
#endif
  const auto *a = reinterpret_cast<const typename Kind::Word*>(from_a), *b = reinterpret_cast<const typename Kind::Word*>(from_b);
  int j = 0;
  for (; j + V * W <= columns; j += V * W)
    for (int i = 0; i < rows; i += 4)
      multiply_tile<Kind, V>(a + i * a_row, a_row, a_col, b + j, ldb, c + static_cast<std::int64_t>(i) * ldc + j, ldc, depth, add);
  for (; j < columns; j += W)
    for (int i = 0; i < rows; i += 4)
      multiply_tile<Kind, 1>(a + i * a_row, a_row, a_col, b + j, ldb, c + static_cast<std::int64_t>(i) * ldc + j, ldc, depth, add);
}

template <template <typename> class V, typename T>
void exact_tile(const V<T>& rows, int kv_head, std::int64_t first, int count, float* tile, int padded) {
  for (int t = 0; t < count; ++t) {
    const T* row = rows.row(first + t, kv_head);
    float* to = tile + t * padded;
    int d = 0;
    const float scale = scale_of(row, rows.dim);
    for (; d + W <= rows.dim; d += W) vstore(to + d, kScaled<T> ? vmul(vload(row + d), vset(scale)) : vload(row + d));
    for (; d < padded; ++d) to[d] = d < rows.dim ? scale * to_float(row[d]) : 0.0f;
  }
}

void coded_key_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  if (a.waiting != nullptr && end > a.first_waiting) {
    const std::int64_t from = larger(begin, a.first_waiting);
    const View<i8> rows{static_cast<const i8*>(a.waiting), static_cast<std::int64_t>(a.num_kv_heads) * (a.key_dim + kBehind<i8>), a.key_dim};
    for (std::int64_t t = from; t < end; ++t) exact_tile(rows, kv_head, t - a.first_waiting, 1, tile + (t - begin) * ld, a.key_dim);
    end = from;
  }
  if (begin < end) (a.bfp.bits ? bfp_key_tile : kivi_key_tile)(a, kv_head, begin, end, tile, ld);
}
void coded_value_tile(const Attention& a, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld) {
  (a.bfp.bits ? bfp_value_tile : kivi_value_tile)(a, kv_head, begin, end, tile, ld);
}

// float rows of tokens [begin, begin + count), from the coded part, the exact one, or both
template <typename CodedTile>
void load_tile(const Attention& a, const Rows& rows, int dim, std::int64_t coded, int kv_head, std::int64_t begin, int count,
               float* tile, CodedTile&& coded_tile) {
  const int padded = round_up(dim, 16);
  const std::int64_t left = larger<std::int64_t, std::int64_t>(coded - begin, 0);
  const int n = static_cast<int>(smaller<std::int64_t, std::int64_t>(left, count));
  if (n > 0) coded_tile(a, kv_head, begin, begin + n, tile, padded);
  if (n < count)
    with_rows(rows, a, dim, [&](const auto& exact) {
      exact_tile(exact, kv_head, begin + n - coded, count - n, tile + n * padded, padded);
    });
}

// the same of a ragged cache's past, whose rows are one head's alone
template <typename CodedTile>
void past_tile(const Attention& a, const Rows& past, int kv_head, std::int64_t begin, std::int64_t end, float* tile, int ld,
               CodedTile&& coded_tile) {
  if (past.data == nullptr) return coded_tile(a, kv_head, begin, end, tile, ld);
  Rows own = past;
  own.stride = a.head_dim;
  with_rows(own, a, a.head_dim, [&](const auto& rows) { exact_tile(rows, 0, begin, static_cast<int>(end - begin), tile, ld); });
}

struct PromptScratch {  // rows = query tokens x heads of one kv head, padded to 16
  int rows;
  float *q, *keys, *values, *scores, *out, *peak, *sum, *low, *high, *shrink;
  PromptScratch(float* at, int padded_rows, int key_dim, int dim) : rows(padded_rows) {
    const auto take = [&](std::size_t n) {
      float* p = at;
      at += n;
      return p;
    };
    const std::size_t r = static_cast<std::size_t>(rows), n = static_cast<std::size_t>(key_dim), d = static_cast<std::size_t>(dim);
    q = take(n * r), keys = take(kTile * n), values = take(kTile * d), scores = take(kTile * r), out = take(r * d);
    peak = take(r), sum = take(r), low = take(r), high = take(r), shrink = take(r);
  }
  static std::size_t size(int rows, int key_dim, int dim) {
    return static_cast<std::size_t>(rows + kTile) * (key_dim + dim) + static_cast<std::size_t>(kTile) * rows + 5u * rows;
  }
};

std::size_t prefill_scratch(const Attention& a, int queries) {
  return PromptScratch::size(round_up(queries * a.queries_per_kv_head(), 16), a.padded_key(), a.padded_dim());
}

// queries transposed and scaled, as words, limits of each row; positions inside the tile walk are kept as floats (exact below 2^24)
template <typename Kind>
void load_queries(const Attention& a, int kv_head, int begin, int end, std::int64_t origin, const PromptScratch& s) {
  const int rep = a.queries_per_kv_head(), dim = a.padded_dim();
  for (std::size_t i = 0; i < static_cast<std::size_t>(a.padded_key()) * s.rows; ++i) s.q[i] = 0.0f;
  for (int i = 0; i < s.rows * dim; ++i) s.out[i] = 0.0f;
  for (int row = 0; row < s.rows; ++row) {
    s.peak[row] = kNever, s.sum[row] = 0.0f, s.low[row] = 0.0f, s.high[row] = 0.0f;
    const int token = begin + row / rep;
    if (token >= end) continue;
    const float* q = a.q + (static_cast<std::int64_t>(token) * a.num_heads + kv_head * rep + row % rep) * a.key_dim;
    for (int d = 0; d < a.key_dim; ++d) s.q[static_cast<std::int64_t>(d) * s.rows + row] = q[d] * a.scale;
    s.low[row] = static_cast<float>(larger<std::int64_t, std::int64_t>(a.first_key + a.place(token), 0) - origin);
    s.high[row] = static_cast<float>(smaller<std::int64_t, std::int64_t>(a.query_key + a.place(token) + 1, a.length) - origin);
  }
  if constexpr (Kind::kNumbers == 2) Kind::join_across(s.q, a.padded_key(), s.rows);
}

// logits become shares, or pairs of shares of tokens that follow each other
template <typename Kind>
void softmax_tile(const PromptScratch& s, int count, int dim, std::int64_t at, bool masked) {
  for (int row = 0; row < s.rows; row += W) {
    const vf before = vload(s.peak + row), low = vload(s.low + row), high = vload(s.high + row);
    vf peak = before, sum = vset(0.0f);
    float* const scores = s.scores + row;
    for (int k = 0; k < count; ++k) {
      vf x = vload(scores + k * s.rows);
      if (masked) {
        x = vwithin(x, vset(static_cast<float>(at + k)), low, high);
        vstore(scores + k * s.rows, x);
      }
      peak = vmax(peak, x);
    }
    if constexpr (Kind::kNumbers == 1) {
      for (int k = 0; k < count; ++k) {
        const vf weight = vexp(vsub(vload(scores + k * s.rows), peak));
        vstore(scores + k * s.rows, weight);
        sum = vadd(sum, weight);
      }
    } else {
      for (int k = 0; k < count; k += 2) {
        const vf one = Kind::share(vload(scores + k * s.rows), peak);
        const vf other = k + 1 < count ? Kind::share(vload(scores + (k + 1) * s.rows), peak) : vset(0.0f);
        Kind::store(scores + k / 2 * s.rows, one, other);
        sum = vadd(sum, vadd(one, other));
      }
    }
    const vf shrink = vexp(vsub(before, peak));
    vstore(s.peak + row, peak);
    vstore(s.shrink + row, shrink);
    vstore(s.sum + row, vfma(vload(s.sum + row), shrink, sum));
  }
  for (int row = 0; row < s.rows; ++row) {
    if (s.shrink[row] == 1.0f) continue;
    for (int d = 0; d < dim; d += W) vstore(s.out + row * dim + d, vmul(vload(s.out + row * dim + d), vset(s.shrink[row])));
  }
}

template <typename Kind>
void prefill_as(const Attention& a, int kv_head, int begin, int end, float* scratch) {
  constexpr int kNumbers = Kind::kNumbers;
  const int rep = a.queries_per_kv_head(), dim = a.padded_dim(), key_dim = a.padded_key();
  const PromptScratch s(scratch, round_up((end - begin) * rep, 16), key_dim, dim);
  // what the first and the last query of this block may see
  const std::int64_t low_first = larger<std::int64_t, std::int64_t>(a.first_key + a.place(begin), 0);
  const std::int64_t low_last = larger<std::int64_t, std::int64_t>(a.first_key + a.place(end - 1), 0);
  const std::int64_t high_first = smaller<std::int64_t, std::int64_t>(a.query_key + a.place(begin) + 1, a.length);
  const std::int64_t high_last = smaller<std::int64_t, std::int64_t>(a.query_key + a.place(end - 1) + 1, a.length);
  const std::int64_t origin = low_first / kTile * kTile;
  load_queries<Kind>(a, kv_head, begin, end, origin, s);
  for (std::int64_t tile = origin; tile < high_last; tile += kTile) {
    const int count = static_cast<int>(smaller<std::int64_t, std::int64_t>(kTile, high_last - tile));
    load_tile(a, a.keys, a.key_dim, a.coded_keys, kv_head, tile, count, s.keys,
              [](auto& at, int h, auto from, auto to, float* out, int ld) { past_tile(at, at.past_keys, h, from, to, out, ld, coded_key_tile); });
    if constexpr (kNumbers == 2) Kind::join_along(s.keys, static_cast<std::int64_t>(count) * key_dim);
    multiply<Kind>(s.keys, key_dim / kNumbers, 1, s.q, s.rows, s.scores, s.rows, round_up(count, 4), s.rows, (a.key_dim + kNumbers - 1) / kNumbers, false);
    const bool masked = tile < low_last || tile + count > high_first;
    softmax_tile<Kind>(s, count, dim, tile - origin, masked);
    load_tile(a, a.values, a.head_dim, a.coded_values, kv_head, tile, count, s.values,
              [](auto& at, int h, auto from, auto to, float* out, int ld) { past_tile(at, at.past_values, h, from, to, out, ld, coded_value_tile); });
    if constexpr (kNumbers == 2) Kind::join_across(s.values, count, dim);
    multiply<Kind>(s.scores, 1, s.rows, s.values, dim, s.out, dim, s.rows, dim, (count + kNumbers - 1) / kNumbers, true);
  }
  for (int row = 0; row < (end - begin) * rep; ++row) {
    const std::int64_t at = static_cast<std::int64_t>(begin + row / rep) * a.num_heads + kv_head * rep + row % rep;
    const float inverse = s.sum[row] > 0.0f ? 1.0f / s.sum[row] : 0.0f;
    for (int d = 0; d < a.head_dim; ++d) a.out[at * a.head_dim + d] = s.out[row * dim + d] * inverse;
    if (a.stats == nullptr) continue;
    a.stats[2 * at] = s.sum[row] > 0.0f ? s.peak[row] : -__builtin_inff();
    a.stats[2 * at + 1] = s.sum[row];
  }
}

int paired_tokens() {
#if defined(__AVX512F__) && defined(MW_BF16_PAIRS)
  if (Pairs::gain()) return kLeastPaired;
#endif
  return 0;
}

void prefill(const Attention& a, int kv_head, int begin, int end, float* scratch) {
#if defined(__AVX512F__) && defined(MW_BF16_PAIRS)
  const auto of_pairs = [](const Rows& rows, const Rows& past) {
    return rows.type == Real::bfloat16 && (past.data == nullptr || past.type == Real::bfloat16);
  };
  if (!a.exact && a.num_tokens >= kLeastPaired && of_pairs(a.keys, a.past_keys) && of_pairs(a.values, a.past_values) && Pairs::gain())
    return prefill_as<Pairs>(a, kv_head, begin, end, scratch);
#endif
  prefill_as<Floats>(a, kv_head, begin, end, scratch);
}

}  // namespace

const AttentionKernels& attention_table() {
  static const AttentionKernels table{decode, decode_scratch, prepared, prepare, prefill, prefill_scratch, paired_tokens, kivi_encode_key_block, kivi_encode_value_rows,
                                      bfp_encode_keys, bfp_encode_values, coded_key_tile, coded_value_tile};
  return table;
}

}  // namespace mw::MW_ISA
