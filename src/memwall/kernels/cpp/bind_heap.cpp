// The C heap's habits. glibc raises its own thresholds when large blocks are freed and then keeps up to 64 MB of free memory in
// the process; a program that promises a resident set can't have that.
#include <nanobind/nanobind.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace nb = nanobind;

namespace {

constexpr int kLargeBlock = 256 << 10;  // from here on a block is a mapping of its own and leaves with its owner
constexpr int kKeptFree = 512 << 10;    // free memory kept at the heap's end

void give_back_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, kLargeBlock);
  mallopt(M_TRIM_THRESHOLD, kKeptFree);
  malloc_trim(0);
#endif
}

}  // namespace

void bind_heap(nb::module_& m) {
  m.def("give_back_freed_memory", &give_back_freed_memory,
        "Free heap memory goes back to the system, now and from now on (glibc; elsewhere nothing happens)");
}
