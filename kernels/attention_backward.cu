// Causal attention, backward: dq, dk and dv from dout without the scores ever being in memory. With p the
// probabilities, computed again from the saved log-sum-exp, and inner = sum over a head of out dout:
//     dv = p^T dout,  ds = p (dout v^T - inner),  dq = scale ds k,  dk = scale ds^T q  (Dao, arXiv 2307.08691, alg. 2).
//
// Three kernels: inner; dq, whose blocks have queries and go over keys; dk and dv, whose blocks have keys and go over
// the queries of all heads that share them. So every sum has one owner and a fixed order; the price is that scores and
// dout v^T are computed in both, 7 products instead of 5.
//
// FLOPs: 14 head_dim for each visible pair. Bytes: out once, dout three times, qkv twice, dqkv once; tiles that pass by
// come mostly from L2. Shared memory in bf16: 50 KiB for dq and 49 KiB for dk, dv of heads of 64; 98 and 65 KiB for
// those of 128.
#include "attention.cuh"

template <int D> constexpr int F32_WARPS = D <= 128 ? 4 : 2;
template <int D> constexpr int F32_COLUMNS = D <= 96 ? 32 : D <= 192 ? 16 : 8;
template <int D>
constexpr Tiles BY_QUERY = sizeof(real) == 2 ? Tiles{4, D <= 128 ? 2 : 1, D <= 192 ? 32 : 16}
                                             : Tiles{F32_WARPS<D>, D <= 64 ? 2 : 1, F32_COLUMNS<D>};
template <int D>
constexpr Tiles BY_KEY = sizeof(real) == 2 ? Tiles{4, D <= 64 ? 2 : 1, D <= 192 ? 32 : 16}
                                           : Tiles{F32_WARPS<D>, 1, F32_COLUMNS<D>};

// What is known of a query and head: log-sum-exp in powers of 2, +infinity where no key is seen, so that its
// probabilities are 0; inner; the first key, as bits. Each head of a sequence has `padded` of them, a multiple of every
// tile's queries; those beyond the sequence see no key.
typedef Wide<f32> Saved;

struct Arguments {
    real* dqkv;
    const real *dout, *qkv;
    const Saved* saved;
    const i32* first_key;
    // Elements of a token's row of qkv, of its queries, and of its keys.
    u64 row, width, kv_width;
    u32 heads, group, head_dim, tokens, padded;
    f32 scale;

    DEVICE bool wide() const { return is_wide(qkv, head_dim) && is_wide(dout, head_dim); }
};

// One group of lanes for each query and head, 8 elements a lane. Bytes: out and dout once, 16 a query and head.
KERNEL(256, NAMED(attention_backward_inner),
       (f32* saved, const real* out, const real* dout, const f32* log_sum_exp, const i32* first_key, u32 batch,
        u32 heads, u32 head_dim, u32 tokens, u32 padded)) {
    u32 lanes = 1;
    while (lanes * 8 < head_dim) lanes *= 2;
    u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x, item = thread / lanes;
    u32 head = item % heads, token = item / heads % padded;
    u64 sequence = item / heads / padded;
    bool valid = sequence < batch && token < tokens;
    bool wide = is_wide(out, head_dim) && is_wide(dout, head_dim);
    u64 at = (sequence * tokens + token) * heads + head;
    f32 inner = 0;
    for (u32 column = thread % lanes * 8, end = column + 8; valid && column < end; column += WIDE<real>) {
        Wide<real> a = read_piece(out + at * head_dim, column, head_dim, wide);
        Wide<real> b = read_piece(dout + at * head_dim, column, head_dim, wide);
        for (u32 e = 0; e < WIDE<real>; e++) inner = __fmaf_rn(load(a.at[e]), load(b.at[e]), inner);
    }
    for (u32 m = lanes / 2; m > 0; m /= 2) inner += __shfl_xor_sync(FULL_WARP, inner, m);
    if (sequence >= batch || thread % lanes != 0) return;
    f32 log = valid ? log_sum_exp[at] : MINUS_INFINITY;
    i32 first = valid && first_key ? first_of(first_key, sequence * tokens + token) : 0;
    Saved record = {log == MINUS_INFINITY ? -MINUS_INFINITY : log * LOG2_E, inner, __int_as_float(first), 0};
    ((Saved*)saved)[(sequence * heads + head) * padded + token] = record;
}

