// LayerNorm and RMSNorm, fused with the residual add before them: src/ops/norm/mod.rs has the formulas.
#include "sums.cuh"
#include "types.cuh"

enum Kind { LAYER = 0, RMS = 1 };

// What a thread holds of a row at once: 16 elements.
#define PIECES (16 / WIDE<real>)
struct Held {
    Wide<real> at[PIECES];
};

// The threads that share a row.
struct WarpTeam {
    static const bool holds_row = true;  // Launched for rows of at most 512 elements.
    static DEVICE u32 member() { return threadIdx.x % WARP; }
    static DEVICE u32 members() { return WARP; }
    static DEVICE f32 sum(f32 x) { return warp_sum(x); }
};
struct BlockTeam {
    static const bool holds_row = false;
    static DEVICE u32 member() { return threadIdx.x; }
    static DEVICE u32 members() { return blockDim.x; }
    static DEVICE f32 sum(f32 x) { return block_sum(x); }
};

// First element of this thread's piece p in the part of the row from `from` on.
template <class Team> DEVICE u32 start(u32 from, int p) {
    return from + (p * Team::members() + Team::member()) * WIDE<real>;
}

template <class Team, bool wide> DEVICE void read(Held& held, const real* row, u32 from, u32 width) {
#pragma unroll
    for (int p = 0; p < PIECES; p++) held.at[p] = load_wide(row, start<Team>(from, p), width, wide);
}

// held += scale * branch, rounded, as it is written to `sum`.
template <class Team, bool wide>
DEVICE void add_branch(Held& held, real* sum, const real* branch, f32 scale, u32 from, u32 width) {
    Held added;
    read<Team, wide>(added, branch, from, width);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        f32 values[WIDE<real>];
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) values[k] = load(held.at[p].at[k]) + scale * load(added.at[p].at[k]);
        round_to(held.at[p], values);
        store_wide(sum, start<Team>(from, p), width, wide, held.at[p]);
    }
}

// Sum of f(element) over this thread's part of a row.
template <class Team, bool wide, class F> DEVICE f32 sum_held(const Held& held, u32 from, u32 width, F f) {
    f32 sum = 0;
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++)
            if (start<Team>(from, p) + (wide ? 0 : k) < width) sum += f(load(held.at[p].at[k]));
    return sum;
}

// A row (all pointers are to its first element). What the team cannot hold at once is read again for the variance and
// for the result; the caches still have it. Memory moves each element of x, branch, sum and y once.
template <class Team, bool wide>
DEVICE void normalize_row(real* y, f32* statistics, const real* x, real* sum, const real* branch, const real* gain,
                      const real* bias, u32 width, u32 kind, f32 scale, f32 eps) {
    u32 part = Team::holds_row ? width : PIECES * WIDE<real> * Team::members();
    bool again = part < width;
    Held held;
    f32 total = 0;
    for (u32 from = 0; from < width; from += part) {
        read<Team, wide>(held, x, from, width);
        if (branch) add_branch<Team, wide>(held, sum, branch, scale, from, width);
        total += sum_held<Team, wide>(held, from, width, [](f32 v) { return v; });
    }
    if (branch) x = sum;
    f32 mean = kind == LAYER ? Team::sum(total) / width : 0.0f;
    f32 squares = 0;
    for (u32 from = 0; from < width; from += part) {
        if (again) read<Team, wide>(held, x, from, width);
        squares += sum_held<Team, wide>(held, from, width, [=](f32 v) { return (v - mean) * (v - mean); });
    }
    f32 inverse = 1.0f / sqrtf(Team::sum(squares) / width + eps);
    if (Team::member() == 0) {
        statistics[0] = mean;
        statistics[1] = inverse;
    }
    for (u32 from = 0; from < width; from += part) {
        if (again) read<Team, wide>(held, x, from, width);
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            u32 i = start<Team>(from, p);
            Wide<real> g = load_wide(gain, i, width, wide), b = {};
            if (bias) b = load_wide(bias, i, width, wide);
            f32 values[WIDE<real>];
#pragma unroll
            for (int k = 0; k < WIDE<real>; k++)
                values[k] = (load(held.at[p].at[k]) - mean) * inverse * load(g.at[k]) + load(b.at[k]);
            store_wide(y, i, width, wide, values);
        }
    }
}

