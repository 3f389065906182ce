// Causal attention of few queries with many keys, as generation with cached keys and values has it: a tile of queries
// (attention.cu) would be almost empty, and one block alone would go over all keys. Here the keys are cut into splits,
// whose length follows from nothing, and each split of a key/value head is a block's; what they found is joined in
// order (Dao et al., "Flash-Decoding", 2023).
//
// Bytes: k and v once for every ROWS queries of a head's group, in pieces of 16 bytes; FLOPs do not count.
#include "attention.cuh"
#include "wide.cuh"

#define THREADS 128
// Queries that a block has in registers: those of the heads of a group, and of neighbouring positions.
#define ROWS 4
// Keys of a split; src/ops/attention/cuda/decode.rs has the same number, and that of ROWS.
#define SPLIT 128

struct Arguments {
    f32* partials;
    const real *q, *k, *v;
    const i32* first_key;
    u64 q_stride, q_rows, k_stride, k_rows, v_stride, v_rows;
    u32 heads, group, head_dim, queries, keys, lanes;
    f32 scale;

    DEVICE u32 rows() const { return queries * group; }
    DEVICE u32 splits() const { return (keys + SPLIT - 1) / SPLIT; }
};

// What a block has to do: a split of the keys of a sequence's key/value head, for ROWS of its queries from `row` on.
// Those of a position's group are neighbours.
struct Work {
    u32 split, row, kv_head, sequence;

    DEVICE Work(const Arguments& p) {
        u32 chunks = (p.rows() + ROWS - 1) / ROWS, rest = blockIdx.x / p.splits();
        split = blockIdx.x % p.splits();
        row = rest % chunks * ROWS;
        kv_head = rest / chunks % (p.heads / p.group);
        sequence = rest / chunks / (p.heads / p.group);
    }
    DEVICE u32 query(const Arguments& p, u32 r) const { return (row + r) / p.group; }
    DEVICE u32 head(const Arguments& p, u32 r) const { return kv_head * p.group + (row + r) % p.group; }
};

// Softmax of ROWS queries over the keys that a team of lanes has seen: the largest score so far, in powers of two, the
// sum of what is above it, and this lane's elements of the weighted sum of values.
template <int STEPS> struct Found {
    f32 largest[ROWS], sum[ROWS], out[ROWS][STEPS][WIDE<real>];

    DEVICE void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            largest[r] = MINUS_INFINITY, sum[r] = 0;
#pragma unroll
            for (int e = 0; e < STEPS * WIDE<real>; e++) out[r][e / WIDE<real>][e % WIDE<real>] = 0;
        }
    }
    DEVICE void add(int r, f32 score, const f32 (&v)[STEPS][WIDE<real>]) {
        f32 top = fmaxf(largest[r], score);
        // While no key has been seen any finite number does: all exponentials are 0.
        f32 shift = top == MINUS_INFINITY ? 0 : top;
        f32 correction = exp2_fast(largest[r] - shift), weight = exp2_fast(score - shift);
        largest[r] = top;
        sum[r] = __fmaf_rn(sum[r], correction, weight);
#pragma unroll
        for (int e = 0; e < STEPS * WIDE<real>; e++) {
            f32& x = out[r][e / WIDE<real>][e % WIDE<real>];
            x = __fmaf_rn(weight, v[e / WIDE<real>][e % WIDE<real>], x * correction);
        }
    }
};

// A lane's elements of a head's row: pieces that are the team's width apart.
template <int STEPS>
DEVICE void load_row(f32 (&to)[STEPS][WIDE<real>], const real* p, const Arguments& a, bool inside, bool wide) {
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        load_wide(to[s], p, (threadIdx.x % a.lanes + s * a.lanes) * WIDE<real>, inside ? a.head_dim : 0, wide);
}

// Goes over a split's keys, one a team at a time.
template <int STEPS> DEVICE void go_over(Found<STEPS>& found, const Arguments& p, const Work& work) {
    bool wide = is_wide(p.q, p.q_stride) && is_wide(p.k, p.k_stride) && is_wide(p.v, p.v_stride) &&
                p.head_dim % WIDE<real> == 0;
    f32 q[ROWS][STEPS][WIDE<real>];
    i32 first[ROWS], last[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        bool inside = work.row + r < p.rows();
        u32 query = inside ? work.query(p, r) : 0;
        const real* from = p.q + (work.sequence * p.q_rows + query) * p.q_stride;
        load_row(q[r], from + (u64)work.head(p, r) * p.head_dim, p, inside, wide);
        first[r] = first_of(p.first_key, (u64)work.sequence * p.queries + query);
        last[r] = inside ? (i32)(p.keys - p.queries + query) : -1;
    }
    u32 team = threadIdx.x / p.lanes, teams = THREADS / p.lanes;
    u32 begin = work.split * SPLIT, end = begin + SPLIT < p.keys ? begin + SPLIT : p.keys;
    const real* k = p.k + work.sequence * p.k_rows * p.k_stride + (u64)work.kv_head * p.head_dim;
    const real* v = p.v + work.sequence * p.v_rows * p.v_stride + (u64)work.kv_head * p.head_dim;
    // All lanes go along, since they exchange.
#pragma unroll 2
    for (u32 base = begin; base < end; base += teams) {
        u32 key = base + team;
        f32 ks[STEPS][WIDE<real>], vs[STEPS][WIDE<real>];
        load_row(ks, k + key * p.k_stride, p, key < end, wide);
        load_row(vs, v + key * p.v_stride, p, key < end, wide);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            f32 score = 0;
#pragma unroll
            for (int e = 0; e < STEPS * WIDE<real>; e++)
                score = __fmaf_rn(q[r][e / WIDE<real>][e % WIDE<real>], ks[e / WIDE<real>][e % WIDE<real>], score);
            for (u32 m = p.lanes / 2; m > 0; m /= 2) score += __shfl_xor_sync(FULL_WARP, score, m);
            bool seen = key < end && (i32)key >= first[r] && (i32)key <= last[r];
            found.add(r, seen ? score * (p.scale * LOG2_E) : MINUS_INFINITY, vs);
        }
    }
}

