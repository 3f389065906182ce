// The stand-in cuBLASLt against products summed in f64, and what it refuses.
#include <cmath>
#include <cstring>

#include "api.hpp"
#include "check.hpp"
#include "product.hpp"

struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
extern "C" {
int cublasLtCreate(void**);
int cublasLtMatmulDescCreate(void**, int, int);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatrixLayoutCreate(void**, int, uint64_t, uint64_t, int64_t);
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulPreferenceCreate(void**);
int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, void*);
}

static const size_t WORKSPACE = 1 << 20;

static float read(Type type, const void* from, size_t i) {
    if (type == F32) return static_cast<const float*>(from)[i];
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static void write(Type type, void* to, size_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (type == F32) static_cast<float*>(to)[i] = x;
    else static_cast<uint16_t*>(to)[i] = uint16_t(bits >> 16);
}

// A column-major matrix in device memory, of small numbers that follow from their place in memory.
struct Matrix {
    Type type;
    uint64_t rows, columns;
    int64_t stride;
    int batches;
    void *at, *layout;

    Matrix(Type type, uint64_t rows, uint64_t columns, int batches = 1, int64_t padding = 3)
        : type(type), rows(rows), columns(columns), stride(int64_t(rows) + padding), batches(batches) {
        at = device<char>(elements() * size_of(type));
        for (size_t i = 0; i < elements(); i++) write(type, at, i, std::sin(float(i) * 0.37f + float(rows)));
        cublasLtMatrixLayoutCreate(&layout, type, rows, columns, stride);
        int64_t step = stride * int64_t(columns);
        cublasLtMatrixLayoutSetAttribute(layout, 5, &batches, sizeof batches);
        cublasLtMatrixLayoutSetAttribute(layout, 6, &step, sizeof step);
    }
    size_t elements() const { return size_t(stride) * columns * size_t(batches); }
    size_t index(int batch, size_t i, size_t j) const {
        return size_t(batch) * size_t(stride) * columns + j * size_t(stride) + i;
    }
    float get(int batch, size_t i, size_t j) const { return read(type, at, index(batch, i, j)); }
};

struct Lt {
    void *handle = nullptr, *desc = nullptr, *preference = nullptr, *workspace = nullptr;
    Lt(int compute = 68) {
        cublasLtCreate(&handle);
        cublasLtMatmulDescCreate(&desc, compute, F32);
        cublasLtMatmulPreferenceCreate(&preference);
        cublasLtMatmulPreferenceSetAttribute(preference, 1, &WORKSPACE, sizeof WORKSPACE);
        workspace = device<char>(WORKSPACE);
    }
    template <class T>
    void set(int attribute, T value) {
        cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof value);
    }
    int choose(const Matrix& a, const Matrix& b, const Matrix& d, Heuristic& found) {
        int count = 0;
        return cublasLtMatmulAlgoGetHeuristic(handle, desc, a.layout, b.layout, d.layout, d.layout, preference, 1,
                                              &found, &count);
    }
    int multiply(const Heuristic& h, float alpha, const Matrix& a, const Matrix& b, float beta, const Matrix& d,
                 void* stream, size_t bytes = WORKSPACE) {
        return cublasLtMatmul(handle, desc, &alpha, a.at, a.layout, b.at, b.layout, &beta, d.at, d.layout, d.at,
                              d.layout, h.algorithm, workspace, bytes, stream);
    }
};