template <class Team>
DEVICE void normalize(real* y, f32* statistics, const real* x, real* sum, const real* branch, const real* gain,
                      const real* bias, u64 row, u32 width, u32 kind, f32 scale, f32 eps) {
    bool wide = is_wide(y, width) && is_wide(x, width) && is_wide(sum, width) && is_wide(branch, width) &&
                is_wide(gain, width) && is_wide(bias, width);
    u64 at = row * width;
    y += at, x += at, statistics += 2 * row;
    if (branch) sum += at, branch += at;
    if (wide) normalize_row<Team, true>(y, statistics, x, sum, branch, gain, bias, width, kind, scale, eps);
    else normalize_row<Team, false>(y, statistics, x, sum, branch, gain, bias, width, kind, scale, eps);
}

// A warp a row, for rows of at most 512 elements.
KERNEL_RESIDENT(256, 4, NAMED(norm_forward),
       (real* y, f32* statistics, const real* x, real* sum, const real* branch, const real* gain, const real* bias,
        u64 rows, u32 width, u32 kind, f32 scale, f32 eps)) {
    u64 row = (u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row < rows) normalize<WarpTeam>(y, statistics, x, sum, branch, gain, bias, row, width, kind, scale, eps);
}

// A block a row.
KERNEL(512, NAMED(norm_forward_long),
       (real* y, f32* statistics, const real* x, real* sum, const real* branch, const real* gain, const real* bias,
        u32 width, u32 kind, f32 scale, f32 eps)) {
    normalize<BlockTeam>(y, statistics, x, sum, branch, gain, bias, blockIdx.x, width, kind, scale, eps);
}

// Sums of one row in backward: of g and of g n, where g = dy gain and n is the normalised row.
struct RowSums {
    f32 g, gn;
};

// Adds this piece to them.
DEVICE void add_to(RowSums& sums, const Wide<real>& dy, const Wide<real>& x, const Wide<real>& gain, f32 mean,
                   f32 inverse) {
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) {
        f32 g = load(dy.at[k]) * load(gain.at[k]);
        sums.g += g;
        sums.gn += g * ((load(x.at[k]) - mean) * inverse);
    }
}

// sums (rows x 2) of rows that are too long for the teams of norm_backward, a block a row.
KERNEL(512, NAMED(norm_backward_sums),
       (f32* sums, const real* dy, const real* x, const f32* statistics, const real* gain, u32 width)) {
    bool wide = is_wide(dy, width) && is_wide(x, width) && is_wide(gain, width);
    u64 row = blockIdx.x, at = row * width;
    f32 mean = statistics[2 * row], inverse = statistics[2 * row + 1];
    RowSums mine = {};
    for (u32 i = threadIdx.x * WIDE<real>; i < width; i += blockDim.x * WIDE<real>)
        add_to(mine, load_wide(dy + at, i, width, wide), load_wide(x + at, i, width, wide),
               load_wide(gain, i, width, wide), mean, inverse);
    mine.g = block_sum(mine.g);
    mine.gn = block_sum(mine.gn);
    if (threadIdx.x == 0) {
        sums[2 * row] = mine.g;
        sums[2 * row + 1] = mine.gn;
    }
}

// Warps of a block of norm_backward.
#define MOST_WARPS 12

// Sums over the teams' rows, all at once. Calls take turns with two buffers, so that one barrier a call is enough.
DEVICE RowSums team_sums(RowSums mine, u32 team, u32 warps, u32 turn) {
    SHARED RowSums partial[2][MOST_WARPS];
    mine.g = warp_sum(mine.g);
    mine.gn = warp_sum(mine.gn);
    if (threadIdx.x % WARP == 0) partial[turn][threadIdx.x / WARP] = mine;
    __syncthreads();
    RowSums all = {};
    for (u32 w = 0; w < warps; w++) {
        all.g += partial[turn][team * warps + w].g;
        all.gn += partial[turn][team * warps + w].gn;
    }
    return all;
}

