// The device language: layouts of ldmatrix and mma against the tables of the PTX manual, exchanges, copies, barriers.
#include <algorithm>

#include "check.hpp"
#include "machine.hpp"

namespace {
#include "device.cuh"

KERNEL(32, matrices, (u32* out)) {
    alignas(16) SHARED u16 rows[32][8];
    for (u32 i = 0; i < 8; i++) rows[threadIdx.x][i] = (u16)(threadIdx.x * 8 + i);
    __syncwarp();
    u32 d[4];
    load_matrices(d, rows[threadIdx.x]);
    for (u32 m = 0; m < 4; m++) out[threadIdx.x * 4 + m] = d[m];
    load_matrices_transposed(d, rows[threadIdx.x]);
    for (u32 m = 0; m < 4; m++) out[128 + threadIdx.x * 4 + m] = d[m];
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": element i of a lane's fragment, two to a
// register, stands at these places.
u32 a_row(u32 lane, u32 i) { return i < 2 || (4 <= i && i < 6) ? lane >> 2 : (lane >> 2) + 8; }
u32 a_column(u32 lane, u32 i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
u32 b_row(u32 lane, u32 i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }
u32 b_column(u32 lane, u32) { return lane >> 2; }
u32 d_row(u32 lane, u32 i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; }
u32 d_column(u32 lane, u32 i) { return lane % 4 * 2 + (i & 1); }

KERNEL(32, product, (f32* d, const f32* a, const f32* b)) {
    u32 lane = threadIdx.x, x[4], y[2];
    f32 sums[4];
    for (u32 r = 0; r < 4; r++) {
        u32 i = 2 * r;
        x[r] =
            pack_bf16(a[a_row(lane, i) * 16 + a_column(lane, i)], a[a_row(lane, i + 1) * 16 + a_column(lane, i + 1)]);
    }
    for (u32 r = 0; r < 2; r++) {
        u32 i = 2 * r;
        y[r] = pack_bf16(b[b_row(lane, i) * 8 + b_column(lane, i)], b[b_row(lane, i + 1) * 8 + b_column(lane, i + 1)]);
    }
    for (u32 i = 0; i < 4; i++) sums[i] = d[d_row(lane, i) * 8 + d_column(lane, i)];
    multiply_add(sums, x, y[0], y[1]);
    for (u32 i = 0; i < 4; i++) d[d_row(lane, i) * 8 + d_column(lane, i)] = sums[i];
}

KERNEL(64, exchanges, (f64* out, u32 mode)) {
    u32 lane = threadIdx.x % 32;
    f64 x = threadIdx.x;
    if (mode == 0) x = __shfl_sync(FULL_WARP, x, (int)lane + 1);
    if (mode == 1) x = __shfl_up_sync(FULL_WARP, x, 3, 8);
    if (mode == 2) x = __shfl_down_sync(FULL_WARP, x, 3, 8);
    if (mode == 3) x = __shfl_xor_sync(FULL_WARP, x, 5);
    if (mode == 4) x = __ballot_sync(FULL_WARP, lane % 3 == 0);
    // Halves of a warp in turns of their own.
    if (mode == 5 && lane < 16)
        for (int i = 0; i < 3; i++) x = __shfl_xor_sync(0xffff, x, 1);
    if (mode == 5 && lane >= 16) x = __shfl_sync(0xffff0000, x, 20);
    // Lanes that have ended are not waited for.
    if (mode == 6) {
        if (lane >= 20) return;
        x = __all_sync(FULL_WARP, lane < 20) + 2 * __any_sync(FULL_WARP, lane == 21);
    }
    out[threadIdx.x] = x;
}

// What is in shared memory after each step: nothing, one group waited for, both.
KERNEL(32, copies, (u32* out, const u32* from)) {
    alignas(16) SHARED u32 to[32][8];
    copy_async_16(&to[threadIdx.x][0], from + threadIdx.x * 8, true);
    copy_commit();
    copy_async_16(&to[threadIdx.x][4], from + threadIdx.x * 8 + 4, threadIdx.x % 2);
    copy_commit();
    u32* mine = out + threadIdx.x * 6;
    mine[0] = to[threadIdx.x][0];
    mine[1] = to[threadIdx.x][4];
    copy_wait<1>();
    mine[2] = to[threadIdx.x][0];
    mine[3] = to[threadIdx.x][4];
    copy_wait<0>();
    mine[4] = to[threadIdx.x][0];
    mine[5] = to[threadIdx.x][4];
}

KERNEL(64, mistakes, (u32 which)) {
    DYNAMIC_SHARED(memory);
    if (which == 0 && threadIdx.x < 32) __syncthreads();
    if (which == 0 && threadIdx.x >= 32) {
        __syncthreads();
    }
    if (which == 1 && threadIdx.x == 0) __syncwarp();
    if (which == 1) __syncthreads();
    if (which == 2) __syncwarp(2);
    if (which == 3) copy_async_16(memory + 8, nullptr, false);
    if (which == 4) copy_async_16(memory + 64, nullptr, false);
    if (which == 5 && threadIdx.x < 32) return;
    if (which == 5) __syncthreads();
}

KERNEL(64, poisoned, (u32* out)) {
    DYNAMIC_SHARED(dynamic);
    SHARED u32 fixed[64];
    u32 i = blockIdx.x * 64 + threadIdx.x;
    out[i] = fixed[threadIdx.x] & ((u32*)dynamic)[threadIdx.x];
    fixed[threadIdx.x] = ((u32*)dynamic)[threadIdx.x] = 0;
}

// Reads this far behind static and dynamic shared memory.
KERNEL(1, overrun, (u32* out, u32 fixed, u32 dynamic)) {
    DYNAMIC_SHARED(bytes);
    SHARED u32 at[48];
    const u32* p = at;
    out[0] = p[fixed] + bytes[dynamic];
}

// With `race`, the barrier between writing and reading is missing.
KERNEL(64, reversal, (u32* out, u32 race)) {
    SHARED u32 at[64];
    at[threadIdx.x] = 1;
    __syncthreads();
    at[threadIdx.x] = 2 + threadIdx.x;
    if (!race) __syncthreads();
    out[threadIdx.x] = at[63 - threadIdx.x];
}

KERNEL(64, places, (u32* out)) {
    u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    atomicAdd(&out[block * (blockDim.x * blockDim.y * blockDim.z) + thread], 1 + block);
}

KERNEL(256, sums, (f32* out, const f32* x)) {
    out[threadIdx.x] = block_sum(x[threadIdx.x]) + block_max(x[threadIdx.x]);
}

std::string launch(const char* name, dim3 grid, dim3 block, size_t shared, auto... arguments) {
    void* pointers[] = {&arguments..., nullptr};
    return emulator::launch(*emulator::find_kernel(name), grid, block, shared, pointers).what;
}
}  // namespace

TEST(ldmatrix_follows_the_manual) {
    std::vector<u32> out(256);
    EXPECT(launch("matrices", 1, 32, 0, out.data()) == "");
    for (u32 lane = 0; lane < 32; lane++)
        for (u32 m = 0; m < 4; m++) {
            // Row by row, four lanes to a row, two elements to a lane.
            u32 major = lane / 4, minor = lane % 4 * 2;
            u32 rows[] = {(8 * m + major) * 8 + minor, (8 * m + major) * 8 + minor + 1};
            u32 columns[] = {(8 * m + minor) * 8 + major, (8 * m + minor + 1) * 8 + major};
            EXPECT(out[lane * 4 + m] == (rows[1] << 16 | rows[0]));
            EXPECT(out[128 + lane * 4 + m] == (columns[1] << 16 | columns[0]));
        }
}

TEST(mma_follows_the_manual) {
    // One side counts its places (up to 255, which bf16 holds), the other picks one of them.
    for (u32 half = 0; half < 2; half++) {
        std::vector<f32> a(256), b(128), d(128);
        for (u32 i = 0; i < 256; i++) a[i] = (f32)i;
        for (u32 k = 0; k < 16; k++) b[k * 8 + k % 8] = k / 8 == half;
        for (u32 i = 0; i < 128; i++) d[i] = 1000.0f * (f32)i;
        EXPECT(launch("product", 1, 32, 0, d.data(), a.data(), b.data()) == "");
        for (u32 row = 0; row < 16; row++)
            for (u32 n = 0; n < 8; n++)
                EXPECT(d[row * 8 + n] == 1000.0f * (f32)(row * 8 + n) + (f32)(row * 16 + n + 8 * half));
    }
    std::vector<f32> a(256), b(128), d(128);
    for (u32 i = 0; i < 16; i++) a[i * 16 + i] = 1;
    for (u32 i = 0; i < 128; i++) b[i] = (f32)i;
    EXPECT(launch("product", 1, 32, 0, d.data(), a.data(), b.data()) == "");
    EXPECT(d == b);
}

TEST(lanes_exchange) {
    for (u64 seed : {0, 1, 2}) {
        emulator::options.seed = seed;
        for (u32 mode = 0; mode < 7; mode++) {
            std::vector<f64> out(64, -1);
            EXPECT(launch("exchanges", 1, 64, 0, out.data(), mode) == "");
            for (u32 i = 0; i < 64; i++) {
                u32 lane = i % 32, warp = i - lane;
                u32 thirds = 0x49249249;
                f64 expected[] = {f64(warp + (lane + 1) % 32),
                                  f64(lane % 8 < 3 ? i : i - 3),
                                  f64(lane % 8 > 4 ? i : i + 3),
                                  f64(i ^ 5),
                                  f64(thirds),
                                  f64(lane < 16 ? i ^ 1 : warp + 20),
                                  lane < 20 ? 1.0 : -1.0};
                EXPECT(out[i] == expected[mode]);
            }
        }
    }
}

TEST(numbers_round_to_nearest_even) {
    for (u32 bits = 0; bits < 0x7c00; bits++) {
        // The number, halfway to the next, and on both sides of that.
        f16 here{(u16)bits}, next{(u16)(bits + 1)}, to;
        f32 low = load(here), high = bits == 0x7bff ? 65536 : load(next), middle = (low + high) / 2;
        u16 even = bits % 2 ? next.bits : here.bits;
        store(to, low);
        EXPECT(to.bits == bits);
        store(to, -middle);
        EXPECT(to.bits == (0x8000 | even));
        store(to, std::nextafter(middle, 0.0f));
        EXPECT(to.bits == bits);
        store(to, std::nextafter(middle, 1e9f));
        EXPECT(to.bits == bits + 1);
    }
    EXPECT(load(f16{0x3c00}) == 1 && load(f16{1}) == 0x1p-24f && load(f16{0xfbff}) == -65504);
    for (u32 bits = 0; bits < 0x7f80; bits++) {
        f32 low = load(bf16{(u16)bits});
        f32 middle = __uint_as_float(bits << 16 | 0x8000);
        bf16 to;
        store(to, low);
        EXPECT(to.bits == bits);
        store(to, middle);
        EXPECT(to.bits == (bits + bits % 2));
        store(to, __uint_as_float(bits << 16 | 0x8001));
        EXPECT(to.bits == bits + 1);
    }
    bf16 nan;
    store(nan, NAN);
    EXPECT(nan.bits == 0x7fff && pack_bf16(1, -2) == 0xc0003f80);
    EXPECT(exp2_fast(0) == 1 && exp2_fast(MINUS_INFINITY) == 0 && exp2_fast(-140) == 0);
    EXPECT(fmaxf(NAN, 1) == 1 && fmaxf(1, NAN) == 1 && min(NAN, 2.0f) == 2);
}

TEST(copies_arrive_when_they_are_waited_for) {
    std::vector<u32> from(256), out(192);
    for (u32 i = 0; i < 256; i++) from[i] = i + 1;
    for (bool at_once : {false, true}) {
        emulator::options.copies_at_once = at_once;
        EXPECT(launch("copies", 1, 32, 0, out.data(), (const u32*)from.data()) == "");
        for (u32 i = 0; i < 32; i++) {
            u32 first = from[i * 8], second = i % 2 ? from[i * 8 + 4] : 0, late = ~0u;
            u32 expected[] = {
                at_once ? first : late, at_once ? second : late, first, at_once ? second : late, first, second};
            EXPECT(std::equal(expected, expected + 6, &out[i * 6]));
        }
    }
}

TEST(mistakes_are_reported) {
    const char* expected[] = {"different barriers", "wait in a warp collective of mask ffffffff",
                              "leaves out its caller", "off its border", "no shared memory"};
    for (u32 which = 0; which < 5; which++) {
        std::string failed = launch("mistakes", 1, 64, 64, which);
        EXPECT(failed.find(expected[which]) != std::string::npos);
        // The machine is as before.
        EXPECT(launch("mistakes", 1, 64, 64, 5u) == "");
    }
}

TEST(blocks_find_poison_in_shared_memory) {
    std::vector<u32> out(192);
    EXPECT(launch("poisoned", 3, 64, 256, out.data()) == "");
    EXPECT(std::ranges::count(out, ~0u) == 192);
}

#ifdef __SANITIZE_ADDRESS__
TEST(static_shared_memory_out_of_bounds) {
    u32 out = 0;
    launch("overrun", 1, 1, 100, &out, 48u, 99u);
}
TEST(dynamic_shared_memory_out_of_bounds) {
    u32 out = 0;
    launch("overrun", 1, 1, 100, &out, 47u, 100u);
}
#endif
TEST(shared_memory_within_its_bounds) {
    u32 out = 0;
    EXPECT(launch("overrun", 1, 1, 100, &out, 47u, 99u) == "" && out == ~0u + 255);
}

TEST(a_seed_finds_a_race) {
    std::vector<u32> right(64), out(64);
    EXPECT(launch("reversal", 1, 64, 0, right.data(), 0u) == "");
    u32 differ = 0;
    for (u64 seed = 1; seed < 9; seed++) {
        emulator::options.seed = seed;
        EXPECT(launch("reversal", 1, 64, 0, out.data(), 0u) == "");
        EXPECT(out == right);
        EXPECT(launch("reversal", 1, 64, 0, out.data(), 1u) == "");
        differ += out != right;
    }
    EXPECT(differ == 8);
}

TEST(every_thread_of_every_block_runs_once) {
    for (u64 seed : {0, 5, 6}) {
        emulator::options.seed = seed;
        std::vector<u32> out(5 * 3 * 2 * 60);
        EXPECT(launch("places", dim3(5, 3, 2), dim3(4, 3, 5), 0, out.data()) == "");
        for (u32 i = 0; i < out.size(); i++) EXPECT(out[i] == 1 + i / 60);
    }
}

TEST(blocks_sum_in_one_order) {
    std::vector<f32> x(256), out(256), again(256);
    for (u32 i = 0; i < 256; i++) x[i] = 1.0f / (f32)(i + 1);
    EXPECT(launch("sums", 1, 256, 0, out.data(), (const f32*)x.data()) == "");
    emulator::options.seed = 3;
    EXPECT(launch("sums", 1, 256, 0, again.data(), (const f32*)x.data()) == "");
    // The 256th harmonic number, and the largest, 1; a sum of eight levels rounds eight times, each term's share.
    EXPECT(std::fabs(out[0] - 7.124344) < 8 * 6e-8 * 7.124344 && out == again);
}