static void compare(Type in, Type out, bool transpose_a, bool transpose_b, uint64_t m, uint64_t n, uint64_t k,
                    int batches) {
    Gpu gpu;
    Lt lt;
    Matrix a(in, transpose_a ? k : m, transpose_a ? m : k, batches),
        b(in, transpose_b ? n : k, transpose_b ? k : n, batches);
    Matrix d(out, m, n, batches), before(out, m, n, batches);
    lt.set<int>(3, transpose_a);
    lt.set<int>(4, transpose_b);
    Heuristic found;
    EXPECT(lt.choose(a, b, d, found) == 0 && lt.multiply(found, 0.5f, a, b, 2.0f, d, gpu.one) == 0);
    EXPECT(cuStreamSynchronize(gpu.one) == 0);
    for (int batch = 0; batch < batches; batch++)
        for (uint64_t i = 0; i < m; i++)
            for (uint64_t j = 0; j < n; j++) {
                double sum = 0, sizes = 0;
                for (uint64_t p = 0; p < k; p++) {
                    double x = transpose_a ? a.get(batch, p, i) : a.get(batch, i, p);
                    double y = transpose_b ? b.get(batch, j, p) : b.get(batch, p, j);
                    sum += x * y;
                    sizes += std::fabs(x * y);
                }
                double expected = 0.5 * sum + 2.0 * before.get(batch, i, j);
                // k roundings of f32 in the sum, and one of the result's type.
                double band =
                    double(k) * 0x1p-24 * sizes + (out == BF16 ? 0x1p-8 : 0x1p-24) * std::fabs(expected) + 1e-30;
                EXPECT(std::fabs(d.get(batch, i, j) - expected) <= band);
            }
    // Padding between columns is not written.
    if (a.stride > int64_t(a.rows)) EXPECT(read(out, d.at, m) == read(out, before.at, m));
}
TEST(products_agree_with_sums) {
    struct { Type in, out; } types[] = {{F32, F32}, {BF16, BF16}, {BF16, F32}};
    for (auto [in, out] : types)
        for (int t = 0; t < 4; t++) {
            compare(in, out, t & 1, t & 2, 37, 13, 29, 1);
            compare(in, out, t & 1, t & 2, 1, 1, 1, 2);
            compare(in, out, t & 1, t & 2, 33, 7, 600, 3);
        }
}

TEST(equal_operands_give_equal_bits) {
    Gpu gpu;
    Lt lt;
    Matrix a(F32, 50, 300), b(F32, 300, 40), d(F32, 50, 40);
    // Every row of A and every column of B the same, so every element of D.
    for (size_t p = 0; p < 300; p++)
        for (size_t i = 0; i < 50; i++) write(F32, a.at, a.index(0, i, p), std::sin(float(p)));
    for (size_t p = 0; p < 300; p++)
        for (size_t j = 0; j < 40; j++) write(F32, b.at, b.index(0, p, j), std::cos(float(p) * 1.3f));
    Heuristic found;
    EXPECT(lt.choose(a, b, d, found) == 0 && lt.multiply(found, 1, a, b, 0, d, gpu.one) == 0);
    EXPECT(cuStreamSynchronize(gpu.one) == 0);
    for (size_t i = 0; i < 50; i++)
        for (size_t j = 0; j < 40; j++) EXPECT(d.get(0, i, j) == d.get(0, 0, 0));
}

