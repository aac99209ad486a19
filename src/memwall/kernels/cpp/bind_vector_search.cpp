// Python face of balanced_tree.h, vector_graph.h and vector_lists.h: checks shapes, lets go of the interpreter's lock, calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <string>

#include "balanced_tree.h"
#include "vector_graph.h"
#include "vector_lists.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
using Bytes = Array<const std::uint8_t, 2>;
using Ids = Array<const std::int32_t, 1>;

void require(bool holds, const char* message) {
  if (!holds) throw nb::value_error(message);
}

mw::Element element_of(const std::string& name) {
  constexpr const char* kNames[mw::kNumElements] = {"float32", "float16", "int8", "uint8"};
  for (int i = 0; i < mw::kNumElements; ++i)
    if (name == kNames[i]) return static_cast<mw::Element>(i);
  throw nb::value_error(("vectors of " + name + " are not known").c_str());
}

mw::VectorRows rows_of(const Bytes& rows, int size, const std::string& element) {
  const mw::Element kind = element_of(element);
  require(size > 0 && rows.shape(1) == static_cast<std::size_t>(size) * static_cast<std::size_t>(mw::element_bytes(kind)), "rows are not of the size told");
  require(rows.shape(0) < (std::size_t{1} << 31), "there are too many vectors");
  return {rows.data(), static_cast<std::int64_t>(rows.shape(1)), static_cast<std::int64_t>(rows.shape(0)), size, kind};
}

template <class Sequence>
bool within(const Sequence& ids, std::int64_t least, std::int64_t bound) {
  return std::all_of(ids.data(), ids.data() + ids.size(), [&](std::int32_t id) { return id >= least && id < bound; });
}

mw::VectorGraph graph_of(const Bytes& rows, int size, const std::string& element, const Array<const std::int32_t, 2>& edges, const Ids& pivots,
                         const Ids& ends, const Ids& seeds) {
  const mw::VectorRows held = rows_of(rows, size, element);
  require(edges.shape(0) == rows.shape(0) && edges.shape(1) > 0, "there is a row of edges per vector");
  require(pivots.shape(0) == ends.shape(0), "pivots and the ends of their seeds differ in number");
  require(within(pivots, 0, held.count) && within(seeds, 0, held.count), "a seed names no vector");
  std::int32_t last = 0;
  for (std::size_t p = 0; p < ends.size(); last = ends.data()[p++]) require(ends.data()[p] >= last && ends.data()[p] <= static_cast<std::int64_t>(seeds.size()), "ends of seeds go astray");
  return {held, edges.data(), static_cast<int>(edges.shape(1)), pivots.data(), ends.data(), seeds.data(), static_cast<std::int64_t>(pivots.shape(0))};
}

nb::tuple balanced_tree(Bytes rows, int size, const std::string& element, int children, int leaf, std::int64_t samples, double range, double factor,
                        std::uint64_t seed) {
  const mw::VectorRows held = rows_of(rows, size, element);
  require(children >= 2 && leaf >= 1 && samples >= children && factor != 0, "a node needs two children, a leaf a vector, and samples as many as children");
  auto* tree = new mw::BalancedTree;
  {
    nb::gil_scoped_release release;
    *tree = mw::balanced_tree(held, {children, leaf, samples, range, factor, seed});
  }
  nb::capsule owner(tree, [](void* held_tree) noexcept { delete static_cast<mw::BalancedTree*>(held_tree); });
  const auto array = [&](std::vector<std::int32_t>& of) { return nb::ndarray<nb::numpy, std::int32_t, nb::ndim<1>>(of.data(), {of.size()}, owner); };
  return nb::make_tuple(array(tree->points), array(tree->begins), array(tree->ends), tree->factor);
}

std::int64_t pick_heads(Ids points, Ids begins, Ids ends, std::int64_t select, std::int64_t split, std::int64_t factor, Array<std::uint8_t, 1> heads) {
  const auto nodes = static_cast<std::int64_t>(points.shape(0));
  require(begins.shape(0) == points.shape(0) && ends.shape(0) == points.shape(0), "points, begins and ends differ in number");
  require(within(points, -1, static_cast<std::int64_t>(heads.shape(0))) && within(begins, 0, nodes + 1) && within(ends, 0, nodes + 1), "a node names no vector or child");
  require(factor >= 1, "the factor is at least 1");
  for (std::int64_t node = 0; node < nodes; ++node)
    require(begins.data()[node] >= ends.data()[node] || begins.data()[node] > node, "children stand behind their parents");
  nb::gil_scoped_release release;
  return mw::pick_heads(points.data(), begins.data(), ends.data(), nodes, {select, split, factor}, heads.data(), static_cast<std::int64_t>(heads.shape(0)));
}

