// Rotary position embedding in the rotate-half form: src/ops/rotary.rs. In place; memory moves each element of the
// queries and keys in and out once. With Q/K norm it is done in head_norm.cu.
#include "rotary.cuh"

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
        f32 a[WIDE<real>], b[WIDE<real>];
        load_wide(a, low, i, half, wide);
        load_wide(b, high, i, half, wide);
        turn(a, b, angles, i, half, wide_table, sign);
        store_wide(low, i, half, wide, a);
        store_wide(high, i, half, wide, b);
    }
}