TEST(epilogues) {
    Gpu gpu;
    Matrix a(F32, 24, 10), b(F32, 10, 9), d(F32, 24, 9), plain(F32, 24, 9), aux(F32, 24, 9, 1, 0);
    float *bias = device<float>(24), *sums = device<float>(24);
    for (int i = 0; i < 24; i++) bias[i] = float(i) - 5;
    auto run = [&](int epilogue, float* vector, const Matrix& to) {
        Lt lt;
        lt.set<int>(7, epilogue);
        lt.set<void*>(8, vector);
        lt.set<void*>(11, aux.at);
        lt.set<int64_t>(12, aux.stride);
        Heuristic found;
        bool ran = lt.choose(a, b, to, found) == 0 && lt.multiply(found, 1, a, b, 0, to, gpu.one) == 0;
        return ran && cuStreamSynchronize(gpu.one) == 0;
    };
    auto gelu = [](double x) { return x / 2 * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); };
    auto near = [](double x, double y) { return std::fabs(x - y) <= 1e-6 * (1 + std::fabs(y)); };
    EXPECT(run(DEFAULT, nullptr, plain) && run(BIAS, bias, d));
    for (size_t i = 0; i < 24; i++) EXPECT(near(d.get(0, i, 8), plain.get(0, i, 8) + bias[i]));
    EXPECT(run(GELU_AUX_BIAS, bias, d));
    for (size_t i = 0; i < 24; i++) {
        EXPECT(near(aux.get(0, i, 8), plain.get(0, i, 8) + bias[i]));
        EXPECT(near(d.get(0, i, 8), gelu(aux.get(0, i, 8))));
    }
    // The derivative at what was saved, by central differences: their error is of the order of the step squared.
    EXPECT(run(DGELU_BGRAD, sums, d));
    for (size_t i = 0; i < 24; i++) {
        double sum = 0, x = aux.get(0, i, 8), step = 1e-4;
        double slope = (gelu(x + step) - gelu(x - step)) / (2 * step);
        for (size_t j = 0; j < 9; j++) sum += d.get(0, i, j);
        EXPECT(near(d.get(0, i, 8), plain.get(0, i, 8) * slope) && near(sums[i], sum));
    }
    EXPECT(run(BGRADA, sums, d));
    for (size_t i = 0; i < 24; i++) {
        double sum = 0;
        for (size_t p = 0; p < 10; p++) sum += a.get(0, i, p);
        EXPECT(near(sums[i], sum) && d.get(0, i, 8) == plain.get(0, i, 8));
    }
    EXPECT(run(BGRADB, sums, d));
    for (size_t j = 0; j < 9; j++) {
        double sum = 0;
        for (size_t p = 0; p < 10; p++) sum += b.get(0, p, j);
        EXPECT(near(sums[j], sum));
    }
}

TEST(products_wait_for_their_stream, "STREAMS=lazy") {
    Gpu gpu;
    Lt lt;
    Matrix a(F32, 4, 4), b(F32, 4, 4), d(F32, 4, 4);
    Heuristic found;
    float before = d.get(0, 0, 0);
    EXPECT(lt.choose(a, b, d, found) == 0 && lt.multiply(found, 1, a, b, 0, d, gpu.one) == 0);
    EXPECT(d.get(0, 0, 0) == before && cuStreamSynchronize(gpu.one) == 0 && d.get(0, 0, 0) != before);
}

TEST(products_refuse) {
    Gpu gpu;
    Matrix a(BF16, 16, 16, 1, 0), b(BF16, 16, 16, 1, 0), c(F32, 16, 16, 1, 0), d(BF16, 16, 16, 1, 0);
    Heuristic found, other;
    Lt lt, tf32(77), aux;
    EXPECT(lt.choose(a, b, d, found) == 0 && found.workspace > 0);
    EXPECT(lt.choose(a, c, d, other) == 15 && lt.choose(c, c, d, other) == 15 && tf32.choose(c, c, c, other) == 15);
    EXPECT(lt.choose(a, Matrix(BF16, 15, 16), d, other) == 7);
    // A leading dimension for the auxiliary matrix that is no multiple of 8.
    aux.set<int>(7, GELU_AUX);
    aux.set<int64_t>(12, 20);
    EXPECT(aux.choose(a, b, d, other) == 15);
    // A bias gradient of another type than the result's.
    Lt sums;
    sums.set<int>(7, BGRADB);
    EXPECT(sums.choose(a, b, c, other) == 0);
    sums.set<int>(26, BF16);
    EXPECT(sums.choose(a, b, c, other) == 15);
    // An algorithm of another problem, a small workspace, a pointer that is aligned less than was promised.
    EXPECT(lt.choose(a, b, c, other) == 0 && lt.multiply(other, 1, a, b, 0, d, gpu.one) == 7);
    EXPECT(lt.multiply(found, 1, a, b, 0, d, gpu.one, 100) == 7);
    Matrix off = a, small = a;
    off.at = (char*)a.at + 2;
    EXPECT(lt.multiply(found, 1, off, b, 0, d, gpu.one) == 15);
    // Memory that ends before the matrix does.
    small.at = device<char>(500);
    EXPECT(lt.multiply(found, 1, small, b, 0, d, gpu.one) == 7 && lt.multiply(found, 1, a, b, 0, d, gpu.one) == 0);
}
