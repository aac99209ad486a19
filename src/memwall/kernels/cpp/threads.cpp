#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mw {
namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kCallerLines = 64;  // of 64 bytes, that the caller fetches ahead at once: it has work of its own between two calls

thread_local Ahead t_ahead;

constexpr int kSpins = 4000;  // about 50-100 us: the gap between two kernels of one token, not more

class Pool {
 public:
  ~Pool() { stop(); }

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void resize(int n) {
    std::lock_guard<std::mutex> guard(calls_);
    stop();
    start(n);
  }

  void run(std::size_t n, std::size_t grain, ChunkBody body) {
    start_region(n, grain, body, [&] {
      runs_in_use_ = false;
      next_.store(0, std::memory_order_relaxed);
    });
  }

  void run_in_runs(std::size_t n, std::size_t least, ChunkBody body, const Ahead* ahead, int num_ahead) {
    start_region(n, least, body, [&] {
      runs_in_use_ = true;
      for (int w = 0; w < size(); ++w) {
        Run& run = runs_[static_cast<std::size_t>(w)];
        run.next.store(run_begin(n, w, size()), std::memory_order_relaxed);
        run.end = run_begin(n, w + 1, size());
        run.ahead = w < num_ahead ? ahead[w] : Ahead{};
      }
    });
    t_ahead = num_ahead > 0 ? ahead[0] : Ahead{};
    t_ahead.fetch(kCallerLines);
  }

 private:
  struct alignas(64) Run {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
    Ahead ahead;
  };

