// Elementwise optimizers over all pieces of all rows in one launch: src/ops/optimizer.rs has the rules, and the CPU's
// order of operations, which is kept bit for bit. A block takes CHUNK elements of a piece. Master weights and moments
// are f32; without a master copy the weights are f32 and their own.
#include "exact.cuh"
#include "step.cuh"

#define THREADS 256
#define RUN_LEN 4
#define CHUNK 8192
#define CHUNKS 8  // of the largest piece

typedef Exact<f32> Single;

struct Step {
    const f64* scalars;
    const Piece* pieces;
    const RowSettings* rows;
    DEVICE Piece piece() const { return pieces[blockIdx.x / CHUNKS]; }
    DEVICE u64 start() const { return (u64)(blockIdx.x % CHUNKS) * CHUNK; }
    DEVICE const RowSettings& row() const { return rows[piece().row]; }
    DEVICE f64 rate() const { return scalars[LEARNING_RATE] * row().lr; }
    // Nothing to do for this block.
    DEVICE bool is_idle() const { return scalars[SKIP] != 0 || row().muon != 0 || start() >= piece().len; }
};

// The arenas from the block's first element on.
template <int MOMENTS> struct Arenas {
    f32* weights;
    real* copy;
    f32* moments[MOMENTS + 1];
    const f32* gradients;

    DEVICE Arenas(real* copy_, f32* master, const f32* gradients_, u64 at) {
        weights = (master ? master : (f32*)copy_) + at;
        copy = master ? copy_ + at : nullptr;
        gradients = gradients_ + at;
    }
    DEVICE bool is_aligned() const {
        u64 all = (u64)weights | (u64)gradients | (u64)copy * (16 / (RUN_LEN * sizeof(real)));
        for (int k = 0; k < MOMENTS; ++k) all |= (u64)moments[k];
        return all % 16 == 0;
    }
};

typedef Pack<f32, RUN_LEN> Run;

// Updates one element; the square of its change.
template <int MOMENTS, class Rule> DEVICE f64 update_one(Run& weights, Run* moments, f32 g, u32 j, const Rule& rule) {
    Single m[MOMENTS + 1];
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) m[k] = moments[k].at[j];
    Single old = weights.at[j], updated = rule(old, m, rule.factor * g);
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) moments[k].at[j] = m[k].value;
    weights.at[j] = updated.value;
    f64 change = (updated - old).value;
    return change * change;
}

// Four elements from i on, of which `len` exist; `wide` when all do and lie aligned.
template <int MOMENTS, class Rule>
DEVICE f64 update_run(const Arenas<MOMENTS>& a, u32 i, u32 len, bool wide, const Rule& rule) {
    Run w, g, m[MOMENTS + 1];
    if (wide) {
        w = *(Run*)(a.weights + i);
        g = *(const Run*)(a.gradients + i);
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) m[k] = *(Run*)(a.moments[k] + i);
    } else {
#pragma unroll
        for (u32 j = 0; j < RUN_LEN; ++j) {
            w.at[j] = j < len ? a.weights[i + j] : 0;
            g.at[j] = j < len ? a.gradients[i + j] : 0;
#pragma unroll
            for (int k = 0; k < MOMENTS; ++k) m[k].at[j] = j < len ? a.moments[k][i + j] : 0;
        }
    }
    f64 changes = 0;
#pragma unroll
    for (u32 j = 0; j < RUN_LEN; ++j) {
        f64 change = update_one<MOMENTS>(w, m, g.at[j], j, rule);
        changes += j < len ? change : 0;
    }
    if (wide) {
        *(Run*)(a.weights + i) = w;
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) *(Run*)(a.moments[k] + i) = m[k];
        if (a.copy) {
            Pack<real, RUN_LEN> rounded;
#pragma unroll
            for (u32 j = 0; j < RUN_LEN; ++j) store(rounded.at[j], w.at[j]);
            *(Pack<real, RUN_LEN>*)(a.copy + i) = rounded;
        }
        return changes;
    }
#pragma unroll
    for (u32 j = 0; j < RUN_LEN; ++j) {
        if (j >= len) break;
        a.weights[i + j] = w.at[j];
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) a.moments[k][i + j] = m[k].at[j];
        if (a.copy) store(a.copy[i + j], w.at[j]);
    }
    return changes;
}

// The block's elements; their sum of squared changes goes to `partial`.
template <int MOMENTS, class Rule>
DEVICE void update_chunk(const Arenas<MOMENTS>& arenas, f64* partial, Step step, const Rule& rule) {
    u64 rest = step.piece().len - step.start();
    u32 len = rest < CHUNK ? (u32)rest : CHUNK;
    bool aligned = arenas.is_aligned();
    f64 changes = 0;
    for (u32 i = threadIdx.x * RUN_LEN; i < len; i += THREADS * RUN_LEN) {
        changes += update_run<MOMENTS>(arenas, i, len - i, aligned && len - i >= RUN_LEN, rule);
    }
    changes = block_sum(changes);
    if (threadIdx.x == 0) *partial = changes;
}

// g + wd w; m = kept m + entering g; w - lr (of_g g + of_m m).
struct Sgd {
    Single factor, lr, decay, kept, entering, of_g, of_m;
    DEVICE Single operator()(Single w, Single* m, Single g) const {
        g = g + decay * w;
        m[0] = kept * m[0] + entering * g;
        return w - lr * (of_g * g + of_m * m[0]);
    }
};

struct PlainSgd {
    Single factor, lr, decay;
    DEVICE Single operator()(Single w, Single*, Single g) const { return w - lr * (g + decay * w); }
};

