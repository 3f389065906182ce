// A kernel at the far end of arrays with more than 2^32 elements, of which only that end is memory. An index that is
// computed in 32 bits points before it, where nothing may be touched.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.hpp"
#include "machine.hpp"

namespace {
#include "step.cuh"

constexpr u64 MANY = (1ull << 33) + 5;     // Elements of a vector.
constexpr u32 ROWS = 0x7fffffff;           // As many blocks as a grid may have along its x.
constexpr u64 PAGE = 4096, TAIL = 8 << 20;  // Bytes at an array's end that are memory.
constexpr u8 UNWRITTEN = 0xa5;

// An array of zeros with its end alone in memory. Before it is nothing either, for indices below zero.
class Far {
    static constexpr u64 BEFORE = 16ull << 30;
    u8 *map, *start;
    u64 elements, size, bytes;

public:
    Far(u64 elements, u64 size) : elements(elements), size(size), bytes(elements * size) {
        u64 all = BEFORE + (bytes + PAGE - 1) / PAGE * PAGE;
        void* got = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got == MAP_FAILED) {
            std::perror("address space for a far array");
            std::abort();
        }
        map = static_cast<u8*>(got);
        start = map + BEFORE;
        u64 tail = std::min(TAIL / size, elements);
        open(elements - tail, tail);
    }
    ~Far() { munmap(map, BEFORE + (bytes + PAGE - 1) / PAGE * PAGE); }
    Far(const Far&) = delete;

    // Makes these elements memory, too.
    void open(u64 first, u64 count) {
        u64 from = first * size / PAGE * PAGE, to = (first + count) * size;
        if (mprotect(start + from, to - from, PROT_READ | PROT_WRITE) != 0) std::perror("mprotect");
    }
    template <class T> T& at(u64 i) { return reinterpret_cast<T*>(start)[i]; }
    u8* data() { return start; }
    void mark() { std::fill_n(start + bytes - size, size, UNWRITTEN); }
    bool is_marked() const {
        return std::all_of(start + bytes - size, start + bytes, [](u8 byte) { return byte == UNWRITTEN; });
    }
};

// A kernel's argument.
struct Argument {
    u64 bits;
    size_t bytes;
    bool pointer = false;
    Argument(u32 x) : bits(x), bytes(4) {}
    Argument(u64 x) : bits(x), bytes(8) {}
    Argument(f32 x) : bits(bits_of<u32>(x)), bytes(4) {}
    Argument(f64 x) : bits(bits_of<u64>(x)), bytes(8) {}
    Argument(const void* at) : bits(reinterpret_cast<uintptr_t>(at)), bytes(8), pointer(true) {}
    Argument(std::nullptr_t) : Argument(static_cast<const void*>(nullptr)) {}
    Argument(Far& array) : Argument(array.data()) {}
    template <class T> Argument(std::vector<T>& array) : Argument(static_cast<const void*>(array.data())) {}
};

// One kernel with one compute type, and the arrays whose last elements it must write.
struct Run {
    std::string kernel;
    u64 size;   // Bytes of `real`.
    u32 wide;   // Elements of it in 16 bytes.
    std::vector<std::unique_ptr<Far>> arrays;
    std::vector<Far*> outputs;

    Run(const char* name, u64 size, bool typed)
        : kernel(std::string(name) + (typed ? size == 4 ? "_f32" : "_bf16" : "")), size(size), wide(u32(16 / size)) {}

    Far& input(u64 elements, u64 size) { return *arrays.emplace_back(std::make_unique<Far>(elements, size)); }
    Far& input(u64 elements) { return input(elements, size); }
    Far& output(u64 elements, u64 size) {
        outputs.push_back(&input(elements, size));
        outputs.back()->mark();
        return *outputs.back();
    }
    Far& output(u64 elements) { return output(elements, size); }

    // The number of `real` among the types, which gradients and moments have here too.
    u32 type() const { return size == 2 ? 2 : 1; }

    // Makes one element of an array of `real` a 1.
    void set_one(Far& array, u64 i) const {
        if (size == 4) array.at<u32>(i) = 0x3f800000;
        else array.at<u16>(i) = 0x3f80;
    }

    bool is_one(Far& array, u64 i) const {
        return size == 4 ? array.at<u32>(i) == 0x3f800000 : array.at<u16>(i) == 0x3f80;
    }

    void fail(const std::string& why) const {
        std::printf("%s: %s\n", kernel.c_str(), why.c_str());
        failures++;
    }
    // Runs the last `blocks` blocks of the grid.
    void last(u64 blocks, dim3 grid, u32 threads, size_t shared, std::vector<Argument> arguments) const {
        const emulator::Kernel* found = emulator::find_kernel(kernel);
        if (!found) return fail("there is no such kernel");
        bool same = found->parameters.size() == arguments.size();
        std::vector<void*> pointers;
        for (size_t i = 0; same && i < arguments.size(); i++) {
            auto [bytes, pointer] = found->parameters[i];
            same = bytes == arguments[i].bytes && pointer == arguments[i].pointer;
            pointers.push_back(&arguments[i].bits);
        }
        if (!same) return fail("its parameters are others: change its case here");
        emulator::options.last_blocks = blocks;
        emulator::Failure failure = emulator::launch(*found, grid, dim3(threads), shared, pointers.data());
        if (!failure.what.empty()) return fail(failure.what);
        for (size_t i = 0; i < outputs.size(); i++)
            if (outputs[i]->is_marked()) fail("the last element of output " + std::to_string(i) + " was not written");
    }
};

// Kernels with a case, or the reason why they have none.
std::map<std::string, std::string>& covered() {
    static std::map<std::string, std::string> all;
    return all;
}
}  // namespace

#define FAR(name) FAR_(name, true)
#define FAR_PLAIN(name) FAR_(name, false)
#define FAR_(name, typed)                                                                            \
    static void far_##name(Run& run);                                                                \
    static const bool covered_##name = covered().emplace(#name, "").second;                          \
    TEST(far_end_of_##name) {                                                                        \
        for (u64 size : {4, 2}) {                                                                    \
            Run run(#name, size, typed);                                                             \
            far_##name(run);                                                                         \
        }                                                                                            \
    }                                                                                                \
    static void far_##name(Run& run)
#define NEVER_FAR(name, reason) static const bool covered_##name = covered().emplace(#name, reason).second
