#include "probe.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

#include "dispatch.h"

namespace mw {
namespace {

constexpr std::size_t kChunk = 4096;
constexpr std::size_t kDirectAlignment = 4096;  // enough for direct I/O on every common drive
constexpr int kMostPasses = 1000;
constexpr std::size_t kWindow = std::size_t(32) << 20;  // bytes one thread moves in a pass: about a millisecond
constexpr double kPassSeconds = 0.001;
constexpr int kNearBest = 4;

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const ProbeKernels& kernels() {
#if defined(MW_X86)
  if (active_isa() >= Isa::avx512) return avx512::probe_kernels();
  if (active_isa() == Isa::avx2) return avx2::probe_kernels();
#endif
  return portable::probe_kernels();
}

// splitmix64: small, and its output does not compress
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = (state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
};

// Anonymous memory on huge pages where there are any, so that address translation is not what gets measured.
class Buffer {
 public:
  explicit Buffer(std::size_t nbytes) : nbytes_((nbytes + kHuge - 1) / kHuge * kHuge) {
    void* p = mmap(nullptr, nbytes_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = p;
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p);
    data_ = reinterpret_cast<char*>((address + kHuge - 1) / kHuge * kHuge);
#if defined(MADV_HUGEPAGE)
    madvise(data_, nbytes_, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { munmap(base_, nbytes_ + kHuge); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return data_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  static constexpr std::size_t kHuge = std::size_t(2) << 20;
  std::size_t nbytes_;
  void* base_;
  char* data_;
};

class Barrier {
 public:
  explicit Barrier(int parties) : parties_(parties) {}
  void wait() {
    const int turn = turn_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == parties_) {
      waiting_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_release);
      return;
    }
    // Spin for longer than a time slice before yielding: on a busy machine whoever yields is away when the others go on, and
    // then the threads run one after the other instead of at once.
    const Clock::time_point start = Clock::now();
    for (int spin = 1; turn_.load(std::memory_order_acquire) == turn; ++spin)
      if (spin % 1024 == 0 && since(start) > kSpinSeconds) std::this_thread::yield();
  }

 private:
  static constexpr double kSpinSeconds = 0.01;
  const int parties_;
  std::atomic<int> waiting_{0}, turn_{0};
};

// Ties the calling thread to one processor, so that the scheduler cannot put two of ours on the same one, and lets it go again.
class Pin {
 public:
  explicit Pin(int processor) {
#if defined(__linux__)
    if (processor < 0 || processor >= CPU_SETSIZE || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    pinned_ = sched_setaffinity(0, sizeof one, &one) == 0;
#else
    (void)processor;
#endif
  }
  ~Pin() {
#if defined(__linux__)
    if (pinned_) sched_setaffinity(0, sizeof before_, &before_);
#endif
  }
  Pin(const Pin&) = delete;
  Pin& operator=(const Pin&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_;
  bool pinned_ = false;
#endif
};

// Runs `work(thread)` on all threads at once, again and again, for about `seconds`; returns the duration of each pass, from the
// first thread's start to the last one's end. A warm-up pass, which touches pages, is not among them.
std::vector<double> timed_passes(int threads, const std::vector<int>& processors, double seconds,
                                 const std::function<void(int)>& work) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be between 1 and 4096");
  struct alignas(64) Span {
    Clock::time_point start, end;
  };
  Barrier barrier(threads);
  bool done = false;  // written by thread 0 between two barriers, read by all after the second
  std::vector<Span> spans(static_cast<std::size_t>(threads));
  std::vector<double> durations;
  auto finish_pass = [&](Clock::time_point begin) {
    Span whole = spans[0];
    for (const Span& span : spans) {
      whole.start = std::min(whole.start, span.start);
      whole.end = std::max(whole.end, span.end);
    }
    durations.push_back(std::chrono::duration<double>(whole.end - whole.start).count());
    // Where other work disturbs most passes, go on until the best has been seen several times, up to three times as long.
    const double best = *std::min_element(durations.begin(), durations.end());
    const auto near_best = std::count_if(durations.begin(), durations.end(), [&](double d) { return d < 1.05 * best; });
    const double elapsed = since(begin);
    done = durations.size() >= kMostPasses || (durations.size() >= 3 && elapsed >= 3 * seconds) ||
           (near_best >= kNearBest && elapsed >= seconds);
  };
  auto loop = [&](int thread) {
    const std::size_t index = static_cast<std::size_t>(thread);
    const Pin pin(index < processors.size() ? processors[index] : -1);
    Span& own = spans[index];
    work(thread);
    barrier.wait();
    const Clock::time_point begin = Clock::now();
    while (!done) {
      own.start = Clock::now();
      work(thread);
      own.end = Clock::now();
      barrier.wait();
      if (thread == 0) finish_pass(begin);
      barrier.wait();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(loop, i);
  loop(0);
  for (auto& other : others) other.join();
  return durations;
}

std::atomic<std::uint64_t> g_sink{0};

// Kept between calls: the first touch of fresh memory can cost more than all measurements together.
std::unique_ptr<Buffer> g_buffer;
std::mutex g_buffer_mutex;

char* shared_buffer(std::size_t nbytes) {
  if (!g_buffer || g_buffer->nbytes() < nbytes) {
    g_buffer.reset();
    g_buffer = std::make_unique<Buffer>(nbytes);
  }
  return g_buffer->data();
}

}  // namespace

void probe_release() {
  std::lock_guard<std::mutex> guard(g_buffer_mutex);
  g_buffer.reset();
}

std::vector<double> probe_memory(const std::string& kind, std::size_t nbytes, int threads,
                                 const std::vector<int>& processors, double seconds) {
  const bool copying = kind == "copy", reading = kind == "read";
  if (!copying && !reading && kind != "write") throw std::invalid_argument("kind must be read, write or copy");
  // Each thread has a part of its own and goes through it window by window: passes are short, so that on a busy machine some
  // are undisturbed, and yet a byte comes up again only after the whole buffer.
  const std::size_t part = nbytes / static_cast<std::size_t>(std::max(threads, 1)) / kChunk * kChunk;
  const std::size_t window = std::min(part, kWindow) / 2 / kChunk * 2 * kChunk;
  if (window == 0) throw std::invalid_argument("the buffer is too small for so many threads");
  const std::size_t num_windows = part / window;
  std::lock_guard<std::mutex> guard(g_buffer_mutex);
  char* data = shared_buffer(nbytes);
  const ProbeKernels& kernel = kernels();
  struct alignas(64) Progress {
    std::size_t passes = 0;
  };
  std::vector<Progress> progress(static_cast<std::size_t>(threads));
  std::vector<double> rates = timed_passes(threads, processors, seconds, [&](int thread) {
    char* own = data + part * static_cast<std::size_t>(thread);
    std::size_t& passes = progress[static_cast<std::size_t>(thread)].passes;
    if (passes++ == 0) return kernel.write(own, part);  // the thread that will use the pages places them
    char* at = own + window * (passes % num_windows);
    if (reading) g_sink.fetch_add(kernel.read(at, window), std::memory_order_relaxed);
    else if (copying) kernel.copy(at, at + window / 2, window / 2);
    else kernel.write(at, window);
  });
  for (double& rate : rates) rate = static_cast<double>(window) * threads / rate;
  return rates;
}

double probe_latency(std::size_t nbytes, double seconds) {
  constexpr std::size_t kLine = 64;
  const std::size_t lines = nbytes / kLine;
  if (lines < 2 || lines > 0xFFFFFFFFu) throw std::invalid_argument("nbytes must be at least two cache lines");
  std::lock_guard<std::mutex> guard(g_buffer_mutex);
  char* data = shared_buffer(nbytes);
  // Sattolo's shuffle gives one single cycle through all lines
  std::vector<std::uint32_t> order(lines);
  for (std::size_t i = 0; i < lines; ++i) order[i] = static_cast<std::uint32_t>(i);
  Random random{42};
  for (std::size_t i = lines - 1; i > 0; --i) std::swap(order[i], order[random.next() % i]);
  for (std::size_t i = 0; i < lines; ++i)
    *reinterpret_cast<void**>(data + kLine * i) = data + kLine * order[i];
  void* at = data;
  std::vector<double> times;
  const std::size_t steps = std::min<std::size_t>(std::max<std::size_t>(lines, 1 << 14), 1 << 17);
  for (const Clock::time_point begin = Clock::now(); times.size() < 4 || since(begin) < seconds;) {
    const Clock::time_point start = Clock::now();
    for (std::size_t i = 0; i < steps; ++i) at = *static_cast<void**>(at);
    asm volatile("" : : "r"(at));
    times.push_back(since(start) / static_cast<double>(steps));
  }
  times.erase(times.begin());  // the first pass warms the caches
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

std::vector<double> probe_arithmetic(const std::string& dtype, int threads, const std::vector<int>& processors,
                                     double seconds) {
  const ProbeKernels& kernel = kernels();
  const ArithmeticLoop loop = dtype == "float32"    ? kernel.float32
                              : dtype == "int8"     ? kernel.int8
                              : dtype == "float16"  ? kernel.float16
                              : dtype == "bfloat16" ? kernel.bfloat16
                                                    : nullptr;
  if (loop == nullptr) throw std::invalid_argument("dtype must be float32, int8, float16 or bfloat16");
  if (loop(1) == 0.0) return {};
  std::uint64_t iterations = 1 << 10;
  double operations = 0;
  for (;;) {  // passes long enough that clocks and barriers do not count
    const Clock::time_point start = Clock::now();
    operations = loop(iterations);
    if (since(start) >= kPassSeconds) break;
    iterations *= 2;
  }
  std::vector<double> rates = timed_passes(threads, processors, seconds, [&](int) { loop(iterations); });
  for (double& rate : rates) rate = operations * threads / rate;
  return rates;
}

namespace {

struct Aligned {
  explicit Aligned(std::size_t nbytes) {
    if (posix_memalign(&data, kDirectAlignment, nbytes) != 0) throw std::bad_alloc();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  void* data = nullptr;
};

void check_disk_arguments(std::size_t file_bytes, std::size_t block_bytes, int depth) {
  if (block_bytes == 0 || block_bytes % 512 != 0 || file_bytes < block_bytes)
    throw std::invalid_argument("blocks must be multiples of 512 bytes and no larger than the file");
  if (depth < 1 || depth > 256) throw std::invalid_argument("depth must be between 1 and 256");
}

// Runs `work(thread)` on `depth` threads and rethrows the first failure as an operating system error.
void run_deep(int depth, const std::function<int(int)>& work) {
  std::atomic<int> failure{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < depth; ++i)
    threads.emplace_back([&, i] {
      int expected = 0;
      const int error = work(i);
      if (error != 0) failure.compare_exchange_strong(expected, error);
    });
  for (auto& thread : threads) thread.join();
  if (failure.load() != 0) throw std::system_error(failure.load(), std::generic_category());
}

int whole(ssize_t moved, std::size_t wanted) {
  if (moved < 0) return errno;
  return static_cast<std::size_t>(moved) == wanted ? 0 : EIO;
}

}  // namespace

double probe_disk_write(int fd, std::size_t file_bytes, std::size_t block_bytes, int depth) {
  check_disk_arguments(file_bytes, block_bytes, depth);
  const std::size_t blocks = file_bytes / block_bytes;
  std::atomic<std::size_t> next{0};
  Clock::time_point start = Clock::now();
  Barrier filled(depth);
  run_deep(depth, [&](int thread) -> int {
    Aligned buffer(block_bytes);
    std::uint64_t* words = static_cast<std::uint64_t*>(buffer.data);
    Random random{static_cast<std::uint64_t>(thread) + 1};
    for (std::size_t i = 0; i < block_bytes / 8; ++i) words[i] = random.next();
    filled.wait();
    if (thread == 0) start = Clock::now();
    for (std::size_t block; (block = next.fetch_add(1)) < blocks;) {
      words[0] = random.next();  // no two blocks alike
      const off_t at = static_cast<off_t>(block * block_bytes);
      if (const int error = whole(pwrite(fd, buffer.data, block_bytes, at), block_bytes)) return error;
    }
    return 0;
  });
  if (fsync(fd) != 0) throw std::system_error(errno, std::generic_category());
  return since(start);
}

DiskReads probe_disk_read(int fd, std::size_t file_bytes, std::size_t block_bytes, int depth, bool random, double seconds) {
  check_disk_arguments(file_bytes, block_bytes, depth);
  const std::size_t blocks = file_bytes / block_bytes;
  std::atomic<std::size_t> next{0};
  std::vector<std::vector<double>> latencies(static_cast<std::size_t>(depth));
  Barrier ready(depth);
  Clock::time_point begin = Clock::now();
  run_deep(depth, [&](int thread) -> int {
    Aligned buffer(block_bytes);
    std::vector<double>& own = latencies[static_cast<std::size_t>(thread)];
    own.reserve(1 << 14);
    Random places{static_cast<std::uint64_t>(thread) * 7919 + block_bytes};
    ready.wait();
    if (thread == 0) begin = Clock::now();
    const Clock::time_point mine = Clock::now();
    do {
      const std::size_t block = (random ? static_cast<std::size_t>(places.next()) : next.fetch_add(1)) % blocks;
      const Clock::time_point start = Clock::now();
      const off_t at = static_cast<off_t>(block * block_bytes);
      if (const int error = whole(pread(fd, buffer.data, block_bytes, at), block_bytes)) return error;
      own.push_back(since(start));
    } while (since(mine) < seconds);
    return 0;
  });
  const double elapsed = since(begin);
  std::vector<double> all;
  for (const auto& own : latencies) all.insert(all.end(), own.begin(), own.end());
  std::nth_element(all.begin(), all.begin() + all.size() / 2, all.end());
  return {all.size(), elapsed, all[all.size() / 2]};
}

}  // namespace mw
