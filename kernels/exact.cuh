// Arithmetic that rounds every operation, as the CPU's does. A compiler for the device joins products and sums into one
// rounding where it can; results that have to be the same bits everywhere are computed with these numbers.
#pragma once
#include "device.cuh"

DEVICE f32 exact_sum(f32 x, f32 y) { return __fadd_rn(x, y); }
DEVICE f64 exact_sum(f64 x, f64 y) { return __dadd_rn(x, y); }
DEVICE f32 exact_product(f32 x, f32 y) { return __fmul_rn(x, y); }
DEVICE f64 exact_product(f64 x, f64 y) { return __dmul_rn(x, y); }
DEVICE f32 exact_quotient(f32 x, f32 y) { return __fdiv_rn(x, y); }
DEVICE f64 exact_quotient(f64 x, f64 y) { return __ddiv_rn(x, y); }
DEVICE f32 exact_root(f32 x) { return __fsqrt_rn(x); }
DEVICE f64 exact_root(f64 x) { return __dsqrt_rn(x); }

// f32 or f64.
template <class T> struct Exact {
    T value;
    Exact() = default;
    DEVICE Exact(T x) : value(x) {}
    friend DEVICE Exact operator+(Exact x, Exact y) { return exact_sum(x.value, y.value); }
    friend DEVICE Exact operator-(Exact x, Exact y) { return exact_sum(x.value, -y.value); }
    friend DEVICE Exact operator*(Exact x, Exact y) { return exact_product(x.value, y.value); }
    friend DEVICE Exact operator/(Exact x, Exact y) { return exact_quotient(x.value, y.value); }
    friend DEVICE bool operator>(Exact x, Exact y) { return x.value > y.value; }
    friend DEVICE Exact root(Exact x) { return exact_root(x.value); }
};
