// Python face of translation.h: settings by name, arrays of equal length, the interpreter's lock let go of while a trace runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>

#include "translation.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Addresses = nb::ndarray<const std::uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Cycles = nb::ndarray<std::uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw nb::value_error(message.c_str());
}

mw::TranslationSettings settings_of(const nb::dict& given) {
  mw::TranslationSettings settings{};
  const auto fields = mw::named_fields(settings);
  require(given.size() == fields.size(), "translation: " + std::to_string(fields.size()) + " settings are wanted");
  for (const auto& [name, place] : fields) {
    require(given.contains(name.c_str()), "translation: no setting " + name);
    *place = nb::cast<std::int64_t>(given[name.c_str()]);
    require(*place >= 0, "translation: " + name + " is negative");
    const bool sets = name.size() > 5 && name.compare(name.size() - 5, 5, "_sets") == 0;
    require(!sets || (*place & (*place - 1)) == 0, "translation: " + name + " must be a power of two");
  }
  for (const std::int64_t count : {settings.width, settings.window, settings.outstanding_misses, settings.walkers, settings.data.sets,
                                   settings.code.sets, settings.second.sets, settings.third.sets, settings.data_tlb.sets, settings.code_tlb.sets,
                                   settings.second_tlb.sets, settings.nested_tlb.sets, settings.memory_line_cycles, settings.window_instructions})
    require(count > 0, "translation: a width, window, count of sets or of cycles is 0");
  require(settings.window < mw::Core::kRecent, "translation: the window is too large");
  for (const auto& [name, place] : fields)
    require(name.size() < 5 || name.compare(name.size() - 5, 5, "_ways") != 0 || *place > 0 || name == "third_tlb_ways" || name == "software_ways",
            "translation: " + name + " is 0");
  return settings;
}

void run(mw::TranslationMachine& machine, const Addresses& addresses, const Bytes& kinds, const Bytes& gaps, const Bytes& depends,
         const Bytes& processes, const std::optional<Cycles>& translation, const std::optional<Cycles>& data) {
  const std::size_t count = addresses.shape(0);
  for (const Bytes* one : {&kinds, &gaps, &depends, &processes}) require(one->shape(0) == count, "translation: arrays differ in length");
  require(translation.has_value() == data.has_value(), "translation: both arrays of cycles, or none");
  if (translation) require(translation->shape(0) == count && data->shape(0) == count, "translation: arrays differ in length");
  for (std::size_t i = 0; i < count; ++i)
    require(kinds.data()[i] < mw::kNumKinds && addresses.data()[i] >> 48 == 0, "translation: a kind or an address is out of range");
  const mw::TraceView view{addresses.data(), kinds.data(), gaps.data(), depends.data(), processes.data(), static_cast<std::int64_t>(count),
                           translation ? translation->data() : nullptr, data ? data->data() : nullptr};
  nb::gil_scoped_release release;
  machine.run(view);
}

}  // namespace

void bind_translation(nb::module_& m) {
  nb::class_<mw::TranslationMachine>(m, "TranslationMachine", "A core, its caches and its address translation, over traces")
      .def("__init__", [](mw::TranslationMachine* self, const nb::dict& settings) { new (self) mw::TranslationMachine(settings_of(settings)); },
           "settings"_a)
      .def("map", [](mw::TranslationMachine& self, std::uint8_t process, std::uint64_t first_page, std::uint64_t pages) {
        require(first_page < std::uint64_t{1} << 36 && pages <= (std::uint64_t{1} << 36) - first_page, "translation: addresses have 48 bits");
        nb::gil_scoped_release release;
        self.map(process, first_page, pages);
      }, "process"_a, "first_page"_a, "pages"_a)
      .def("run", &run, "addresses"_a.noconvert(), "kinds"_a.noconvert(), "gaps"_a.noconvert(), "depends"_a.noconvert(),
           "processes"_a.noconvert(), "translation_cycles"_a = nb::none(), "data_cycles"_a = nb::none())
      .def("counters", [](const mw::TranslationMachine& self) {
        nb::dict out;
        for (const auto& [name, value] : self.counters()) out[name.c_str()] = value;
        return out;
      })
      .def("walked_pages", [](const mw::TranslationMachine& self) {
        const auto rows = self.walked_pages();
        nb::list out;
        for (const auto& row : rows) out.append(nb::make_tuple(row[0], row[1], row[2], row[3], row[4]));
        return out;
      }, "(frequency, cost, walks, walks to memory, cycles) of each page that was walked");
}
