// RMSNorm of each query and key head: src/ops/head_norm.rs has the formulas. A block has a row at a time, and a group
// of `lanes` (a power of two, at most a warp) one of its heads, in pieces of 16 bytes; a head that is longer than the
// group is gone through in steps, and read again from the cache. Memory moves each element of a row in and out once.
#include "wide.cuh"

// Sum over a group of lanes.
DEVICE f32 group_sum(f32 x, u32 lanes) {
    for (u32 m = lanes / 2; m > 0; m /= 2) x += __shfl_xor_sync(FULL_WARP, x, m);
    return x;
}

// The values' heads, after those that are normalised, are copied.
KERNEL(512, NAMED(head_norm_forward),
       (real* out, f32* statistics, const real* qkv, const real* q_gain, const real* k_gain, u32 query_heads,
        u32 key_heads, u32 size, u32 lanes, f32 eps)) {
    u32 normed = query_heads + key_heads, heads = normed + key_heads;
    u32 group = threadIdx.x / lanes, groups = blockDim.x / lanes, own = threadIdx.x % lanes * WIDE<real>;
    u64 row = blockIdx.x;
    bool wide = is_wide(out, size) && is_wide(qkv, size), wide_gain = is_wide(q_gain, size) && is_wide(k_gain, size);
    // All lanes of a warp go on together, since they exchange; those beyond the last head have nothing.
    for (u32 base = 0; base < heads; base += groups) {
        u32 head = base + group, inside = head < heads ? size : 0;
        u64 at = (row * heads + head) * size;
        f32 squares = 0;
        for (u32 i = own; i < inside; i += lanes * WIDE<real>) {
            Wide<real> x = load_wide(qkv + at, i, inside, wide);
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++) squares += load(x.at[k]) * load(x.at[k]);
        }
        f32 inverse = 1.0f / sqrtf(group_sum(squares, lanes) / size + eps);
        if (own == 0 && head < normed) statistics[row * normed + head] = inverse;
        const real* gain = head < query_heads ? q_gain : k_gain;
        for (u32 i = own; i < inside; i += lanes * WIDE<real>) {
            Wide<real> x = load_wide(qkv + at, i, inside, wide);
            if (head < normed) {
                Wide<real> gains = load_wide(gain, i, inside, wide_gain);
                f32 values[WIDE<real>];
#pragma unroll
                for (int k = 0; k < WIDE<real>; k++) values[k] = load(x.at[k]) * inverse * load(gains.at[k]);
                round_to(x, values);
            }
            store_wide(out + at, i, inside, wide, x);
        }
    }
}

// What a group does to one head of a row: adds to the gain's gradients (its own, in shared memory) and turns d into the
// gradient by the input. With r = 1/deviation: dgain += d x r; d = r (d gain - x r^2 mean(d gain x)).
DEVICE void head_backward(real* d, f32* dgain, const real* x, f32 inverse, const real* gain, u32 size, u32 inside,
                          u32 own, u32 lanes, bool wide, bool wide_gain) {
    f32 slope = 0;
    for (u32 i = own; i < inside; i += lanes * WIDE<real>) {
        Wide<real> ds = load_wide(d, i, inside, wide), xs = load_wide(x, i, inside, wide);
        Wide<real> gains = load_wide(gain, i, inside, wide_gain);
        // Past the end of a head all is zero, and nobody else has these places.
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) {
            f32 dx = load(ds.at[k]) * load(xs.at[k]);
            if (i + k < inside) dgain[i + k] += dx * inverse;
            slope += dx * load(gains.at[k]);
        }
    }
    slope = group_sum(slope, lanes) / size * inverse * inverse;
    for (u32 i = own; i < inside; i += lanes * WIDE<real>) {
        Wide<real> ds = load_wide(d, i, inside, wide), xs = load_wide(x, i, inside, wide);
        Wide<real> gains = load_wide(gain, i, inside, wide_gain);
        f32 values[WIDE<real>];
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++)
            values[k] = inverse * (load(ds.at[k]) * load(gains.at[k]) - load(xs.at[k]) * slope);
        store_wide(d, i, inside, wide, values);
    }
}

// d in place, and for each block of `rows_per_block` rows the sums of the gains' gradients: partials is blocks x 2 (q,
// k) x size. Shared memory: groups x 2 x size of f32.
KERNEL(256, NAMED(head_norm_backward),
       (real* d, f32* partials, const real* qkv, const f32* statistics, const real* q_gain, const real* k_gain,
        u64 rows, u32 rows_per_block, u32 query_heads, u32 key_heads, u32 size, u32 lanes)) {
    DYNAMIC_SHARED(shared);
    f32* sums = (f32*)shared;
    u32 normed = query_heads + key_heads, heads = normed + key_heads;
    u32 group = threadIdx.x / lanes, groups = blockDim.x / lanes, own = threadIdx.x % lanes * WIDE<real>;
    bool wide = is_wide(d, size) && is_wide(qkv, size), wide_gain = is_wide(q_gain, size) && is_wide(k_gain, size);
    for (u32 i = threadIdx.x; i < groups * 2 * size; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    u64 from = (u64)blockIdx.x * rows_per_block, to = from + rows_per_block < rows ? from + rows_per_block : rows;
    for (u64 row = from; row < to; row++) {
        for (u32 base = 0; base < normed; base += groups) {
            u32 head = base + group, inside = head < normed ? size : 0, side = head < query_heads ? 0 : 1;
            u64 at = (row * heads + head) * size;
            f32 inverse = inside ? statistics[row * normed + head] : 0.0f;
            head_backward(d + at, sums + (group * 2 + side) * size, qkv + at, inverse, side ? k_gain : q_gain, size,
                          inside, own, lanes, wide, wide_gain);
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < 2 * size; i += blockDim.x) {
        f32 sum = 0;
        for (u32 g = 0; g < groups; g++) sum += sums[g * 2 * size + i];
        partials[(u64)blockIdx.x * 2 * size + i] = sum;
    }
}
