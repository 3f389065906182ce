// Causal attention, forward: out = softmax(scale q k^T) v without the scores ever being in memory (Dao,
// arXiv 2307.08691, algorithm 1). One block takes some queries of a head and goes over the keys that they see; the
// largest score of a row so far, and the sum of exponentials above it, are kept in registers.
//
// FLOPs: 4 head_dim for each visible pair. Bytes: q and out once; k and v once for every block of queries, mostly from
// L2, as neighbouring blocks are those of one sequence and key/value head. Shared memory: q, and two buffers of k and v
// each; in bf16 48 KiB for heads of 64, 64 KiB for 128. With 32 rows a warp, what is read of k or v serves two products
// of the tensor cores: 160 bytes a product (heads of 64; 192 for 128), so that shared memory allows 0.8 (0.67) products
// a clock and multiprocessor, which is what mma.sync reaches on a Hopper.
#include "attention.cuh"

template <int D>
constexpr Tiles TILES = sizeof(real) == 2 ? Tiles{4, D <= 128 ? 2 : 1, D <= 96 ? 64 : 32}
                                          : Tiles{4, D <= 96 ? 2 : 1, D <= 128 ? 32 : D <= 192 ? 16 : 8};

struct Arguments {
    real* out;
    f32* log_sum_exp;
    const real *q, *k, *v;
    const i32* first_key;
    u64 q_stride, q_rows, k_stride, k_rows, v_stride, v_rows;
    u32 heads, group, head_dim, queries, keys;
    f32 scale;
};

// Softmax of a warp's rows as their scores come in.
template <int BLOCKS> struct Softmax {
    // Of each row: the largest score, and this lane's part of the sum of 2^(factor (score - largest)).
    f32 largest[2 * BLOCKS], sum[2 * BLOCKS];

    DEVICE Softmax() {
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) largest[i] = MINUS_INFINITY, sum[i] = 0;
    }
    // Turns scores into numerators, and scales what has been summed so far to the new largest score.
    template <int D, int COLUMNS>
    DEVICE void numerators(Product<BLOCKS, COLUMNS>& scores, Product<BLOCKS, D>& out, f32 factor) {
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) {
            f32 top = MINUS_INFINITY;
#pragma unroll
            for (int n = 0; n < COLUMNS / 4; n++) top = fmaxf(top, scores.at[i / 2][n / 2][i % 2 * 2 + n % 2]);
            top = fmaxf(largest[i], row_max(top));
            // While no key has been seen any finite number does: all exponentials are 0.
            f32 shift = top == MINUS_INFINITY ? 0 : top * factor;
            f32 correction = exp2_fast(__fmaf_rn(largest[i], factor, -shift));
            f32 added = 0;
#pragma unroll
            for (int n = 0; n < COLUMNS / 4; n++) {
                f32& x = scores.at[i / 2][n / 2][i % 2 * 2 + n % 2];
                x = exp2_fast(__fmaf_rn(x, factor, -shift));
                added += x;
            }
            sum[i] = __fmaf_rn(sum[i], correction, added);
            largest[i] = top;
            out.scale_row(i / 2, i % 2, correction);
        }
    }
};

// What a block of threads has to do: some queries of a head, the last ones, which see the most keys, first.
struct Work {
    u32 start, head, sequence;

    DEVICE Work(const Arguments& p, u32 rows) {
        u32 tiles = (p.queries + rows - 1) / rows, block = anew(blockIdx.x);
        start = (tiles - 1 - block % tiles) * rows;
        head = block / tiles % p.heads;
        sequence = block / tiles / p.heads;
    }
};

// Writes the warp's rows, `row` being the first of them in the block.
template <int D, int BLOCKS>
DEVICE void finish(const Arguments& p, u32 row, Product<BLOCKS, D>& out, const Softmax<BLOCKS>& softmax, real* tile) {
    Work work(p, TILES<D>.rows());
    u32 first = work.start + row, rows = first < p.queries ? p.queries - first : 0;
    u64 to = (u64)work.sequence * p.queries + first, width = (u64)p.heads * p.head_dim;
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++) {
        f32 sum = row_sum(softmax.sum[i]);
        out.scale_row(i / 2, i % 2, sum == 0 ? 0 : 1 / sum);
        u32 own = 8 * i + threadIdx.x % WARP / 4;
        if (threadIdx.x % 4 == 0 && own < rows)
            p.log_sum_exp[(to + own) * p.heads + work.head] =
                sum == 0 ? MINUS_INFINITY : softmax.largest[i] * p.scale + logf(sum);
    }
    store_product(p.out + to * width + (u64)work.head * p.head_dim, width, rows, p.head_dim, out, tile);
}

