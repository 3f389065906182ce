// Causal attention, backward: dq, dk and dv from dout without the scores ever being in memory. With p the probabilities,
// computed again from the saved log-sum-exp, and inner = sum over a head of out dout:
//     dv = p^T dout,  ds = p (dout v^T - inner),  dq = scale ds k,  dk = scale ds^T q  (Dao, arXiv 2307.08691, alg. 2).
//
// Three kernels: inner; dq, whose blocks have queries and go over keys; dk and dv, whose blocks have keys and go over the
// queries of all heads that share them. So every sum has one owner and a fixed order; the price is that scores and
// dout v^T are computed in both, 7 products instead of 5.
//
// FLOPs: 14 head_dim for each visible pair. Bytes: qkv twice and dout, out, dqkv once or twice, the passing tiles mostly
// from L2. Shared memory: at most 97 KiB (Tiles); 64 KiB for dq and 49 KiB for dk, dv of heads of 64 in bf16.
#include "attention.cuh"

template <int D>
constexpr Tiles BY_QUERY = sizeof(real) == 2 ? Tiles{4, D <= 128 ? 2 : 1, D <= 64 ? 64 : D <= 192 ? 32 : 16}
                                             : Tiles{D <= 128 ? 4 : 2, D <= 64 ? 2 : 1, D <= 96 ? 32 : D <= 192 ? 16 : 8};
template <int D>
constexpr Tiles BY_KEY = sizeof(real) == 2 ? Tiles{4, D <= 64 ? 2 : 1, D <= 64 ? 32 : D <= 128 ? 64 : D <= 192 ? 32 : 16}
                                           : Tiles{D <= 128 ? 4 : 2, 1, D <= 96 ? 32 : D <= 192 ? 16 : 8};

// What is known of a query and head: log-sum-exp in powers of 2, +infinity where no key is seen, so that its
// probabilities are 0; inner; the first key, as bits. Each head of a sequence has `padded` of them, a multiple of every
// tile's queries; those beyond the sequence see no key.
typedef Wide<f32> Saved;

struct Arguments {
    real* dqkv;
    const real *dout, *qkv;
    const Saved* saved;
    const i32* first_key;
    u32 heads, group, head_dim, tokens, padded;
    f32 scale;

    DEVICE u64 width() const { return (u64)heads * head_dim; }
    DEVICE u64 row() const { return (u64)(heads + 2 * (heads / group)) * head_dim; }
    // Where a key head and a value head begin in a row.
    DEVICE u64 key_at(u32 kv_head) const { return (u64)(heads + kv_head) * head_dim; }
    DEVICE u64 value_at(u32 kv_head) const { return key_at(kv_head) + (u64)(heads / group) * head_dim; }
    DEVICE bool wide() const {
        return is_wide(qkv, head_dim) && is_wide(dout, head_dim);
    }
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

// dq of some queries of a head; the last ones, which see the most keys, first.
template <int D> DEVICE void by_query(const Arguments& p, u8* shared) {
    constexpr Tiles T = BY_QUERY<D>;
    constexpr u32 M = T.rows(), N = T.columns;
    u32 tiles = (p.tokens + M - 1) / M, start = (tiles - 1 - blockIdx.x % tiles) * M;
    u32 head = blockIdx.x / tiles % p.heads, sequence = blockIdx.x / tiles / p.heads;
    u32 rows = p.tokens - start < M ? p.tokens - start : M, row = threadIdx.x / WARP * 16 * T.blocks;
    u64 token = (u64)sequence * p.tokens + start, at = (u64)head * p.head_dim;
    Queries queries(p.first_key ? p.first_key + token : nullptr, rows, start);

    real *q_tile = (real*)shared, *dout_tile = q_tile + M * D, *buffers = dout_tile + M * D;
    const real* k = p.qkv + (u64)sequence * p.tokens * p.row() + p.key_at(head / p.group);
    auto fetch = [&](u32 key) {
        real* buffer = buffers + key / N % 2 * (2 * N * D);
        const real* from = k + key * p.row();
        u64 to_value = (u64)(p.heads / p.group) * p.head_dim;
        load_tile<D, N, T.threads()>(buffer, from, p.row(), p.tokens - key, p.head_dim, p.wide());
        load_tile<D, N, T.threads()>(buffer + N * D, from + to_value, p.row(), p.tokens - key, p.head_dim, p.wide());
    };
    load_tile<D, M, T.threads()>(q_tile, p.qkv + token * p.row() + at, p.row(), rows, p.head_dim, p.wide());
    load_tile<D, M, T.threads()>(dout_tile, p.dout + token * p.width() + at, p.width(), rows, p.head_dim, p.wide());

    f32 log[2 * T.blocks], inner[2 * T.blocks];
#pragma unroll
    for (int i = 0; i < 2 * T.blocks; i++) {
        u32 own = start + row + 8 * i + threadIdx.x % WARP / 4;
        Saved saved = p.saved[((u64)sequence * p.heads + head) * p.padded + own];
        log[i] = saved.at[0], inner[i] = saved.at[1];
    }
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
        for (int i = 0; i < N * T.blocks / 2; i++) {
            constexpr int EACH = N / 2;
            const int m = i / EACH, n = i % EACH / 4, j = i % 4;
            differentiate(scores.at[m][n][j], gradients.at[m][n][j], log[2 * m + j / 2], inner[2 * m + j / 2],
                          p.scale * LOG2_E);
        }
        add_product<D>(dq, gradients, k_tile);
    }
    copy_wait<0>();
    __syncthreads();  // For a block without keys: q's tile is about to be overwritten.
    dq.scale(p.scale);
    store_product(p.dqkv + (token + row) * p.row() + at, p.row(), rows > row ? rows - row : 0, p.head_dim, dq,
                  q_tile + row * D);
}