// p and ds of one score and its gradient, in their places.
DEVICE void differentiate(f32& score, f32& gradient, f32 log, f32 inner, f32 factor) {
    score = exp2_fast(__fmaf_rn(score, factor, -log));
    gradient = score * (gradient - inner);
}

// What a block of threads has to do: the `tile`-th part of `rows` tokens of a head. Found out again where it is needed
// again, for that costs less than registers.
struct Work {
    u32 tiles, tile, head, sequence;

    DEVICE Work(const Arguments& p, u32 rows, u32 heads, u32 blocks_each) {
        u32 block = anew(blockIdx.x) / blocks_each;
        tiles = (p.tokens + rows - 1) / rows;
        tile = block % tiles;
        head = block / tiles % heads;
        sequence = block / tiles / heads;
    }
};

// dq of some queries of a head; the last ones, which see the most keys, first.
template <int D> DEVICE void by_query(const Arguments& p, u8* shared) {
    constexpr Tiles T = BY_QUERY<D>;
    constexpr u32 M = T.rows(), N = T.columns;
    u32 row = threadIdx.x / WARP * 16 * T.blocks;
    Work work(p, M, p.heads, 1);
    u32 start = (work.tiles - 1 - work.tile) * M, rows = p.tokens - start < M ? p.tokens - start : M;
    u64 token = (u64)work.sequence * p.tokens + start, at = (u64)work.head * p.head_dim;
    Queries queries(p.first_key ? p.first_key + token : nullptr, rows, start);

    real *q_tile = (real*)shared, *dout_tile = q_tile + M * D, *buffers = dout_tile + M * D;
    Saved* saved_rows = (Saved*)(buffers + 4 * N * D);
    const real* k = p.qkv + (u64)work.sequence * p.tokens * p.row + p.width + (u64)(work.head / p.group) * p.head_dim;
    auto fetch = [&](u32 key) {
        real* buffer = buffers + key / N % 2 * (2 * N * D);
        const real* from = k + key * p.row;
        load_tile<D, N, T.threads()>(buffer, from, p.row, p.tokens - key, p.head_dim, p.wide());
        load_tile<D, N, T.threads()>(buffer + N * D, from + p.kv_width, p.row, p.tokens - key, p.head_dim, p.wide());
    };
    load_tile<D, M, T.threads()>(q_tile, p.qkv + token * p.row + at, p.row, rows, p.head_dim, p.wide());
    load_tile<D, M, T.threads()>(dout_tile, p.dout + token * p.width + at, p.width, rows, p.head_dim, p.wide());

    const Saved* saved = p.saved + ((u64)work.sequence * p.heads + work.head) * p.padded + start;
    for (u32 i = threadIdx.x; i < M; i += T.threads()) copy_async_16(saved_rows + i, saved + i, true);
    Product<T.blocks, D> dq;
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
        Product<T.blocks, N> scores, gradients;
        multiply_rows<D>(scores, q_tile + row * D, k_tile);
        queries.hide(scores, row, key);
        multiply_rows<D>(gradients, dout_tile + row * D, k_tile + N * D);
#pragma unroll
        for (int i = 0; i < 2 * T.blocks; i++) {
            Saved of = saved_rows[row + 8 * i + anew(threadIdx.x % WARP) / 4];
#pragma unroll
            for (int n = 0; n < N / 4; n++) {
                const int m = i / 2, j = i % 2 * 2 + n % 2;
                differentiate(scores.at[m][n / 2][j], gradients.at[m][n / 2][j], of.at[0], of.at[1], p.scale * LOG2_E);
            }
        }
        add_product<D>(dq, gradients, k_tile);
    }
    copy_wait<0>();
    __syncthreads();  // For a block without keys: q's tile is about to be overwritten.
    dq.scale(p.scale);
    Work same(p, M, p.heads, 1);
    u32 first = (same.tiles - 1 - same.tile) * M + row;
    real* to = p.dqkv + ((u64)same.sequence * p.tokens + first) * p.row + (u64)same.head * p.head_dim;
    store_product(to, p.row, first < p.tokens ? p.tokens - first : 0, p.head_dim, dq, q_tile + row * D);
}