void graph_build(Bytes rows, int size, const std::string& element, Ids order, std::int64_t budget, std::int64_t candidates, Array<std::int32_t, 2> edges) {
  const mw::VectorRows held = rows_of(rows, size, element);
  require(order.shape(0) == rows.shape(0) && edges.shape(0) == rows.shape(0) && edges.shape(1) > 0, "there is a place and a row of edges per vector");
  require(within(order, 0, held.count) && budget > 0 && candidates > 0, "the order names no vector, or nothing is to be looked at");
  nb::gil_scoped_release release;
  mw::graph_build(held, order.data(), static_cast<int>(edges.shape(1)), budget, candidates, edges.data());
}

std::int64_t graph_connect(Bytes rows, int size, const std::string& element, Array<std::int32_t, 2> edges, Ids pivots, Ids ends, Ids seeds,
                           std::int64_t budget) {
  const mw::VectorGraph graph = graph_of(rows, size, element, Array<const std::int32_t, 2>(edges), pivots, ends, seeds);
  require(within(edges, -1, graph.rows.count), "an edge leads nowhere");
  nb::gil_scoped_release release;
  return mw::graph_connect(graph, edges.data(), budget);
}

// Edges are checked when a file is opened, not at each search.
void graph_search(Bytes rows, int size, const std::string& element, Array<const std::int32_t, 2> edges, Ids pivots, Ids ends, Ids seeds,
                  Array<const float, 2> queries, std::int64_t budget, Array<std::int32_t, 2> ids, Array<float, 2> distances,
                  Array<std::int32_t, 1> checked, Array<std::int32_t, 1> expanded) {
  const mw::VectorGraph graph = graph_of(rows, size, element, edges, pivots, ends, seeds);
  require(queries.shape(1) == static_cast<std::size_t>(graph.rows.padded()), "queries are padded to a multiple of 16");
  require(ids.shape(0) == queries.shape(0) && distances.shape(0) == queries.shape(0) && distances.shape(1) == ids.shape(1) &&
              checked.shape(0) == queries.shape(0) && expanded.shape(0) == queries.shape(0), "there is a row of results per query");
  nb::gil_scoped_release release;
  mw::graph_search(graph, queries.data(), static_cast<std::int64_t>(queries.shape(0)), static_cast<std::int64_t>(ids.shape(1)), budget, ids.data(),
                   distances.data(), checked.data(), expanded.data());
}

void closure_assign(Bytes heads, int size, const std::string& element, Array<const std::int32_t, 2> candidates, Array<const float, 2> distances,
                    float closure, float rng_factor, bool nearest_only, Array<std::int32_t, 2> taken, Array<float, 2> apart) {
  const mw::VectorRows held = rows_of(heads, size, element);
  require(candidates.shape(0) == distances.shape(0) && candidates.shape(1) == distances.shape(1), "there is a distance per candidate");
  require(taken.shape(0) == candidates.shape(0) && apart.shape(0) == taken.shape(0) && apart.shape(1) == taken.shape(1), "there is a row of results per vector");
  require(within(candidates, -1, held.count), "a candidate is no head");
  nb::gil_scoped_release release;
  mw::closure_assign({held, candidates.data(), distances.data(), static_cast<std::int64_t>(candidates.shape(0)), static_cast<std::int64_t>(candidates.shape(1)),
                      closure, rng_factor, static_cast<int>(taken.shape(1)), nearest_only, taken.data(), apart.data()});
}

std::int64_t scan_lists(Array<const std::uint8_t, 1> bytes, Array<const std::int64_t, 1> starts, Ids counts, int size, const std::string& element,
                        bool apart, Array<const float, 1> query, std::int32_t most_id, Array<std::int32_t, 1> ids, Array<float, 1> distances) {
  const mw::Element kind = element_of(element);
  const std::int64_t stride = static_cast<std::int64_t>(size) * mw::element_bytes(kind) + 4;
  require(size > 0 && query.shape(0) == static_cast<std::size_t>((size + mw::kQueryPad - 1) / mw::kQueryPad * mw::kQueryPad), "the query is padded to a multiple of 16");
  require(starts.shape(0) == counts.shape(0) && ids.shape(0) == distances.shape(0), "there is a count per list and a distance per id");
  for (std::size_t l = 0; l < starts.size(); ++l)
    require(starts.data()[l] >= 0 && counts.data()[l] >= 0 && starts.data()[l] <= static_cast<std::int64_t>(bytes.size()) &&
                counts.data()[l] <= (static_cast<std::int64_t>(bytes.size()) - starts.data()[l]) / stride, "a list lies outside of what was read");
  nb::gil_scoped_release release;
  return mw::scan_lists({bytes.data(), starts.data(), counts.data(), static_cast<std::int64_t>(starts.shape(0)), size, kind, apart, query.data(),
                         static_cast<std::int64_t>(ids.shape(0)), ids.data(), distances.data()}, most_id);
}

}  // namespace

void bind_vector_search(nb::module_& m) {
  m.def("balanced_tree", &balanced_tree);
  m.def("pick_heads", &pick_heads);
  m.def("vector_graph_build", &graph_build);
  m.def("vector_graph_connect", &graph_connect);
  m.def("vector_graph_search", &graph_search);
  m.def("closure_assign", &closure_assign);
  m.def("scan_lists", &scan_lists);
}
