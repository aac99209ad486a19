// Inner loops of the probe, once per instruction set. Wide independent accumulators, so that neither latency nor the front end
// is what gets measured.
#include "probe.h"

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MW_HAVE_FP16 1
#endif

namespace mw::MW_ISA {
namespace {

constexpr std::size_t kChunk = 1024;  // bytes per unrolled step; callers pass multiples of it

#if defined(__AVX512VNNI__)

std::uint64_t read(const void* data, std::size_t nbytes) {
  const char* p = static_cast<const char*>(data);
  __m512i sum[8] = {};
  for (std::size_t i = 0; i < nbytes; i += 512)
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_add_epi64(sum[j], _mm512_load_si512(p + i + 64 * j));
  for (int j = 1; j < 8; ++j) sum[0] = _mm512_add_epi64(sum[0], sum[j]);
  alignas(64) std::uint64_t lanes[8];
  _mm512_store_si512(lanes, sum[0]);
  for (int j = 1; j < 8; ++j) lanes[0] += lanes[j];
  return lanes[0];
}

void write(void* data, std::size_t nbytes) {
  char* p = static_cast<char*>(data);
  const __m512i value = _mm512_set1_epi64(static_cast<long long>(nbytes));
  for (std::size_t i = 0; i < nbytes; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p + i), value);
  _mm_sfence();
}

void copy(void* target, const void* source, std::size_t nbytes) {
  char* t = static_cast<char*>(target);
  const char* s = static_cast<const char*>(source);
  for (std::size_t i = 0; i < nbytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(t + i), _mm512_load_si512(s + i));
  _mm_sfence();
}

constexpr int kSums = 24;

double float32(std::uint64_t iterations) {
  __m512 sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ps(1.0f + 0.01f * static_cast<float>(j));
  __m512 scale = _mm512_set1_ps(0.999f), shift = _mm512_set1_ps(0.001f);
  asm volatile("" : "+v"(scale), "+v"(shift));
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_fmadd_ps(sum[j], scale, shift);
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "v"(sum[j]));
  return 2.0 * 16 * kSums * static_cast<double>(iterations);
}

double int8(std::uint64_t iterations) {
  __m512i sum[kSums] = {};
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-5);
  asm volatile("" : "+v"(a), "+v"(b));
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], a, b);
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "v"(sum[j]));
  return 2.0 * 64 * kSums * static_cast<double>(iterations);
}

__attribute__((target("avx512bf16"))) double bfloat16_loop(std::uint64_t iterations) {
  __m512 sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ps(static_cast<float>(j));
  const __m512 one = _mm512_set1_ps(0.5f);
  __m512bh a = _mm512_cvtne2ps_pbh(one, one), b = a;
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], a, b);
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "v"(sum[j]));
  return 2.0 * 32 * kSums * static_cast<double>(iterations);
}

double bfloat16(std::uint64_t iterations) {
  return __builtin_cpu_supports("avx512bf16") ? bfloat16_loop(iterations) : 0.0;
}

#if defined(MW_HAVE_FP16)
__attribute__((target("avx512fp16"))) double float16_loop(std::uint64_t iterations) {
  __m512h sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = _mm512_set1_ph(static_cast<_Float16>(1));
  const __m512h scale = _mm512_set1_ph(static_cast<_Float16>(0.99)), shift = _mm512_set1_ph(static_cast<_Float16>(0.01));
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kSums; ++j) sum[j] = _mm512_fmadd_ph(sum[j], scale, shift);
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "v"(sum[j]));
  return 2.0 * 32 * kSums * static_cast<double>(iterations);
}

double float16(std::uint64_t iterations) {
  return __builtin_cpu_supports("avx512fp16") ? float16_loop(iterations) : 0.0;
}
#else
double float16(std::uint64_t) { return 0.0; }
#endif

#elif defined(__AVX2__)

