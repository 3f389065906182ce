// What a warp's lanes do together: exchanges, votes, and the tensor cores' instructions. Each gives its share and the
// last to arrive works for all (emulator::collective). A part of emulator.hpp.

template <class T> struct Exchange {
    T value;
    unsigned from;
};
template <class T> DEVICE T exchange(u32 mask, T value, unsigned from) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 4 or 8 bytes");
    Exchange<T> mine = {value, from};
    emulator::collective(mask, [](void* const (&lanes)[emulator::LANES]) {
        T values[emulator::LANES];
        // What a lane that takes no part would give is not defined.
        memset(values, 0xff, sizeof values);
        for (unsigned i = 0; i < emulator::LANES; i++)
            if (lanes[i]) values[i] = ((Exchange<T>*)lanes[i])->value;
        for (void* lane : lanes)
            if (lane) ((Exchange<T>*)lane)->value = values[((Exchange<T>*)lane)->from];
    }, &mine);
    return mine.value;
}
// A segment of `width` lanes is a warp of its own; what would come from outside is the lane's own value.
template <class T> DEVICE T __shfl_sync(u32 mask, T value, int from, int width = 32) {
    unsigned first = emulator::lane() & ~(width - 1);
    return exchange(mask, value, first | (from & (width - 1)));
}
template <class T> DEVICE T __shfl_up_sync(u32 mask, T value, unsigned by, int width = 32) {
    unsigned lane = emulator::lane();
    return exchange(mask, value, (lane & (width - 1)) < by ? lane : lane - by);
}
template <class T> DEVICE T __shfl_down_sync(u32 mask, T value, unsigned by, int width = 32) {
    unsigned lane = emulator::lane();
    return exchange(mask, value, (lane & (width - 1)) + by >= (unsigned)width ? lane : lane + by);
}
template <class T> DEVICE T __shfl_xor_sync(u32 mask, T value, int by, int width = 32) {
    unsigned lane = emulator::lane(), from = lane ^ by;
    return exchange(mask, value, from > (lane | (width - 1)) || from >= emulator::LANES ? lane : from);
}

struct Ballot {
    bool vote;
    u32 yes, voters;
};
DEVICE Ballot ballot(u32 mask, bool vote) {
    Ballot mine = {vote, 0, 0};
    emulator::collective(mask, [](void* const (&lanes)[emulator::LANES]) {
        u32 yes = 0, voters = 0;
        for (unsigned i = 0; i < emulator::LANES; i++) {
            if (!lanes[i]) continue;
            voters |= 1u << i;
            if (((Ballot*)lanes[i])->vote) yes |= 1u << i;
        }
        for (void* lane : lanes)
            if (lane) ((Ballot*)lane)->yes = yes, ((Ballot*)lane)->voters = voters;
    }, &mine);
    return mine;
}
DEVICE u32 __ballot_sync(u32 mask, int vote) { return ballot(mask, vote).yes; }
DEVICE int __any_sync(u32 mask, int vote) { return ballot(mask, vote).yes != 0; }
DEVICE int __all_sync(u32 mask, int vote) {
    Ballot b = ballot(mask, vote);
    return b.yes == b.voters;
}
// A device may answer with any set of lanes that the caller is in.
DEVICE u32 __activemask() { return 1u << emulator::lane(); }
DEVICE void __syncwarp(u32 mask = 0xffffffff) {
    emulator::collective(mask, [](void* const (&)[emulator::LANES]) {}, nullptr);
}

struct MatrixRows {
    const u8* row;
    u32* to;
};
template <bool transposed> DEVICE void load_four_matrices(u32 (&d)[4], const void* row) {
    emulator::check_shared(row, 16, 16, "a row of ldmatrix");
    MatrixRows mine = {(const u8*)row, d};
    emulator::collective(0xffffffff, [](void* const (&lanes)[emulator::LANES]) {
        u16 at[32][8];
        for (unsigned i = 0; i < 32; i++) {
            if (!lanes[i]) emulator::fault("ldmatrix without all lanes of the warp");
            memcpy(at[i], ((MatrixRows*)lanes[i])->row, 16);
        }
        for (unsigned i = 0; i < 32; i++)
            for (unsigned m = 0; m < 4; m++) {
                const u16(*matrix)[8] = &at[8 * m];
                unsigned major = i / 4, minor = 2 * (i % 4);
                u16 low = transposed ? matrix[minor][major] : matrix[major][minor];
                u16 high = transposed ? matrix[minor + 1][major] : matrix[major][minor + 1];
                ((MatrixRows*)lanes[i])->to[m] = (u32)high << 16 | low;
            }
    }, &mine);
}
DEVICE void load_matrices(u32 (&d)[4], const void* shared_row) { load_four_matrices<false>(d, shared_row); }
DEVICE void load_matrices_transposed(u32 (&d)[4], const void* shared_row) { load_four_matrices<true>(d, shared_row); }

struct Fragments {
    f32* d;
    const u32* a;
    u32 b[2];
};
DEVICE f32 low_half(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE f32 high_half(u32 pair) { return __uint_as_float(pair & 0xffff0000); }
DEVICE void multiply_add(f32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Fragments mine = {d, a, {b0, b1}};
    emulator::collective(0xffffffff, [](void* const (&lanes)[emulator::LANES]) {
        f32 x[16][16], y[16][8];
        for (unsigned i = 0; i < 32; i++) {
            if (!lanes[i]) emulator::fault("mma without all lanes of the warp");
            const Fragments& f = *(Fragments*)lanes[i];
            unsigned g = i / 4, t = 2 * (i % 4);
            for (unsigned r = 0; r < 4; r++) {
                f32* pair = &x[g + r % 2 * 8][t + r / 2 * 8];
                pair[0] = low_half(f.a[r]);
                pair[1] = high_half(f.a[r]);
            }
            for (unsigned r = 0; r < 2; r++) {
                y[t + 8 * r][g] = low_half(f.b[r]);
                y[t + 8 * r + 1][g] = high_half(f.b[r]);
            }
        }
        for (unsigned row = 0; row < 16; row++) {
            f32 sum[8];
            for (unsigned c = 0; c < 8; c++) sum[c] = ((Fragments*)lanes[row % 8 * 4 + c / 2])->d[row / 8 * 2 + c % 2];
            for (unsigned k = 0; k < 16; k++)
                for (unsigned c = 0; c < 8; c++) sum[c] += x[row][k] * y[k][c];
            for (unsigned c = 0; c < 8; c++) ((Fragments*)lanes[row % 8 * 4 + c / 2])->d[row / 8 * 2 + c % 2] = sum[c];
        }
    }, &mine);
}