// Joins what `count` have found, from the largest scores, the sums and the weighted sums, `stride` floats apart: the
// largest of all and the sum, and one element's weighted sum. In order.
struct Joined {
    f32 largest, sum, out;

    DEVICE Joined(const f32* largest_of, const f32* sum_of, const f32* out_of, u32 stride, u32 out_stride, u32 count)
        : largest(MINUS_INFINITY), sum(0), out(0) {
        for (u32 t = 0; t < count; t++) largest = fmaxf(largest, largest_of[t * stride]);
        f32 shift = largest == MINUS_INFINITY ? 0 : largest;
        for (u32 t = 0; t < count; t++) {
            f32 weight = exp2_fast(largest_of[t * stride] - shift);
            sum = __fmaf_rn(sum_of[t * stride], weight, sum);
            out = __fmaf_rn(out_of[t * out_stride], weight, out);
        }
    }
};

// partials is (sequence, query, head) x splits x (largest, sum, head_dim elements).
template <int STEPS> DEVICE void decode(const Arguments& p) {
    SHARED f32 largest[THREADS][ROWS], sum[THREADS][ROWS], out[THREADS * ROWS * STEPS * WIDE<real>];
    Work work(p);
    Found<STEPS> found;
    found.clear();
    go_over(found, p, work);
    u32 lane = threadIdx.x % p.lanes, team = threadIdx.x / p.lanes, width = p.lanes * STEPS * WIDE<real>;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (lane == 0) largest[team][r] = found.largest[r], sum[team][r] = found.sum[r];
#pragma unroll
        for (int e = 0; e < STEPS * WIDE<real>; e++) {
            u32 column = (lane + e / WIDE<real> * p.lanes) * WIDE<real> + e % WIDE<real>;
            out[(team * ROWS + r) * width + column] = found.out[r][e / WIDE<real>][e % WIDE<real>];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * p.head_dim; i += THREADS) {
        u32 r = i / p.head_dim, column = i % p.head_dim;
        if (work.row + r >= p.rows()) continue;
        Joined all(&largest[0][r], &sum[0][r], out + r * width + column, ROWS, ROWS * width, THREADS / p.lanes);
        u64 row = ((u64)work.sequence * p.queries + work.query(p, r)) * p.heads + work.head(p, r);
        f32* to = p.partials + (row * p.splits() + work.split) * (p.head_dim + 2);
        to[2 + column] = all.out;
        if (column == 0) to[0] = all.largest, to[1] = all.sum;
    }
}

// One block for each sequence, key/value head, ROWS queries and split. `lanes`, a power of two, share a key's row; two
// pieces of it each where a warp is too short.
KERNEL(THREADS, NAMED(attention_decode),
       (f32* partials, const real* q, const real* k, const real* v, const i32* first_key, u64 q_stride, u64 q_rows,
        u64 k_stride, u64 k_rows, u64 v_stride, u64 v_rows, u32 heads, u32 group, u32 head_dim, u32 queries, u32 keys,
        u32 lanes, f32 scale)) {
    Arguments p = {partials, q,      k,     v,     first_key, q_stride, q_rows, k_stride, k_rows,
                   v_stride, v_rows, heads, group, head_dim,  queries,  keys,   lanes,    scale};
    // Heads have up to 256 elements: a warp's pieces in bf16, twice as many in f32.
    if (head_dim <= WARP * WIDE<real>) decode<1>(p);
    else decode<sizeof(real) / 2>(p);
}

// One block for each query and head: out = the weighted sum of all splits, over the sum of weights.
KERNEL(THREADS, NAMED(attention_decode_join),
       (real* out, f32* log_sum_exp, const f32* partials, u32 splits, u32 head_dim)) {
    u64 row = blockIdx.x;
    u32 stride = head_dim + 2;
    const f32* from = partials + row * splits * stride;
    for (u32 column = threadIdx.x; column < head_dim; column += blockDim.x) {
        Joined all(from, from + 1, from + 2 + column, stride, stride, splits);
        store(out[row * head_dim + column], all.sum == 0 ? 0 : all.out / all.sum);
        if (column == 0) log_sum_exp[row] = all.sum == 0 ? MINUS_INFINITY : all.largest / LOG2_E + logf(all.sum);
    }
}
