// Token and position embeddings: src/ops/embedding.rs. The gradient by the weights is summed without atomics on floats:
// rows are sorted by token (and stay in order within one), cut into windows, and summed within windows and then over
// them. Beside the tokens, memory moves each element of dx once, and each touched element of dweight in and out.
#include "sums.cuh"
#include "types.cuh"

// x = scale * weight[token] + positions[..]. Rows go along the grid's x, pieces of a row along its y and the block.
KERNEL(256, NAMED(embedding_forward),
       (real* x, const i32* tokens, const real* weight, const real* positions, u32 width, u32 sequence,
        u32 first_position, f32 scale)) {
    u64 i = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * WIDE<real>, row = blockIdx.x;
    bool wide = is_wide(x, width) && is_wide(weight, width) && is_wide(positions, width);
    Wide<real> word = load_wide(weight + (u64)tokens[row] * width, i, width, wide), place = {};
    if (positions) place = load_wide(positions + ((u64)first_position + row % sequence) * width, i, width, wide);
    f32 values[WIDE<real>];
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) values[k] = scale * load(word.at[k]) + load(place.at[k]);
    store_wide(x + row * width, i, width, wide, values);
}

#define SORT_WARPS 16
// Tokens of the vocabulary that a block sorts: one a thread.
#define BINS (SORT_WARPS * WARP)
// Groups of 32 rows that a warp loads at once.
#define GROUPS 8

// Calls f(row, bin) with each warp's rows in order, a lane a row; bin is the token less `first`. All lanes go on
// together; those without a row have a bin that is none.
template <class F> DEVICE void each_row(const i32* tokens, u32 rows, u32 first, F f) {
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u64 share = ((u64)rows + SORT_WARPS - 1) / SORT_WARPS, from = warp * share;
    u64 to = from + share < rows ? from + share : rows;
    for (u64 base = from; base < to; base += GROUPS * WARP) {
        u32 bins[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            u64 row = base + g * WARP + lane;
            bins[g] = row < to ? (u32)tokens[row] - first : 0x7fffffff;
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) f((u32)(base + g * WARP + lane), bins[g]);
    }
}

// Sum of the lower threads' x, for blocks of BINS threads.
DEVICE u32 sum_before(u32 x) {
    SHARED u32 warps[SORT_WARPS];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = x;
    for (u32 by = 1; by < WARP; by *= 2) {
        u32 lower = __shfl_up_sync(FULL_WARP, sum, by);
        if (lane >= by) sum += lower;
    }
    if (lane == WARP - 1) warps[warp] = sum;
    __syncthreads();
    for (u32 w = 0; w < warp; w++) sum += warps[w];
    return sum - x;
}

// order: the rows sorted by token, and within a token in order; starts[t] (vocabulary + 1): where token t begins. A
// block looks through all tokens for those of its BINS, twice: to count them, warp by warp, and to place them.
KERNEL(BINS, NAMED(embedding_sort), (u32* order, u32* starts, const i32* tokens, u32 rows, u32 vocabulary)) {
    SHARED u32 places[SORT_WARPS][BINS];
    SHARED u32 lower;
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, bin = threadIdx.x, first = blockIdx.x * BINS;
    for (u32 w = 0; w < SORT_WARPS; w++) places[w][bin] = 0;
    if (bin == 0) lower = 0;
    __syncthreads();
    u32 below = 0;
    each_row(tokens, rows, first, [&](u32, u32 b) {
        if ((i32)b < 0) below++;
        if (b < BINS) atomicAdd(&places[warp][b], 1);
    });
    atomicAdd(&lower, below);
    __syncthreads();

    u32 count = 0;
    for (u32 w = 0; w < SORT_WARPS; w++) count += places[w][bin];
    u32 place = lower + sum_before(count);
    if (first + bin < vocabulary) starts[first + bin] = place;
    if (first + bin + 1 == vocabulary) starts[vocabulary] = rows;
    for (u32 w = 0; w < SORT_WARPS; w++) {
        u32 of_warp = places[w][bin];
        places[w][bin] = place;
        place += of_warp;
    }
    __syncthreads();

    each_row(tokens, rows, first, [&](u32 row, u32 b) {
        u32 waiting = __ballot_sync(FULL_WARP, b < BINS);
        while (waiting) {
            u32 one = __shfl_sync(FULL_WARP, b, __ffs(waiting) - 1), same = __ballot_sync(FULL_WARP, b == one);
            u32 from = places[warp][one];
            if (b == one) order[from + __popc(same & ((1u << lane) - 1))] = row;
            __syncwarp();
            if (lane == 0) places[warp][one] = from + __popc(same);
            __syncwarp();
            waiting &= ~same;
        }
    });
}

#define MOST_WINDOW 256
// Rows whose gradients a thread loads at once.
#define BATCH 8

// Adds to the elements of a row from i on.
template <class T, int N>
DEVICE void add_to_row(T* row, u64 i, u32 width, bool wide, f32 scale, const f32 (&sum)[N]) {
    f32 held[N];
    load_f32(held, row, i, width, wide);
#pragma unroll
    for (int k = 0; k < N; k++) held[k] += scale * sum[k];
    store_f32(row, i, width, wide, held);
}

// The same of a row of dweight, which is bf16 only beside activations that are.
template <int N>
DEVICE void add_to_token(void* dweight, u32 type, u32 token, u64 i, u32 width, bool wide, f32 scale,
                         const f32 (&sum)[N]) {
    if constexpr (sizeof(real) == sizeof(bf16)) {
        if (type == TYPE_BF16) {
            add_to_row((bf16*)dweight + (u64)token * width, i, width, wide, scale, sum);
            return;
        }
    }
    add_to_row((f32*)dweight + (u64)token * width, i, width, wide, scale, sum);
}

