// A fixed pool of worker threads shared by every kernel of the process.
//
// Workers wait in two phases: they spin for some microseconds, because in decoding the next kernel follows at once, and then
// sleep in the kernel (futex), because a program that waits for input must not burn a core. Work is handed out in chunks from an
// atomic counter, so a worker that the operating system has put aside delays only the chunk it holds; one that is still asleep
// when all chunks are taken is not waited for.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace mw {

// Number of threads that kernels use, the calling thread included.
int num_threads();
void set_num_threads(int n);

// A lane: kernels that the calling thread starts use `n` threads of its own, itself included, and run beside those of other
// threads instead of after them; 0 goes back to the shared pool, more than `num_threads` is cut to that. How work is cut, and so
// every bit of a result, still follows `num_threads`. Products with matrices stay one at a time (one scratch).
int lane_threads();
void set_lane_threads(int n);

// A borrowed callable: unlike std::function it never allocates. The callable must outlive the call, as a lambda argument does.
class ChunkBody {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, ChunkBody>>>
  ChunkBody(F&& f)  // implicit, so that a lambda can be passed as it is
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, std::size_t begin, std::size_t end, int worker) {
          (*static_cast<std::remove_reference_t<F>*>(object))(begin, end, worker);
        }) {}
  void operator()(std::size_t begin, std::size_t end, int worker) const { call_(object_, begin, end, worker); }

 private:
  void* object_;
  void (*call_)(void*, std::size_t, std::size_t, int);
};

// Calls body(begin, end, worker) over [0, n) in chunks of `grain` (the last may be shorter); worker is in [0, num_threads()).
// Runs inline when there is one chunk or one thread. Not reentrant: a body must not call parallel_for, nor throw.
void parallel_for(std::size_t n, std::size_t grain, ChunkBody body);

}  // namespace mw
