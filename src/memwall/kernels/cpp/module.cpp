// The compiled module memwall._native. Each family of kernels registers its functions in a file of its own (bind_NAME.cpp), so
// that adding one touches this list and nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "dispatch.h"
#include "program.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_linear(nb::module_& m, nb::class_<Program>&);       // linear.h: matrices and products
void bind_elementwise(nb::module_& m, nb::class_<Program>&);  // norms, rotary embedding, activations
void bind_attention(nb::module_& m, nb::class_<Program>&);  // attention over full-precision and coded caches
void bind_parts(nb::module_& m);      // the next token of several caches that lie apart
void bind_bfp(nb::module_& m);        // block floating point caches
void bind_pages(nb::module_& m);      // pages of coded blocks
void bind_latent(nb::module_& m);     // rows in few bits, attention over rebuilt blocks
void bind_latent_parts(nb::module_& m);  // the next token of several of their caches
void bind_probe(nb::module_& m);      // measurements of this machine
void bind_heap(nb::module_& m);       // the C heap's habits
void bind_range_coder(nb::module_& m);  // entropy coding of symbol streams
void bind_planes(nb::module_& m);       // products of bit planes
void bind_nearest(nb::module_& m);      // the nearest of many centroids
void bind_information(nb::module_& m);  // shifts of blocks under which codes tell the most
void bind_scan(nb::module_& m);         // state space layers, static 8-bit products
void bind_tiled_attention(nb::module_& m);  // attention whose tiles are parameters
void bind_lora(nb::module_& m, nb::class_<Program>&);  // low-rank additions to products
void bind_neurons(nb::module_& m);      // a feed-forward of rows, a neuron each
void bind_row_scores(nb::module_& m);   // queries against vectors in few bits
void bind_vector_search(nb::module_& m);  // trees, graphs and lists of vectors
void bind_tenant_tree(nb::module_& m);  // one tree of vectors for many tenants
void bind_oblivious(nb::module_& m);    // the private half of an oblivious map, and of Path ORAM
void bind_translation(nb::module_& m);  // address translation of a simulated core

NB_MODULE(_native, m) {
  m.doc() = "memwall's compiled kernels; use them through memwall.kernels";
  m.def("num_threads", &mw::num_threads, "Threads that kernels use, the caller included");
  m.def("set_num_threads", &mw::set_num_threads, "n"_a);
  m.def("lane_threads", &mw::lane_threads, "Threads that this thread's kernels have to themselves; 0: the shared ones");
  m.def("set_lane_threads", &mw::set_lane_threads, "n"_a);
  m.def("isa", [] { return std::string(mw::isa_name(mw::active_isa())); }, "Instruction set in use");
  m.def("best_isa", [] { return std::string(mw::isa_name(mw::best_isa())); });
  m.def("force_isa", [](const std::string& name) {
    for (int i = 0; i < mw::kNumIsas; ++i)
      if (name == mw::isa_name(static_cast<mw::Isa>(i))) return mw::force_isa(static_cast<mw::Isa>(i));
    throw nb::value_error(("unknown instruction set: " + name).c_str());
  }, "name"_a);
  nb::class_<Program> program(m, "Program", "Kernel calls recorded once and run in a row, many times; holds their arrays");
  program.def(nb::init<>())
      .def("run", &Program::run)
      .def("extend", &Program::extend, "other"_a, "Adds the calls of another program")
      .def("__len__", [](const Program& self) { return self.steps.size(); });
  bind_linear(m, program);
  bind_elementwise(m, program);
  bind_attention(m, program);
  bind_parts(m);
  bind_bfp(m);
  bind_pages(m);
  bind_latent(m);
  bind_latent_parts(m);
  bind_probe(m);
  bind_heap(m);
  bind_range_coder(m);
  bind_planes(m);
  bind_nearest(m);
  bind_neurons(m);
  bind_row_scores(m);
  bind_vector_search(m);
  bind_tenant_tree(m);
  bind_oblivious(m);
  bind_translation(m);
  bind_information(m);
  bind_scan(m);
  bind_tiled_attention(m);
  bind_lora(m, program);
}
