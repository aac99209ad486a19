"""The fixed part of emitted CUDA: accesses of every width, conversions, and the matrix instructions in PTX."""

from __future__ import annotations

PRELUDE = r"""#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE [[maybe_unused]] static __device__ __forceinline__
#define SHARED extern __shared__ __align__(128) uint8_t shared[];

DEVICE void load_16(uint32_t* r, const uint8_t* p) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
}
DEVICE void load_8(uint32_t* r, const uint8_t* p) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    r[0] = v.x, r[1] = v.y;
}
DEVICE void load_4(uint32_t* r, const uint8_t* p) { r[0] = *reinterpret_cast<const uint32_t*>(p); }
DEVICE void load_2(uint32_t& r, int bit, const uint8_t* p) {
    r |= uint32_t(*reinterpret_cast<const uint16_t*>(p)) << bit;
}
DEVICE void load_1(uint32_t& r, int bit, const uint8_t* p) { r |= uint32_t(*p) << bit; }
DEVICE void zero_16(uint32_t* r) { r[0] = r[1] = r[2] = r[3] = 0; }
DEVICE void zero_8(uint32_t* r) { r[0] = r[1] = 0; }
DEVICE void zero_4(uint32_t* r) { r[0] = 0; }
DEVICE void store_16(uint8_t* p, const uint32_t* r) {
    *reinterpret_cast<uint4*>(p) = make_uint4(r[0], r[1], r[2], r[3]);
}
DEVICE void store_8(uint8_t* p, const uint32_t* r) { *reinterpret_cast<uint2*>(p) = make_uint2(r[0], r[1]); }
DEVICE void store_4(uint8_t* p, const uint32_t* r) { *reinterpret_cast<uint32_t*>(p) = r[0]; }
DEVICE void store_2(uint8_t* p, uint32_t bits) { *reinterpret_cast<uint16_t*>(p) = uint16_t(bits); }
DEVICE void store_1(uint8_t* p, uint32_t bits) { *p = uint8_t(bits); }

template <int bits, int base, int shift>
DEVICE long swizzle(long offset) {
    return offset ^ (((offset >> (base + shift)) & ((1 << bits) - 1)) << base);
}
DEVICE uint32_t shared_address(const uint8_t* p) { return uint32_t(__cvta_generic_to_shared(p)); }
template <int width>
DEVICE void copy_async(uint8_t* to, const uint8_t* from, int size) {
    if constexpr (width == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size));
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size),
                     "n"(width));
}
DEVICE void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
DEVICE void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
DEVICE void ldmatrix_4(uint32_t* r, const uint8_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}
DEVICE void ldmatrix_2(uint32_t* r, const uint8_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(p)));
}
DEVICE void ldmatrix_1(uint32_t* r, const uint8_t* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(shared_address(p)));
}

template <int half>
DEVICE float get_f16(uint32_t word) {
    return __half2float(__ushort_as_half(uint16_t(half ? word >> 16 : word)));
}
template <int half>
DEVICE void put_f16(uint32_t& word, float x) {
    const uint32_t bits = __half_as_ushort(__float2half_rn(x));
    word = half ? (word & 0xFFFFu) | bits << 16 : bits;
}
template <int half>
DEVICE float get_bf16(uint32_t word) {
    return __uint_as_float(half ? word & 0xFFFF0000u : word << 16);
}
template <int half>
DEVICE void put_bf16(uint32_t& word, float x) {
    const uint32_t bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    word = half ? (word & 0xFFFFu) | bits << 16 : bits;
}
DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
    const __half2 r = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&r);
}
DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
    const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&r);
}
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    const __half2 r =
        __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b), *reinterpret_cast<__half2*>(&c));
    return *reinterpret_cast<const uint32_t*>(&r);
}
template <int sign_shift, int shift>
DEVICE uint32_t place(uint32_t codes, uint32_t signs, uint32_t mask) {
    return (codes << sign_shift & signs) | (codes << shift & mask);
}
DEVICE uint32_t place_e4m3(uint32_t codes) {
    const uint32_t carry = (codes & 0x007F007Fu) + 0x00010001u;
    return place<8, 7>(codes, 0x80008000u, 0x3F803F80u) | ((carry & 0x00800080u) >> 7) * 0x7E00u;
}

DEVICE void mma_f16(uint32_t* c, const uint32_t* a, const uint32_t* b) {
    float* s = reinterpret_cast<float*>(c);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_bf16(uint32_t* c, const uint32_t* a, const uint32_t* b) {
    float* s = reinterpret_cast<float*>(c);
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void lock(int* semaphore, int value) {
    if (threadIdx.x == 0)
        while (*reinterpret_cast<volatile int*>(semaphore) != value) {
        }
    __syncthreads();
    __threadfence();
}
DEVICE void release(int* semaphore, int value) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(semaphore, value);
}
"""