// One past the last query that sees a key before `keys_end`, as far as first keys say. The whole block calls it.
DEVICE u32 end_of_queries(const i32* first_key, u32 tokens, u32 keys_end, u32* scratch) {
    if (!first_key) return tokens;
    u32 end = 0;
    for (u32 query = threadIdx.x; query < tokens; query += blockDim.x)
        if ((u32)first_of(first_key, query) < keys_end) end = query + 1;
    for (int m = WARP / 2; m > 0; m /= 2) {
        u32 other = __shfl_xor_sync(FULL_WARP, end, m);
        end = other > end ? other : end;
    }
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = end;
    __syncthreads();
    for (u32 warp = 0; warp < blockDim.x / WARP; warp++) end = scratch[warp] > end ? scratch[warp] : end;
    __syncthreads();
    return end;
}

// Sets hidden scores to minus infinity: those of the keys from `key` on (rows) with the queries from `query` on.
template <int BLOCKS, int COLUMNS>
DEVICE void hide_keys(Product<BLOCKS, COLUMNS>& scores, u32 key, u32 query, const Saved* saved, bool may_begin_late) {
    if (query >= key + 16 * BLOCKS - 1 && !may_begin_late) return;
    u32 lane = anew(threadIdx.x % WARP);
#pragma unroll
    for (int n = 0; n < COLUMNS / 4; n++) {
        u32 column = n / 2 * 8 + lane % 4 * 2 + n % 2;
        u32 first = __float_as_int(saved[column].at[2]);
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) {
            u32 k = key + 8 * i + lane / 4;
            if (k > query + column || k < first) scores.at[i / 2][n / 2][i % 2 * 2 + n % 2] = MINUS_INFINITY;
        }
    }
}

// dk (KEYS) or dv (VALUES), or both, of some keys; the first ones, which most queries see, first.
template <int D, bool KEYS, bool VALUES> DEVICE void by_key(const Arguments& p, u8* shared) {
    constexpr Tiles T = BY_KEY<D>;
    constexpr u32 M = T.rows(), N = T.columns;
    u32 row = threadIdx.x / WARP * 16 * T.blocks;
    Work work(p, M, p.heads / p.group, KEYS && VALUES ? 1 : 2);
    u32 start = work.tile * M, head = work.head * p.group;
    u64 token = (u64)work.sequence * p.tokens;

    real *k_tile = (real*)shared, *v_tile = k_tile + M * D, *buffers = v_tile + M * D;
    Saved* saved_buffers = (Saved*)(buffers + 4 * N * D);
    const i32* first_key = p.first_key ? p.first_key + token : nullptr;
    u32 end = end_of_queries(first_key, p.tokens, start + M, (u32*)saved_buffers);
    // Tiles of queries of one head; those of the group's heads follow one another.
    u32 begin = start / N, count = end > begin * N ? (end - begin * N + N - 1) / N : 0;
    auto fetch = [&](u32 i) {
        u32 query = (begin + i % count) * N;
        u64 from = token + query, at = (u64)(head + i / count) * p.head_dim;
        real* buffer = buffers + i % 2 * (2 * N * D);
        load_tile<D, N, T.threads()>(buffer, p.qkv + from * p.row + at, p.row, p.tokens - query, p.head_dim,
                                     p.wide());
        load_tile<D, N, T.threads()>(buffer + N * D, p.dout + from * p.width + at, p.width, p.tokens - query,
                                     p.head_dim, p.wide());
        const Saved* saved = p.saved + ((u64)work.sequence * p.heads + head + i / count) * p.padded + query;
        if (threadIdx.x < N) copy_async_16(saved_buffers + i % 2 * N + threadIdx.x, saved + threadIdx.x, true);
    };
    const real* keys = p.qkv + (token + start) * p.row + p.width + (u64)work.head * p.head_dim;
    u32 rows = p.tokens - start;
    load_tile<D, M, T.threads()>(k_tile, keys, p.row, rows, p.head_dim, p.wide());
    if (KEYS) load_tile<D, M, T.threads()>(v_tile, keys + p.kv_width, p.row, rows, p.head_dim, p.wide());

    Product<T.blocks, KEYS ? D : 8> dk;
    Product<T.blocks, VALUES ? D : 8> dv;
    if (count > 0) fetch(0);
    copy_commit();
    for (u32 i = 0; i < p.group * count; i++) {
        copy_wait<0>();
        __syncthreads();  // This tile is there, and the other buffer's readers are done.
        if (i + 1 < p.group * count) fetch(i + 1);
        copy_commit();
        u32 query = (begin + i % count) * N;
        if (query + N <= start + row) continue;  // These queries stand before all of the warp's keys.
        const real *q_tile = buffers + i % 2 * (2 * N * D), *dout_tile = q_tile + N * D;
        const Saved* saved = saved_buffers + i % 2 * N;
        Product<T.blocks, N> scores, gradients;
        multiply_rows<D>(scores, k_tile + row * D, q_tile);
        hide_keys(scores, start + row, query, saved, p.first_key);
        if (KEYS) multiply_rows<D>(gradients, v_tile + row * D, dout_tile);
#pragma unroll
        for (int n = 0; n < N / 4; n++) {
            Saved of = saved[n / 2 * 8 + anew(threadIdx.x % 4) * 2 + n % 2];
#pragma unroll
            for (int r = 0; r < 2 * T.blocks; r++) {
                const int m = r / 2, j = r % 2 * 2 + n % 2;
                differentiate(scores.at[m][n / 2][j], gradients.at[m][n / 2][j], of.at[0], of.at[1], p.scale * LOG2_E);
            }
        }
        if constexpr (VALUES) add_product<D>(dv, scores, dout_tile);
        if constexpr (KEYS) add_product<D>(dk, gradients, q_tile);
    }
    copy_wait<0>();
    __syncthreads();  // For a block without queries: the tiles are about to be overwritten.
    Work same(p, M, p.heads / p.group, KEYS && VALUES ? 1 : 2);
    u32 first = same.tile * M + row, left = first < p.tokens ? p.tokens - first : 0;
    real* to = p.dqkv + ((u64)same.sequence * p.tokens + first) * p.row + p.width + (u64)same.head * p.head_dim;
    if constexpr (VALUES) store_product(to + p.kv_width, p.row, left, p.head_dim, dv, k_tile + row * D);
    if constexpr (KEYS) {
        dk.scale(p.scale);
        store_product(to, p.row, left, p.head_dim, dk, k_tile + row * D);
    }
}

