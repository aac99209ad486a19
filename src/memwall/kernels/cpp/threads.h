// A fixed pool of worker threads shared by every kernel of the process.
//
// Workers wait in two phases: they spin for some microseconds, because in decoding the next kernel follows at once, and then
// sleep in the kernel (futex), because a program that waits for input must not burn a core. Work is handed out in chunks from
// atomic counters, so a worker that the operating system has put aside delays only the chunk it holds; one that is still asleep
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

// What a thread is to read in the calls after this one, as far as that is known: it fetches it while it would wait, or while the
// memory has less to do than the thread. Addresses are never read: they may be of what is gone.
struct Ahead {
  static constexpr int kSpans = 3;
  static constexpr std::size_t kLine = 64;
  struct Span {
    const char* at = nullptr;
    std::size_t bytes = 0;
  };
  Span spans[kSpans];

  bool left() const { return spans[0].bytes > 0; }
  // Asks for some more lines, for the second-level cache. Always inline: kernels use it too, and no copy that was compiled for their
  // instruction set may be what the linker keeps for all.
  __attribute__((always_inline)) void fetch(int lines) {
    for (Span& first = spans[0]; lines > 0 && first.bytes > 0; --lines) {
      __builtin_prefetch(first.at, 0, 2);
      first.at += kLine;
      first.bytes -= first.bytes < kLine ? first.bytes : kLine;
      if (first.bytes == 0) drop();
    }
  }

 private:
  __attribute__((always_inline)) void drop() {
    for (int i = 0; i + 1 < kSpans; ++i) spans[i] = spans[i + 1];
    spans[kSpans - 1] = {};
  }
};

// What the calling thread has not fetched yet of what it was told.
Ahead& ahead_here();

// The same for work that streams through memory. Worker w has a run of its own, [run_begin(n, w), run_begin(n, w + 1)), and takes half
// of what is left of it at a time, `least` at least: it reads on where it was, so that what the processor fetched in advance is
// not lost. Who is done takes from the others' runs in the same way. ahead: of each of `num_ahead` workers; need not outlive the call.
void parallel_runs(std::size_t n, std::size_t least, ChunkBody body, const Ahead* ahead = nullptr, int num_ahead = 0);
inline std::size_t run_begin(std::size_t n, int worker, int workers) { return n * static_cast<std::size_t>(worker) / static_cast<std::size_t>(workers); }

}  // namespace mw
