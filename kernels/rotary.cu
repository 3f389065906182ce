// Rotary position embedding in the rotate-half form: src/ops/rotary.rs. In place; memory moves each element of the
// queries and keys in and out once.
#include "wide.cuh"

// A block has a row. A thread takes pieces of 16 bytes of a head's lower half, with those of the upper half that they
// turn with. `heads` counts query and key heads, `width` is a row's elements; the table is positions x half x (cos,
// sin).
KERNEL(256, NAMED(rotary),
       (real* qkv, const f32* table, u32 heads, u32 half, u32 width, u32 sequence, u32 first_position, u32 backward)) {
    u64 row = blockIdx.x;
    real* start = qkv + row * width;
    const f32* angles = table + ((u64)first_position + row % sequence) * (2 * half);
    bool wide = is_wide(qkv, half), wide_table = is_wide(table, 2 * half);
    u32 pieces = (half + WIDE<real> - 1) / WIDE<real>;
    f32 sign = backward ? -1.0f : 1.0f;
    for (u32 piece = threadIdx.x; piece < heads * pieces; piece += blockDim.x) {
        u32 i = piece % pieces * WIDE<real>;
        real *low = start + piece / pieces * (2 * half), *high = low + half;
        Wide<real> a = load_wide(low, i, half, wide), b = load_wide(high, i, half, wide);
        f32 turn[2 * WIDE<real>], turned_a[WIDE<real>], turned_b[WIDE<real>];
        load_f32(turn, angles, 2 * i, 2 * half, wide_table);
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) {
            f32 x = load(a.at[k]), y = load(b.at[k]), cosine = turn[2 * k], sine = sign * turn[2 * k + 1];
            turned_a[k] = x * cosine - y * sine;
            turned_b[k] = y * cosine + x * sine;
        }
        store_wide(low, i, half, wide, turned_a);
        store_wide(high, i, half, wide, turned_b);
    }
}
