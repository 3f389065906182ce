// The stand-in cuBLASLt: descriptors, a heuristic that offers some algorithms, and products enqueued through the stand-in
// driver. What the real library is documented to refuse it refuses, and says why on the error output.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "product.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of the stand-in driver (streams.cpp).
extern "C" int emulated_enqueue(void* stream, const char* name, void (*run)(const void*, char*), const void* data,
                                size_t bytes);
extern "C" int emulated_reaches(const void* at, size_t bytes);

namespace {

enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
enum { COMPUTE_32F = 68, COMPUTE_32F_PEDANTIC = 69, COMPUTE_64F = 70 };

int refuse(Status status, const std::string& why) {
    std::fprintf(stderr, "emulated cuBLASLt: %s\n", why.c_str());
    return status;
}

// Attributes by number, each as the bytes that were set.
struct Attributes {
    std::map<int, std::string> values;

    int set(int attribute, const void* from, size_t bytes) {
        if (!from) return INVALID_VALUE;
        values[attribute] = std::string(static_cast<const char*>(from), bytes);
        return SUCCESS;
    }
    int get(int attribute, void* to, size_t bytes, size_t* written) const {
        auto found = values.find(attribute);
        if (found == values.end() || bytes < found->second.size()) return INVALID_VALUE;
        std::memcpy(to, found->second.data(), found->second.size());
        if (written) *written = found->second.size();
        return SUCCESS;
    }
    template <class T> T read(int attribute, T otherwise) const {
        auto found = values.find(attribute);
        if (found == values.end()) return otherwise;
        T value = otherwise;
        std::memcpy(&value, found->second.data(), std::min(sizeof value, found->second.size()));
        return value;
    }
};

// The attributes' numbers that are read.
enum Desc {
    COMPUTE,
    SCALE,
    POINTER_MODE,
    TRANSPOSE_A,
    TRANSPOSE_B,
    TRANSPOSE_C,
    EPILOGUE = 7,
    BIAS_POINTER = 8,
    BIAS_BATCH_STRIDE = 10,
    AUX_POINTER = 11,
    AUX_STRIDE = 12,
    AUX_BATCH_STRIDE = 13,
    AUX_TYPE = 22,
    BIAS_TYPE = 26
};
enum Layout { TYPE, ORDER, ROWS, COLUMNS, STRIDE, BATCHES, BATCH_STRIDE };
enum Preference { WORKSPACE = 1, ALIGNMENT_A = 5 };

struct Algorithm {
    uint64_t mark, problem, workspace, alignment[4], number;
};
constexpr uint64_t MARK = 0x6f676c615f756d65;
// What the algorithm wants beside its operands, where that is offered.
constexpr size_t SCRATCH = 64 << 10;
// Algorithms that are offered for a product, to those who want so many.
constexpr int OFFERED = 3;

Operand operand(const Attributes& layout, const void* at) {
    return {const_cast<void*>(at), layout.read(TYPE, F32), layout.read<uint64_t>(ROWS, 0),
            layout.read<uint64_t>(COLUMNS, 0), layout.read<int64_t>(STRIDE, 0), layout.read<int64_t>(BATCH_STRIDE, 0)};
}

Product describe(const Attributes& desc, const Attributes* const (&layouts)[4], const void* const (&at)[4]) {
    Product p{};
    p.a = operand(*layouts[0], at[0]);
    p.b = operand(*layouts[1], at[1]);
    p.c = operand(*layouts[2], at[2]);
    p.d = operand(*layouts[3], at[3]);
    p.transpose_a = desc.read(TRANSPOSE_A, 0);
    p.transpose_b = desc.read(TRANSPOSE_B, 0);
    p.batches = layouts[3]->read(BATCHES, 1);
    p.m = p.d.rows;
    p.n = p.d.columns;
    p.k = p.transpose_a ? p.a.rows : p.a.columns;
    p.epilogue = desc.read(EPILOGUE, DEFAULT);
    p.bias = desc.read<void*>(BIAS_POINTER, nullptr);
    p.aux = desc.read<void*>(AUX_POINTER, nullptr);
    p.bias_type = desc.read(BIAS_TYPE, -1) < 0 ? p.d.type : desc.read(BIAS_TYPE, F32);
    p.aux_type = desc.read(AUX_TYPE, -1) < 0 ? p.d.type : desc.read(AUX_TYPE, F32);
    p.aux_stride = desc.read<int64_t>(AUX_STRIDE, 0);
    p.aux_batch_stride = desc.read<int64_t>(AUX_BATCH_STRIDE, 0);
    p.bias_batch_stride = desc.read<int64_t>(BIAS_BATCH_STRIDE, 0);
    return p;
}

// Sizes that agree; INVALID_VALUE's reasons.
const char* inconsistent(const Attributes& desc, const Attributes* const (&layouts)[4], const Product& p) {
    const Operand* all[] = {&p.a, &p.b, &p.c, &p.d};
    for (int i = 0; i < 4; i++) {
        if (!all[i]->rows || !all[i]->columns) return "an empty matrix";
        if (all[i]->stride < int64_t(all[i]->rows)) return "a leading dimension below the rows";
        if (layouts[i]->read(BATCHES, 1) != p.batches) return "batch counts that differ";
    }
    if ((p.transpose_a ? p.a.columns : p.a.rows) != p.m) return "A's rows are not D's";
    if ((p.transpose_b ? p.b.rows : p.b.columns) != p.n) return "B's columns are not D's";
    if ((p.transpose_b ? p.b.columns : p.b.rows) != p.k) return "A's columns are not B's rows";
    if (p.c.rows != p.m || p.c.columns != p.n) return "C's shape is not D's";
    if (desc.read(TRANSPOSE_A, 0) > 1 || desc.read(TRANSPOSE_B, 0) > 1) return "an operation that is neither N nor T";
    return nullptr;
}

// cuBLAS documentation, "cublasLtMatmul" (tables of types) and "cublasLtEpilogue_t"; NOT_SUPPORTED's reasons.
const char* unsupported(const Attributes& desc, const Attributes* const (&layouts)[4], const Product& p) {
    int compute = desc.read(COMPUTE, -1), scale = desc.read(SCALE, -1);
    for (const Attributes* layout : layouts)
        if (layout->read(ORDER, 0) != 0) return "an order that is not column-major";
    if (desc.read(POINTER_MODE, 0) != 0) return "alpha and beta on the device (the emulator's own limit)";
    if (desc.read(TRANSPOSE_C, 0) != 0) return "C transposed";
    bool wide = p.a.type == F64;
    if (wide ? compute != COMPUTE_64F || scale != F64
             : (compute != COMPUTE_32F && compute != COMPUTE_32F_PEDANTIC) || scale != F32)
        return "a compute or scale type that does not go with the operands (no TF32 here)";
    if (p.a.type != p.b.type || p.c.type != p.d.type) return "A and B, or C and D, of different types";
    bool out = p.d.type == p.a.type || (p.a.type == BF16 && p.d.type == F32);
    if (!out || (p.a.type != BF16 && p.a.type != F32 && !wide)) return "these types";
    if (p.epilogue == DEFAULT) return nullptr;
    if (wide) return "an epilogue with f64";
    constexpr int known[] = {RELU,          BIAS,  RELU_BIAS,   GELU,   GELU_BIAS, GELU_AUX,
                             GELU_AUX_BIAS, DGELU, DGELU_BGRAD, BGRADA, BGRADB};
    if (std::count(std::begin(known), std::end(known), p.epilogue) == 0) return "this epilogue";
    if (p.bias_type != p.d.type) return "a bias, or a bias gradient, of another type than D";
    if (!(p.epilogue & AUX)) return nullptr;
    if (p.aux_type != p.d.type) return "an auxiliary matrix of another type than D";
    return p.aux_stride % 8 != 0 || p.aux_stride < int64_t(p.m)
               ? "an auxiliary leading dimension that is no multiple of 8"
               : nullptr;
}

// The problem's shape, for which an algorithm is chosen: everything but addresses.
uint64_t fingerprint(Product p) {
    // Field by field, as padding has no value; FNV-1a.
    uint64_t hash = 0xcbf29ce484222325;
    auto add = [&](uint64_t x) { hash = (hash ^ x) * 0x100000001b3; };
    for (const Operand& x : {p.a, p.b, p.c, p.d})
        for (uint64_t part : {uint64_t(x.type), x.rows, x.columns, uint64_t(x.stride), uint64_t(x.batch_stride)})
            add(part);
    for (uint64_t part : {uint64_t(p.transpose_a), uint64_t(p.transpose_b), uint64_t(p.batches), uint64_t(p.epilogue),
                          uint64_t(p.bias_type), uint64_t(p.aux_type), uint64_t(p.aux_stride)})
        add(part);
    return hash;
}

// Vectors that the algorithm may load are as wide as pointers were promised to be aligned, at most 16 bytes, and as
// columns are, since those start anywhere otherwise.
uint64_t alignment_of(const Operand& x, uint64_t promised) {
    uint64_t bits = 16 | promised | uint64_t(x.stride) * size_of(x.type) | uint64_t(x.batch_stride) * size_of(x.type);
    return bits & -bits;
}

// Everything that the product touches is memory of the device.
const char* unreachable(const Product& p) {
    auto lacks = [&](const Operand& x) { return !emulated_reaches(x.at, x.elements(p.batches) * size_of(x.type)); };
    if (lacks(p.a)) return "A is no memory of the device";
    if (lacks(p.b)) return "B is no memory of the device";
    if (p.beta != 0 && lacks(p.c)) return "C is no memory of the device";
    if (lacks(p.d)) return "D is no memory of the device";
    if (p.workspace_bytes && !emulated_reaches(p.workspace, p.workspace_bytes))
        return "the workspace is no memory of the device";
    uint64_t biases = p.epilogue == BGRADB ? p.n : p.m;
    bool bias = p.epilogue & (BIAS | GRADIENT_OF_BIAS | BGRADA | BGRADB);
    if (bias && !emulated_reaches(p.bias, biases * size_of(p.bias_type))) return "the bias is no memory of the device";
    uint64_t aux = (uint64_t(p.aux_stride) * (p.n - 1) + p.m) * size_of(p.aux_type);
    return p.epilogue & AUX && !emulated_reaches(p.aux, aux) ? "the auxiliary matrix is no memory of the device"
                                                             : nullptr;
}

void run(const void* data, char* failed) {
    Product p;
    std::memcpy(&p, data, sizeof p);
    const char* why = unreachable(p);
    if (why) std::snprintf(failed, 256, "cublasLtMatmul, when it ran: %s", why);
    else multiply(p);
}

struct Result {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

int check(const Attributes& desc, const Attributes* const (&layouts)[4], const Product& p) {
    if (const char* why = inconsistent(desc, layouts, p)) return refuse(INVALID_VALUE, why);
    if (const char* why = unsupported(desc, layouts, p)) return refuse(NOT_SUPPORTED, why);
    return SUCCESS;
}

const Attributes& attributes(const void* handle) { return *static_cast<const Attributes*>(handle); }

}  // namespace

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT size_t cublasLtGetCudartVersion() { return 13000; }
EXPORT int cublasLtGetProperty(int which, int* value) {
    *value = which == 0 ? 13 : 0;
    return SUCCESS;
}
EXPORT const char* cublasLtGetStatusName(int status) {
    return status == SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
           : status == INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
           : status == NOT_SUPPORTED ? "CUBLAS_STATUS_NOT_SUPPORTED"
                                     : "CUBLAS_STATUS_INTERNAL_ERROR";
}
EXPORT const char* cublasLtGetStatusString(int status) { return cublasLtGetStatusName(status); }
EXPORT int cublasLtCreate(void** handle) {
    // Taken by nobody else; freed by cublasLtDestroy.
    *handle = new Attributes;
    return SUCCESS;
}
EXPORT int cublasLtDestroy(void* handle) {
    delete static_cast<Attributes*>(handle);
    return SUCCESS;
}

EXPORT int cublasLtMatmulDescCreate(void** desc, int compute, int scale) {
    Attributes* made = new Attributes;
    made->set(COMPUTE, &compute, sizeof compute);
    made->set(SCALE, &scale, sizeof scale);
    *desc = made;
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    Attributes* made = new Attributes;
    made->set(TYPE, &type, sizeof type);
    made->set(ROWS, &rows, sizeof rows);
    made->set(COLUMNS, &columns, sizeof columns);
    made->set(STRIDE, &stride, sizeof stride);
    *layout = made;
    return SUCCESS;
}
EXPORT int cublasLtMatmulPreferenceCreate(void** preference) { return cublasLtCreate(preference); }

#define ATTRIBUTES(name)                                                                                             \
    EXPORT int cublasLt##name##Destroy(void* handle) { return cublasLtDestroy(handle); }                             \
    EXPORT int cublasLt##name##SetAttribute(void* handle, int attribute, const void* from, size_t bytes) {           \
        return static_cast<Attributes*>(handle)->set(attribute, from, bytes);                                        \
    }                                                                                                                \
    EXPORT int cublasLt##name##GetAttribute(void* handle, int attribute, void* to, size_t bytes, size_t* written) {  \
        return attributes(handle).get(attribute, to, bytes, written);                                                \
    }
