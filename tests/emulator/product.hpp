// Matrix products for the stand-in cuBLASLt: column-major, over plain memory.
#pragma once

#include <cstddef>
#include <cstdint>

enum Type : int { F32 = 0, F64 = 1, BF16 = 14 };

inline size_t size_of(Type type) { return type == BF16 ? 2 : type == F32 ? 4 : 8; }

// What happens to alpha op(A) op(B) + beta C; the numbers are cublasLtEpilogue_t's, which are made of bits.
enum Epilogue : int {
    DEFAULT = 1, RELU = 2, BIAS = 4, GELU = 32, AUX = 128, GRADIENT_OF_GELU = 64, GRADIENT_OF_BIAS = 16,
    RELU_BIAS = 6, GELU_BIAS = 36, GELU_AUX = 160, GELU_AUX_BIAS = 164, DGELU = 192, DGELU_BGRAD = 208,
    BGRADA = 256, BGRADB = 512,
};

struct Operand {
    void* at;
    Type type;
    uint64_t rows, columns;  // As stored.
    int64_t stride;          // Elements from column to column.
    int64_t batch_stride;

    uint64_t elements(int batches) const { return (columns - 1) * stride + rows + (batches - 1) * batch_stride; }
};

struct Product {
    Operand a, b, c, d;
    bool transpose_a, transpose_b;
    int batches;
    uint64_t m, n, k;
    double alpha, beta;
    Epilogue epilogue;
    void *bias, *aux;
    Type bias_type, aux_type;
    int64_t aux_stride, aux_batch_stride, bias_batch_stride;
    void* workspace;
    size_t workspace_bytes;
};

// Every element of the result is summed in the order of k by the same instructions, wherever it lies. Sums are f32, or
// f64 for operands of f64.
void multiply(const Product& product);
