// Sums over micro-steps, the gradient's norm, the decision about a step: src/ops/gradient.rs has the contracts. Sums of
// many numbers are made in f64 and in an order given by the sizes alone.
#include "step.cuh"
#include "types.cuh"

#define THREADS 512
#define ONE_BLOCK 1024

// scalars: LossSum += sum of losses, Counted += number of targets that are not negative. One block.
KERNEL(ONE_BLOCK, tally, (f64* scalars, const f32* losses, const i32* targets, u64 rows)) {
    f64 loss = 0, counted = 0;
#pragma unroll 4
    for (u64 i = threadIdx.x; i < rows; i += ONE_BLOCK) {
        loss += losses[i];
        counted += targets[i] >= 0 ? 1 : 0;
    }
    loss = block_sum(loss);
    counted = block_sum(counted);
    if (threadIdx.x == 0) {
        scalars[LOSS_SUM] += loss;
        scalars[COUNTED] += counted;
    }
}

// to = from or to + from, rounded once. f32 has room for what is exact or rounds to f32; other sums go through f64.
template <class T, class S> DEVICE void accumulate_one(T& to, S from, bool add) {
    if constexpr (sizeof(T) == 4 && sizeof(S) <= 4) {
        store(to, add ? load(to) + load(from) : load(from));
    } else if constexpr (sizeof(S) <= 4) {
        if (add) store(to, (f64)load(to) + (f64)load(from));
        else if constexpr (sizeof(T) == 8) to = load(from);
        else store(to, load(from));
    } else {
        store(to, add ? (f64)load(to) + from : from);
    }
}

// Four elements a thread.
template <class T, class S> DEVICE void accumulate_run(T* target, const S* source, u64 len, bool add) {
    constexpr int RUN_OF_T = WIDE<T> < 4 ? WIDE<T> : 4, RUN_OF_S = WIDE<S> < 4 ? WIDE<S> : 4;
    u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * 4;
    bool aligned = (u64)target % (sizeof(T) * RUN_OF_T) == 0 && (u64)source % (sizeof(S) * RUN_OF_S) == 0;
    if (!aligned || i + 4 > len) {
        for (u64 end = i + 4 < len ? i + 4 : len; i < end; ++i) accumulate_one(target[i], source[i], add);
        return;
    }
    Pack<T, RUN_OF_T> to[4 / RUN_OF_T];
    Pack<S, RUN_OF_S> from[4 / RUN_OF_S];
#pragma unroll
    for (int k = 0; k < 4 / RUN_OF_S; ++k) from[k] = ((const Pack<S, RUN_OF_S>*)(source + i))[k];
#pragma unroll
    for (int k = 0; k < 4 / RUN_OF_T; ++k) {
        if (add) to[k] = ((Pack<T, RUN_OF_T>*)(target + i))[k];
#pragma unroll
        for (int j = 0; j < RUN_OF_T; ++j) {
            int e = k * RUN_OF_T + j;
            accumulate_one(to[k].at[j], from[e / RUN_OF_S].at[e % RUN_OF_S], add);
        }
        ((Pack<T, RUN_OF_T>*)(target + i))[k] = to[k];
    }
}

// Any type to any other.
template <class T> struct AccumulateTo {
    T* target;
    u64 len;
    bool add;
    template <class S> DEVICE void operator()(const S* source) const { accumulate_run(target, source, len, add); }
};
struct Accumulate {
    const void* source;
    u32 source_type;
    u64 len;
    bool add;
    template <class T> DEVICE void operator()(T* target) const {
        with_type(source_type, source, AccumulateTo<T>{target, len, add});
    }
};

// Bytes: source and target, the target twice with `add`.
KERNEL(THREADS, accumulate, (void* target, u32 target_type, const void* source, u32 source_type, u64 len, u32 add)) {
    with_type(target_type, target, Accumulate{source, source_type, len, add != 0});
}

DEVICE f64 square(f32 x) { return (f64)x * x; }

