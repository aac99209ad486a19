// Measurements of this machine: memory bandwidth and latency, arithmetic rates, disk. Used by memwall.hardware.probe only.
//
// The inner loops differ by instruction set (probe.isa.cpp); threads, passes and clocks are in probe.cpp. Every call is bounded
// by the seconds it is given, so that Python can react to an interrupt between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mw {

// An arithmetic loop whose operands stay in registers: runs `iterations` and returns the operations done (0: not available).
using ArithmeticLoop = double (*)(std::uint64_t iterations);

struct ProbeKernels {
  std::uint64_t (*read)(const void* data, std::size_t nbytes);  // the sum, so that no load can be left out
  void (*write)(void* data, std::size_t nbytes);
  void (*copy)(void* target, const void* source, std::size_t nbytes);
  ArithmeticLoop float32, int8, float16, bfloat16;
};

namespace portable { const ProbeKernels& probe_kernels(); }
namespace avx2 { const ProbeKernels& probe_kernels(); }
namespace avx512 { const ProbeKernels& probe_kernels(); }

// Bytes per second of each pass over a buffer of `nbytes`; kind is "read", "write" or "copy" (bytes read plus bytes written).
// Thread i runs on processors[i] where that is given and the system can pin threads.
std::vector<double> probe_memory(const std::string& kind, std::size_t nbytes, int threads,
                                 const std::vector<int>& processors, double seconds);
// Seconds per dependent load in a random cycle through `nbytes`.
double probe_latency(std::size_t nbytes, double seconds);
// Operations per second of each pass; empty when this processor has no instruction for the type.
std::vector<double> probe_arithmetic(const std::string& dtype, int threads, const std::vector<int>& processors,
                                     double seconds);

// Gives back the buffer that probe_memory and probe_latency keep between calls.
void probe_release();

struct DiskReads {
  std::uint64_t reads;
  double seconds;
  double median_latency_seconds;
};

// Writes `file_bytes` of incompressible data from offset 0 and flushes them; returns the seconds taken.
double probe_disk_write(int fd, std::size_t file_bytes, std::size_t block_bytes, int depth);
// Reads blocks with `depth` of them in flight (one thread each), in order or at random aligned places.
DiskReads probe_disk_read(int fd, std::size_t file_bytes, std::size_t block_bytes, int depth, bool random, double seconds);

}  // namespace mw
