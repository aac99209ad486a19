// Stands in for CUDA where there is no GPU: a thread of the system for each thread of a block, barriers for what threads do
// together. Fragments of ldmatrix and mma.m16n8k16 follow the PTX manual, not memwall's layouts. Asynchronous copies are
// kept back until their group has been waited for.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define DEVICE [[maybe_unused]] static inline
#define SHARED uint8_t* const shared = me.block->shared;
#define __global__
#define __launch_bounds__(n)

struct Warp {
    std::barrier<> all{32};
    uint32_t words[32][16];
    const uint8_t* pointers[32];
};
struct Block {
    explicit Block(int threads) : all(threads), warps(new Warp[threads / 32]) {}
    std::barrier<> all;
    std::unique_ptr<Warp[]> warps;
    uint8_t* shared;
};
struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int size, width;
};
struct Me {
    Block* block;
    Warp* warp;
    int lane;
    std::vector<Copy> pending;
    std::vector<std::vector<Copy>> groups;
};
struct Index {
    int x, y, z;
};
static thread_local Me me;
static thread_local Index threadIdx, blockIdx;
static std::atomic<int> misaligned{0};

static inline void __syncthreads() { me.block->all.arrive_and_wait(); }
static inline void together() { me.warp->all.arrive_and_wait(); }
static inline uint32_t __float_as_uint(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
static inline float __uint_as_float(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
    return uint32_t(((uint64_t(high) << 32) | low) >> shift);
}
static inline float __shfl_xor_sync(uint32_t, float x, int partner) {
    me.warp->words[me.lane][0] = __float_as_uint(x);
    together();
    const float other = __uint_as_float(me.warp->words[me.lane ^ partner][0]);
    together();
    return other;
}

#define ALIGNED(p, n) \
    if (reinterpret_cast<uintptr_t>(p) % n) misaligned = n;
DEVICE void load_16(uint32_t* r, const uint8_t* p) { ALIGNED(p, 16) std::memcpy(r, p, 16); }
DEVICE void load_8(uint32_t* r, const uint8_t* p) { ALIGNED(p, 8) std::memcpy(r, p, 8); }
DEVICE void load_4(uint32_t* r, const uint8_t* p) { ALIGNED(p, 4) std::memcpy(r, p, 4); }
DEVICE void load_2(uint32_t& r, int bit, const uint8_t* p) { r |= uint32_t(p[0] | p[1] << 8) << bit; }
DEVICE void load_1(uint32_t& r, int bit, const uint8_t* p) { r |= uint32_t(*p) << bit; }
DEVICE void zero_16(uint32_t* r) { std::memset(r, 0, 16); }
DEVICE void zero_8(uint32_t* r) { std::memset(r, 0, 8); }
DEVICE void zero_4(uint32_t* r) { std::memset(r, 0, 4); }
DEVICE void store_16(uint8_t* p, const uint32_t* r) { ALIGNED(p, 16) std::memcpy(p, r, 16); }
DEVICE void store_8(uint8_t* p, const uint32_t* r) { ALIGNED(p, 8) std::memcpy(p, r, 8); }
DEVICE void store_4(uint8_t* p, const uint32_t* r) { ALIGNED(p, 4) std::memcpy(p, r, 4); }
DEVICE void store_2(uint8_t* p, uint32_t bits) { std::memcpy(p, &bits, 2); }
DEVICE void store_1(uint8_t* p, uint32_t bits) { *p = uint8_t(bits); }
template <int bits, int base, int shift>
DEVICE long swizzle(long offset) {
    return offset ^ (((offset >> (base + shift)) & ((1 << bits) - 1)) << base);
}
template <int width>
DEVICE void copy_async(uint8_t* to, const uint8_t* from, int size) {
    ALIGNED(to, width) ALIGNED(from, width) me.pending.push_back({to, from, size, width});
}
DEVICE void commit_group() {
    me.groups.push_back(me.pending);
    me.pending.clear();
}
template <int left>
DEVICE void wait_group() {
    while (me.groups.size() > left) {
        for (const Copy& c : me.groups.front()) {
            std::memset(c.to, 0, c.width);
            std::memcpy(c.to, c.from, c.size);
        }
        me.groups.erase(me.groups.begin());
    }
}

template <int count>
DEVICE void ldmatrix(uint32_t* r, const uint8_t* p) {
    me.warp->pointers[me.lane] = p;
    together();
    for (int m = 0; m < count; ++m) {
        const uint8_t* row = me.warp->pointers[m * 8 + me.lane / 4];
        ALIGNED(row, 16) std::memcpy(r + m, row + me.lane % 4 * 4, 4);
    }
    together();
}
DEVICE void ldmatrix_4(uint32_t* r, const uint8_t* p) { ldmatrix<4>(r, p); }
DEVICE void ldmatrix_2(uint32_t* r, const uint8_t* p) { ldmatrix<2>(r, p); }
DEVICE void ldmatrix_1(uint32_t* r, const uint8_t* p) { ldmatrix<1>(r, p); }

static inline float half_to_float(uint32_t bits) {
    const uint16_t b = uint16_t(bits);
    _Float16 h;
    std::memcpy(&h, &b, 2);
    return float(h);
}
static inline uint32_t float_to_half(float x) {
    const _Float16 h = _Float16(x);
    uint16_t b;
    std::memcpy(&b, &h, 2);
    return b;
}
static inline uint32_t float_to_brain(float x) {
    const uint32_t u = __float_as_uint(x);
    return (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
}
template <int half>
DEVICE float get_f16(uint32_t word) {
    return half_to_float(half ? word >> 16 : word);
}
template <int half>
DEVICE void put_f16(uint32_t& word, float x) {
    word = half ? (word & 0xFFFFu) | float_to_half(x) << 16 : float_to_half(x);
}
template <int half>
DEVICE float get_bf16(uint32_t word) {
    return __uint_as_float(half ? word & 0xFFFF0000u : word << 16);
}
template <int half>
DEVICE void put_bf16(uint32_t& word, float x) {
    word = half ? (word & 0xFFFFu) | float_to_brain(x) << 16 : float_to_brain(x);
}
DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
    return float_to_half(get_f16<0>(a) - get_f16<0>(b)) | float_to_half(get_f16<1>(a) - get_f16<1>(b)) << 16;
}
DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
    return float_to_half(get_f16<0>(a) * get_f16<0>(b)) | float_to_half(get_f16<1>(a) * get_f16<1>(b)) << 16;
}
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    return float_to_half(get_f16<0>(a) * get_f16<0>(b) + get_f16<0>(c)) |
           float_to_half(get_f16<1>(a) * get_f16<1>(b) + get_f16<1>(c)) << 16;
}
DEVICE uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t found = 0;
    for (int i = 0; i < 4; ++i) found |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
