// The machine that runs kernels on the host: a grid's blocks one after another, a block's threads as fibers of one OS
// thread that switch where they wait (barriers, warp collectives). The state is global: who launches holds the lock of
// the driver (or is alone, as a test's main).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(SHARED_SECTION)
// Where the linker puts the shared variables of this file (see SHARED); absent when it has none.
#define EMULATED_JOIN_(a, b) a##b
#define EMULATED_JOIN(a, b) EMULATED_JOIN_(a, b)
#define EMULATED_TEXT_(a) #a
#define EMULATED_TEXT(a) EMULATED_TEXT_(a)
#define SHARED_BEGIN EMULATED_JOIN(__start_, SHARED_SECTION)
#define SHARED_END EMULATED_JOIN(__stop_, SHARED_SECTION)
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char SHARED_BEGIN[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char SHARED_END[];
#else
#define SHARED_BEGIN nullptr
#define SHARED_END nullptr
#endif

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    uint64_t volume() const { return uint64_t(x) * y * z; }
};

#pragma GCC visibility push(hidden)
namespace emulator {

constexpr unsigned LANES = 32, MOST_THREADS = 1024;

struct Fiber;
// What the last lane to arrive does for all: `lanes[i]` is what lane i gave, null where it takes no part.
using Finish = void (*)(void* const (&lanes)[LANES]);

// A cp.async that has not arrived.
struct Copy {
    void* to;
    const void* from;
    bool valid, closes_group;
};

struct Thread {
    dim3 index;
    unsigned linear = 0;
    Fiber* fiber = nullptr;  // Null until it begins.
    bool ended = false;
    // The warp collective, or else the barrier, at which it waits.
    Finish finish = nullptr;
    unsigned mask = 0;
    void* given = nullptr;
    unsigned barrier_line = 0;
    int vote = 0;
    std::vector<Copy> copies;
};

extern Thread* self;
extern dim3 block_index, block_dim, grid_dim;
extern uint8_t* dynamic_shared;

inline unsigned lane() { return self->linear % LANES; }

// Waits for the lanes of `mask` at a collective of the same kind; the last to arrive finishes it.
void collective(unsigned mask, Finish finish, void* given);

struct Votes {
    int count, threads;
};
// Waits for the block and counts the threads whose vote is not zero. `line` tells barriers apart.
Votes barrier(int vote, unsigned line);

void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(unsigned pending);

// Ends the launch with an error.
[[noreturn]] void fault(const std::string& what);
// Faults unless the bytes lie in the running block's shared memory, aligned.
void check_shared(const void* at, size_t bytes, size_t alignment, const char* what);

struct Parameter {
    size_t bytes;
    bool pointer;
};
struct Kernel {
    const char* name;
    unsigned threads;  // The most in a block, from its launch bounds.
    std::vector<Parameter> parameters;
    void (*call)(void* const* parameters);
    uint8_t *shared_begin, *shared_end;
};

// All kernels of this library; sorted by nothing.
std::vector<Kernel>& kernels();
const Kernel* find_kernel(const std::string& name);

struct Options {
    uint64_t seed = 0;             // Not 0: threads and blocks run in an order that follows from it.
    uint64_t last_blocks = 0;      // Not 0: so many blocks of a grid run only, the last.
    bool copies_at_once = false;   // cp.async delivers at the call, the other extreme of what a device may do.
};
extern Options options;  // From MUPSCALE_EMULATED_SEED and MUPSCALE_EMULATED_COPIES=at-once at first.

// Why a launch ended; nothing in `what` when it ran to its end.
struct Failure {
    std::string what;
    bool access = false;  // It touched memory that is nobody's.
};
// Runs a grid.
Failure launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void* const* parameters);

// A kernel as a function of the array of pointers that cuLaunchKernel takes.
template <auto function> struct Call;
template <class... A, void (*function)(A...)> struct Call<function> {
    template <size_t... I> static void unpack(void* const* p, std::index_sequence<I...>) {
        function(*static_cast<std::remove_cv_t<A>*>(p[I])...);
    }
    static void call(void* const* p) { unpack(p, std::index_sequence_for<A...>{}); }
    static std::vector<Parameter> parameters() { return {{sizeof(A), std::is_pointer_v<A>}...}; }

    // Runs it from a test, and ends the process on a fault.
    static void run(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, A... arguments) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))..., nullptr};
        std::string failed = launch(*find_kernel(name), grid, block, dynamic_bytes, pointers).what;
        if (failed.empty()) return;
        std::fprintf(stderr, "%s\n", failed.c_str());
        std::exit(1);
    }
};

struct Registrar {
    template <class C> Registrar(const char* name, unsigned threads, C, uint8_t* begin, uint8_t* end) {
        kernels().push_back({name, threads, C::parameters(), C::call, begin, end});
    }
};

}  // namespace emulator
#pragma GCC visibility pop
