// Python face of lora.h: adapters, the batch they are worked in, and the call as a step of a program.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "lora.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
  if (!condition) throw nb::value_error(message.c_str());
}

mw::Form form_of(const std::string& name) {
  if (name == "float32") return mw::Form::float32;
  if (name == "float16") return mw::Form::float16;
  require(name == "bfloat16", "an adapter's numbers are float32, float16 or bfloat16, not " + name);
  return mw::Form::bfloat16;
}

struct PyAdapter {
  std::shared_ptr<mw::LoraAdapter> adapter = std::make_shared<mw::LoraAdapter>();
};

// targets: [7, 4] of rank, inputs, outputs, first unit
PyAdapter make_adapter(const std::string& form, float scale, Array<const std::int64_t, 2> targets) {
  require(targets.shape(0) == mw::kLoraTargets && targets.shape(1) == 4, "targets must be [7, 4]");
  PyAdapter made;
  made.adapter->form = form_of(form);
  made.adapter->scale = scale;
  for (int i = 0; i < mw::kLoraTargets; ++i) {
    const std::int64_t* row = targets.data() + 4 * i;
    require(row[0] >= 0 && row[0] <= mw::kMostLoraRank && row[1] >= 0 && row[2] >= 0 && row[3] >= 0,
            "targets must not be negative, nor a rank above " + std::to_string(mw::kMostLoraRank));
    made.adapter->targets[i] = {row[0], row[1], row[2], row[3]};
  }
  return made;
}

void set_pages(PyAdapter& self, Array<const std::int32_t, 1> pages) {
  self.adapter->pages.assign(pages.data(), pages.data() + pages.shape(0));
}

// rows: [layers, 2, out], see LoraAdapter; they are copied
void set_rows(PyAdapter& self, int target, Array<const float, 3> rows) {
  require(target >= 0 && target < mw::kLoraTargets, "there is no such target");
  const auto out = static_cast<std::int64_t>(rows.shape(2));
  require(rows.shape(1) == 2 && out == self.adapter->targets[target].out, "rows must be [layers, 2, outputs of the target]");
  self.adapter->rows[target].assign(rows.data(), rows.data() + rows.size());
}

struct Batch {
  mw::LoraPool pool;
  std::vector<mw::LoraSegment> segments;
  std::vector<std::shared_ptr<mw::LoraAdapter>> held;
  Array<float, 2> scratch;
  std::int64_t multiplies = 0, calls = 0;
};

struct PyBatch {
  std::shared_ptr<Batch> batch = std::make_shared<Batch>();
};

mw::LoraPool pool_of(const Array<std::uint8_t, 2>& pages, std::int64_t layers, std::int64_t unit_bytes, std::int64_t units_per_block) {
  mw::LoraPool pool;
  pool.base = pages.data();
  pool.pages = static_cast<std::int64_t>(pages.shape(0));
  pool.page_bytes = static_cast<std::int64_t>(pages.shape(1));
  pool.unit_bytes = unit_bytes, pool.layer_bytes = unit_bytes * units_per_block;
  require(units_per_block > 0 && (units_per_block & (units_per_block - 1)) == 0, "the units of a block are a power of two");
  while ((std::int64_t{1} << pool.block_shift) < units_per_block) ++pool.block_shift;
  require(layers > 0 && unit_bytes > 0 && unit_bytes % 4 == 0 && pool.layer_bytes * layers <= pool.page_bytes,
          "pages are smaller than the units of all layers");
  return pool;
}

void check_pages(const mw::LoraPool& pool, const mw::LoraAdapter& adapter) {
  for (const std::int32_t page : adapter.pages) require(page >= 0 && page < pool.pages, "an adapter's page lies outside the pool");
  for (const auto& t : adapter.targets)
    require(t.rank == 0 || t.first_unit + adapter.units(pool, t) <= static_cast<std::int64_t>(adapter.pages.size()) << pool.block_shift,
            "an adapter has fewer pages than its rows take");
}

// segments: (first row, count, adapter), rows in ascending order
void assign(PyBatch& self, Array<std::uint8_t, 2> pages, std::int64_t layers, std::int64_t unit_bytes, std::int64_t units_per_block,
            nb::sequence segments) {
  Batch& batch = *self.batch;
  batch.segments.clear(), batch.held.clear();
  batch.pool = pool_of(pages, layers, unit_bytes, units_per_block);
  std::int64_t next = 0;
  for (nb::handle each : segments) {
    const auto segment = nb::cast<nb::tuple>(each);
    require(nb::len(segment) == 3, "a segment is (first row, count, adapter)");
    const auto first = nb::cast<std::int64_t>(segment[0]), count = nb::cast<std::int64_t>(segment[1]);
    const auto adapter = nb::cast<const PyAdapter&>(segment[2]).adapter;
    require(first >= next && count > 0, "segments must be in order and not empty");
    next = first + count;
    std::int64_t ranks = 0;
    for (const auto& t : adapter->targets) ranks = std::max(ranks, t.rank);
    require(3 * ranks <= static_cast<std::int64_t>(batch.scratch.shape(1)), "an adapter's rank is larger than the scratch was made for");
    check_pages(batch.pool, *adapter);
    batch.segments.push_back({first, count, adapter.get()});
    batch.held.push_back(adapter);
  }
}