template <int sign_shift, int shift>
DEVICE uint32_t place(uint32_t codes, uint32_t signs, uint32_t mask) {
    return (codes << sign_shift & signs) | (codes << shift & mask);
}
DEVICE uint32_t place_e4m3(uint32_t codes) {
    const uint32_t carry = (codes & 0x007F007Fu) + 0x00010001u;
    return place<8, 7>(codes, 0x80008000u, 0x3F803F80u) | ((carry & 0x00800080u) >> 7) * 0x7E00u;
}

template <float (*low)(uint32_t), float (*high)(uint32_t)>
static void multiply(uint32_t* c, const uint32_t* a, const uint32_t* b) {
    uint32_t(*held)[16] = me.warp->words;
    std::memcpy(held[me.lane], a, 16);
    std::memcpy(held[me.lane] + 4, b, 8);
    together();
    for (int i = 0; i < 4; ++i) {
        const int row = me.lane / 4 + 8 * (i >= 2), column = me.lane % 4 * 2 + (i & 1);
        float sum = __uint_as_float(c[i]);
        for (int k = 0; k < 16; ++k) {
            const uint32_t x = held[row % 8 * 4 + k % 8 / 2][(row >= 8) + 2 * (k >= 8)];
            const uint32_t y = held[column * 4 + k % 8 / 2][4 + (k >= 8)];
            sum += (k & 1 ? high(x) : low(x)) * (k & 1 ? high(y) : low(y));
        }
        c[i] = __float_as_uint(sum);
    }
    together();
}
DEVICE void mma_f16(uint32_t* c, const uint32_t* a, const uint32_t* b) { multiply<get_f16<0>, get_f16<1>>(c, a, b); }
DEVICE void mma_bf16(uint32_t* c, const uint32_t* a, const uint32_t* b) { multiply<get_bf16<0>, get_bf16<1>>(c, a, b); }

DEVICE void lock(int* semaphore, int value) {
    if (threadIdx.x == 0)
        while (std::atomic_ref<int>(*semaphore).load() != value) std::this_thread::yield();
    __syncthreads();
}
DEVICE void release(int* semaphore, int value) {
    __syncthreads();
    if (threadIdx.x == 0) std::atomic_ref<int>(*semaphore).store(value);
}

// blocks one after another, those that add to one output tile in ascending order
template <class Kernel>
static int launch(Kernel kernel, Index grid, int threads, int shared_bytes) {
    for (int x = 0; x < grid.x; ++x)
        for (int y = 0; y < grid.y; ++y)
            for (int z = 0; z < grid.z; ++z) {
                Block block(threads);
                std::vector<uint8_t> room(shared_bytes + 256, 0xCD);
                block.shared = room.data() + (128 - reinterpret_cast<uintptr_t>(room.data()) % 128);
                std::vector<std::thread> all;
                for (int t = 0; t < threads; ++t)
                    all.emplace_back([&, t] {
                        me = Me{&block, &block.warps[t / 32], t % 32, {}, {}};
                        threadIdx = {t, 0, 0};
                        blockIdx = {x, y, z};
                        kernel();
                    });
                for (auto& each : all) each.join();
            }
    return misaligned;
}
