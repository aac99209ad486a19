#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <system_error>
#include <tuple>

#include "probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// std::system_error as OSError, with the error number
template <typename Function>
auto translated(Function function) {
  try {
    nb::gil_scoped_release release;
    return function();
  } catch (const std::system_error& error) {
    nb::gil_scoped_acquire acquire;
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
}

}  // namespace

void bind_probe(nb::module_& m) {
  m.def("probe_memory", &mw::probe_memory, "kind"_a, "nbytes"_a, "threads"_a, "processors"_a, "seconds"_a,
        nb::call_guard<nb::gil_scoped_release>(), "Bytes per second of each pass: read, write or copy");
  m.def("probe_latency", &mw::probe_latency, "nbytes"_a, "seconds"_a, nb::call_guard<nb::gil_scoped_release>(),
        "Seconds per dependent load in a random cycle through nbytes");
  m.def("probe_arithmetic", &mw::probe_arithmetic, "dtype"_a, "threads"_a, "processors"_a, "seconds"_a,
        nb::call_guard<nb::gil_scoped_release>(), "Operations per second of each pass; empty when not native");
  m.def("probe_release", &mw::probe_release, "Gives back the buffer that the memory measurements keep between calls");
  m.def("probe_disk_write", [](int fd, std::size_t file_bytes, std::size_t block_bytes, int depth) {
    return translated([&] { return mw::probe_disk_write(fd, file_bytes, block_bytes, depth); });
  }, "fd"_a, "file_bytes"_a, "block_bytes"_a, "depth"_a, "Seconds to write and flush the file");
  m.def("probe_disk_read",
        [](int fd, std::size_t file_bytes, std::size_t block_bytes, int depth, bool random, double seconds) {
          const mw::DiskReads reads =
              translated([&] { return mw::probe_disk_read(fd, file_bytes, block_bytes, depth, random, seconds); });
          return std::make_tuple(reads.reads, reads.seconds, reads.median_latency_seconds);
        },
        "fd"_a, "file_bytes"_a, "block_bytes"_a, "depth"_a, "random"_a, "seconds"_a,
        "(reads done, seconds taken, median seconds of one read)");
}
