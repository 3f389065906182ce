// Elements of rows in pieces of 16 bytes. `wide` says that pieces are aligned and that none goes past the row's end in
// its middle; otherwise they are taken element by element. The thread, its elements and its arithmetic stay the same,
// and so do all bits of a result.
#pragma once
#include "device.cuh"

// Elements i to i + WIDE - 1 of the n at p; zeros past the end.
template <class T> DEVICE Wide<T> load_wide(const T* p, u64 i, u64 n, bool wide) {
    Wide<T> piece = {};
    if (wide) {
        if (i < n) piece = *(const Wide<T>*)(p + i);
    } else {
#pragma unroll
        for (int k = 0; k < WIDE<T>; k++)
            if (i + k < n) piece.at[k] = p[i + k];
    }
    return piece;
}
// Their values.
template <class T> DEVICE void load_wide(f32 (&to)[WIDE<T>], const T* p, u64 i, u64 n, bool wide) {
    Wide<T> piece = load_wide(p, i, n, wide);
#pragma unroll
    for (int k = 0; k < WIDE<T>; k++) to[k] = load(piece.at[k]);
}
// Those of f32, in as many elements as 16 bytes of T have: parameters' gradients and partial sums.
template <int N> DEVICE void load_f32(f32 (&to)[N], const f32* p, u64 i, u64 n, bool wide) {
#pragma unroll
    for (int k = 0; k < N; k += WIDE<f32>) {
        Wide<f32> piece = load_wide(p, i + k, n, wide);
#pragma unroll
        for (int j = 0; j < WIDE<f32>; j++) to[k + j] = piece.at[j];
    }
}

DEVICE void load_f32(f32 (&to)[WIDE<bf16>], const bf16* p, u64 i, u64 n, bool wide) {
    Wide<bf16> piece = load_wide(p, i, n, wide);
#pragma unroll
    for (int k = 0; k < WIDE<bf16>; k++) to[k] = load(piece.at[k]);
}

// Rounds values to the elements of one piece.
DEVICE void round_to(Wide<f32>& piece, const f32 (&values)[4]) {
#pragma unroll
    for (int k = 0; k < 4; k++) piece.at[k] = values[k];
}
DEVICE void round_to(Wide<bf16>& piece, const f32 (&values)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k += 2) {
        u32 pair = pack_bf16(values[k], values[k + 1]);
        piece.at[k].bits = (u16)pair;
        piece.at[k + 1].bits = (u16)(pair >> 16);
    }
}
// Writes one piece; nothing past the end.
template <class T> DEVICE void store_wide(T* p, u64 i, u64 n, bool wide, const Wide<T>& piece) {
    if (wide) {
        if (i < n) *(Wide<T>*)(p + i) = piece;
    } else {
#pragma unroll
        for (int k = 0; k < WIDE<T>; k++)
            if (i + k < n) p[i + k] = piece.at[k];
    }
}
// Rounds values and writes them.
template <class T> DEVICE void store_wide(T* p, u64 i, u64 n, bool wide, const f32 (&values)[WIDE<T>]) {
    Wide<T> piece;
    round_to(piece, values);
    store_wide(p, i, n, wide, piece);
}
template <int N> DEVICE void store_f32(f32* p, u64 i, u64 n, bool wide, const f32 (&values)[N]) {
#pragma unroll
    for (int k = 0; k < N; k += WIDE<f32>) {
        Wide<f32> piece;
#pragma unroll
        for (int j = 0; j < WIDE<f32>; j++) piece.at[j] = values[k + j];
        store_wide(p, i + k, n, wide, piece);
    }
}
DEVICE void store_f32(bf16* p, u64 i, u64 n, bool wide, const f32 (&values)[WIDE<bf16>]) {
    store_wide(p, i, n, wide, values);
}
