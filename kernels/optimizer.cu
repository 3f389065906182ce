// Elementwise optimizers over all pieces of all rows in one launch: src/ops/optimizer.rs has the rules, and the CPU's
// order of operations, which is kept bit for bit. A block takes CHUNK elements of a piece. Master weights are f32;
// without a master copy the weights are f32 and their own. Gradients and moments are f32 or bf16, arithmetic is f32.
#include "moments.cuh"

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

// The arenas as a launch names them, from element `origin` of the table's on: moments and gradients are of types that
// are known at run time. `rounding` is the stream whose bits moments in bf16 are rounded with.
struct Arenas {
    real* working;
    f32* master;
    void* moments[3];
    const void* gradients;
    u32 moment_type, gradient_type;
    Stream rounding;
    u64 origin;
};

// N neighbours at p, which lie on their border.
template <int N, class T> DEVICE Pack<T, N> load_run(const T* p) { return *(const Pack<T, N>*)p; }
template <int N, class T> DEVICE void store_run(T* p, const Pack<T, N>& run) { *(Pack<T, N>*)p = run; }
template <class T> DEVICE bool is_aligned(const T* p) { return (u64)p % sizeof(Pack<T, RUN_LEN>) == 0; }

// The arenas from the block's first element on: element `at` of them, and `element` of the table's. M, G: types of moments
// and gradients.
template <int MOMENTS, class M, class G> struct Typed {
    f32* weights;
    real* copy;
    M* moments[MOMENTS + 1];
    const G* gradients;
    Stream rounding;
    u64 element;

    DEVICE Typed(const Arenas& a, u64 at) : rounding(a.rounding), element(a.origin + at) {
        weights = (a.master ? a.master : (f32*)a.working) + at;
        copy = a.master ? a.working + at : nullptr;
        gradients = (const G*)a.gradients + at;
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) moments[k] = (M*)a.moments[k] + at;
    }
    DEVICE bool is_wide() const {
        bool all = element % RUN_LEN == 0 && is_aligned(weights) && is_aligned(copy) && is_aligned(gradients);
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) all = all && is_aligned(moments[k]);
        return all;
    }
};

// Updates N elements from i on; the sum of the squares of their changes.
template <int N, int MOMENTS, class M, class G, class Rule>
DEVICE f64 update_run(const Typed<MOMENTS, M, G>& a, u32 i, const Rule& rule) {
    Pack<f32, N> weights = load_run<N>(a.weights + i);
    Pack<G, N> gradients = load_run<N>(a.gradients + i);
    Pack<M, N> moments[MOMENTS + 1];
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) moments[k] = load_run<N>(a.moments[k] + i);
    u32 words[N] = {};
    if (MOMENTS > 0 && sizeof(M) == sizeof(bf16)) words_of(words, a.rounding, a.element + i);
    Pack<real, N> copy;
    f64 changes = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        Single m[MOMENTS + 1];
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) m[k] = load(moments[k].at[j]);
        Single old = weights.at[j], updated = rule(old, m, rule.factor * load(gradients.at[j]));
#pragma unroll
        for (int k = 0; k < MOMENTS; ++k) keep(moments[k].at[j], m[k].value, bits_of(words[j], k));
        weights.at[j] = updated.value;
        store(copy.at[j], updated.value);
        f64 change = (updated - old).value;
        changes += change * change;
    }
    store_run(a.weights + i, weights);
#pragma unroll
    for (int k = 0; k < MOMENTS; ++k) store_run(a.moments[k] + i, moments[k]);
    if (a.copy) store_run(a.copy + i, copy);
    return changes;
}

