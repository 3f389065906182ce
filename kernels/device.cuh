// What kernels need of the machine: element types, wide loads and stores, warps and blocks, asynchronous copies, tensor
// cores. All inline PTX of the project is here. No header of a toolkit is included, so NVRTC compiles kernels on a
// machine that has a driver only. Built for the host (tests/emulator), the same functions come from emulator.hpp.
//
// A file that works on activations is compiled once for each compute type, with REAL = f32 or bf16; its kernels' names
// end in that type.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;

struct alignas(2) bf16 {
    u16 bits;
};
struct alignas(2) f16 {
    u16 bits;
};

#ifdef MUPSCALE_EMULATED
#include "emulator.hpp"
#else

// KERNEL(threads, name, (parameters)): an entry point for blocks of at most `threads` threads.
#define KERNEL(threads, name, parameters) extern "C" __global__ void __launch_bounds__(threads) name parameters
// The same, with at least `blocks` blocks resident on a multiprocessor.
#define KERNEL_RESIDENT(threads, blocks, name, parameters) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
// Shared memory whose size the launch gives, as bytes on a 128-byte border.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

DEVICE f32 load(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE f32 load(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// Rounds to nearest, ties to even.
DEVICE void store(bf16& to, f32 x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
DEVICE void store(f16& to, f32 x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
// Two bf16 in a word, `low` at the lower address.
DEVICE u32 pack_bf16(f32 low, f32 high) {
    u32 d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

// 2^x to 2 ulp; exactly 1 for 0 and 0 for -infinity.
DEVICE f32 exp2_fast(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies 16 bytes from global to shared memory in the background (both on 16-byte borders); zeros when !valid, and then
// nothing is read.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Closes the group of copies begun since the last commit.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way; other threads' copies need a barrier after it.
template <int pending> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, and gets of each matrix
// the elements (row lane / 4, columns 2 (lane % 4) and the next). PTX ISA, "ldmatrix".
DEVICE void load_matrices(u32 (&d)[4], const void* shared_row) {
    u32 from = (u32)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(from) : "memory");
}
// The same of the transposed matrices.
DEVICE void load_matrices_transposed(u32 (&d)[4], const void* shared_row) {
    u32 from = (u32)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(from) : "memory");
}
// d += a b for a 16 x 16 (row-major), b 16 x 8, bf16, sums in f32, by one warp. With g = lane / 4 and t = lane % 4:
// a[0] holds (g, 2t), (g, 2t+1); a[1] the same of row g+8; a[2] of columns + 8; a[3] of both; b[0] holds (2t, g),
// (2t+1, g); b[1] the same of rows + 8; d[0], d[1] are (g, 2t), (g, 2t+1); d[2], d[3] those of row g+8.
// PTX ISA, "mma.m16n8k16".
DEVICE void multiply_add(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// x, of which the compiler knows nothing more: what follows from it is computed where it is used, and not kept in
// registers from before a loop on.
DEVICE u32 anew(u32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

DEVICE f32 load(f32 x) { return x; }
DEVICE f64 load(f64 x) { return x; }
DEVICE void store(f32& to, f32 x) { to = x; }

#define WARP 32
#define FULL_WARP 0xffffffffu
#define MINUS_INFINITY (-__int_as_float(0x7f800000))

// N elements that are read and written at once, where N * sizeof(T) is 16 or less.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};
// Elements in 16 bytes.
template <class T> constexpr int WIDE = 16 / sizeof(T);
template <class T> using Wide = Pack<T, WIDE<T>>;
// Whether wide accesses are aligned everywhere in rows of `width` elements from p on.
template <class T> DEVICE bool is_wide(const T* p, u64 width) {
    return ((u64)p % 16 == 0) && (width * sizeof(T) % 16 == 0);
}

DEVICE f32 warp_sum(f32 x) {
    for (int m = WARP / 2; m > 0; m /= 2) x += __shfl_xor_sync(FULL_WARP, x, m);
    return x;
}
DEVICE f64 warp_sum(f64 x) {
    for (int m = WARP / 2; m > 0; m /= 2) x += __shfl_xor_sync(FULL_WARP, x, m);
    return x;
}
DEVICE f32 warp_max(f32 x) {
    for (int m = WARP / 2; m > 0; m /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, m));
    return x;
}

// Sum over the block (one-dimensional, whole warps), the same in every thread and at every run.
template <class T> DEVICE T block_sum(T x) {
    SHARED T partial[WARP];
    x = warp_sum(x);
    __syncthreads();  // The last call's readers are done.
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < blockDim.x / WARP ? partial[threadIdx.x % WARP] : T(0);
    return warp_sum(x);
}
DEVICE f32 block_max(f32 x) {
    SHARED f32 partial[WARP];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < blockDim.x / WARP ? partial[threadIdx.x % WARP] : MINUS_INFINITY;
    return warp_max(x);
}

#ifdef REAL
typedef REAL real;
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
// A kernel's name with the compute type: NAMED(norm_forward) is norm_forward_bf16.
#define NAMED(name) JOIN(name, REAL)
#endif
