// Random numbers: the same bits as src/rng.rs, whose text is the specification; its steps are numbered here.
#pragma once
#include "exact.cuh"

// Seed, and hash of the name.
struct Stream {
    u64 seed, name;
};

struct Words {
    u32 at[4];
};

// Philox4x32-10: block `block` of a stream.
DEVICE Words philox(Stream stream, u64 block) {
    u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = (u32)stream.name, c3 = (u32)(stream.name >> 32);
    u32 k0 = (u32)stream.seed, k1 = (u32)(stream.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u64 low = (u64)0xd2511f53u * c0, high = (u64)0xcd9e8d57u * c2;
        c0 = (u32)(high >> 32) ^ c1 ^ k0;
        c1 = (u32)high;
        c2 = (u32)(low >> 32) ^ c3 ^ k1;
        c3 = (u32)low;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// Horner's rule with fma, lowest coefficient first.
DEVICE f32 horner(f32, f32 last) { return last; }
template <class... Rest> DEVICE f32 horner(f32 x, f32 lowest, Rest... rest) {
    return __fmaf_rn(horner(x, rest...), x, lowest);
}

// Steps 1 to 4.
DEVICE f32 normal_radius(u32 w) {
    const f32 step = 4.656612873077393e-10f;  // 2^-31
    u32 u = __float_as_uint(__fmaf_rn((f32)(i32)(w >> 1), step, 0.5f * step));
    i32 e = (i32)(u - 0x3f2aaaabu) >> 23;
    f32 f = __fadd_rn(__uint_as_float(u - ((u32)e << 23)), -1.0f);
    f32 p = horner(f, 0.33333215f, -0.24999797f, 0.20010406f, -0.16680487f, 0.14005862f, -0.12184278f, 0.13984467f,
                   -0.12891601f);
    f32 log = __fmaf_rn(__fmul_rn(f, f), __fmaf_rn(f, p, -0.5f), f);
    f32 square = __fmaf_rn((f32)e, -1.38629436111989f, __fmul_rn(-2.0f, log));
    return __fsqrt_rn(square > 0.0f ? square : 0.0f);
}

// Steps 5 to 7.
DEVICE void normal_direction(f32& cosine, f32& sine, u32 v) {
    u32 quadrant = (v + (1u << 29)) >> 30;
    f32 t = __fmul_rn((f32)(i32)(v - (quadrant << 30)), 3.14159265358979f * 4.656612873077393e-10f);
    f32 s = __fmul_rn(t, t);
    f32 sin = __fmaf_rn(__fmul_rn(t, s), horner(s, -0.16666655f, 0.008332178f, -0.00019517234f), t);
    f32 cos = __fmaf_rn(__fmul_rn(s, s), horner(s, 0.041666646f, -0.0013887367f, 0.000024438378f),
                        __fmaf_rn(s, -0.5f, 1.0f));
    u32 sign = quadrant >> 1 << 31;
    bool swapped = quadrant & 1;
    cosine = __uint_as_float(__float_as_uint(swapped ? -sin : cos) ^ sign);
    sine = __uint_as_float(__float_as_uint(swapped ? cos : sin) ^ sign);
}

// The four normal numbers of a block.
DEVICE void normals(f32 (&z)[4], Words words) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        f32 radius = normal_radius(words.at[2 * pair]), cosine, sine;
        normal_direction(cosine, sine, words.at[2 * pair + 1]);
        z[2 * pair] = __fmul_rn(radius, cosine);
        z[2 * pair + 1] = __fmul_rn(radius, sine);
    }
}

// A stream comes in groups of 64 elements. The whole blocks of a thread that has a quarter of a group make runs of
// neighbours: z[q][j] is element 64 group + 16 q + 4 quarter + j.
constexpr u32 GROUP = 64;
constexpr int RUNS = 4, SPAN = 4;
DEVICE void normals_of_quarter(f32 (&z)[RUNS][SPAN], Stream stream, u64 group, u32 quarter) {
#pragma unroll
    for (int j = 0; j < SPAN; ++j) {
        f32 of_block[4];
        normals(of_block, philox(stream, group * 16 + quarter * SPAN + j));
#pragma unroll
        for (int q = 0; q < RUNS; ++q) z[q][j] = of_block[q];
    }
}