// Sums over a window of sorted rows, token by token. A token that lies in this window alone is added to dweight; of one
// that goes on beyond the window's begin or end, partials (windows x 2 x width) gets the sum: at 0 if it began before
// the window, else at 1. Windows go along the grid's x, pieces of a row along its y and the block.
KERNEL(256, NAMED(embedding_windows),
       (void* dweight, u32 sum_type, f32* partials, const real* dx, const i32* tokens, const u32* order, u32 rows,
        u32 window, u32 width, f32 scale)) {
    SHARED u32 row_of[MOST_WINDOW];
    SHARED i32 token_of[MOST_WINDOW];
    u64 from = (u64)blockIdx.x * window;
    u32 count = rows - from < window ? (u32)(rows - from) : window;
    for (u32 p = threadIdx.x; p < count; p += blockDim.x) {
        row_of[p] = order[from + p];
        token_of[p] = tokens[row_of[p]];
    }
    i32 before = from > 0 ? tokens[order[from - 1]] : -1;
    i32 after = from + count < rows ? tokens[order[from + count]] : -1;
    __syncthreads();

    u64 i = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * WIDE<real>;
    bool wide = is_wide(dx, width), wide_sums = is_wide(partials, width);
    bool wide_target = sum_type == TYPE_BF16 ? is_wide((bf16*)dweight, width) : is_wide((f32*)dweight, width);
    f32 sum[WIDE<real>] = {};
    for (u32 base = 0; base < count; base += BATCH) {
        Wide<real> batch[BATCH];
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            batch[b] = load_wide(dx + (u64)row_of[base + b < count ? base + b : 0] * width, i,
                                 base + b < count ? width : 0, wide);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            u32 p = base + b;
            if (p >= count) break;
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++) sum[k] += load(batch[b].at[k]);
            i32 token = token_of[p];
            if (p + 1 < count && token_of[p + 1] == token) continue;
            bool began_before = token == before, goes_on = p + 1 == count && token == after;
            if (began_before || goes_on) {
                f32* partial = partials + ((u64)blockIdx.x * 2 + (began_before ? 0 : 1)) * width;
                store_f32(partial, i, width, wide_sums, sum);
            } else {
                add_to_token(dweight, sum_type, token, i, width, wide_target, scale, sum);
            }
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++) sum[k] = 0;
        }
    }
}

#define MOST_WARPS 8

// Adds the sums of the token that begins in this window (along the grid's x) and goes on in the next ones, if there is
// one: its windows in slices, one for each team of `warps` warps, and then the slices. Pieces of a row go along the
// grid's y and the team.
KERNEL(256, NAMED(embedding_join),
       (void* dweight, u32 sum_type, const f32* partials, const i32* tokens, const u32* order, const u32* starts, u32 rows,
        u32 window, u32 width, u32 warps, f32 scale)) {
    u64 next = ((u64)blockIdx.x + 1) * window;
    if (next >= rows) return;
    i32 token = tokens[order[next - 1]];
    if (token != tokens[order[next]] || starts[token] + window < next) return;
    u32 members = warps * WARP, columns = members * WIDE<real>, first = blockIdx.y * columns;
    u32 team = threadIdx.x / members, teams = blockDim.x / members, own = threadIdx.x % members * WIDE<real>;
    // The first window's sum is at 1, those of the windows after it at 0.
    u64 windows = (starts[token + 1] - 1) / window + 1 - blockIdx.x, share = (windows + teams - 1) / teams;
    u64 from = team * share, to = from + share < windows ? from + share : windows;
    bool wide = is_wide(partials, width);
    f32 sum[WIDE<real>] = {};
#pragma unroll 4
    for (u64 w = from; w < to; w++) {
        f32 partial[WIDE<real>];
        load_f32(partial, partials + ((blockIdx.x + w) * 2 + (w == 0 ? 1 : 0)) * width, first + own, width, wide);
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) sum[k] += partial[k];
    }
    u64 target = (u64)token * width + first;
    u32 inside = width - first < columns ? width - first : columns;
    add_teams<MOST_WARPS>(sum, own, columns, inside, team, teams, [=](u32 c, f32 all) {
        store_as(dweight, sum_type, target + c, load_as(dweight, sum_type, target + c) + scale * all);
    });
}

// dpositions = sum of dx over the sequences, zero where no sequence reaches. Positions go along the grid's x; teams,
// slices and pieces as above.
KERNEL(256, NAMED(embedding_positions),
       (void* dpositions, u32 sum_type, const real* dx, u64 rows, u32 sequence, u32 width, u32 warps)) {
    u32 members = warps * WARP, columns = members * WIDE<real>, first = blockIdx.y * columns;
    u32 team = threadIdx.x / members, teams = blockDim.x / members, own = threadIdx.x % members * WIDE<real>;
    u64 position = blockIdx.x;
    u64 count = position < sequence && position < rows ? (rows - position - 1) / sequence + 1 : 0;
    u64 share = (count + teams - 1) / teams, from = team * share, to = from + share < count ? from + share : count;
    bool wide = is_wide(dx, width);
    f32 sum[WIDE<real>] = {};
#pragma unroll 4
    for (u64 s = from; s < to; s++) {
        Wide<real> piece = load_wide(dx + (s * sequence + position) * width, first + own, width, wide);
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) sum[k] += load(piece.at[k]);
    }
    u64 target = position * width + first;
    u32 inside = width - first < columns ? width - first : columns;
    add_teams<MOST_WARPS>(sum, own, columns, inside, team, teams,
                          [=](u32 c, f32 all) { store_as(dpositions, sum_type, target + c, all); });
}
