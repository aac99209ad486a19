"""The fixed parts of emitted C++: vectors, conversions, the product of tiles, and the loop over blocks."""

from __future__ import annotations

PRELUDE = r"""// written by memwall.kernels.tile_cpp
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#if defined(__F16C__) || defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int LANES = @LANES@;
typedef float VF __attribute__((vector_size(LANES * 4)));
typedef uint32_t VU __attribute__((vector_size(LANES * 4)));
typedef int32_t VI __attribute__((vector_size(LANES * 4)));
typedef uint16_t VH __attribute__((vector_size(LANES * 2)));
typedef uint8_t VB __attribute__((vector_size(LANES)));

static inline VF all(float x) { return VF{} + x; }
static inline VU none() { return VU{}; }
static inline VF select(VI test, VF a, VF b) { return test ? a : b; }
static inline VU select(VI test, VU a, VU b) { return test ? a : b; }
static inline VF as_floats(VU x) { return (VF)x; }  // the same bits
static inline VU as_words(VF x) { return (VU)x; }
static inline VF numbers(VI x) { return __builtin_convertvector(x, VF); }

// ---- float16 and bfloat16; both in the low halves of words

static inline VF from_bf16(VU half) { return as_floats(half << 16); }
static inline VU bits_bf16(VF x) {
    const VU u = as_words(x);
    return (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
}
static inline VF round_bf16(VF x) { return from_bf16(bits_bf16(x)); }

#if defined(__AVX512F__) && @LANES@ == 16
static inline VF from_f16(VU half) { return (VF)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half)); }
static inline VU bits_f16(VF x) {
    return (VU)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__) && @LANES@ == 8
static inline VF from_f16(VU half) { return (VF)_mm256_cvtph_ps((__m128i)__builtin_convertvector(half, VH)); }
static inline VU bits_f16(VF x) {
    const VH halves = (VH)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return __builtin_convertvector(halves, VU);
}
#else
static inline VF from_f16(VU half) {
    const VU size = half & 0x7FFFu, sign = (half & 0x8000u) << 16;
    const VU wide = (size << 13) + (112u << 23);
    const VU large = select((VI)(size >= 0x7C00u), wide + (112u << 23), wide);
    const VF small = numbers((VI)size) * 5.9604644775390625e-8f;
    return as_floats(select((VI)(size < 0x400u), as_words(small), large) | sign);
}
static inline VU bits_f16(VF x) {
    const VU u = as_words(x), size = u & 0x7FFFFFFFu, sign = (u >> 16) & 0x8000u;
    const VU rounded = ((size + 0xFFFu + ((size >> 13) & 1u)) >> 13) - (112u << 10);
    const VU normal = select((VI)(size >= 0x477FF000u), VU{} + 0x7C00u, rounded);
    // added to 0.5, what is below 2^-24 is rounded away
    const VU small = as_words(as_floats(size) + 0.5f) - 0x3F000000u;
    const VU finite = select((VI)(size < 0x38800000u), small, normal);
    return select((VI)(size > 0x7F800000u), VU{} + 0x7E00u, finite) | sign;
}
#endif
static inline VF round_f16(VF x) { return from_f16(bits_f16(x)); }

// ---- floats of up to 8 bits; special: 3 keeps infinity and NaN, 1 one NaN

template <int E, int M, int special>
static inline VF small_float(VU code) {
    constexpr int bias = (1 << (E - 1)) - 1;
    const VU size = code & ((1u << (E + M)) - 1), sign = (code >> (E + M)) << 31;
    VU bits = (size << (23 - M)) + (uint32_t(127 - bias) << 23);
    if (special == 3)
        bits = select((VI)(size >= (31u << M)), (size << (23 - M)) | 0x7F800000u, bits);
    if (special == 1) bits = select((VI)(size == ((1u << (E + M)) - 1)), VU{} + 0x7FC00000u, bits);
    const VF small = numbers((VI)size) * std::ldexp(1.0f, 1 - bias - M);
    return as_floats(select((VI)(size < (1u << M)), as_words(small), bits) | sign);
}

// ---- memory

template <class V>
static inline V load(const uint8_t* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline float one_f32(const uint8_t* p) { return load<float>(p); }
static inline float one_bf16(const uint8_t* p) {
    const uint32_t bits = uint32_t(load<uint16_t>(p)) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline float one_f16(const uint8_t* p) { return from_f16(VU{} + uint32_t(load<uint16_t>(p)))[0]; }
static inline VF load_f32(const uint8_t* p) { return load<VF>(p); }
static inline uint32_t one_words(const uint8_t* p) { return load<uint32_t>(p); }
static inline uint32_t one_halves(const uint8_t* p) { return load<uint16_t>(p); }
static inline uint32_t one_bytes(const uint8_t* p) { return *p; }
static inline VU load_words(const uint8_t* p) { return load<VU>(p); }
#if defined(__AVX512F__) && @LANES@ == 16
static inline VU load_halves(const uint8_t* p) {
    return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
static inline VU load_bytes(const uint8_t* p) { return (VU)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__AVX2__) && @LANES@ == 8
static inline VU load_halves(const uint8_t* p) { return (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline VU load_bytes(const uint8_t* p) { return (VU)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#else
static inline VU load_halves(const uint8_t* p) { return __builtin_convertvector(load<VH>(p), VU); }
static inline VU load_bytes(const uint8_t* p) { return __builtin_convertvector(load<VB>(p), VU); }
#endif
static inline VF load_f16(const uint8_t* p) { return from_f16(load_halves(p)); }
static inline VF load_bf16(const uint8_t* p) { return from_bf16(load_halves(p)); }
// every second or fourth piece: written as a loop, which compilers turn into shuffles
template <class T, int apart>
static inline VU pieces(const uint8_t* p) {
    T all[LANES * apart];
    std::memcpy(all, p, sizeof(T) * ((LANES - 1) * apart + 1));
    VU v;
    for (int lane = 0; lane < LANES; ++lane) v[lane] = all[lane * apart];
    return v;
}
// masked: not a byte beyond the last piece is touched
#if defined(__AVX512F__) && @LANES@ == 16
static inline VU load_words_2(const uint8_t* p) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high = _mm512_maskz_loadu_epi32(0x7FFF, p + 64);
    return (VU)_mm512_permutex2var_epi32(_mm512_loadu_si512(p), even, high);
}
static inline VU load_words_4(const uint8_t* p) {
    const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i low = _mm512_permutex2var_epi32(_mm512_loadu_si512(p), fourth, _mm512_loadu_si512(p + 64));
    const __m512i last = _mm512_maskz_loadu_epi32(0x1FFF, p + 192);
    const __m512i high = _mm512_permutex2var_epi32(_mm512_loadu_si512(p + 128), fourth, last);
    return (VU)_mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}
#elif defined(__AVX2__) && @LANES@ == 8
static inline VU load_words_2(const uint8_t* p) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)p);
    const __m256i high = _mm256_maskload_epi32((const int*)(p + 32), _mm256_setr_epi32(-1, -1, -1, -1, -1, -1, -1, 0));
    const __m256 even = _mm256_shuffle_ps((__m256)low, (__m256)high, 0x88);
    return (VU)_mm256_permute4x64_epi64((__m256i)even, 0xD8);
}
static inline VU load_words_4(const uint8_t* p) {
    return (VU)_mm256_i32gather_epi32((const int*)p, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), 4);
}
#else
static inline VU load_words_2(const uint8_t* p) { return pieces<uint32_t, 2>(p); }
static inline VU load_words_4(const uint8_t* p) { return pieces<uint32_t, 4>(p); }
#endif
static inline VU load_halves_2(const uint8_t* p) { return pieces<uint16_t, 2>(p); }
static inline VU load_halves_4(const uint8_t* p) { return pieces<uint16_t, 4>(p); }
static inline VU load_bytes_2(const uint8_t* p) { return pieces<uint8_t, 2>(p); }
static inline VU load_bytes_4(const uint8_t* p) { return pieces<uint8_t, 4>(p); }
static inline VF repeat4(float a, float b, float c, float d) {
#if defined(__AVX512F__) && @LANES@ == 16
    return (VF)_mm512_broadcast_f32x4(_mm_setr_ps(a, b, c, d));
#else
    VF v;
    for (int lane = 0; lane < LANES; lane += 4) v[lane] = a, v[lane + 1] = b, v[lane + 2] = c, v[lane + 3] = d;
    return v;
#endif
}
static inline VU repeat4w(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#if defined(__AVX512F__) && @LANES@ == 16
    return (VU)_mm512_broadcast_i32x4(_mm_setr_epi32(a, b, c, d));
#else
    VU v;
    for (int lane = 0; lane < LANES; lane += 4) v[lane] = a, v[lane + 1] = b, v[lane + 2] = c, v[lane + 3] = d;
    return v;
#endif
}
static inline void store_f32(uint8_t* p, VF v) { std::memcpy(p, &v, sizeof v); }
static inline void put_f32(uint8_t* p, float x) { std::memcpy(p, &x, 4); }
static inline void put_f16(uint8_t* p, float x) {
    const uint16_t half = uint16_t(bits_f16(all(x))[0]);
    std::memcpy(p, &half, 2);
}
static inline void put_bf16(uint8_t* p, float x) {
    const uint16_t half = uint16_t(bits_bf16(all(x))[0]);
    std::memcpy(p, &half, 2);
}
static inline VF each_exp(VF x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}
static inline VF each_sqrt(VF x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
}

// ---- whole tiles

template <int m, int n, int k>
static inline void multiply(const float* a, const float* b, float* sums) {
    for (int i = 0; i < m; ++i)
        for (int p = 0; p < k; ++p) {
            const float x = a[i * k + p];
            for (int j = 0; j < n; ++j) sums[i * n + j] += x * b[p * n + j];
        }
}
struct Sum {
    static constexpr float start = 0.0f;
    static float of(float a, float b) { return a + b; }
};
struct Most {
    static constexpr float start = -INFINITY;
    static float of(float a, float b) { return a > b ? a : b; }
};
template <class Op, int size, int owners, int slots, int threads>
static inline void over_threads(float* found, const float* values, const int* where, const int* who) {
    float partial[size];
    int stamp[size] = {};
    for (int i = 0; i < size; ++i) found[i] = Op::start;
    for (int t = 0; t < owners; ++t) {
        for (int s = 0; s < slots; ++s) {
            const int key = where[t * slots + s];
            const float x = values[s * threads + who[t]];
            partial[key] = stamp[key] == t + 1 ? Op::of(partial[key], x) : x;
            stamp[key] = t + 1;
        }
        for (int i = 0; i < size; ++i)
            if (stamp[i] == t + 1) found[i] = Op::of(found[i], partial[i]);
    }
}

class Semaphores {
  public:
    explicit Semaphores(int count) : values_(new std::atomic<int>[count]) {
        for (int i = 0; i < count; ++i) values_[i] = 0;
    }
    void lock(long semaphore, long value) {
        while (values_[semaphore].load(std::memory_order_acquire) != value) std::this_thread::yield();
    }
    void release(long semaphore, long value) { values_[semaphore].store(int(value), std::memory_order_release); }

  private:
    std::unique_ptr<std::atomic<int>[]> values_;
};
"""

