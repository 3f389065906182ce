// Sums of matrices' columns in a fixed order.
#pragma once
#include "wide.cuh"

// Sum of `count` elements, `stride` apart from p on. Each lane of a warp has a column of its own (`inside`, or it has
// none), the block's warps have a slice of the rows each: added in order within a slice, and then over slices. The same
// in every warp.
template <class T> DEVICE f32 column_sum(const T* p, u64 count, u64 stride, bool inside) {
    SHARED f32 slices[WARP][WARP];
    u32 lane = threadIdx.x % WARP, slice = threadIdx.x / WARP, all = blockDim.x / WARP;
    u64 rows = (count + all - 1) / all, from = slice * rows, to = from + rows < count ? from + rows : count;
    f32 sum = 0;
    if (inside) {
#pragma unroll 8
        for (u64 r = from; r < to; r++) sum += load(p[r * stride]);
    }
    slices[slice][lane] = sum;
    __syncthreads();
    sum = 0;
    for (u32 s = 0; s < all; s++) sum += slices[s][lane];
    __syncthreads();  // The next call may write.
    return sum;
}

// The block's threads as `teams`, each with all of `columns` columns, of which a thread has the N from `own` on: calls
// put(c, sum) for each c < inside, with the teams' values for column c added in order.
template <int MOST_WARPS, int N, class F>
DEVICE void add_teams(const f32 (&values)[N], u32 own, u32 columns, u32 inside, u32 team, u32 teams, F put) {
    SHARED f32 all[MOST_WARPS * WARP * N];
    __syncthreads();  // The last call's readers are done.
#pragma unroll
    for (int k = 0; k < N; k++) all[team * columns + own + k] = values[k];
    __syncthreads();
    for (u32 c = threadIdx.x; c < inside; c += blockDim.x) {
        f32 sum = 0;
        for (u32 t = 0; t < teams; t++) sum += all[t * columns + c];
        put(c, sum);
    }
}