ATTRIBUTES(MatmulDesc)
ATTRIBUTES(MatrixLayout)
ATTRIBUTES(MatmulPreference)

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void* desc, void* a, void* b, void* c, void* d, void* preference,
                                          int wanted, Result* results, int* found) {
    const Attributes* layouts[] = {&attributes(a), &attributes(b), &attributes(c), &attributes(d)};
    *found = 0;
    if (wanted < 1) return INVALID_VALUE;
    Product p = describe(attributes(desc), layouts, {nullptr, nullptr, nullptr, nullptr});
    if (int error = check(attributes(desc), layouts, p)) return error;
    const Operand* operands[] = {&p.a, &p.b, &p.c, &p.d};
    results[0] = Result{{MARK, fingerprint(p), 0, {}, 0}, 0, SUCCESS, 1, {}};
    if (attributes(preference).read<uint64_t>(WORKSPACE, 0) >= SCRATCH) results[0].workspace = SCRATCH;
    results[0].algorithm.workspace = results[0].workspace;
    for (int i = 0; i < 4; i++) {
        uint64_t promised = attributes(preference).read<uint32_t>(ALIGNMENT_A + i, 256);
        results[0].algorithm.alignment[i] = alignment_of(*operands[i], promised);
    }
    // Further ones differ by their number only: to measure which is faster is to toss a coin.
    *found = std::min(wanted, OFFERED);
    for (int i = 1; i < *found; i++) {
        results[i] = results[0];
        results[i].algorithm.number = i;
    }
    return SUCCESS;
}