// This thread's part of the sum of squares of len elements.
template <class T> DEVICE f64 squares(const T* x, u32 len) {
    f64 sum = 0;
    u32 packs = is_wide(x, WIDE<T>) ? len / WIDE<T> : 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < packs; i += THREADS) {
        Wide<T> pack = ((const Wide<T>*)x)[i];
#pragma unroll
        for (int j = 0; j < WIDE<T>; ++j) sum += square(load(pack.at[j]));
    }
    for (u32 i = packs * WIDE<T> + threadIdx.x; i < len; i += THREADS) sum += square(load(x[i]));
    return sum;
}

// partials[block] = clip weight times the sum of squares over the block's piece. Bytes: the gradients once.
KERNEL(THREADS, square_norms,
       (f64* partials, const void* gradients, u32 gradient_type, const Piece* pieces, const RowSettings* rows)) {
    Piece piece = pieces[blockIdx.x];
    f64 sum = gradient_type == TYPE_BF16 ? squares((const bf16*)gradients + piece.offset, piece.len)
                                         : squares((const f32*)gradients + piece.offset, piece.len);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = rows[piece.row].clip * sum;
}

#define SUMMERS 256

DEVICE bool is_finite(f64 x) { return x - x == 0; }

// sums[i] = the sum of the i-th of SUMMERS runs of neighbours, `per` elements each but the last ones.
DEVICE void sums_of_runs(f64 (&sums)[SUMMERS], const f64* x, u32 count, u32 per) {
    u64 start = (u64)threadIdx.x * per, end = start + per < count ? start + per : count;
    f64 sum = 0;
    for (u64 i = start; i < end; ++i) sum += x[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
}

// Adds the runs in order. Where the sum stops being finite, `bad` becomes the row of the piece that did it.
DEVICE f64 guarded_sum(f64& bad, const f64 (&sums)[SUMMERS], const f64* partials, const Piece* pieces, u32 count,
                       u32 per) {
    f64 sum = 0;
    for (u32 run = 0; run < SUMMERS && run * (u64)per < count; ++run) {
        if (is_finite(sum + sums[run])) {
            sum += sums[run];
            continue;
        }
        u32 i = run * per, last = (run + 1) * (u64)per < count ? i + per - 1 : count - 1;
        for (sum += partials[i]; is_finite(sum) && i < last; sum += partials[i]) ++i;
        bad = pieces[i].row;
        return is_finite(sum) ? sum + sums[run] : sum;
    }
    return sum;
}

// From partials, LossSum and Counted: GradNorm, Factor, Skip, Halt, BadRow. One block.
KERNEL(SUMMERS, decide,
       (f64* scalars, const f64* partials, const Piece* pieces, u32 count, f64 clip, f64 nominal, u32 halt)) {
    SHARED f64 sums[SUMMERS];
    u32 per = (count + SUMMERS - 1) / SUMMERS;
    sums_of_runs(sums, partials, count, per);
    if (threadIdx.x != 0) return;
    f64 bad = -1;
    f64 sum = guarded_sum(bad, sums, partials, pieces, count, per);
    if (bad == -1 && !is_finite(scalars[LOSS_SUM])) bad = -2;
    bool finite = bad == -1;
    f64 counted = scalars[COUNTED], mean = nominal / counted, norm = sqrt(sum) * mean;
    if (halt && !finite) scalars[HALT] = 1;
    bool skip = !finite || counted == 0 || scalars[HALT] != 0;
    scalars[GRAD_NORM] = norm;
    // A ratio that is no number does not clip.
    scalars[FACTOR] = mean * (clip / norm < 1 ? clip / norm : 1);
    scalars[SKIP] = skip ? 1 : 0;
    scalars[BAD_ROW] = bad;
}

// UpdateNorm = root of the sum of partials, 0 when the step was skipped. One block.
KERNEL(SUMMERS, finish_update, (f64* scalars, const f64* partials, u32 count)) {
    SHARED f64 sums[SUMMERS];
    sums_of_runs(sums, partials, count, (count + SUMMERS - 1) / SUMMERS);
    if (threadIdx.x != 0) return;
    f64 sum = 0;
    for (u32 run = 0; run < SUMMERS; ++run) sum += sums[run];
    scalars[UPDATE_NORM] = scalars[SKIP] != 0 ? 0 : sqrt(sum);
}
