// What Muon needs beside its products: src/ops/muon.rs has the steps. Master weights are f32, moments and gradients f32
// or bf16, the matrix that is orthogonalised is of the compute type. A block takes `chunk` neighbours, and leaves their
// sum.
#include "moments.cuh"

#define THREADS 256
#define MOMENTUM 0.95f

typedef Exact<f32> Single;

// Calls work(i) for the block's elements, and puts the sum of what it gives in sums[block].
template <class Work> DEVICE void sum_chunk(f64* sums, u64 len, u64 chunk, Work work) {
    u64 start = blockIdx.x * chunk, end = start + chunk < len ? start + chunk : len;
    f64 sum = 0;
#pragma unroll 4
    for (u64 i = start + threadIdx.x; i < end; i += THREADS) sum += work(i);
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Of all `count` sums, in every thread.
DEVICE f64 sum_of(const f64* sums, u32 count) {
    f64 sum = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += sums[i];
    return block_sum(sum);
}

// `at`: the matrix's first element in the arena.
template <class M, class G>
DEVICE void add_momentum(real* x, M* first, const G* gradient, f64* sums, const f64* scalars, Stream rounding, u64 at,
                         u64 len, u64 chunk) {
    bool skip = scalars[SKIP] != 0;
    Single factor = (f32)scalars[FACTOR], momentum = MOMENTUM;
    sum_chunk(sums, len, chunk, [&](u64 i) -> f64 {
        if (skip) {
            store(x[i], 0.0f);
            return 0;
        }
        Single g = factor * load(gradient[i]), m = momentum * load(first[i]) + g;
        f32 u = (g + momentum * m).value;
        u32 word = sizeof(M) == sizeof(bf16) ? word_of(rounding, at + i) : 0;
        keep(first[i], m.value, bits_of(word, 0));
        store(x[i], u);
        return (f64)u * u;
    });
}

// first = 0.95 first + g; x = g + 0.95 first, with g = factor gradient; sums of squares of x. A skipped step leaves
// first as it is, and x zero.
KERNEL(THREADS, NAMED(muon_momentum),
       (real* x, void* first, u32 moment_type, const void* gradient, u32 gradient_type, f64* sums, const f64* scalars,
        u64 rounding, u64 at, u64 len, u64 chunk)) {
    Stream stream = rounding_stream(scalars, rounding);
    if constexpr (sizeof(real) == sizeof(bf16)) {
        if (gradient_type == TYPE_BF16) {
            const bf16* g = (const bf16*)gradient;
            if (moment_type == TYPE_BF16) add_momentum(x, (bf16*)first, g, sums, scalars, stream, at, len, chunk);
            else add_momentum(x, (f32*)first, g, sums, scalars, stream, at, len, chunk);
            return;
        }
    }
    const f32* g = (const f32*)gradient;
    if (moment_type == TYPE_BF16) add_momentum(x, (bf16*)first, g, sums, scalars, stream, at, len, chunk);
    else add_momentum(x, (f32*)first, g, sums, scalars, stream, at, len, chunk);
}

// x = x / (norm + eps), the norm being the root of the sum of `sums`.
KERNEL(THREADS, NAMED(muon_normalise), (real* x, const f64* sums, u32 count, f64 eps, u64 len, u64 chunk)) {
    f32 scale = (f32)(1 / (sqrt(sum_of(sums, count)) + eps));
    u64 start = blockIdx.x * chunk, end = start + chunk < len ? start + chunk : len;
#pragma unroll 4
    for (u64 i = start + threadIdx.x; i < end; i += THREADS) store(x[i], load(x[i]) * scale);
}

// w = w - rate decay w - rate x, master and working copy; sums of squared changes.
KERNEL(THREADS, NAMED(muon_apply),
       (real* weight, f32* master, const real* x, f64* sums, const f64* scalars, f64 lr, f64 decay, u64 len,
        u64 chunk)) {
    bool skip = scalars[SKIP] != 0;
    f64 step = scalars[LEARNING_RATE] * lr;
    Single rate = (f32)step, shrink = (f32)(step * decay);
    f32* weights = master ? master : (f32*)weight;
    sum_chunk(sums, len, chunk, [&](u64 i) -> f64 {
        if (skip) return 0;
        Single old = weights[i], updated = old - shrink * old - rate * load(x[i]);
        weights[i] = updated.value;
        if (master) store(weight[i], updated.value);
        f64 change = (updated - old).value;
        return change * change;
    });
}

// partial[0] = the sum of `sums`. One block.
KERNEL(THREADS, NAMED(muon_changes), (f64* partial, const f64* sums, u32 count)) {
    f64 sum = sum_of(sums, count);
    if (threadIdx.x == 0) partial[0] = sum;
}
