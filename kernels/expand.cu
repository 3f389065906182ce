// Expansion of tensors, initial values, mean squares: src/ops/expand.rs has the contracts, and every bit here is the
// CPU's. A thread writes the 16 elements of the target that the blocks it draws make, in runs of four.
#include "rng.cuh"
#include "types.cuh"

#define THREADS 256

// The part of a target that is written: elements start .. end of the whole tensor, of which a thread's are
// first + 16 q + j.
struct Part {
    u64 start, end, first, group;
    u32 quarter;
    DEVICE Part(u64 start, u64 len) : start(start), end(start + len) {
        u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x;
        group = start / GROUP + thread / 4;
        quarter = thread % 4;
        first = group * GROUP + quarter * SPAN;
    }
    DEVICE bool has(u64 i) const { return start <= i && i < end; }
};

// What is added to the values: amount times normal numbers, drawn here or (less their means) made by paired_noise,
// whose first element is `origin` of the whole tensor.
struct Noise {
    Stream stream;
    f64 amount;
    bool drawn;
    const void* given;
    u64 origin;
};

template <class A> DEVICE void add_noise(Exact<A> (&v)[RUNS][SPAN], Part part, Noise noise) {
    if (!noise.drawn) return;
    Exact<A> amount = (A)noise.amount;
    if (noise.given) {
        const A* given = (const A*)noise.given;
#pragma unroll
        for (int e = 0; e < RUNS * SPAN; ++e) {
            u64 i = part.first + e / SPAN * 16 + e % SPAN;
            if (part.has(i)) v[e / SPAN][e % SPAN] = v[e / SPAN][e % SPAN] + amount * given[i - noise.origin];
        }
        return;
    }
    f32 z[RUNS][SPAN];
    normals_of_quarter(z, noise.stream, part.group, part.quarter);
#pragma unroll
    for (int e = 0; e < RUNS * SPAN; ++e) {
        v[e / SPAN][e % SPAN] = v[e / SPAN][e % SPAN] + amount * (A)z[e / SPAN][e % SPAN];
    }
}

template <class T, class A> DEVICE void write(T* target, const Exact<A> (&v)[RUNS][SPAN], Part part) {
    constexpr int WIDTH = sizeof(T) * SPAN > 16 ? WIDE<T> : SPAN;
    T* at_first = target + (i64)(part.first - part.start);
    bool aligned = (u64)at_first % (sizeof(T) * WIDTH) == 0;
#pragma unroll
    for (int q = 0; q < RUNS; ++q) {
        u64 i = part.first + 16 * q;
        if (aligned && part.has(i) && i + SPAN <= part.end) {
#pragma unroll
            for (int j = 0; j < SPAN; j += WIDTH) {
                Pack<T, WIDTH> pack;
#pragma unroll
                for (int k = 0; k < WIDTH; ++k) store(pack.at[k], v[q][j + k].value);
                *(Pack<T, WIDTH>*)(at_first + 16 * q + j) = pack;
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            if (part.has(i + j)) store(at_first[16 * q + j], v[q][j].value);
        }
    }
}

// The 16-bit types are rounded from f32.
template <class A> DEVICE void write(void* target, u32 type, const Exact<A> (&v)[RUNS][SPAN], Part part) {
    if constexpr (sizeof(A) == 8) {
        write((f64*)target, v, part);
    } else {
        switch (type) {
            case TYPE_F32: return write((f32*)target, v, part);
            case TYPE_BF16: return write((bf16*)target, v, part);
            default: return write((f16*)target, v, part);
        }
    }
}

// Where values come from; a matrix of `columns` columns is the target.
struct Map {
    const u32 *rows, *of_columns;
    u32 source_columns, columns;
    // Further factors, or null.
    const f64 *rows_scale, *columns_scale;

    DEVICE f64 factor(f64 scale, u64 row, u64 column) const {
        if (rows_scale) scale *= rows_scale[row];
        return columns_scale ? scale * columns_scale[column] : scale;
    }
};

// v = factor times the source's values.
template <class A, class S>
DEVICE void gather(Exact<A> (&v)[RUNS][SPAN], const S* values, Map map, f64 whole, Part part) {
    bool scaled = map.rows_scale || map.columns_scale;
    Exact<A> scale = (A)whole;
    u64 at = part.first < part.start ? part.start : part.first;
    u64 row = part.end >> 32 ? at / map.columns : (u32)at / map.columns;
    u64 column = at - row * map.columns;
#pragma unroll
    for (int q = 0; q < RUNS; ++q) {
        u64 i = part.first + 16 * q;
        // The runs may begin before the range does.
        if (i > at) {
            column += i - at;
            at = i;
        }
        while (column >= map.columns && at < part.end) {
            column -= map.columns;
            ++row;
        }
        u64 run_row = row, run_column = column;
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            v[q][j] = A(0);
            if (!part.has(i + j)) continue;
            if (run_column == map.columns) {
                run_column = 0;
                ++run_row;
            }
            if (scaled) scale = (A)map.factor(whole, run_row, run_column);
            u64 from = (u64)map.rows[run_row] * map.source_columns + map.of_columns[run_column++];
            v[q][j] = scale * (A)load(values[from]);
        }
    }
}

