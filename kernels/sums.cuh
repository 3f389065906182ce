// Sums of matrices' columns in a fixed order.
#pragma once
#include "device.cuh"

// Sum of `count` elements, `stride` apart from p on, where a lane of a warp has a column of its own (`inside`, or it has
// none) and the block's warps, at most 32 and whole, have a slice of the rows each: added in order within a slice, and
// then over slices. The same in every warp. Adjacent lanes read adjacent elements.
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