std::uint64_t read(const void* data, std::size_t nbytes) {
  const char* p = static_cast<const char*>(data);
  __m256i sum[8] = {};
  for (std::size_t i = 0; i < nbytes; i += 256)
    for (int j = 0; j < 8; ++j)
      sum[j] = _mm256_add_epi64(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_add_epi64(sum[0], sum[j]);
  alignas(32) std::uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sum[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

void write(void* data, std::size_t nbytes) {
  char* p = static_cast<char*>(data);
  const __m256i value = _mm256_set1_epi64x(static_cast<long long>(nbytes));
  for (std::size_t i = 0; i < nbytes; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p + i), value);
  _mm_sfence();
}

void copy(void* target, const void* source, std::size_t nbytes) {
  char* t = static_cast<char*>(target);
  const char* s = static_cast<const char*>(source);
  for (std::size_t i = 0; i < nbytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(t + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(s + i)));
  _mm_sfence();
}

constexpr int kSums = 12;

double float32(std::uint64_t iterations) {
  __m256 sum[kSums];
  for (int j = 0; j < kSums; ++j) sum[j] = _mm256_set1_ps(1.0f + 0.01f * static_cast<float>(j));
  __m256 scale = _mm256_set1_ps(0.999f), shift = _mm256_set1_ps(0.001f);
  asm volatile("" : "+x"(scale), "+x"(shift));
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < kSums; ++j) sum[j] = _mm256_fmadd_ps(sum[j], scale, shift);
  for (int j = 0; j < kSums; ++j) asm volatile("" : : "x"(sum[j]));
  return 2.0 * 8 * kSums * static_cast<double>(iterations);
}

// Multiply bytes, sum pairs, keep the sums in 16 bits: what a kernel does between two widenings.
double int8(std::uint64_t iterations) {
  __m256i sum[8] = {};
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-5);
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < 8; ++j) {
      asm volatile("" : "+x"(a));  // the product must be computed every time
      sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(a, b));
    }
  for (int j = 0; j < 8; ++j) asm volatile("" : : "x"(sum[j]));
  return 2.0 * 32 * 8 * static_cast<double>(iterations);
}

double float16(std::uint64_t) { return 0.0; }
double bfloat16(std::uint64_t) { return 0.0; }

#else

std::uint64_t read(const void* data, std::size_t nbytes) {
  const std::uint64_t* p = static_cast<const std::uint64_t*>(data);
  std::uint64_t sum[16] = {};
  for (std::size_t i = 0; i < nbytes / 8; i += 16)
    for (int j = 0; j < 16; ++j) sum[j] += p[i + j];
  for (int j = 1; j < 16; ++j) sum[0] += sum[j];
  return sum[0];
}

void write(void* data, std::size_t nbytes) {
  std::memset(data, 0x5A, nbytes);
}

void copy(void* target, const void* source, std::size_t nbytes) {
  std::memcpy(target, source, nbytes);
}

// 64 sums: sixteen vectors of four lanes, which compilers keep in registers where there are 32 (ARM) and nearly so elsewhere.
double float32(std::uint64_t iterations) {
  float sum[64];
  for (int j = 0; j < 64; ++j) sum[j] = 1.0f + 0.01f * static_cast<float>(j);
  for (std::uint64_t i = 0; i < iterations; ++i)
    for (int j = 0; j < 64; ++j) sum[j] = sum[j] * 0.999f + 0.001f;
  float total = 0;
  for (float value : sum) total += value;
  asm volatile("" : : "g"(total));
  return 2.0 * 64 * static_cast<double>(iterations);
}

double int8(std::uint64_t iterations) {
  std::int32_t sum[16] = {};
  std::int8_t a[64], b[64];
  std::memset(a, 3, sizeof a);
  std::memset(b, 5, sizeof b);
  for (std::uint64_t i = 0; i < iterations; ++i) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 4; ++k) sum[j] += static_cast<int>(a[4 * j + k]) * static_cast<int>(b[4 * j + k]);
  }
  std::int32_t total = 0;
  for (std::int32_t value : sum) total += value;
  asm volatile("" : : "r"(total));
  return 2.0 * 64 * static_cast<double>(iterations);
}

double float16(std::uint64_t) { return 0.0; }
double bfloat16(std::uint64_t) { return 0.0; }

#endif

static_assert(kChunk % 512 == 0, "the widest step must divide the chunk");

}  // namespace

const ProbeKernels& probe_kernels() {
  static const ProbeKernels kernels{read, write, copy, float32, int8, float16, bfloat16};
  return kernels;
}

}  // namespace mw::MW_ISA
