#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
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

  void run(std::size_t n, std::size_t grain, const std::function<void(std::size_t, std::size_t, int)>& body) {
    if (n == 0) return;
    grain = std::max<std::size_t>(grain, 1);
    std::unique_lock<std::mutex> guard(calls_);  // two Python threads may call kernels at once: one after the other
    if (workers_.empty() || n <= grain) {
      guard.unlock();
      body(0, n, 0);
      return;
    }
    body_ = &body;
    n_ = n;
    grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> wake(sleep_);
      awake_.notify_all();
    }
    drain(0);
    for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpins) relax();
      else std::this_thread::yield();
    }
  }

 private:
  void drain(int worker) {
    const auto& body = *body_;
    const std::size_t n = n_, grain = grain_;
    for (;;) {
      const std::size_t begin = next_.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      body(begin, std::min(begin + grain, n), worker);
    }
  }

  void start(int n) {
    quit_ = false;
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
      drain(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex calls_, sleep_;
  std::condition_variable awake_;
  std::atomic<bool> quit_{false};
  std::atomic<unsigned> epoch_{0};
  std::atomic<int> sleepers_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  alignas(64) std::atomic<int> busy_{0};
  const std::function<void(std::size_t, std::size_t, int)>* body_ = nullptr;
  std::size_t n_ = 0, grain_ = 1;
};

// Started at first use, so that importing the module starts no thread. After a fork the child has none of the parent's threads:
// it gets a new pool, and the old one's memory is left alone.
Pool* g_pool = nullptr;
int g_threads = 0;
std::mutex g_mutex;

Pool& pool() {
  std::lock_guard<std::mutex> guard(g_mutex);
  if (g_pool == nullptr) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { g_pool = nullptr; });
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

void parallel_for(std::size_t n, std::size_t grain, const std::function<void(std::size_t, std::size_t, int)>& body) {
  pool().run(n, grain, body);
}

}  // namespace mw
