// The device language on the host: what kernels/device.cuh takes from CUDA and PTX, for kernels compiled by g++. The
// machine behind it is machine.hpp.
//
// A kernel in a throw-away program (`RUN` takes the grid, the block, the bytes of dynamic shared memory, and then the
// kernel's parameters, with null pointers cast to their type):
//
//     #include "machine.hpp"
//     #define REAL bf16
//     namespace {
//     #include "norm.cu"
//     }
//     int main() { RUN(norm_forward_bf16, dim3(rows), dim3(256), 0, y, x, rows, width); }
//
//     g++ -std=c++20 -O2 -ffp-contract=off -mfma -DMUPSCALE_EMULATED -DSHARED_SECTION=emulated_shared -I kernels
//         -I tests/emulator -Wno-unknown-pragmas main.cpp tests/emulator/{machine,fiber}.cpp
//
// MUPSCALE_EMULATED_SEED=7 permutes threads and blocks, MUPSCALE_EMULATED_COPIES=at-once makes cp.async immediate;
// results must be the same. With -fsanitize=address,undefined -fsanitize-sections=emulated_shared it finds accesses
// out of bounds, in shared memory too.
#pragma once

#include "machine.hpp"

#define RUN(name, ...) emulator::Call<name>::run(#name, __VA_ARGS__)

#define KERNEL(threads, name, parameters) EMULATED_KERNEL(threads, name, parameters)
#define KERNEL_RESIDENT(threads, blocks, name, parameters) EMULATED_KERNEL(threads, name, parameters)
// Declared, registered under its name with its parameters' sizes, then defined by what follows.
#define EMULATED_KERNEL(threads, name, parameters)                                                                   \
    void name parameters;                                                                                            \
    static const emulator::Registrar registered_##name(#name, threads, emulator::Call<name>{}, SHARED_BEGIN,         \
                                                       SHARED_END);                                                  \
    void name parameters
#define DEVICE inline
// One copy is enough where one block runs at a time. In a section of its own, so that each block finds it poisoned.
#ifdef SHARED_SECTION
#define SHARED static __attribute__((section(EMULATED_TEXT(SHARED_SECTION))))
#else
#define SHARED static
#endif
#define DYNAMIC_SHARED(name) u8* const name = emulator::dynamic_shared

#define threadIdx (emulator::self->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)
#define __device__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static const
#define __builtin_assume(x) ((void)0)

template <class To, class From> DEVICE To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
DEVICE f32 __int_as_float(i32 x) { return bits_of<f32>(x); }
DEVICE f32 __uint_as_float(u32 x) { return bits_of<f32>(x); }
DEVICE i32 __float_as_int(f32 x) { return bits_of<i32>(x); }
DEVICE u32 __float_as_uint(f32 x) { return bits_of<u32>(x); }
DEVICE f64 __longlong_as_double(i64 x) { return bits_of<f64>(x); }
DEVICE i64 __double_as_longlong(f64 x) { return bits_of<i64>(x); }

// Arithmetic with the rounding in its name: the host compiles without contraction, so that plain operators round so.
DEVICE f32 __fadd_rn(f32 x, f32 y) { return x + y; }
DEVICE f32 __fsub_rn(f32 x, f32 y) { return x - y; }
DEVICE f32 __fmul_rn(f32 x, f32 y) { return x * y; }
DEVICE f32 __fdiv_rn(f32 x, f32 y) { return x / y; }
DEVICE f32 __frcp_rn(f32 x) { return 1 / x; }
DEVICE f32 __fsqrt_rn(f32 x) { return sqrtf(x); }
DEVICE f32 __fmaf_rn(f32 x, f32 y, f32 z) { return fmaf(x, y, z); }
DEVICE f32 __frsqrt_rn(f32 x) { return (f32)(1 / sqrt((f64)x)); }
DEVICE f64 __dadd_rn(f64 x, f64 y) { return x + y; }
DEVICE f64 __dsub_rn(f64 x, f64 y) { return x - y; }
DEVICE f64 __dmul_rn(f64 x, f64 y) { return x * y; }
DEVICE f64 __ddiv_rn(f64 x, f64 y) { return x / y; }
DEVICE f64 __drcp_rn(f64 x) { return 1 / x; }
DEVICE f64 __dsqrt_rn(f64 x) { return sqrt(x); }
DEVICE f64 __fma_rn(f64 x, f64 y, f64 z) { return fma(x, y, z); }
DEVICE f32 __double2float_rn(f64 x) { return (f32)x; }
DEVICE f32 __uint2float_rn(u32 x) { return (f32)x; }
DEVICE f32 __int2float_rn(i32 x) { return (f32)x; }
DEVICE f32 __ull2float_rn(u64 x) { return (f32)x; }
DEVICE i32 __float2int_rn(f32 x) { return (i32)rintf(x); }
DEVICE u32 __float2uint_rn(f32 x) { return (u32)rintf(x); }
DEVICE f32 rsqrtf(f32 x) { return (f32)(1 / sqrt((f64)x)); }
DEVICE f64 rsqrt(f64 x) { return 1 / sqrt(x); }
DEVICE f32 __saturatef(f32 x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
// The C library's header has names like these of its own.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)
#define __fdividef(x, y) ((x) / (y))

// Of two numbers; the number, where the other is not one.
template <class A, class B> DEVICE std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin((T)a, (T)b);
    return (T)a < (T)b ? (T)a : (T)b;
}
template <class A, class B> DEVICE std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax((T)a, (T)b);
    return (T)a > (T)b ? (T)a : (T)b;
}

