// What a linear layer needs beside its products (src/ops/linear.rs): the gradient of the bias, column sums of dy.
#include "types.cuh"

#define THREADS 256
#define ACROSS 32
#define DOWN 8

// out[column] = the sum of x over rows first .. end, V neighbouring columns a thread. The order of a sum is given by
// the rows alone, so columns that hold copies get the same bits, wherever they lie.
template <int V, class T>
DEVICE void sum_columns(void* out, u32 type, const T* x, u64 first, u64 end, u32 columns, bool add) {
    SHARED f32 sums[DOWN][ACROSS * V];
    u32 across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS;
    u64 column = ((u64)blockIdx.x * ACROSS + across) * V;
    f32 sum[V] = {};
    if (column < columns) {
#pragma unroll 4
        for (u64 row = first + down; row < end; row += DOWN) {
            Pack<T, V> pack = *(const Pack<T, V>*)(x + row * columns + column);
#pragma unroll
            for (int j = 0; j < V; ++j) sum[j] += load(pack.at[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) sums[down][across * V + j] = sum[j];
    __syncthreads();
    for (u32 j = threadIdx.x; j < ACROSS * V; j += THREADS) {
        u64 at = (u64)blockIdx.x * ACROSS * V + j;
        if (at >= columns) continue;
        f32 total = add ? load_as(out, type, at) : 0;
        for (int k = 0; k < DOWN; ++k) total += sums[k][j];
        store_as(out, type, at, total);
    }
}

// partials[blockIdx.y, column] = the sum of x over the block's rows. Bytes: x once.
KERNEL(THREADS, NAMED(partial_column_sums),
       (f32* partials, const real* x, u64 rows, u32 columns, u32 rows_per_block, u32 wide)) {
    u64 first = (u64)blockIdx.y * rows_per_block, end = first + rows_per_block < rows ? first + rows_per_block : rows;
    f32* out = partials + (u64)blockIdx.y * columns;
    if (wide) sum_columns<WIDE<real>>(out, TYPE_F32, x, first, end, columns, false);
    else sum_columns<1>(out, TYPE_F32, x, first, end, columns, false);
}

// out = the column sums of partials, or with `add` out += them.
KERNEL(THREADS, NAMED(add_partials),
       (void* out, u32 out_type, const f32* partials, u32 rows, u32 columns, u32 add)) {
    sum_columns<1>(out, out_type, partials, 0, rows, columns, add != 0);
}