// One past the last query that sees a key before `keys_end`, as far as first keys say. All threads of the block call it.
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
template <int D, bool KEYS, bool VALUES> DEVICE void by_key(const Arguments& p, u8* shared, u32 block) {
    constexpr Tiles T = BY_KEY<D>;
    constexpr u32 M = T.rows(), N = T.columns;
    u32 tiles = (p.tokens + M - 1) / M, kv_heads = p.heads / p.group, start = block % tiles * M;
    u32 kv_head = block / tiles % kv_heads, sequence = block / tiles / kv_heads;
    u32 rows = p.tokens - start < M ? p.tokens - start : M, row = threadIdx.x / WARP * 16 * T.blocks;
    u64 token = (u64)sequence * p.tokens;

    real *k_tile = (real*)shared, *v_tile = k_tile + M * D, *buffers = v_tile + M * D;
    Saved* saved_buffers = (Saved*)(buffers + 4 * N * D);
    const i32* first_key = p.first_key ? p.first_key + token : nullptr;
    u32 end = end_of_queries(first_key, p.tokens, start + M, (u32*)saved_buffers);
    // Tiles of queries of one head; those of the group's heads follow one another.
    u32 begin = start / N, count = end > begin * N ? (end - begin * N + N - 1) / N : 0;
    auto fetch = [&](u32 i) {
        u32 head = kv_head * p.group + i / count, query = (begin + i % count) * N;
        u64 from = token + query, at = (u64)head * p.head_dim;
        real* buffer = buffers + i % 2 * (2 * N * D);
        load_tile<D, N, T.threads()>(buffer, p.qkv + from * p.row() + at, p.row(), p.tokens - query, p.head_dim,
                                     p.wide());
        load_tile<D, N, T.threads()>(buffer + N * D, p.dout + from * p.width() + at, p.width(), p.tokens - query,
                                     p.head_dim, p.wide());
        const Saved* saved = p.saved + ((u64)sequence * p.heads + head) * p.padded + query;
        if (threadIdx.x < N) copy_async_16(saved_buffers + i % 2 * N + threadIdx.x, saved + threadIdx.x, true);
    };
    const real* keys = p.qkv + (token + start) * p.row();
    load_tile<D, M, T.threads()>(k_tile, keys + p.key_at(kv_head), p.row(), rows, p.head_dim, p.wide());
    if (KEYS) load_tile<D, M, T.threads()>(v_tile, keys + p.value_at(kv_head), p.row(), rows, p.head_dim, p.wide());

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
        hide_keys(scores, start + row, query, saved, first_key);
        if (KEYS) multiply_rows<D>(gradients, v_tile + row * D, dout_tile);
#pragma unroll
        for (int n = 0; n < N / 4; n++) {
            Saved of = saved[n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2];
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
    real* to = p.dqkv + (token + start + row) * p.row();
    u32 left = rows > row ? rows - row : 0;
    if constexpr (VALUES) store_product(to + p.value_at(kv_head), p.row(), left, p.head_dim, dv, k_tile + row * D);
    if constexpr (KEYS) {
        dk.scale(p.scale);
        store_product(to + p.key_at(kv_head), p.row(), left, p.head_dim, dk, k_tile + row * D);
    }
}

// One block of threads for each sequence, head and BY_QUERY<D>.rows() tokens.
KERNEL(128, NAMED(attention_backward_queries),
       (real* dqkv, const real* dout, const real* qkv, const f32* saved, const i32* first_key, u32 heads, u32 group,
        u32 head_dim, u32 tokens, u32 padded, f32 scale)) {
    DYNAMIC_SHARED(shared);
    Arguments p = {dqkv, dout, qkv, (const Saved*)saved, first_key, heads, group, head_dim, tokens, padded, scale};
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
       (real* dqkv, const real* dout, const real* qkv, const f32* saved, const i32* first_key, u32 heads, u32 group,
        u32 head_dim, u32 tokens, u32 padded, f32 scale)) {
    DYNAMIC_SHARED(shared);
    Arguments p = {dqkv, dout, qkv, (const Saved*)saved, first_key, heads, group, head_dim, tokens, padded, scale};
    u32 block = blockIdx.x;
    if (head_dim <= 16) return by_key<16, true, true>(p, shared, block);
    if (head_dim <= 32) return by_key<32, true, true>(p, shared, block);
    if (head_dim <= 64) return by_key<64, true, true>(p, shared, block);
    if (head_dim <= 96) return by_key<96, true, true>(p, shared, block);
    if (head_dim <= 128) return by_key<128, true, true>(p, shared, block);
    if (head_dim <= 192)
        return block % 2 ? by_key<192, false, true>(p, shared, block / 2) : by_key<192, true, false>(p, shared, block / 2);
    return block % 2 ? by_key<256, false, true>(p, shared, block / 2) : by_key<256, true, false>(p, shared, block / 2);
}