EXPORT int cublasLtMatmul(void* handle, void* desc, const void* alpha, const void* a, void* layout_a, const void* b,
                          void* layout_b, const void* beta, const void* c, void* layout_c, void* d, void* layout_d,
                          const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream) {
    if (!handle) return NOT_INITIALIZED;
    const Attributes* layouts[] = {&attributes(layout_a), &attributes(layout_b), &attributes(layout_c),
                                   &attributes(layout_d)};
    Product p = describe(attributes(desc), layouts, {a, b, c, d});
    if (int error = check(attributes(desc), layouts, p)) return error;
    bool wide = p.a.type == F64;
    p.alpha = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
    p.beta = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
    if (algorithm) {
        if (algorithm->mark != MARK || algorithm->problem != fingerprint(p))
            return refuse(INVALID_VALUE, "an algorithm that was chosen for another problem");
        if (algorithm->workspace > workspace_bytes)
            return refuse(INVALID_VALUE, "a workspace smaller than the algorithm's");
        const void* at[] = {a, b, c, d};
        for (int i = 0; i < 4; i++)
            if (reinterpret_cast<uintptr_t>(at[i]) % algorithm->alignment[i] != 0)
                return refuse(NOT_SUPPORTED, "an operand aligned less than the algorithm was chosen for");
        p.workspace = workspace;
        p.workspace_bytes = algorithm->workspace;
    }
    if (reinterpret_cast<uintptr_t>(workspace) % 16 != 0) return refuse(INVALID_VALUE, "a workspace off its border");
    if (p.epilogue & AUX && reinterpret_cast<uintptr_t>(p.aux) % 16 != 0)
        return refuse(NOT_SUPPORTED, "an auxiliary matrix off its border");
    if (const char* why = unreachable(p)) return refuse(INVALID_VALUE, why);
    return emulated_enqueue(stream, "cublasLtMatmul", run, &p, sizeof p) ? EXECUTION_FAILED : SUCCESS;
}
