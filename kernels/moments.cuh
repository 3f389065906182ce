// Moments as they are kept: in f32, or in bf16 rounded stochastically, with the random bits of src/ops/stochastic.rs.
#pragma once
#include "rng.cuh"
#include "step.cuh"
#include "types.cuh"

// What moments are rounded with at a step.
DEVICE Stream rounding_stream(const f64* scalars, u64 name) { return {(u64)scalars[TIME], name}; }

// The word of element i: word i % 4 of block i / 4.
DEVICE u32 word_of(Stream stream, u64 i) {
    Words words = philox(stream, i / 4);
    // Indices that the compiler knows keep them in registers.
    u32 low = i & 1 ? words.at[1] : words.at[0], high = i & 1 ? words.at[3] : words.at[2];
    return i & 2 ? high : low;
}

DEVICE void words_of(u32 (&words)[1], Stream stream, u64 i) { words[0] = word_of(stream, i); }
// The same of i and the next three, where i is a multiple of 4.
DEVICE void words_of(u32 (&words)[4], Stream stream, u64 i) {
    Words all = philox(stream, i / 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[j] = all.at[j];
}

// The half of an element's word that belongs to a moment: 0 the first; 1 the second, and 2 its maximum, which then is
// rounded as the second is that becomes it.
DEVICE u32 bits_of(u32 word, int moment) { return moment == 0 ? word & 0xffff : word >> 16; }

// x as it is kept: as it is, or one of its two neighbours in bf16, the one away from zero with the probability of the
// part of their distance that x lies beyond the other; `bits` are uniform below 2^16.
DEVICE void keep(f32& to, f32 x, u32) { to = x; }
DEVICE void keep(bf16& to, f32 x, u32 bits) { to.bits = x != x ? 0x7fc0 : (u16)((__float_as_uint(x) + bits) >> 16); }
