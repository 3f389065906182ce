// Turning pairs of a head's elements: src/ops/rotary.rs has the formula.
#pragma once
#include "wide.cuh"

// Turns the elements i, i + 1, ... of a head's lower half, `low`, with those of its upper half, by the angles of the
// row's position (half x (cos, sin)); the other way with sign -1. Past the end of a half there are zeros.
template <int N>
DEVICE void turn(f32 (&low)[N], f32 (&high)[N], const f32* angles, u32 i, u32 half, bool wide, f32 sign) {
    f32 by[2 * N];
    load_f32(by, angles, 2 * i, 2 * half, wide);
#pragma unroll
    for (int k = 0; k < N; k++) {
        f32 x = low[k], y = high[k], cosine = by[2 * k], sine = sign * by[2 * k + 1];
        low[k] = x * cosine - y * sine;
        high[k] = y * cosine + x * sine;
    }
}