// Bytes an element: 12, with a momentum 20, and the working copy.
KERNEL(THREADS, NAMED(sgd),
       (real* weights, f32* master, f32* first, const f32* gradients, f64* chunks, const f64* scalars,
        const Piece* pieces, const RowSettings* rows, f64 momentum, f64 dampening, u32 nesterov)) {
    Step step = {scalars, pieces, rows};
    f64* partial = chunks + blockIdx.x;
    if (step.is_idle()) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    u64 at = step.piece().offset + step.start();
    f32 factor = (f32)scalars[FACTOR], lr = (f32)step.rate(), decay = (f32)step.row().decay;
    if (!first) {
        Arenas<0> arenas(weights, master, gradients, at);
        return update_chunk<0>(arenas, partial, step, PlainSgd{factor, lr, decay});
    }
    bool fresh = scalars[TIME] <= 1;
    Arenas<1> arenas(weights, master, gradients, at);
    arenas.moments[0] = first + at;
    Sgd rule = {factor, lr, decay, (f32)(fresh ? 0 : momentum), (f32)(fresh ? 1 : 1 - dampening),
                nesterov ? 1.0f : 0.0f, nesterov ? (f32)momentum : 1.0f};
    update_chunk<1>(arenas, partial, step, rule);
}

// Constants of src/ops/optimizer.rs of the same names.
struct Adam {
    Single factor, beta1[2], beta2[2], correction, lr, eps, l2, shrink;
    DEVICE void set(Step step, f64 b1, f64 b2, bool coupled) {
        f64 time = step.scalars[TIME], rate = step.rate(), decay = step.row().decay;
        factor = (f32)step.scalars[FACTOR];
        beta1[0] = (f32)b1, beta1[1] = (f32)(1 - b1);
        beta2[0] = (f32)b2, beta2[1] = (f32)(1 - b2);
        correction = (f32)(1 / sqrt(1 - pow(b2, time)));
        lr = (f32)(rate / (1 - pow(b1, time)));
        eps = (f32)step.row().eps;
        l2 = coupled ? (f32)decay : 0.0f;
        shrink = coupled ? 0.0f : (f32)(rate * decay);
    }
    DEVICE Single operator()(Single w, Single* m, Single g) const {
        moments(w, m, g);
        return weight(w, m[0], m[1]);
    }
    DEVICE void moments(Single w, Single* m, Single g) const {
        g = g + l2 * w;
        m[0] = beta1[0] * m[0] + beta1[1] * g;
        m[1] = beta2[0] * m[1] + beta2[1] * g * g;
    }
    DEVICE Single weight(Single w, Single m, Single v) const {
        return w - shrink * w - lr * m / (root(v) * correction + eps);
    }
};

struct AdamOfMaximum : Adam {
    DEVICE Single operator()(Single w, Single* m, Single g) const {
        moments(w, m, g);
        m[2] = m[1] > m[2] ? m[1] : m[2];
        return weight(w, m[0], m[2]);
    }
};

// Adam and AdamW; amsgrad where there is a maximum. Bytes an element: 28, with a maximum 36, and the working copy.
KERNEL(THREADS, NAMED(adam),
       (real* weights, f32* master, f32* first, f32* second, f32* maximum, const f32* gradients, f64* chunks,
        const f64* scalars, const Piece* pieces, const RowSettings* rows, f64 beta1, f64 beta2, u32 coupled)) {
    // Two powers a block, not a thread.
    SHARED AdamOfMaximum rule;
    Step step = {scalars, pieces, rows};
    f64* partial = chunks + blockIdx.x;
    if (step.is_idle()) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    if (threadIdx.x == 0) rule.set(step, beta1, beta2, coupled != 0);
    __syncthreads();
    u64 at = step.piece().offset + step.start();
    Arenas<3> arenas(weights, master, gradients, at);
    if (maximum) {
        arenas.moments[0] = first + at, arenas.moments[1] = second + at, arenas.moments[2] = maximum + at;
        return update_chunk<3>(arenas, partial, step, rule);
    }
    Arenas<2> without(weights, master, gradients, at);
    without.moments[0] = first + at, without.moments[1] = second + at;
    update_chunk<2>(without, partial, step, (const Adam&)rule);
}

struct Lion {
    Single factor, b1, g1, b2, g2, lr, shrink;
    DEVICE Single operator()(Single w, Single* m, Single g) const {
        f32 u = (b1 * m[0] + g1 * g).value;
        m[0] = b2 * m[0] + g2 * g;
        Single sign = (u > 0 ? 1.0f : 0.0f) - (u < 0 ? 1.0f : 0.0f);
        return w - shrink * w - lr * sign;
    }
};

// Bytes an element: 20, and the working copy.
KERNEL(THREADS, NAMED(lion),
       (real* weights, f32* master, f32* first, const f32* gradients, f64* chunks, const f64* scalars,
        const Piece* pieces, const RowSettings* rows, f64 beta1, f64 beta2)) {
    Step step = {scalars, pieces, rows};
    f64* partial = chunks + blockIdx.x;
    if (step.is_idle()) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    u64 at = step.piece().offset + step.start();
    Arenas<1> arenas(weights, master, gradients, at);
    arenas.moments[0] = first + at;
    f64 rate = step.rate();
    Lion rule = {(f32)scalars[FACTOR], (f32)beta1, (f32)(1 - beta1), (f32)beta2, (f32)(1 - beta2), (f32)rate,
                 (f32)(rate * step.row().decay)};
    update_chunk<1>(arenas, partial, step, rule);
}

// partials[i] = sum over the chunks of piece i.
KERNEL(THREADS, NAMED(sum_chunks), (f64* partials, const f64* chunks, u32 count)) {
    u32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    f64 sum = 0;
    for (u32 k = 0; k < CHUNKS; ++k) sum += chunks[(u64)i * CHUNKS + k];
    partials[i] = sum;
}
