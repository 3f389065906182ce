// Pieces of attention: tiles in shared memory, products of a warp's rows with a tile, and what a query sees.
//
// A product lies in a warp's registers as mma.m16n8k16 leaves it (device.cuh, multiply_add), in both compute types: f32
// only fills it by multiplications of its own. So a product's rows become the left factor of the next product without
// leaving the registers, and softmax needs the four lanes of a row only. An element is the sum of the same terms in the
// same order wherever it lies in a tile.
#pragma once
#include "device.cuh"

#define LOG2_E 1.4426950408889634f

// How a kernel cuts its work for one head size: `warps` with `blocks` times 16 rows each stay in a block of threads,
// and tiles of `columns` rows of the other side pass by, in two buffers. src/ops/attention/cuda.rs has the same tables.
// They are the same for all GPUs: everything fits into the 99 KiB of shared memory that the least of them offers, and
// twice into a Hopper's 227 KiB; more blocks than two would find no registers, of which a thread has up to 255. Larger
// tiles (64 columns for heads of 128) spill.
struct Tiles {
    int warps, blocks, columns;
    DEVICE constexpr int rows() const { return 16 * blocks * warps; }
    DEVICE constexpr int threads() const { return WARP * warps; }
};

// 16 BLOCKS x COLUMNS elements of a warp. With g = lane / 4 and t = lane % 4, at[m][n][2 i + e] is the element
// (16 m + 8 i + g, 8 n + 2 t + e).
template <int BLOCKS, int COLUMNS> struct Product {
    f32 at[BLOCKS][COLUMNS / 8][4];

    DEVICE Product() { clear(); }
    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < BLOCKS * COLUMNS / 2; i++) at[i / (COLUMNS / 2)][i / 4 % (COLUMNS / 8)][i % 4] = 0;
    }
    // Multiplies row 16 m + 8 i + g.
    DEVICE void scale_row(int m, int i, f32 factor) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            at[m][n][2 * i] *= factor;
            at[m][n][2 * i + 1] *= factor;
        }
    }
    DEVICE void scale(f32 factor) {
#pragma unroll
        for (int m = 0; m < BLOCKS; m++) {
            scale_row(m, 0, factor);
            scale_row(m, 1, factor);
        }
    }
};

// Pieces of 16 bytes that change places within a row of D elements.
template <class T, int D>
constexpr u32 TURN = D / WIDE<T> % 8 == 0 ? 8 : D / WIDE<T> % 4 == 0 ? 4 : D / WIDE<T> % 2 == 0 ? 2 : 1;
// Where a piece of a tile with D elements a row lies. Neighbouring rows keep theirs in different banks: whether a warp
// reads one row or a column of pieces, every eight accesses meet 32 banks.
template <class T, int D> DEVICE u32 place(u32 row, u32 piece) {
    return row * D + (piece ^ (row / (8 / TURN<T, D>) % TURN<T, D>)) * WIDE<T>;
}
// Where the piece `step` (even) beyond `at`, the place of piece 0 or 1 of a row, lies: few different distances, so that
// their registers are few.
template <class T, int D> DEVICE u32 further(u32 at, int step) {
    return (at ^ (step % TURN<T, D> * WIDE<T>)) + step / TURN<T, D> * (TURN<T, D> * WIDE<T>);
}

// The 16 bytes of a head's row from `column` on, with zeros from `head_dim` on.
template <class T> DEVICE Wide<T> read_piece(const T* row, u32 column, u32 head_dim, bool wide) {
    Wide<T> piece = {};
    if (wide && column < head_dim) return *(const Wide<T>*)(row + column);
    for (u32 e = 0; e < WIDE<T>; e++)
        if (column + e < head_dim) piece.at[e] = row[column + e];
    return piece;
}

// Begins to copy ROWS rows of a head into a tile; rows from `rows` on and columns from `head_dim` on become zero. Not
// `wide`: elements are copied one by one, and at once.
template <int D, int ROWS, int THREADS, class T>
DEVICE void load_tile(T* tile, const T* from, u64 stride, u32 rows, u32 head_dim, bool wide) {
    constexpr u32 PIECES = D / WIDE<T>;
#pragma unroll 1
    for (u32 i = anew(threadIdx.x); i < ROWS * PIECES; i += THREADS) {
        u32 row = i / PIECES, column = i % PIECES * WIDE<T>;
        T* to = tile + place<T, D>(row, i % PIECES);
        bool valid = row < rows && column < head_dim;
        if (wide)
            copy_async_16(to, valid ? from + row * stride + column : from, valid);
        else
            *(Wide<T>*)to = valid ? read_piece(from + row * stride, column, head_dim, false) : Wide<T>{};
    }
}