template <int D> DEVICE void attend(const Arguments& p, u8* shared) {
    constexpr Tiles T = TILES<D>;
    constexpr u32 M = T.rows(), N = T.columns;
    real* q_tile = (real*)shared;
    real* buffers = q_tile + M * D;
    u32 row = threadIdx.x / WARP * 16 * T.blocks;

    Work work(p, M);
    const i32* first_key = p.first_key ? p.first_key + (u64)work.sequence * p.queries + work.start : nullptr;
    u32 rows = p.queries - work.start < M ? p.queries - work.start : M;
    Queries queries(first_key, rows, p.keys - p.queries + work.start);
    u64 kv_at = (u64)(work.head / p.group) * p.head_dim;
    const real* k = p.k + work.sequence * p.k_rows * p.k_stride + kv_at;
    const real* v = p.v + work.sequence * p.v_rows * p.v_stride + kv_at;
    bool wide = is_wide(p.q, p.q_stride) && is_wide(p.k, p.k_stride) && is_wide(p.v, p.v_stride) &&
                p.head_dim % WIDE<real> == 0;
    auto fetch = [&](u32 key) {
        real* buffer = buffers + key / N % 2 * (2 * N * D);
        u32 left = p.keys - key;
        load_tile<D, N, T.threads()>(buffer, k + key * p.k_stride, p.k_stride, left, p.head_dim, wide);
        load_tile<D, N, T.threads()>(buffer + N * D, v + key * p.v_stride, p.v_stride, left, p.head_dim, wide);
    };
    const real* q = p.q + (work.sequence * p.q_rows + work.start) * p.q_stride + (u64)work.head * p.head_dim;
    load_tile<D, M, T.threads()>(q_tile, q, p.q_stride, rows, p.head_dim, wide);

    Product<T.blocks, D> out;
    Softmax<T.blocks> softmax;
    u32 key = queries.begin(N);
    if (key < queries.end()) fetch(key);
    copy_commit();
    for (; key < queries.end(); key += N) {
        copy_wait<0>();
        __syncthreads();  // This tile is there, and the other buffer's readers are done.
        if (key + N < queries.end()) fetch(key + N);
        copy_commit();
        if (queries.hidden(row + 16 * T.blocks - 1, key)) continue;
        const real* k_tile = buffers + key / N % 2 * (2 * N * D);
        Product<T.blocks, N> scores;
        multiply_rows<D>(scores, q_tile + row * D, k_tile);
        queries.hide(scores, row, key);
        softmax.template numerators<D>(scores, out, p.scale * LOG2_E);
        add_product<D>(out, scores, k_tile + N * D);
    }
    copy_wait<0>();
    __syncthreads();  // For a block without keys: q's tile is about to be overwritten.
    finish(p, row, out, softmax, q_tile + row * D);
}

// One block of threads for each sequence, head and TILES<D>.rows() queries, D the least size below that holds a head.
KERNEL(128, NAMED(attention_forward),
       (real* out, f32* log_sum_exp, const real* q, const real* k, const real* v, const i32* first_key, u64 q_stride,
        u64 q_rows, u64 k_stride, u64 k_rows, u64 v_stride, u64 v_rows, u32 heads, u32 group, u32 head_dim,
        u32 queries, u32 keys, f32 scale)) {
    DYNAMIC_SHARED(shared);
    Arguments p = {out,    log_sum_exp, q,      k,     v,     first_key, q_stride, q_rows, k_stride,
                   k_rows, v_stride,    v_rows, heads, group, head_dim,  queries,  keys,   scale};
    if (head_dim <= 16) return attend<16>(p, shared);
    if (head_dim <= 32) return attend<32>(p, shared);
    if (head_dim <= 64) return attend<64>(p, shared);
    if (head_dim <= 96) return attend<96>(p, shared);
    if (head_dim <= 128) return attend<128>(p, shared);
    if (head_dim <= 192) return attend<192>(p, shared);
    return attend<256>(p, shared);
}