  template <class Prepare>
  void start_region(std::size_t n, std::size_t grain, ChunkBody body, Prepare&& prepare) {
    if (n == 0) return;
    grain = std::max<std::size_t>(grain, 1);
    if (n <= grain) return body(0, n, 0);
    std::unique_lock<std::mutex> guard(calls_);  // two Python threads may call kernels at once: one after the other
    if (workers_.empty()) return body(0, n, 0);
    body_ = &body;
    n_ = n;
    grain_ = grain;
    prepare();
    open_.store(true, std::memory_order_seq_cst);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> wake(sleep_);
      awake_.notify_all();
    }
    drain(0);
    open_.store(false, std::memory_order_seq_cst);
    for (int spin = 0; inside_.load(std::memory_order_seq_cst) != 0; ++spin) {
      if (spin < kSpins) relax();
      else std::this_thread::yield();
    }
  }

  // Takes from a run; half of what is left, so that few chunks make it up and yet the last ones are small.
  void drain_run(Run& run, const ChunkBody& body, int worker) {
    std::size_t begin = run.next.load(std::memory_order_relaxed);
    while (begin < run.end) {
      const std::size_t left = run.end - begin, count = std::min(left, std::max(grain_, left / 2));
      if (!run.next.compare_exchange_weak(begin, begin + count, std::memory_order_relaxed)) continue;
      body(begin, begin + count, worker);
      begin = run.next.load(std::memory_order_relaxed);
    }
  }

  void drain(int worker) {
    const ChunkBody body = *body_;
    if (runs_in_use_) {
      for (int i = 0; i < size(); ++i) drain_run(runs_[static_cast<std::size_t>((worker + i) % size())], body, worker);
      return;
    }
    const std::size_t n = n_, grain = grain_;
    for (;;) {
      const std::size_t begin = next_.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      body(begin, std::min(begin + grain, n), worker);
    }
  }

  void start(int n) {
    quit_ = false;
    runs_ = std::make_unique<Run[]>(static_cast<std::size_t>(n));
    const unsigned seen = epoch_.load();
    for (int i = 1; i < n; ++i) workers_.emplace_back([this, i, seen] { loop(i, seen); });
  }

  void stop() {
    {
      std::lock_guard<std::mutex> guard(sleep_);
      quit_ = true;
      awake_.notify_all();
    }
    for (auto& worker : workers_) worker.join();
    workers_.clear();
  }

  void loop(int worker, unsigned seen) {
    for (;;) {
      int spin = 0;
      while (epoch_.load(std::memory_order_acquire) == seen && !quit_) {
        if (++spin < kSpins) {
          relax();
          continue;
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        awake_.wait(lock, [&] { return epoch_.load(std::memory_order_seq_cst) != seen || quit_; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (quit_) return;
      seen = epoch_.load(std::memory_order_acquire);
      // Say "inside" first and look second, while the caller closes first and looks second: either the caller waits for this
      // worker, or this worker sees that it came too late and leaves `body_` alone.
      inside_.fetch_add(1, std::memory_order_seq_cst);
      if (open_.load(std::memory_order_seq_cst)) {
        if (runs_in_use_) t_ahead = runs_[static_cast<std::size_t>(worker)].ahead;
        drain(worker);
      }
      inside_.fetch_sub(1, std::memory_order_seq_cst);
      while (t_ahead.left() && epoch_.load(std::memory_order_relaxed) == seen) t_ahead.fetch(16);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex calls_, sleep_;
  std::condition_variable awake_;
  std::atomic<bool> quit_{false};
  std::atomic<unsigned> epoch_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<int> inside_{0};  // workers that may be using body_
  std::atomic<bool> open_{false};           // chunks are being handed out
  std::unique_ptr<Run[]> runs_;             // of each worker
  bool runs_in_use_ = false;                // else chunks come from next_
  const ChunkBody* body_ = nullptr;
  std::size_t n_ = 0, grain_ = 1;
};

// Started at first use, so that importing the module starts no thread. After a fork the child has none of the parent's threads:
// it gets a new pool, and the old one's memory is left alone.
Pool* g_pool = nullptr;
int g_threads = 0;
std::mutex g_mutex;

// What the calling thread alone uses instead of the shared pool; see `set_lane_threads`.
thread_local int t_lane = 0;
thread_local std::unique_ptr<Pool> t_pool;

Pool& pool() {
  std::lock_guard<std::mutex> guard(g_mutex);
  if (g_pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      g_pool = nullptr;
      (void)t_pool.release();
      t_lane = 0;
    });
    (void)registered;
    if (g_threads == 0) g_threads = std::max(1u, std::thread::hardware_concurrency());
    g_pool = new Pool();
    g_pool->resize(g_threads);
  }
  return *g_pool;
}

}  // namespace

int num_threads() { return pool().size(); }

void set_num_threads(int n) {
  n = std::max(n, 1);
  {
    std::lock_guard<std::mutex> guard(g_mutex);
    g_threads = n;
    if (g_pool == nullptr) return;
  }
  if (pool().size() != n) pool().resize(n);
}

int lane_threads() { return t_lane; }

void set_lane_threads(int n) {
  n = std::clamp(n, 0, num_threads());
  if (n == t_lane) return;
  t_lane = n;
  t_pool.reset();
  if (n < 2) return;
  t_pool = std::make_unique<Pool>();
  t_pool->resize(n);
}

void parallel_for(std::size_t n, std::size_t grain, ChunkBody body) {
  if (t_lane == 0) return pool().run(n, grain, body);
  // scratch is per worker of `num_threads`: a lane that was made when there were more of them works alone
  if (t_pool && t_pool->size() <= num_threads()) return t_pool->run(n, grain, body);
  grain = std::max<std::size_t>(grain, 1);
  for (std::size_t begin = 0; begin < n; begin += grain) body(begin, std::min(begin + grain, n), 0);
}

void parallel_runs(std::size_t n, std::size_t least, ChunkBody body, const Ahead* ahead, int num_ahead) {
  if (t_lane == 0) return pool().run_in_runs(n, least, body, ahead, num_ahead);
  if (t_pool && t_pool->size() <= num_threads()) return t_pool->run_in_runs(n, least, body, ahead, num_ahead);
  if (n > 0) body(0, n, 0);
}

Ahead& ahead_here() { return t_ahead; }

}  // namespace mw