// One block of threads for each sequence, head and BY_QUERY<D>.rows() tokens.
KERNEL(128, NAMED(attention_backward_queries),
       (real* dqkv, const real* dout, const real* qkv, const f32* saved, const i32* first_key, u64 row, u64 width,
        u64 kv_width, u32 heads, u32 group, u32 head_dim, u32 tokens, u32 padded, f32 scale)) {
    DYNAMIC_SHARED(shared);
    Arguments p = {dqkv,     dout,  qkv,   (const Saved*)saved, first_key, row,    width,
                   kv_width, heads, group, head_dim,            tokens,    padded, scale};
    if (head_dim <= 16) return by_query<16>(p, shared);
    if (head_dim <= 32) return by_query<32>(p, shared);
    if (head_dim <= 64) return by_query<64>(p, shared);
    if (head_dim <= 96) return by_query<96>(p, shared);
    if (head_dim <= 128) return by_query<128>(p, shared);
    if (head_dim <= 192) return by_query<192>(p, shared);
    return by_query<256>(p, shared);
}

// One block of threads for each sequence, key/value head and BY_KEY<D>.rows() tokens; two where head_dim is over 128,
// for dk and for dv, since registers do not hold both.
KERNEL(128, NAMED(attention_backward_keys),
       (real* dqkv, const real* dout, const real* qkv, const f32* saved, const i32* first_key, u64 row, u64 width,
        u64 kv_width, u32 heads, u32 group, u32 head_dim, u32 tokens, u32 padded, f32 scale)) {
    DYNAMIC_SHARED(shared);
    Arguments p = {dqkv,     dout,  qkv,   (const Saved*)saved, first_key, row,    width,
                   kv_width, heads, group, head_dim,            tokens,    padded, scale};
    if (head_dim <= 16) return by_key<16, true, true>(p, shared);
    if (head_dim <= 32) return by_key<32, true, true>(p, shared);
    if (head_dim <= 64) return by_key<64, true, true>(p, shared);
    if (head_dim <= 96) return by_key<96, true, true>(p, shared);
    if (head_dim <= 128) return by_key<128, true, true>(p, shared);
    if (head_dim <= 192)
        return blockIdx.x % 2 ? by_key<192, false, true>(p, shared) : by_key<192, true, false>(p, shared);
    return blockIdx.x % 2 ? by_key<256, false, true>(p, shared) : by_key<256, true, false>(p, shared);
}