template <int MOMENTS, class M, class G, class Rule>
DEVICE void update_typed(const Arenas& all, f64* partial, Step step, const Rule& rule) {
    u64 rest = step.piece().len - step.start();
    u32 len = rest < CHUNK ? (u32)rest : CHUNK;
    Typed<MOMENTS, M, G> arenas(all, step.piece().offset + step.start());
    bool wide = arenas.is_wide();
    f64 changes = 0;
    for (u32 i = threadIdx.x * RUN_LEN; i < len; i += THREADS * RUN_LEN) {
        if (wide && len - i >= RUN_LEN) {
            changes += update_run<RUN_LEN>(arenas, i, rule);
            continue;
        }
        u32 end = len - i < RUN_LEN ? len : i + RUN_LEN;
#pragma unroll 1
        for (u32 j = i; j < end; ++j) changes += update_run<1>(arenas, j, rule);
    }
    changes = block_sum(changes);
    if (threadIdx.x == 0) *partial = changes;
}

// The block's elements; their sum of squared changes goes to `partial`. Gradients are bf16 only beside working weights
// that are.
template <int MOMENTS, class Rule>
DEVICE void update_chunk(const Arenas& all, f64* partial, Step step, const Rule& rule) {
    bool half = MOMENTS > 0 && all.moment_type == TYPE_BF16;
    if constexpr (sizeof(real) == sizeof(bf16)) {
        if (all.gradient_type == TYPE_BF16) {
            if (half) update_typed<MOMENTS, bf16, bf16>(all, partial, step, rule);
            else update_typed<MOMENTS, f32, bf16>(all, partial, step, rule);
            return;
        }
    }
    if (half) update_typed<MOMENTS, bf16, f32>(all, partial, step, rule);
    else update_typed<MOMENTS, f32, f32>(all, partial, step, rule);
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
       (real* weights, f32* master, void* first, u32 moment_type, const void* gradients, u32 gradient_type, f64* chunks,
        const f64* scalars, const Piece* pieces, const RowSettings* rows, u64 rounding, u64 origin, f64 momentum,
        f64 dampening, u32 nesterov)) {
    Step step = {scalars, pieces, rows};
    f64* partial = chunks + blockIdx.x;
    if (step.is_idle()) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    Arenas arenas = {weights, master, {first}, gradients, moment_type, gradient_type,
                     rounding_stream(scalars, rounding), origin};
    f32 factor = (f32)scalars[FACTOR], lr = (f32)step.rate(), decay = (f32)step.row().decay;
    if (!first) return update_chunk<0>(arenas, partial, step, PlainSgd{factor, lr, decay});
    bool fresh = scalars[TIME] <= 1;
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

// Adam and AdamW; amsgrad where there is a maximum. Bytes an element: 28, with a maximum 36, and the working
// copy; moments in bf16 take half of their 16 or 24.
KERNEL(THREADS, NAMED(adam),
       (real* weights, f32* master, void* first, void* second, void* maximum, u32 moment_type, const void* gradients,
        u32 gradient_type, f64* chunks, const f64* scalars, const Piece* pieces, const RowSettings* rows, u64 rounding,
        u64 origin, f64 beta1, f64 beta2, u32 coupled)) {
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
    Arenas arenas = {weights, master, {first, second, maximum}, gradients, moment_type, gradient_type,
                     rounding_stream(scalars, rounding), origin};
    if (maximum) update_chunk<3>(arenas, partial, step, rule);
    else update_chunk<2>(arenas, partial, step, (const Adam&)rule);
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

// Bytes an element: 20, with moments in bf16 16, and the working copy.
KERNEL(THREADS, NAMED(lion),
       (real* weights, f32* master, void* first, u32 moment_type, const void* gradients, u32 gradient_type, f64* chunks,
        const f64* scalars, const Piece* pieces, const RowSettings* rows, u64 rounding, u64 origin, f64 beta1,
        f64 beta2)) {
    Step step = {scalars, pieces, rows};
    f64* partial = chunks + blockIdx.x;
    if (step.is_idle()) {
        if (threadIdx.x == 0) *partial = 0;
        return;
    }
    Arenas arenas = {weights, master, {first}, gradients, moment_type, gradient_type,
                     rounding_stream(scalars, rounding), origin};
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