RUNNER = r"""
// Blocks are taken in ascending order: whoever waits for a semaphore waits for a block that has been taken before.
// The call ends when all blocks are done; a helper that the system starts too late finds none, and is not waited for.
namespace {
struct State {
    explicit State(void* const* arrays) : arrays(arrays), semaphores(@SEMAPHORES@) {}
    void* const* arrays;
    Semaphores semaphores;
    std::atomic<long> next{0}, done{0};
};
void work(State& state) {
    constexpr long blocks = @BLOCKS@;
    long number = state.next.fetch_add(1);
    if (number >= blocks) return;
    std::vector<uint8_t> room(@SHARED@ + 64);
    uint8_t* shared = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64);
    for (; number < blocks; number = state.next.fetch_add(1)) {
        one(state.arrays, state.semaphores, shared, number);
        state.done.fetch_add(1, std::memory_order_release);
    }
}
}  // namespace
extern "C" void tile_run(void* const* arrays, int threads) {
    constexpr long blocks = @BLOCKS@;
    const auto state = std::make_shared<State>(arrays);
    for (int i = 1; i < threads && i < blocks; ++i) std::thread([state] { work(*state); }).detach();
    work(*state);
    while (state->done.load(std::memory_order_acquire) < blocks) std::this_thread::yield();
}
"""
