// RMSNorm of each query and key head, and RoPE behind it in the same pass: src/ops/head_norm.rs has the formulas. A
// block has a row at a time, and a group of `lanes` (a power of two, at most a warp) one of its heads, in pieces of 16
// bytes; a head that is longer than the group is gone through in steps, and read again from the cache. Where heads are
// turned, a lane has pieces of the lower half and those of the upper half that they turn with: SIDES is 2, and `part`
// half a head; otherwise 1 and all of it. Memory moves each element of a row in and out once.
#include "rotary.cuh"

// Sum over a group of lanes.
DEVICE f32 group_sum(f32 x, u32 lanes) {
    for (u32 m = lanes / 2; m > 0; m /= 2) x += __shfl_xor_sync(FULL_WARP, x, m);
    return x;
}

// A lane's elements of a head, from `i` of each side on.
template <int SIDES> DEVICE void load_sides(f32 (&to)[SIDES][WIDE<real>], const real* p, u32 i, u32 part, bool wide) {
#pragma unroll
    for (int s = 0; s < SIDES; s++) load_wide(to[s], p + s * part, i, part, wide);
}
template <int SIDES>
DEVICE void store_sides(real* p, u32 i, u32 part, bool wide, const f32 (&values)[SIDES][WIDE<real>]) {
#pragma unroll
    for (int s = 0; s < SIDES; s++) store_wide(p + s * part, i, part, wide, values[s]);
}

// How rows lie in memory, which is the same in both passes, and where a row's angles are.
struct Rows {
    u32 query_heads, key_heads, size, lanes;
    const f32* table;  // Null: heads are not turned.
    u32 sequence, first_position;
    bool wide, wide_gain, wide_table;

    DEVICE u32 normed() const { return query_heads + key_heads; }
    DEVICE u32 heads() const { return query_heads + 2 * key_heads; }
    DEVICE const f32* angles(u64 row) const {
        return table ? table + ((u64)first_position + row % sequence) * size : nullptr;
    }
};

// What a group does with one head: out = x gain / deviation, turned; or, with no gain, out = x. `inside` is 0 for lanes
// beyond the last head, which go along since lanes exchange.
template <int SIDES>
DEVICE f32 head_forward(real* out, const real* x, const real* gain, const f32* angles, const Rows& rows, u32 inside,
                        f32 eps) {
    u32 part = rows.size / SIDES, own = threadIdx.x % rows.lanes * WIDE<real>, step = rows.lanes * WIDE<real>;
    f32 squares = 0;
    for (u32 i = own; i < inside; i += step) {
        f32 xs[SIDES][WIDE<real>];
        load_sides(xs, x, i, part, rows.wide);
#pragma unroll
        for (int k = 0; k < SIDES * WIDE<real>; k++) {
            f32 y = xs[k / WIDE<real>][k % WIDE<real>];
            squares += y * y;
        }
    }
    f32 inverse = 1.0f / sqrtf(group_sum(squares, rows.lanes) / rows.size + eps);
    for (u32 i = own; i < inside; i += step) {
        f32 xs[SIDES][WIDE<real>], gains[SIDES][WIDE<real>];
        load_sides(xs, x, i, part, rows.wide);
        if (gain) {
            load_sides(gains, gain, i, part, rows.wide_gain);
#pragma unroll
            for (int k = 0; k < SIDES * WIDE<real>; k++)
                xs[k / WIDE<real>][k % WIDE<real>] *= inverse * gains[k / WIDE<real>][k % WIDE<real>];
            if (SIDES == 2) turn(xs[0], xs[SIDES - 1], angles, i, part, rows.wide_table, 1.0f);
        }
        store_sides(out, i, part, rows.wide, xs);
    }
    return inverse;
}

// The values' heads, after those that are normalised, are copied.
template <int SIDES>
DEVICE void forward(real* out, f32* statistics, const real* qkv, const real* q_gain, const real* k_gain,
                    const Rows& rows, f32 eps) {
    u32 group = threadIdx.x / rows.lanes, groups = blockDim.x / rows.lanes;
    u64 row = blockIdx.x;
    for (u32 base = 0; base < rows.heads(); base += groups) {
        u32 head = base + group, inside = head < rows.heads() ? rows.size / SIDES : 0;
        u64 at = (row * rows.heads() + head) * rows.size;
        const real* gain = head < rows.query_heads ? q_gain : head < rows.normed() ? k_gain : nullptr;
        f32 inverse = head_forward<SIDES>(out + at, qkv + at, gain, rows.angles(row), rows, inside, eps);
        if (threadIdx.x % rows.lanes == 0 && gain) statistics[row * rows.normed() + head] = inverse;
    }
}
KERNEL(512, NAMED(head_norm_forward),
       (real* out, f32* statistics, const real* qkv, const real* q_gain, const real* k_gain, const f32* table,
        u32 sequence, u32 first_position, u32 query_heads, u32 key_heads, u32 size, u32 lanes, f32 eps)) {
    u32 part = table ? size / 2 : size;
    bool wide = is_wide(out, part) && is_wide(qkv, part), wide_gain = is_wide(q_gain, part) && is_wide(k_gain, part);
    Rows rows = {query_heads, key_heads, size, lanes,     table,
                 sequence,    first_position, wide, wide_gain, is_wide(table, size)};
    if (table) forward<2>(out, statistics, qkv, q_gain, k_gain, rows, eps);
    else forward<1>(out, statistics, qkv, q_gain, k_gain, rows, eps);
}

