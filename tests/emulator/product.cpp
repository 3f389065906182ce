#include "product.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

double read(const void* from, Type type, size_t i) {
    if (type == F64) return static_cast<const double*>(from)[i];
    if (type == F32) return static_cast<const float*>(from)[i];
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

void write(void* to, Type type, size_t i, double x) {
    float y = float(x);
    uint32_t bits;
    std::memcpy(&bits, &y, 4);
    if (type == F64) static_cast<double*>(to)[i] = x;
    else if (type == F32) static_cast<float*>(to)[i] = y;
    else static_cast<uint16_t*>(to)[i] = y != y ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Tiles of the result, with rows in vectors; blocks of the sums' length, whose packed operands stay in a cache.
constexpr size_t BYTES = 64, COLUMNS = 6, BLOCK = 256;
template <class T> struct Tile {
    typedef T Vector __attribute__((vector_size(BYTES)));
    static constexpr size_t LANES = BYTES / sizeof(T), ROWS = 2 * LANES;
    Vector at[COLUMNS][2];
};

template <class T> void multiply_tile(Tile<T>& tile, const T* a, const T* b, size_t length) {
    Tile<T> sums = tile;
    for (size_t p = 0; p < length; p++, a += Tile<T>::ROWS, b += COLUMNS) {
        typename Tile<T>::Vector low, high;
        std::memcpy(&low, a, BYTES);
        std::memcpy(&high, a + Tile<T>::LANES, BYTES);
        for (size_t j = 0; j < COLUMNS; j++) {
            sums.at[j][0] += low * b[j];
            sums.at[j][1] += high * b[j];
        }
    }
    tile = sums;
}

// Packs `length` steps from `first` on of `count` lines of a matrix, `width` lines at a time, zeros behind the last.
// A line's neighbour is `across` elements away, a step's `along`.
template <class T, class From>
void pack_from(std::vector<T>& to, const From* from, auto convert, size_t count, size_t width, size_t length,
               int64_t across, int64_t along) {
    to.assign((count + width - 1) / width * width * length, T(0));
    for (size_t line = 0; line < count; line++) {
        T* panel = &to[line / width * width * length + line % width];
        for (size_t p = 0; p < length; p++)
            panel[p * width] = convert(from[int64_t(line) * across + int64_t(p) * along]);
    }
}
template <class T>
void pack(std::vector<T>& to, const Operand& x, int64_t base, size_t count, size_t width, size_t length, int64_t across,
          int64_t along) {
    auto widen = [](uint16_t bits) {
        uint32_t word = uint32_t(bits) << 16;
        float y;
        std::memcpy(&y, &word, 4);
        return T(y);
    };
    auto same = [](auto y) { return T(y); };
    if (x.type == BF16) pack_from(to, static_cast<uint16_t*>(x.at) + base, widen, count, width, length, across, along);
    else if (x.type == F32) pack_from(to, static_cast<float*>(x.at) + base, same, count, width, length, across, along);
    else pack_from(to, static_cast<double*>(x.at) + base, same, count, width, length, across, along);
}

// The tanh form (Hendrycks and Gimpel 2016) and its derivative.
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_gradient(double x) {
    double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

// From the sum to what is stored at (i, j).
double finish(const Product& p, int batch, size_t i, size_t j, double sum) {
    double x = p.alpha * sum;
    size_t at = size_t(p.c.stride) * j + i + size_t(p.c.batch_stride * batch);
    if (p.beta != 0) x += p.beta * read(p.c.at, p.c.type, at);
    int bits = p.epilogue;
    if (bits & BIAS) x += read(p.bias, p.bias_type, i + size_t(p.bias_batch_stride * batch));
    size_t aux = size_t(p.aux_stride) * j + i + size_t(p.aux_batch_stride * batch);
    if (bits & GRADIENT_OF_GELU) return x * gelu_gradient(read(p.aux, p.aux_type, aux));
    if (bits & AUX) write(p.aux, p.aux_type, aux, x);
    if (bits & GELU) return gelu(x);
    if (bits & RELU) return std::max(x, 0.0);
    return x;
}

// Sums of op(A)'s rows or op(B)'s columns, or of the result's rows, into the bias.
void sum_bias(const Product& p, int batch) {
    bool of_a = p.epilogue == BGRADA, of_b = p.epilogue == BGRADB;
    const Operand& x = of_a ? p.a : of_b ? p.b : p.d;
    bool down = of_a ? p.transpose_a : of_b ? !p.transpose_b : false;
    size_t count = of_b ? p.n : p.m, length = of_a || of_b ? p.k : p.n;
    for (size_t i = 0; i < count; i++) {
        double sum = 0;
        for (size_t q = 0; q < length; q++) {
            size_t row = down ? q : i, column = down ? i : q;
            sum += read(x.at, x.type, row + column * size_t(x.stride) + size_t(x.batch_stride * batch));
        }
        write(p.bias, p.bias_type, i + size_t(p.bias_batch_stride * batch), sum);
    }
}

template <class T> void multiply_as(const Product& p, int batch) {
    constexpr size_t ROWS = Tile<T>::ROWS;
    size_t down = (p.m + ROWS - 1) / ROWS, right = (p.n + COLUMNS - 1) / COLUMNS;
    static std::vector<Tile<T>> tiles;
    static std::vector<T> a, b;
    tiles.assign(down * right, Tile<T>{});
    int64_t a_across = p.transpose_a ? p.a.stride : 1, a_along = p.transpose_a ? 1 : p.a.stride;
    int64_t b_across = p.transpose_b ? 1 : p.b.stride, b_along = p.transpose_b ? p.b.stride : 1;
    for (size_t first = 0; first < p.k; first += BLOCK) {
        size_t length = std::min(BLOCK, p.k - first);
        int64_t step = int64_t(first);
        pack(a, p.a, p.a.batch_stride * batch + step * a_along, p.m, ROWS, length, a_across, a_along);
        pack(b, p.b, p.b.batch_stride * batch + step * b_along, p.n, COLUMNS, length, b_across, b_along);
        for (size_t j = 0; j < right; j++)
            for (size_t i = 0; i < down; i++)
                multiply_tile(tiles[j * down + i], &a[i * ROWS * length], &b[j * COLUMNS * length], length);
    }
    for (size_t j = 0; j < p.n; j++)
        for (size_t i = 0; i < p.m; i++) {
            auto& vector = tiles[j / COLUMNS * down + i / ROWS].at[j % COLUMNS][i % ROWS / Tile<T>::LANES];
            double x = finish(p, batch, i, j, vector[i % Tile<T>::LANES]);
            write(p.d.at, p.d.type, size_t(p.d.stride) * j + i + size_t(p.d.batch_stride * batch), x);
        }
}

}  // namespace

void multiply(const Product& p) {
    // An algorithm leaves something in its workspace.
    if (p.workspace_bytes) std::memset(p.workspace, 0xff, p.workspace_bytes);
    for (int batch = 0; batch < p.batches; batch++) {
        if (p.a.type == F64) multiply_as<double>(p, batch);
        else multiply_as<float>(p, batch);
        if (p.epilogue & (BGRADA | BGRADB | GRADIENT_OF_BIAS)) sum_bias(p, batch);
    }
}