template <class A> struct Gather {
    Exact<A> (&v)[RUNS][SPAN];
    Map map;
    f64 scale;
    Part part;
    template <class S> DEVICE void operator()(const S* values) const {
        gather(v, values, map, scale, part);
    }
};

template <class A>
DEVICE void expand_part(void* target, u32 type, const void* values, u32 source_type, Map map, f64 scale, Part part,
                        Noise noise) {
    Exact<A> v[RUNS][SPAN];
    with_type(source_type, values, Gather<A>{v, map, scale, part});
    add_noise(v, part, noise);
    write(target, type, v, part);
}

// Bytes: an element of the target, and its source once for all copies that lie near each other.
KERNEL(THREADS, expand,
       (void* target, u32 target_type, u64 start, u64 len, const void* values, u32 source_type, u32 source_columns,
        const u32* rows_map, const u32* columns_map, u32 columns, f64 scale, const f64* rows_scale,
        const f64* columns_scale, u32 drawn, f64 amount, u64 seed, u64 name, const void* given, u64 origin)) {
    Part part(start, len);
    if (part.first >= part.end) return;
    Map map = {rows_map, columns_map, source_columns, columns, rows_scale, columns_scale};
    Noise noise = {{seed, name}, amount, drawn != 0, given, origin};
    if (target_type == TYPE_F64) {
        expand_part<f64>(target, target_type, values, source_type, map, scale, part, noise);
    } else {
        expand_part<f32>(target, target_type, values, source_type, map, scale, part, noise);
    }
}

template <class A> DEVICE void fill_part(void* target, u32 type, f64 mean, Part part, Noise noise) {
    Exact<A> v[RUNS][SPAN];
#pragma unroll
    for (int e = 0; e < RUNS * SPAN; ++e) v[e / SPAN][e % SPAN] = (A)mean;
    add_noise(v, part, noise);
    write(target, type, v, part);
}

KERNEL(THREADS, fill,
       (void* target, u32 target_type, u64 start, u64 len, f64 mean, u32 drawn, f64 amount, u64 seed, u64 name)) {
    Part part(start, len);
    if (part.first >= part.end) return;
    Noise noise = {{seed, name}, amount, drawn != 0, nullptr, 0};
    if (target_type == TYPE_F64) {
        fill_part<f64>(target, target_type, mean, part, noise);
    } else {
        fill_part<f32>(target, target_type, mean, part, noise);
    }
}

#define NO_COLUMN 0xffffffffu

// The copies of each source column, as chains in the order of the target's columns: first_copy[source column], and
// next_copy[column].
KERNEL(THREADS, copies_of_columns,
       (u32* first_copy, u32* next_copy, const u32* columns_map, u32 columns, u32 source_columns)) {
    u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x;
    auto find = [&](u32 source, u64 from) {
        while (from < columns && columns_map[from] != source) ++from;
        return from < columns ? (u32)from : NO_COLUMN;
    };
    if (thread < columns) next_copy[thread] = find(columns_map[thread], thread + 1);
    if (thread < source_columns) first_copy[thread] = find((u32)thread, 0);
}