// The gradient by a head's normalised elements, which is that by the turned ones turned back.
template <int SIDES>
DEVICE void load_turned(f32 (&to)[SIDES][WIDE<real>], const real* d, const f32* angles, const Rows& rows, u32 i) {
    u32 part = rows.size / SIDES;
    load_sides(to, d, i, part, rows.wide);
    if (SIDES == 2) turn(to[0], to[SIDES - 1], angles, i, part, rows.wide_table, -1.0f);
}

// What a group does to one head of a row: adds to the gain's gradients (its own, in shared memory) and turns d into the
// gradient by the input. With r = 1/deviation: dgain += d x r; d = r (d gain - x r^2 mean(d gain x)).
template <int SIDES>
DEVICE void head_backward(real* d, f32* dgain, const real* x, f32 inverse, const real* gain, const f32* angles,
                          const Rows& rows, u32 inside) {
    u32 part = rows.size / SIDES, own = threadIdx.x % rows.lanes * WIDE<real>, step = rows.lanes * WIDE<real>;
    f32 slope = 0;
    for (u32 i = own; i < inside; i += step) {
        f32 ds[SIDES][WIDE<real>], xs[SIDES][WIDE<real>], gains[SIDES][WIDE<real>];
        load_turned(ds, d, angles, rows, i);
        load_sides(xs, x, i, part, rows.wide);
        load_sides(gains, gain, i, part, rows.wide_gain);
        // Past the end of a side all is zero, and nobody else has these places.
#pragma unroll
        for (int s = 0; s < SIDES; s++)
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++) {
                f32 dx = ds[s][k] * xs[s][k];
                if (i + k < inside) dgain[s * part + i + k] += dx * inverse;
                slope += dx * gains[s][k];
            }
    }
    slope = group_sum(slope, rows.lanes) / rows.size * inverse * inverse;
    for (u32 i = own; i < inside; i += step) {
        f32 ds[SIDES][WIDE<real>], xs[SIDES][WIDE<real>], gains[SIDES][WIDE<real>];
        load_turned(ds, d, angles, rows, i);
        load_sides(xs, x, i, part, rows.wide);
        load_sides(gains, gain, i, part, rows.wide_gain);
#pragma unroll
        for (int s = 0; s < SIDES; s++)
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++) ds[s][k] = inverse * (ds[s][k] * gains[s][k] - xs[s][k] * slope);
        store_sides(d, i, part, rows.wide, ds);
    }
}

// Rows `from` to `to`; sums: groups x 2 (q, k) x size.
template <int SIDES>
DEVICE void backward(real* d, f32* sums, const real* qkv, const f32* statistics, const real* q_gain,
                     const real* k_gain, u64 from, u64 to, const Rows& rows) {
    u32 group = threadIdx.x / rows.lanes, groups = blockDim.x / rows.lanes;
    for (u64 row = from; row < to; row++) {
        for (u32 base = 0; base < rows.normed(); base += groups) {
            u32 head = base + group, inside = head < rows.normed() ? rows.size / SIDES : 0;
            u32 side = head < rows.query_heads ? 0 : 1;
            u64 at = (row * rows.heads() + head) * rows.size;
            f32 inverse = inside ? statistics[row * rows.normed() + head] : 0.0f;
            head_backward<SIDES>(d + at, sums + (group * 2 + side) * rows.size, qkv + at, inverse,
                                 side ? k_gain : q_gain, rows.angles(row), rows, inside);
        }
    }
}

// d in place, and for each block of `rows_per_block` rows the sums of the gains' gradients: partials is blocks x 2 (q,
// k) x size. Shared memory: groups x 2 x size of f32.
KERNEL(256, NAMED(head_norm_backward),
       (real* d, f32* partials, const real* qkv, const f32* statistics, const real* q_gain, const real* k_gain,
        const f32* table, u32 sequence, u32 first_position, u64 rows, u32 rows_per_block, u32 query_heads,
        u32 key_heads, u32 size, u32 lanes)) {
    DYNAMIC_SHARED(shared);
    f32* sums = (f32*)shared;
    u32 groups = blockDim.x / lanes, part = table ? size / 2 : size;
    for (u32 i = threadIdx.x; i < groups * 2 * size; i += blockDim.x) sums[i] = 0;
    __syncthreads();
    u64 from = (u64)blockIdx.x * rows_per_block, to = from + rows_per_block < rows ? from + rows_per_block : rows;
    bool wide = is_wide(d, part) && is_wide(qkv, part), wide_gain = is_wide(q_gain, part) && is_wide(k_gain, part);
    Rows places = {query_heads, key_heads, size, lanes,     table,
                   sequence,    first_position, wide, wide_gain, is_wide(table, size)};
    if (table) backward<2>(d, sums, qkv, statistics, q_gain, k_gain, from, to, places);
    else backward<1>(d, sums, qkv, statistics, q_gain, k_gain, from, to, places);
    __syncthreads();
    for (u32 i = threadIdx.x; i < 2 * size; i += blockDim.x) {
        f32 sum = 0;
        for (u32 g = 0; g < groups; g++) sum += sums[g * 2 * size + i];
        partials[(u64)blockIdx.x * 2 * size + i] = sum;
    }
}