// dx (+)= (g - mean(g) - n mean(g n)) / deviation, where RMSNorm lacks the second term; and for each block of
// `rows_per_block` rows the sums over them of dy n and (with sides = 2) of dy: partials is blocks x sides x width.
// A team of `warps` warps has a row, a thread one piece of it. Rows longer than a team are cut along the grid's y; then
// `sums` are given. Memory moves each element of dy, x and dx once.
KERNEL_RESIDENT(384, 2, NAMED(norm_backward),
       (real* dx, f32* partials, const real* dy, const real* x, const f32* statistics, const f32* sums,
        const real* gain, u64 rows, u32 rows_per_block, u32 warps, u32 width, u32 sides, u32 kind, u32 overwrite)) {
    bool wide = is_wide(dx, width) && is_wide(dy, width) && is_wide(x, width) && is_wide(gain, width);
    u32 columns = warps * WARP * WIDE<real>, first = blockIdx.y * columns, teams = blockDim.x / (warps * WARP);
    u32 team = threadIdx.x / (warps * WARP), own = threadIdx.x % (warps * WARP) * WIDE<real>, i = first + own;
    Wide<real> gains = load_wide(gain, i, width, wide);
    f32 dgain[WIDE<real>] = {}, dbias[WIDE<real>] = {};
    u64 from = (u64)blockIdx.x * rows_per_block, to = from + rows_per_block < rows ? from + rows_per_block : rows;
    u32 turn = 0;
    for (u64 base = from; base < to; base += teams) {
        u64 row = base + team, at = row * width;
        u32 inside = row < to ? width : 0;  // A team without a row reads nothing, and adds zeros.
        Wide<real> d = load_wide(dy + at, i, inside, wide), v = load_wide(x + at, i, inside, wide), past = {};
        if (!overwrite) past = load_wide(dx + at, i, inside, wide);
        f32 mean = inside ? statistics[2 * row] : 0.0f, inverse = inside ? statistics[2 * row + 1] : 0.0f;
        RowSums all = {};
        if (sums) {
            if (inside) all.g = sums[2 * row], all.gn = sums[2 * row + 1];
        } else {
            RowSums mine = {};
            add_to(mine, d, v, gains, mean, inverse);
            all = team_sums(mine, team, warps, turn++ % 2);
        }
        f32 shift = kind == LAYER ? all.g / width : 0.0f, slope = all.gn / width;
        f32 values[WIDE<real>];
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) {
            f32 dy_k = load(d.at[k]), n = (load(v.at[k]) - mean) * inverse;
            values[k] = load(past.at[k]) + inverse * (dy_k * load(gains.at[k]) - shift - n * slope);
            dgain[k] += dy_k * n;
            dbias[k] += dy_k;
        }
        store_wide(dx + at, i, inside, wide, values);
    }
    u32 inside = width - first < columns ? width - first : columns;
    f32* target = partials + (u64)blockIdx.x * sides * width + first;
    auto put = [&](u32 c, f32 sum) { target[c] = sum; };
    add_teams<MOST_WARPS>(dgain, own, columns, inside, team, teams, put);
    target += width;
    if (sides == 2) add_teams<MOST_WARPS>(dbias, own, columns, inside, team, teams, put);
}

// first[i] (and second[i], if given) = sum over `count` rows of partials (count x 1 or 2 x width), in order.
KERNEL(1024, NAMED(add_up), (void* first, void* second, u32 sum_type, const f32* partials, u64 count, u32 width)) {
    u32 column = blockIdx.x * WARP + threadIdx.x % WARP, sides = second ? 2 : 1;
    bool inside = column < width;
    const f32* p = partials + (blockIdx.y ? width : 0) + column;
    f32 sum = column_sum(p, count, (u64)sides * width, inside);
    if (inside && threadIdx.x < WARP) store_as(blockIdx.y ? second : first, sum_type, column, sum);
}

// target = x + scale * branch.
KERNEL(256, NAMED(norm_add), (real* target, const real* x, const real* branch, u64 n, f32 scale)) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * WIDE<real>;
    bool wide = is_wide(target, 0) && is_wide(x, 0) && is_wide(branch, 0) && i + WIDE<real> <= n;
    Wide<real> a = load_wide(x, i, n, wide), b = load_wide(branch, i, n, wide);
    f32 values[WIDE<real>];
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) values[k] = load(a.at[k]) + scale * load(b.at[k]);
    store_wide(target, i, n, wide, values);
}

KERNEL(256, NAMED(norm_scale), (real* x, u64 n, f32 scale)) {
    u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * WIDE<real>;
    bool wide = is_wide(x, 0) && i + WIDE<real> <= n;
    Wide<real> a = load_wide(x, i, n, wide);
    f32 values[WIDE<real>];
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) values[k] = scale * load(a.at[k]);
    store_wide(x, i, n, wide, values);
}