DEVICE u32 __umulhi(u32 x, u32 y) { return (u32)((u64)x * y >> 32); }
DEVICE i32 __mulhi(i32 x, i32 y) { return (i32)((i64)x * y >> 32); }
DEVICE u64 __umul64hi(u64 x, u64 y) { return (u64)((unsigned __int128)x * y >> 64); }
DEVICE i32 __popc(u32 x) { return __builtin_popcount(x); }
DEVICE i32 __popcll(u64 x) { return __builtin_popcountll(x); }
DEVICE i32 __clz(i32 x) { return x ? __builtin_clz((u32)x) : 32; }
DEVICE i32 __clzll(i64 x) { return x ? __builtin_clzll((u64)x) : 64; }
DEVICE i32 __ffs(i32 x) { return __builtin_ffs(x); }
DEVICE i32 __ffsll(i64 x) { return __builtin_ffsll(x); }
DEVICE u32 __funnelshift_l(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) << (by & 31) >> 32); }
DEVICE u32 __funnelshift_r(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
template <class T> DEVICE T __ldg(const T* p) { return *p; }
DEVICE void __trap() { emulator::fault("__trap"); }

// A thread goes on alone until it waits, so plain accesses are atomic.
template <class T> DEVICE T atomic_update(T* p, T to) {
    T old = *p;
    *p = to;
    return old;
}
template <class T> using Atomic = std::enable_if_t<std::is_integral_v<T> && sizeof(T) >= 4, T>;
template <class T> DEVICE Atomic<T> atomicAdd(T* p, std::type_identity_t<T> x) { return atomic_update<T>(p, *p + x); }
template <class T>
DEVICE Atomic<T> atomicMin(T* p, std::type_identity_t<T> x) {
    return atomic_update<T>(p, min(*p, x));
}
template <class T>
DEVICE Atomic<T> atomicMax(T* p, std::type_identity_t<T> x) {
    return atomic_update<T>(p, max(*p, x));
}
template <class T> DEVICE Atomic<T> atomicOr(T* p, std::type_identity_t<T> x) { return atomic_update<T>(p, *p | x); }
template <class T> DEVICE Atomic<T> atomicAnd(T* p, std::type_identity_t<T> x) { return atomic_update<T>(p, *p & x); }
template <class T> DEVICE Atomic<T> atomicExch(T* p, std::type_identity_t<T> x) { return atomic_update<T>(p, x); }
template <class T> DEVICE Atomic<T> atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
    return atomic_update<T>(p, *p == expected ? x : *p);
}
DEVICE u32 atomicInc(u32* p, u32 last) { return atomic_update<u32>(p, *p >= last ? 0 : *p + 1); }
DEVICE void __threadfence() {}
DEVICE void __threadfence_block() {}

DEVICE void __syncthreads(unsigned line = __builtin_LINE()) { emulator::barrier(0, line); }
DEVICE int __syncthreads_count(int x, unsigned line = __builtin_LINE()) { return emulator::barrier(x, line).count; }
DEVICE int __syncthreads_or(int x, unsigned line = __builtin_LINE()) { return emulator::barrier(x, line).count > 0; }
DEVICE int __syncthreads_and(int x, unsigned line = __builtin_LINE()) {
    emulator::Votes votes = emulator::barrier(x, line);
    return votes.count == votes.threads;
}

#include "warp.hpp"

DEVICE f32 load(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE f32 load(f16 x) {
    u32 sign = (u32)(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (f32)mantissa * 0x1p-24f;
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
DEVICE void store(bf16& to, f32 x) {
    u32 bits = __float_as_uint(x);
    to.bits = x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE void store(f16& to, f32 x) {
    u32 bits = __float_as_uint(x);
    u16 sign = (u16)(bits >> 16 & 0x8000);
    f32 size = fabsf(x);
    // Below the smallest normal number, steps are of 2^-24; from half a step above the largest on, all is infinite.
    if (x != x) to.bits = 0x7fff;
    else if (size < 0x1p-14f) to.bits = sign | (u16)rintf(size * 0x1p24f);
    else if (size >= 65520) to.bits = sign | 0x7c00;
    else to.bits = sign | (u16)(((bits & 0x7fffffff) - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13);
}
DEVICE u32 pack_bf16(f32 low, f32 high) {
    bf16 a, b;
    store(a, low);
    store(b, high);
    return (u32)b.bits << 16 | a.bits;
}

DEVICE f32 exp2_fast(f32 x) {
    f32 y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}

DEVICE void copy_async_16(void* shared, const void* global, bool valid) { emulator::copy_async(shared, global, valid); }
DEVICE void copy_commit() { emulator::copy_commit(); }
template <int pending> DEVICE void copy_wait() { emulator::copy_wait(pending); }