// Writes a warp's product to the first `rows` rows of a head, by way of as many rows of a tile that only this warp
// uses.
template <int D, int BLOCKS, class T>
DEVICE void store_product(T* to, u64 stride, u32 rows, u32 head_dim, const Product<BLOCKS, D>& product, T* tile) {
    constexpr u32 PIECES = D / WIDE<T>;
    u32 lane = threadIdx.x % WARP;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 column = 8 * n + lane % 4 * 2;
                Pack<T, 2> pair;
                store(pair.at[0], product.at[m][n][2 * i]);
                store(pair.at[1], product.at[m][n][2 * i + 1]);
                T* at = tile + place<T, D>(16 * m + 8 * i + lane / 4, column / WIDE<T>) + column % WIDE<T>;
                *(Pack<T, 2>*)at = pair;
            }
    __syncwarp();
    bool wide = is_wide(to, stride) && is_wide(to, head_dim);
    for (u32 i = lane; i < 16 * BLOCKS * PIECES; i += WARP) {
        u32 row = i / PIECES, column = i % PIECES * WIDE<T>;
        if (row >= rows || column >= head_dim) continue;
        Wide<T> piece = *(const Wide<T>*)(tile + place<T, D>(row, i % PIECES));
        T* at = to + row * stride + column;
        if (wide)
            *(Wide<T>*)at = piece;
        else
            for (u32 e = 0; e < WIDE<T> && column + e < head_dim; e++) at[e] = piece.at[e];
    }
}

// product = rows . tile^T, of the warp's rows (D elements each) and the COLUMNS rows of a tile.
template <int D, int BLOCKS, int COLUMNS>
DEVICE void multiply_rows(Product<BLOCKS, COLUMNS>& product, const bf16* rows, const bf16* tile) {
    u32 lane = anew(threadIdx.x) % WARP;
    u32 row_at = place<bf16, D>(lane % 16, lane / 16);
    u32 tile_at = place<bf16, D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    product.clear();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++) load_matrices(a[m], rows + further<bf16, D>(row_at, 2 * k) + 16 * m * D);
#pragma unroll
        for (int n = 0; n < COLUMNS / 16; n++) {
            u32 b[4];
            load_matrices(b, tile + further<bf16, D>(tile_at, 2 * k) + 16 * n * D);
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                multiply_add(product.at[m][2 * n], a[m], b[0], b[1]);
                multiply_add(product.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
// A lane has 4 BLOCKS elements in a column pair: 2 BLOCKS + COLUMNS / 4 reads of 16 bytes for 2 BLOCKS COLUMNS sums.
template <int D, int BLOCKS, int COLUMNS>
DEVICE void multiply_rows(Product<BLOCKS, COLUMNS>& product, const f32* rows, const f32* tile) {
    u32 lane = anew(threadIdx.x) % WARP, g = lane / 4, t = lane % 4;
    product.clear();
#pragma unroll 1
    for (u32 piece = 0; piece < D / 4; piece++) {
        Wide<f32> a[2 * BLOCKS];
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) a[i] = *(const Wide<f32>*)(rows + 8 * i * D + place<f32, D>(g, piece));
#pragma unroll
        for (int n = 0; n < COLUMNS / 4; n++) {
            Wide<f32> b = *(const Wide<f32>*)(tile + n / 2 * 8 * D + place<f32, D>(2 * t + n % 2, piece));
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS; i++) {
                f32& sum = product.at[i / 2][n / 2][i % 2 * 2 + n % 2];
#pragma unroll
                for (int e = 0; e < 4; e++) sum = __fmaf_rn(a[i].at[e], b.at[e], sum);
            }
        }
    }
}