// noise[row, j] = normal number less the mean over the copies of j's source column; a block makes a row, the first one
// being `first_row` of the whole tensor.
template <class A>
DEVICE void paired_row(A* noise, u64 first_row, u32 columns, const u32* first_copy, const u32* next_copy,
                       u32 source_columns, f64 copies, Stream stream) {
    A* row = noise + (u64)blockIdx.x * columns;
    u64 start = (first_row + blockIdx.x) * columns, end = start + columns;
    for (u64 thread = threadIdx.x; (start / GROUP + thread / 4) * GROUP < end; thread += THREADS) {
        u64 group = start / GROUP + thread / 4;
        f32 z[RUNS][SPAN];
        normals_of_quarter(z, stream, group, thread % 4);
#pragma unroll
        for (int e = 0; e < RUNS * SPAN; ++e) {
            u64 i = group * GROUP + thread % 4 * SPAN + e / SPAN * 16 + e % SPAN;
            if (start <= i && i < end) row[i - start] = z[e / SPAN][e % SPAN];
        }
    }
    __syncthreads();
    for (u32 source = threadIdx.x; source < source_columns; source += THREADS) {
        Exact<A> sum = A(0);
        for (u32 j = first_copy[source]; j != NO_COLUMN; j = next_copy[j]) sum = sum + row[j];
        Exact<A> mean = sum / (A)copies;
        for (u32 j = first_copy[source]; j != NO_COLUMN; j = next_copy[j]) row[j] = (row[j] - mean).value;
    }
}

KERNEL(THREADS, paired_noise,
       (void* noise, u32 in_f64, u64 first_row, u32 columns, const u32* first_copy, const u32* next_copy,
        u32 source_columns, f64 copies, u64 seed, u64 name)) {
    Stream stream = {seed, name};
    if (in_f64) {
        paired_row((f64*)noise, first_row, columns, first_copy, next_copy, source_columns, copies, stream);
    } else {
        paired_row((f32*)noise, first_row, columns, first_copy, next_copy, source_columns, copies, stream);
    }
}

// The CPU's sum of squares: over tasks of 65,536 elements in 16 lanes, then over the tasks in pairs.
#define TASK 65536
#define SUM_LANES 16
#define TILE 2048

// Squares of x[at] and those after it, as far as they lie before the end.
struct Squares {
    f64* tile;
    u64 at, end;
    template <class T> DEVICE void operator()(const T* x) const {
#pragma unroll
        for (int k = 0; k < TILE / THREADS; ++k) {
            u64 i = at + k * THREADS + threadIdx.x;
            Exact<f64> value = i < end ? (f64)load(x[i]) : 0.0;
            tile[k * THREADS + threadIdx.x] = (value * value).value;
        }
    }
};

// sums[block] = sum of squares of the block's task. All threads square a tile; as many as there are lanes add it.
KERNEL(THREADS, square_sums, (f64* sums, const void* x, u32 x_type, u64 len)) {
    SHARED f64 tile[TILE];
    u64 start = (u64)blockIdx.x * TASK, end = start + TASK < len ? start + TASK : len;
    Exact<f64> sum = 0.0;
    for (u64 at = start; at < end; at += TILE) {
        with_type(x_type, x, Squares{tile, at, end});
        __syncthreads();
        if (threadIdx.x < SUM_LANES) {
#pragma unroll 16
            for (int i = threadIdx.x; i < TILE; i += SUM_LANES) sum = sum + tile[i];
        }
        __syncthreads();
    }
    if (threadIdx.x < SUM_LANES) tile[threadIdx.x] = sum.value;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int lane = 1; lane < SUM_LANES; ++lane) sum = sum + tile[lane];
        sums[blockIdx.x] = sum.value;
    }
}

// out[0] = sum of `sums`, neighbours first, then neighbouring sums, and so on, over `len`. One block.
KERNEL(1024, mean_of_sums, (f64* out, f64* sums, u32 count, u64 len)) {
    for (u64 step = 1; step < count; step *= 2) {
        for (u64 left = 2 * step * threadIdx.x; left + step < count; left += 2 * step * blockDim.x) {
            sums[left] = exact_sum(sums[left], sums[left + step]);
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) out[0] = count ? sums[0] / (f64)len : 0.0;
}
