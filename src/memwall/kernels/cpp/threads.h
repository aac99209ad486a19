// A fixed pool of worker threads shared by every kernel of the process.
//
// Workers wait in two phases: they spin for a few microseconds, because in decoding the next kernel follows at once, and then
// sleep in the kernel (futex), because a program that waits for input must not burn a core. Work is handed out in chunks from an
// atomic counter, so a worker that the operating system has put aside delays only the chunk it holds.
#pragma once

#include <cstddef>
#include <functional>

namespace mw {

// Number of threads that kernels use, the calling thread included.
int num_threads();
void set_num_threads(int n);

// Calls body(begin, end, worker) over [0, n) in chunks of `grain` (the last may be shorter); worker is in [0, num_threads()).
// Runs inline when there is one chunk or one thread. Not reentrant: a body must not call parallel_for.
void parallel_for(std::size_t n, std::size_t grain, const std::function<void(std::size_t, std::size_t, int)>& body);

}  // namespace mw
