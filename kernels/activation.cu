// GELU (tanh form and exact), ReLU, SwiGLU: src/ops/activation.rs has the formulas. A thread takes pieces of 16 bytes;
// of each element a kernel reads its inputs and writes its output once, so memory decides: the sigmoid is two
// instructions of the special-function units.
#include "wide.cuh"

enum Kind { GELU_TANH = 0, GELU_EXACT = 1, RELU = 2 };

// 2 sqrt(2/pi) and 2 sqrt(2/pi) * 0.044715: 0.5 (1 + tanh u) is sigmoid(2u), and 2u = x (LINEAR + CUBIC x^2).
#define LINEAR 1.5957691216057308f
#define CUBIC (LINEAR * 0.044715f)
#define LOG2_E 1.4426950408889634f
#define INVERSE_ROOT_2 0.70710678118654752f
#define INVERSE_ROOT_2_PI 0.39894228040143268f

// Pieces of a thread in an elementwise kernel, a block's width apart, all loaded before the first is used.
#define PIECES 2

// To some 4 ulp where it is not tiny; exactly 0 and 1 at the infinities.
DEVICE f32 sigmoid(f32 x) { return __fdividef(1.0f, 1.0f + exp2_fast(-LOG2_E * x)); }
DEVICE f32 normal_distribution(f32 x) { return 0.5f * (1.0f + erff(INVERSE_ROOT_2 * x)); }

template <int kind> DEVICE f32 value(f32 x) {
    if (kind == GELU_TANH) return x * sigmoid(x * (LINEAR + CUBIC * x * x));
    if (kind == GELU_EXACT) return x * normal_distribution(x);
    return x <= 0 ? 0.0f : x;  // NaN stays NaN.
}
template <int kind> DEVICE f32 slope(f32 x) {
    if (kind == GELU_TANH) {
        f32 x2 = x * x, s = sigmoid(x * (LINEAR + CUBIC * x2));
        return s + x * s * (1.0f - s) * (LINEAR + 3.0f * CUBIC * x2);
    }
    if (kind == GELU_EXACT) return normal_distribution(x) + x * INVERSE_ROOT_2_PI * exp2_fast(-0.5f * LOG2_E * x * x);
    return x > 0 ? 1.0f : 0.0f;
}

// The first element of this thread's piece `p`.
DEVICE u64 piece_start(int p) {
    return ((u64)blockIdx.x * PIECES + p) * blockDim.x * WIDE<real> + threadIdx.x * WIDE<real>;
}

// Whether it is loaded and stored at once; `aligned` says that all vectors begin on 16 bytes.
DEVICE bool whole_piece(int p, u64 n, bool aligned) { return aligned && piece_start(p) + WIDE<real> <= n; }

template <int kind> DEVICE void activate(real* y, const real* x, u64 n, bool aligned) {
    Wide<real> pieces[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) pieces[p] = load_wide(x, piece_start(p), n, whole_piece(p, n, aligned));
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        f32 values[WIDE<real>];
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++) values[k] = value<kind>(load(pieces[p].at[k]));
        store_wide(y, piece_start(p), n, whole_piece(p, n, aligned), values);
    }
}
KERNEL(256, NAMED(activate), (real* y, const real* x, u64 n, u32 kind)) {
    bool aligned = is_wide(y, 0) && is_wide(x, 0);
    if (kind == GELU_TANH) activate<GELU_TANH>(y, x, n, aligned);
    if (kind == GELU_EXACT) activate<GELU_EXACT>(y, x, n, aligned);
    if (kind == RELU) activate<RELU>(y, x, n, aligned);
}

template <int kind> DEVICE void activate_backward(real* d, const real* x, u64 n, bool aligned) {
    Wide<real> gradients[PIECES], inputs[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        inputs[p] = load_wide(x, piece_start(p), n, whole_piece(p, n, aligned));
        gradients[p] = load_wide(d, piece_start(p), n, whole_piece(p, n, aligned));
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        f32 values[WIDE<real>];
#pragma unroll
        for (int k = 0; k < WIDE<real>; k++)
            values[k] = load(gradients[p].at[k]) * slope<kind>(load(inputs[p].at[k]));
        store_wide(d, piece_start(p), n, whole_piece(p, n, aligned), values);
    }
}
// d *= f'(x).
KERNEL(256, NAMED(activate_backward), (real* d, const real* x, u64 n, u32 kind)) {
    bool aligned = is_wide(d, 0) && is_wide(x, 0);
    if (kind == GELU_TANH) activate_backward<GELU_TANH>(d, x, n, aligned);
    if (kind == GELU_EXACT) activate_backward<GELU_EXACT>(d, x, n, aligned);
    if (kind == RELU) activate_backward<RELU>(d, x, n, aligned);
}

// Rows go along the grid's x, pieces of a row along its y and the block: no index is divided.

// y = silu(gate) up, where a row of gate_up is the gate's outputs and then those of up.
KERNEL(256, NAMED(gate), (real* y, const real* gate_up, u32 ffn)) {
    u64 i = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * WIDE<real>, row = blockIdx.x;
    bool wide = is_wide(y, ffn) && is_wide(gate_up, ffn);
    const real* inputs = gate_up + row * 2 * ffn;
    Wide<real> gate = load_wide(inputs, i, ffn, wide), up = load_wide(inputs + ffn, i, ffn, wide);
    f32 values[WIDE<real>];
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) {
        f32 g = load(gate.at[k]);
        values[k] = g * sigmoid(g) * load(up.at[k]);
    }
    store_wide(y + row * ffn, i, ffn, wide, values);
}

KERNEL(256, NAMED(gate_backward), (real* dgate_up, const real* dy, const real* gate_up, u32 ffn)) {
    u64 i = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * WIDE<real>, row = blockIdx.x;
    bool wide = is_wide(dgate_up, ffn) && is_wide(dy, ffn) && is_wide(gate_up, ffn);
    const real* inputs = gate_up + row * 2 * ffn;
    Wide<real> gate = load_wide(inputs, i, ffn, wide), up = load_wide(inputs + ffn, i, ffn, wide);
    Wide<real> gradient = load_wide(dy + row * ffn, i, ffn, wide);
    f32 dgate[WIDE<real>], dup[WIDE<real>];
#pragma unroll
    for (int k = 0; k < WIDE<real>; k++) {
        f32 g = load(gate.at[k]), d = load(gradient.at[k]), s = sigmoid(g);
        dgate[k] = d * load(up.at[k]) * s * (1.0f + g * (1.0f - s));
        dup[k] = d * g * s;
    }
    store_wide(dgate_up + row * 2 * ffn, i, ffn, wide, dgate);
    store_wide(dgate_up + row * 2 * ffn + ffn, i, ffn, wide, dup);
}