// sum += left . tile, where the columns of `left` are the rows of the tile. In bf16 `left` is rounded to it.
template <int D, int BLOCKS, int COLUMNS>
DEVICE void add_product(Product<BLOCKS, D>& sum, const Product<BLOCKS, COLUMNS>& left, const bf16* tile) {
    u32 lane = anew(threadIdx.x) % WARP, at = place<bf16, D>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++) {
        u32 a[BLOCKS][4];
#pragma unroll
        for (int m = 0; m < BLOCKS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const f32(&pair)[4] = left.at[m][2 * k + i / 2];
                a[m][i] = pack_bf16(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 b[4];
            load_matrices_transposed(b, tile + further<bf16, D>(at, 2 * n) + 16 * k * D);
#pragma unroll
            for (int m = 0; m < BLOCKS; m++) {
                multiply_add(sum.at[m][2 * n], a[m], b[0], b[1]);
                multiply_add(sum.at[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}
template <int D, int BLOCKS, int COLUMNS>
DEVICE void add_product(Product<BLOCKS, D>& sum, const Product<BLOCKS, COLUMNS>& left, const f32* tile) {
    u32 t = anew(threadIdx.x) % 4, first_at = t / 2 * 4 + t % 2 * 2;
#pragma unroll
    for (int row = 0; row < COLUMNS; row++) {
        // place(row, 2 n + t / 2) + t % 2 * 2
        constexpr u32 TURNED = TURN<f32, D>;
        u32 turn = row / (8 / TURNED) % TURNED;
        f32 a[2 * BLOCKS];
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++)
            a[i] = __shfl_sync(FULL_WARP, left.at[i / 2][row / 8][i % 2 * 2 + row % 2], row % 8 / 2, 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            u32 at = (first_at ^ ((2 * n % TURNED ^ turn) * 4)) + 2 * n / TURNED * TURNED * 4 + row * D;
            Pack<f32, 2> b = *(const Pack<f32, 2>*)(tile + at);
#pragma unroll
            for (int i = 0; i < 4 * BLOCKS; i++) {
                f32& to = sum.at[i / 4][n][i % 4];
                to = __fmaf_rn(a[i / 2], b.at[i % 2], to);
            }
        }
    }
}

// Largest value of a row, of which each of four neighbouring lanes has some; and the sum.
DEVICE f32 row_max(f32 x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}
DEVICE f32 row_sum(f32 x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// The first key of a query, 0 without `first_key`.
DEVICE i32 first_of(const i32* first_key, u64 query) {
    return first_key && first_key[query] > 0 ? first_key[query] : 0;
}

// What a block of queries sees of its sequence: query i stands at `position + i`.
struct Queries {
    const i32* first_key;  // From the block's first query on, or null.
    u32 rows;
    i32 position;
    // Least and largest first key. No query sees keys before `low`, and each sees those from `high` to its position.
    i32 low, high;

    DEVICE Queries(const i32* first_key, u32 rows, i32 position)
        : first_key(first_key), rows(rows), position(position), low(0), high(0) {
        if (!first_key) return;
        low = 0x7fffffff;
        for (u32 row = threadIdx.x % WARP; row < rows; row += WARP) {
            i32 first = first_of(first_key, row);
            low = first < low ? first : low;
            high = first > high ? first : high;
        }
        for (int m = WARP / 2; m > 0; m /= 2) {
            i32 other_low = __shfl_xor_sync(FULL_WARP, low, m), other_high = __shfl_xor_sync(FULL_WARP, high, m);
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
        }
    }
    // First key that is read, in steps of a tile, and the one after the last.
    DEVICE u32 begin(u32 tile) const { return (u32)low / tile * tile; }
    DEVICE u32 end() const { return position + rows; }
    // Whether `row` stands before `key`, as do all rows before it.
    DEVICE bool hidden(u32 row, i32 key) const { return key > position + (i32)row; }
    // Sets hidden scores to minus infinity: those of the warp's rows from `row` on with the keys from `key` on.
    template <int BLOCKS, int COLUMNS> DEVICE void hide(Product<BLOCKS, COLUMNS>& scores, u32 row, i32 key) const {
        if (key + COLUMNS - 1 <= position + (i32)row && key >= high) return;
        u32 lane = anew(threadIdx.x) % WARP;
        key += lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) {
            u32 at = row + 8 * i + lane / 4;
            i32 last = position + at, first = at < rows ? first_of(first_key, at) : 0;
#pragma unroll
            for (int n = 0; n < COLUMNS / 4; n++) {
                i32 k = key + n / 2 * 8 + n % 2;
                if (k > last || k < first) scores.at[i / 2][n / 2][i % 2 * 2 + n % 2] = MINUS_INFINITY;
            }
        }
    }
};
