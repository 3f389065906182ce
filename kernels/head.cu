// Cross-entropy over a chunk of logits, and their gradient in their place: src/ops/head/mod.rs has the contract. A
// block takes a token. The logits are read once from memory: what fits is kept in shared memory for the second pass,
// where each thread reads again what it wrote; the rest comes from the second-level cache. Bytes: the logits, and with
// gradients the logits again.
#include "device.cuh"

#define THREADS 512
#define AHEAD 4  // packs that a thread reads before it uses them

// e^x. For f32 with the precision of the library; a bf16 logit has lost more than the fast form loses.
DEVICE f32 exponential(f32 x, f32) { return expf(x); }
DEVICE f32 exponential(f32 x, bf16) { return exp2_fast(x * 1.4426950408889634f); }
DEVICE f32 exponential(f32 x) { return exponential(x, real()); }

// A token's logits as packs of V, some of them also in shared memory.
template <int V> struct Logits {
    typedef Pack<real, V> Packed;
    Packed *global, *shared;
    u32 classes, cached;

    DEVICE u32 packs() const { return (classes + V - 1) / V; }
    // A pack as numbers; what is no class is smaller than anything.
    DEVICE void get(f32 (&z)[V], const Packed& pack, u32 i) const {
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = i * V + j < classes ? load(pack.at[j]) : MINUS_INFINITY;
    }
};

// Maximum and sum of e^(z - maximum) of what was seen so far. It starts below every number, not at minus infinity,
// whose difference with itself is no number.
struct Online {
    f32 max = -3.4e38f, sum = 0;

    template <int V> DEVICE void add(const f32 (&z)[V]) {
        f32 larger = max;
#pragma unroll
        for (int j = 0; j < V; ++j) larger = fmaxf(larger, z[j]);
        if (larger > max) {
            sum *= exponential(max - larger);
            max = larger;
        }
#pragma unroll
        for (int j = 0; j < V; ++j) sum += exponential(z[j] - max);
    }
    // The block's.
    DEVICE void combine() {
        f32 larger = block_max(max);
        sum = block_sum(sum * exponential(max - larger));
        max = larger;
    }
};

template <int V> DEVICE Online first_pass(const Logits<V>& logits) {
    Online online;
    u32 packs = logits.packs();
    for (u32 first = threadIdx.x; first < packs; first += AHEAD * blockDim.x) {
        Pack<real, V> ahead[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            u32 i = first + k * blockDim.x;
            if (i < packs) ahead[k] = logits.global[i];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            u32 i = first + k * blockDim.x;
            if (i >= packs) break;
            if (i < logits.cached) logits.shared[i] = ahead[k];
            f32 z[V];
            logits.get(z, ahead[k], i);
            online.add(z);
        }
    }
    online.combine();
    return online;
}

// Writes scale (softmax - onehot), and zero beyond the classes.
template <int V>
DEVICE void second_pass(const Logits<V>& logits, Online online, u32 target, u32 padded, f32 scale) {
    f32 factor = scale / online.sum;
    u32 packs = logits.packs();
#pragma unroll 2
    for (u32 i = threadIdx.x; i < padded / V; i += blockDim.x) {
        Pack<real, V> pack = {};
        if (i < packs) {
            pack = i < logits.cached ? logits.shared[i] : logits.global[i];
            f32 z[V];
            logits.get(z, pack, i);
#pragma unroll
            for (int j = 0; j < V; ++j) {
                f32 e = exponential(z[j] - online.max);
                store(pack.at[j], (i * V + j == target ? e - online.sum : e) * factor);
            }
        }
        logits.global[i] = pack;
    }
}

template <int V>
DEVICE void token(f32* loss, real* row, real* shared, i32 target, u32 classes, u32 padded, u32 cached, bool gradients,
                  f32 scale) {
    typedef Pack<real, V> Packed;
    Logits<V> logits = {(Packed*)row, (Packed*)shared, classes, cached / V};
    // Before the gradient takes its place.
    f32 at_target = load(row[target]);
    Online online = first_pass(logits);
    if (threadIdx.x == 0) *loss = logf(online.sum) + online.max - at_target;
    if (gradients) second_pass(logits, online, (u32)target, padded, scale);
}

// losses[token] = log of the sum of e^logits, less the target's; 0 for a target below 0. With `gradients` the logits
// become scale (softmax - onehot). `cached` elements of a row fit in shared memory.
KERNEL_RESIDENT(THREADS, 2, NAMED(cross_entropy),
                (f32* losses, real* logits, const i32* targets, u32 classes, u32 padded, u32 cached, u32 gradients,
                 f32 scale)) {
    DYNAMIC_SHARED(shared);
    i32 target = targets[blockIdx.x];
    real* row = logits + (u64)blockIdx.x * padded;
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        for (u32 i = threadIdx.x; gradients && i < padded; i += blockDim.x) store(row[i], 0);
    } else if (is_wide(logits, padded)) {
        token<WIDE<real>>(losses + blockIdx.x, row, (real*)shared, target, classes, padded, cached, gradients != 0,
                          scale);
    } else {
        token<1>(losses + blockIdx.x, row, (real*)shared, target, classes, padded, cached, gradients != 0, scale);
    }
}

// Copies rows, with zeros for those whose target is below 0: a product with their zero gradients is then zero whatever
// they hold. A block a row.
KERNEL(THREADS, NAMED(counted_rows), (real* to, const real* from, const i32* targets, u32 width)) {
    bool counted = targets[blockIdx.x] >= 0;
    const real* source = from + (u64)blockIdx.x * width;
    real* target = to + (u64)blockIdx.x * width;
    if (is_wide(from, width) && is_wide(to, width)) {
        for (u32 i = threadIdx.x; i < width / WIDE<real>; i += blockDim.x) {
            ((Wide<real>*)target)[i] = counted ? ((const Wide<real>*)source)[i] : Wide<real>();
        }
        return;
    }
    for (u32 i = threadIdx.x; i < width; i += blockDim.x) target[i] = counted ? source[i] : real();
}
