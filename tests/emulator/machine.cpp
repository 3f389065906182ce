#include "machine.hpp"

#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <map>
#include <numeric>

#include "fiber.hpp"

namespace emulator {

Thread* self = nullptr;
dim3 block_index, block_dim, grid_dim;
uint8_t* dynamic_shared = nullptr;

static Options from_environment() {
    Options options;
    if (const char* seed = std::getenv("MUPSCALE_EMULATED_SEED")) options.seed = std::strtoull(seed, nullptr, 0);
    const char* copies = std::getenv("MUPSCALE_EMULATED_COPIES");
    options.copies_at_once = copies && std::string(copies) == "at-once";
    return options;
}
Options options = from_environment();

namespace {

struct Warp {
    unsigned waiting = 0, ended = 0;  // A bit a lane; lanes that a block lacks have ended.
};

Thread threads[MOST_THREADS];
Warp warps[MOST_THREADS / LANES];
unsigned thread_count, ended_count, barrier_count;
Votes votes;

// Threads that can go on, in a ring; each is in it at most once.
Thread* ready[MOST_THREADS];
unsigned ready_from, ready_to;

Fiber launcher;
std::vector<Fiber*> fibers, idle;
const Kernel* running;
void* const* arguments;
Failure failure;
size_t dynamic_size;
uint64_t random_state;

uint64_t random_number() {
    // SplitMix64 (Steele, Lea, Flood 2014).
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

void make_ready(Thread& thread) { ready[ready_to++ % MOST_THREADS] = &thread; }

// The thread to go on with; null when none can.
Thread* next_thread() {
    if (ready_from == ready_to) return nullptr;
    if (options.seed) {
        unsigned chosen = ready_from + random_number() % (ready_to - ready_from);
        std::swap(ready[ready_from % MOST_THREADS], ready[chosen % MOST_THREADS]);
    }
    return ready[ready_from++ % MOST_THREADS];
}

std::string where_all_wait() {
    std::map<std::string, unsigned> places;
    for (unsigned i = 0; i < thread_count; i++) {
        const Thread& t = threads[i];
        char place[80];
        if (t.ended) std::snprintf(place, sizeof place, "have ended");
        else if (t.finish) std::snprintf(place, sizeof place, "wait in a warp collective of mask %08x", t.mask);
        else std::snprintf(place, sizeof place, "wait at the barrier of line %u", t.barrier_line);
        places[place]++;
    }
    std::string text = "no thread can go on:";
    for (auto& [place, count] : places) text += " " + std::to_string(count) + " " + place + ";";
    text.pop_back();
    return text;
}

// Lets the warp's collective of this kind finish when all of its lanes are there.
bool finish_collective(Warp& warp, Thread* first_lane, unsigned mask, Finish finish) {
    unsigned live = mask & ~warp.ended;
    if ((warp.waiting & live) != live) return false;
    void* given[LANES];
    for (unsigned i = 0; i < LANES; i++) {
        bool part = live >> i & 1;
        if (part && (first_lane[i].finish != finish || first_lane[i].mask != mask)) return false;
        given[i] = part ? first_lane[i].given : nullptr;
    }
    finish(given);
    warp.waiting &= ~live;
    for (unsigned i = 0; i < LANES; i++) {
        if (!(live >> i & 1)) continue;
        first_lane[i].finish = nullptr;
        make_ready(first_lane[i]);
    }
    return true;
}

void finish_barrier() {
    if (barrier_count == 0 || barrier_count + ended_count < thread_count) return;
    unsigned line = 0;
    votes = {0, int(barrier_count)};
    for (unsigned i = 0; i < thread_count; i++) {
        if (threads[i].ended) continue;
        if (line && threads[i].barrier_line != line)
            fault("threads of one block wait at different barriers, lines " + std::to_string(line) + " and " +
                  std::to_string(threads[i].barrier_line));
        line = threads[i].barrier_line;
        votes.count += threads[i].vote != 0;
        make_ready(threads[i]);
    }
    barrier_count = 0;
}

void end_thread(Thread& thread) {
    if (!thread.copies.empty()) copy_wait(0);
    thread.ended = true;
    ended_count++;
    finish_barrier();
    unsigned warp = thread.linear / LANES;
    warps[warp].ended |= 1u << lane();
    Thread* first = &threads[warp * LANES];
    for (unsigned i = 0; warps[warp].waiting && i < LANES; i++)
        if (warps[warp].waiting >> i & 1) finish_collective(warps[warp], first, first[i].mask, first[i].finish);
}

// Runs threads one after another on this fiber, as long as the next one has not begun.
void run_threads() {
    Fiber& fiber = *self->fiber;
    entered(fiber);
    for (;;) {
        running->call(arguments);
        end_thread(*self);
        Thread* next = next_thread();
        if (!next && ended_count < thread_count) fault(where_all_wait());
        if (!next || next->fiber) {
            // The stack is used until the switch, and nobody else runs before.
            idle.push_back(&fiber);
            self = next;
            switch_fiber(fiber, next ? *next->fiber : launcher, true);
        }
        next->fiber = &fiber;
        self = next;
    }
}

Fiber* begin_fiber() {
    if (idle.empty()) {
        fibers.push_back(make_fiber());
        idle.push_back(fibers.back());
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    prepare(*fiber, run_threads);
    return fiber;
}

void wait() {
    Thread* from = self;
    Thread* next = next_thread();
    if (!next) fault(where_all_wait());
    if (next == from) return;
    self = next;
    if (!next->fiber) next->fiber = begin_fiber();
    switch_fiber(*from->fiber, *next->fiber, false);
}

// Without the sanitizer's checks: red zones between variables are overwritten too.
__attribute__((no_sanitize("address", "undefined"))) void poison(uint8_t* from, uint8_t* to) {
    for (volatile uint8_t* p = from; p < to; p++) *p = 0xff;
}

void run_block() {
    poison(running->shared_begin, running->shared_end);
    if (dynamic_size) memset(dynamic_shared, 0xff, dynamic_size);
    ended_count = barrier_count = ready_from = ready_to = 0;
    for (unsigned i = 0; i < thread_count; i++) {
        Thread& t = threads[i];
        t.fiber = nullptr;
        t.ended = false;
        t.finish = nullptr;
        t.copies.clear();
        make_ready(t);
    }
    for (unsigned w = 0; w * LANES < thread_count; w++) {
        unsigned lanes = thread_count - w * LANES;
        warps[w] = {0, lanes < LANES ? ~0u << lanes : 0};
    }
    self = next_thread();
    self->fiber = begin_fiber();
    switch_fiber(launcher, *self->fiber, false);
}

// One allocation for each size asked for, so that a sanitizer knows the end.
uint8_t* shared_memory(size_t bytes) {
    static std::map<size_t, void*> blocks;
    void*& block = blocks[bytes];
    if (!block && posix_memalign(&block, 128, bytes) != 0) std::abort();
    return static_cast<uint8_t*>(block);
}

// While a grid runs, an access to memory that is nobody's ends the launch. A sanitizer has a better report of its own.
#ifdef __SANITIZE_ADDRESS__
struct AccessGuard {};
#else
pthread_t launching;

void report_access(int, siginfo_t* info, void*) {
    if (!pthread_equal(launching, pthread_self())) {
        // Somebody else's; it comes again.
        std::signal(SIGSEGV, SIG_DFL);
        return;
    }
    char what[80];
    const char* where = self && overflows(*self->fiber, info->si_addr) ? "its stack is too small; " : "";
    std::snprintf(what, sizeof what, "%san access to %p, where no memory is", where, info->si_addr);
    failure.access = true;
    fault(what);
}

struct AccessGuard {
    struct sigaction before;
    stack_t stack_before;

    AccessGuard() {
        // The handler leaves by switching fibers, so the signal is not blocked in it; it needs a stack, as the thread's
        // own may be what overflowed.
        static char stack[64 << 10];
        launching = pthread_self();
        stack_t own{.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof stack};
        struct sigaction action{};
        action.sa_sigaction = report_access;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaltstack(&own, &stack_before);
        sigaction(SIGSEGV, &action, &before);
    }
    ~AccessGuard() {
        sigaction(SIGSEGV, &before, nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};
#endif

void set_up(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void* const* parameters) {
    running = &kernel;
    arguments = parameters;
    grid_dim = grid;
    block_dim = block;
    thread_count = unsigned(block.volume());
    dynamic_size = dynamic_bytes;
    dynamic_shared = dynamic_bytes ? shared_memory(dynamic_bytes) : nullptr;
    for (unsigned i = 0; i < thread_count; i++) {
        threads[i].linear = i;
        threads[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    }
    failure = {};
    be_fiber(launcher);
    random_state = options.seed;
}

}  // namespace

Failure launch(const Kernel& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void* const* parameters) {
    uint64_t blocks = grid.volume();
    if (blocks == 0 || block.volume() == 0 || block.volume() > kernel.threads)
        return {std::string(kernel.name) + ": a grid or block of a forbidden size"};
    [[maybe_unused]] AccessGuard guard;
    set_up(kernel, grid, block, dynamic_bytes, parameters);
    uint64_t count = options.last_blocks ? std::min(options.last_blocks, blocks) : blocks;
    // With a seed: from a random block on by a random step that has no factor in common with their number.
    uint64_t at = blocks - count, step = 1;
    if (options.seed) {
        at = random_number() % blocks;
        do step = random_number() % blocks + 1;
        while (std::gcd(step, blocks) != 1);
    }
    for (uint64_t i = 0; i < count && failure.what.empty(); i++) {
        block_index = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
        run_block();
        at = (at + step) % blocks;
    }
    return failure;
}

void collective(unsigned mask, Finish finish, void* given) {
    Warp& warp = warps[self->linear / LANES];
    if (!(mask >> lane() & 1)) fault("a warp collective whose mask leaves out its caller");
    self->mask = mask;
    self->finish = finish;
    self->given = given ? given : self;  // Null is for lanes that take no part.
    warp.waiting |= 1u << lane();
    finish_collective(warp, &threads[self->linear / LANES * LANES], mask, finish);
    wait();
}

Votes barrier(int vote, unsigned line) {
    self->vote = vote;
    self->barrier_line = line;
    barrier_count++;
    finish_barrier();
    wait();
    return votes;
}

void copy_async(void* shared, const void* global, bool valid) {
    check_shared(shared, 16, 16, "the destination of cp.async");
    if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
        fault("cp.async from an address off its 16-byte border");
    self->copies.push_back({shared, global, valid, false});
    // Until it arrives nobody may read there.
    memset(shared, 0xff, 16);
    if (options.copies_at_once) {
        if (valid) memcpy(shared, global, 16);
        else memset(shared, 0, 16);
    }
}

void copy_commit() { self->copies.push_back({nullptr, nullptr, false, true}); }

void copy_wait(unsigned pending) {
    std::vector<Copy>& copies = self->copies;
    unsigned groups = 0;
    for (const Copy& copy : copies) groups += copy.closes_group;
    size_t done = 0;
    while (groups > pending) {
        const Copy& copy = copies[done++];
        if (copy.closes_group) groups--;
        else if (options.copies_at_once) continue;
        else if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

void fault(const std::string& what) {
    char at[160];
    std::snprintf(at, sizeof at, ": block (%u, %u, %u)", block_index.x, block_index.y, block_index.z);
    std::string text = running->name + std::string(at);
    if (self) {
        std::snprintf(at, sizeof at, ", thread (%u, %u, %u)", self->index.x, self->index.y, self->index.z);
        text += at;
    }
    failure.what = text + ": " + what;
    // The block's threads are left where they are; nothing of theirs is needed again.
    Fiber abandoned;
    idle = fibers;
    switch_fiber(abandoned, launcher, true);
    std::abort();
}

void check_shared(const void* at, size_t bytes, size_t alignment, const char* what) {
    const uint8_t* p = static_cast<const uint8_t*>(at);
    if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fault(what + std::string(" is off its border"));
    bool dynamic = p >= dynamic_shared && p + bytes <= dynamic_shared + dynamic_size;
    bool fixed = p >= running->shared_begin && p + bytes <= running->shared_end;
    if (!dynamic && !fixed && running->shared_begin) fault(what + std::string(" is no shared memory"));
}

std::vector<Kernel>& kernels() {
    static auto* all = new std::vector<Kernel>;
    return *all;
}

const Kernel* find_kernel(const std::string& name) {
    for (const Kernel& kernel : kernels())
        if (name == kernel.name) return &kernel;
    return nullptr;
}

}  // namespace emulator