struct Outputs {
  std::vector<mw::LoraOutput> outputs;
  std::vector<Array<float, 2>> owners;
  ~Outputs() {
    nb::gil_scoped_acquire held;  // a step may end where the GIL is not held
    owners.clear();
  }
};

mw::Step add_lora(const PyBatch& lora, std::int64_t layer, std::int64_t first_row, Array<const float, 2> x, std::vector<int> targets,
                  nb::sequence outs) {
  const std::shared_ptr<Batch> batch = lora.batch;
  const auto held = std::make_shared<Outputs>();
  const auto rows = static_cast<std::int64_t>(x.shape(0)), in = static_cast<std::int64_t>(x.shape(1));
  require(targets.size() == nb::len(outs) && targets.size() <= 3 && !targets.empty(), "there is one output per target, at most three");
  require(layer >= 0 && first_row >= 0 && rows <= static_cast<std::int64_t>(batch->scratch.shape(0)), "more rows than the scratch was made for");
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const auto out = nb::cast<Array<float, 2>>(outs[i], false);
    require(targets[i] >= 0 && targets[i] < mw::kLoraTargets && static_cast<std::int64_t>(out.shape(0)) == rows, "an output needs a row per row of x");
    held->outputs.push_back({targets[i], out.data(), static_cast<std::int64_t>(out.shape(1))});
    held->owners.push_back(out);
  }
  return [batch, held, x, layer, first_row, rows, in] {
    for (const auto& segment : batch->segments)
      for (const auto& output : held->outputs) {
        const auto& t = segment.adapter->targets[output.target];
        if (t.rank && (t.in != in || t.out != output.width)) return;  // checked where adapters are read
        const std::size_t rows_held = segment.adapter->rows[output.target].size();
        if (rows_held && rows_held < static_cast<std::size_t>((layer + 1) * 2 * output.width)) return;
      }
    if ((layer + 1) * batch->pool.layer_bytes > batch->pool.page_bytes) return;
    const mw::LoraCall call{&batch->pool, batch->segments.data(), batch->segments.size(), layer, first_row, rows, x.data(), in,
                            held->outputs.data(), held->outputs.size(), batch->scratch.data(),
                            static_cast<std::int64_t>(batch->scratch.shape(1))};
    const std::int64_t done = mw::add_lora(call);
    batch->multiplies += done;
    batch->calls += done > 0;
  };
}

std::int64_t fetch(const PyAdapter& self, Array<std::uint8_t, 2> pages, std::int64_t layers, std::int64_t unit_bytes,
                   std::int64_t units_per_block, int file, const std::string& stored, Array<const std::int64_t, 3> offsets) {
  const mw::LoraPool pool = pool_of(pages, layers, unit_bytes, units_per_block);
  check_pages(pool, *self.adapter);
  require(static_cast<std::int64_t>(offsets.shape(0)) == layers && offsets.shape(1) == mw::kLoraTargets && offsets.shape(2) == 2,
          "offsets must be [layers, 7, 2]");
  const mw::Form form = form_of(stored);
  require(form == self.adapter->form || (form == mw::Form::float32 && self.adapter->form == mw::Form::float16),
          "only float32 adapters are rounded, to float16");
  const std::shared_ptr<mw::LoraAdapter> adapter = self.adapter;
  nb::gil_scoped_release release;
  return mw::fetch_lora(pool, *adapter, file, form, offsets.data(), layers);
}

}  // namespace

void bind_lora(nb::module_& m, nb::class_<Program>& program) {
  nb::class_<PyAdapter>(m, "LoraAdapter", "One adapter's shape and the pages it lies in")
      .def("set_pages", &set_pages, "pages"_a.noconvert())
      .def("set_rows", &set_rows, "target"_a, "rows"_a.noconvert(), "What each output is lengthened by once all is added: y += rows[0] y + rows[1]")
      .def("fetch", &fetch, "pages"_a.noconvert(), "layers"_a, "unit_bytes"_a, "units_per_block"_a, "file"_a, "stored"_a, "offsets"_a.noconvert(),
           "Reads tensors from a file into the adapter's pages; bytes read, or -1 - errno");
  m.def("lora_adapter", &make_adapter, "form"_a, "scale"_a, "targets"_a.noconvert());
  nb::class_<PyBatch>(m, "LoraBatch", "Which rows of the next step belong to which adapter")
      .def("__init__", [](PyBatch* self, Array<float, 2> scratch) {
        new (self) PyBatch();
        self->batch->scratch = scratch;
      }, "scratch"_a.noconvert())
      .def("assign", &assign, "pages"_a.noconvert(), "layers"_a, "unit_bytes"_a, "units_per_block"_a, "segments"_a)
      .def("clear", [](PyBatch& self) { self.batch->segments.clear(), self.batch->held.clear(); })
      .def_prop_ro("multiplies", [](const PyBatch& self) { return self.batch->multiplies; })
      .def_prop_ro("calls", [](const PyBatch& self) { return self.batch->calls; });
  bind_step(m, program, "add_lora", &add_lora, "lora"_a, "layer"_a, "first_row"_a, "x"_a.noconvert(), "targets"_a, "outs"_a);
}
