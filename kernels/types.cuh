// Element types that are known at run time: the tags are those of src/ops/convert.rs.
#pragma once
#include "device.cuh"

enum Type : u32 { TYPE_F64 = 0, TYPE_F32 = 1, TYPE_BF16 = 2, TYPE_F16 = 3 };

// Calls work(pointer to elements of the type). All threads have the same type. `work` is a struct: NVRTC takes
// generic lambdas for functions of the host.
template <class Work> DEVICE void with_type(u32 type, const void* x, Work work) {
    switch (type) {
        case TYPE_F64: return work((const f64*)x);
        case TYPE_F32: return work((const f32*)x);
        case TYPE_BF16: return work((const bf16*)x);
        default: return work((const f16*)x);
    }
}
template <class Work> DEVICE void with_type(u32 type, void* x, Work work) {
    switch (type) {
        case TYPE_F64: return work((f64*)x);
        case TYPE_F32: return work((f32*)x);
        case TYPE_BF16: return work((bf16*)x);
        default: return work((f16*)x);
    }
}

// Element i of a gradient of parameters, or of a moment: bf16 or f32.
DEVICE f32 load_as(const void* p, u32 type, u64 i) {
    return type == TYPE_BF16 ? load(((const bf16*)p)[i]) : ((const f32*)p)[i];
}
DEVICE void store_as(void* p, u32 type, u64 i, f32 x) {
    if (type == TYPE_BF16) store(((bf16*)p)[i], x);
    else ((f32*)p)[i] = x;
}

// The f32 beside x from which a second rounding, to 16 bits, gives what one rounding of x would: toward zero, with the
// last bit set where anything was lost.
DEVICE f32 round_to_odd(f64 x) {
    f32 y = (f32)x;
    u32 bits = __float_as_uint(y);
    if ((f64)y == x || x != x || (bits & 1)) return y;
    bool above = (f64)y > 0 ? (f64)y > x : (f64)y < x;
    return __uint_as_float(above ? bits - 1 : bits + 1);
}

// Rounded once, to nearest.
DEVICE void store(f64& to, f64 x) { to = x; }
DEVICE void store(f32& to, f64 x) { to = (f32)x; }
DEVICE void store(bf16& to, f64 x) { store(to, round_to_odd(x)); }
DEVICE void store(f16& to, f64 x) { store(to, round_to_odd(x)); }
