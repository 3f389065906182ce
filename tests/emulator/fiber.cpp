#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/asan_interface.h>
#endif

// emulated_switch(save, to) pushes what a call must preserve, leaves the stack pointer in *save, and returns on `to`.
#if defined(__x86_64__)
extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");
#elif defined(__aarch64__)
extern "C" void emulated_switch(void** save, void* to);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
.type emulated_switch, %function
emulated_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulated_switch, .-emulated_switch
)");
#else
static void emulated_switch(void** save, void* to) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}
#endif

namespace emulator {

// Sanitizers put more into a frame.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 288 << 10;
#else
constexpr size_t STACK = 96 << 10;
#endif
constexpr size_t GUARD = 60 << 10, COLOURS = 28 << 10;

Fiber* make_fiber() {
    void* at = mmap(nullptr, GUARD + STACK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + GUARD, STACK, PROT_READ | PROT_WRITE) != 0) {
        std::perror("emulated CUDA: no memory for a thread's stack");
        std::abort();
    }
    Fiber* fiber = new Fiber;
    fiber->bottom = static_cast<char*>(at) + GUARD;
    // Ends at differing places, or else all stacks would share a few lines of the cache.
    static size_t number = 0;
    fiber->bytes = STACK - number++ * 448 % COLOURS;
    return fiber;
}

void be_fiber([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &fiber.bytes);
    pthread_attr_destroy(&attributes);
    fiber.bottom = static_cast<char*>(bottom);
#endif
}

void prepare(Fiber& fiber, void (*entry)()) {
    fiber.sanitizer_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    // What its last user left there.
    __asan_unpoison_memory_region(fiber.bottom, fiber.bytes);
#endif
    uint64_t* top = reinterpret_cast<uint64_t*>(fiber.bottom + fiber.bytes);
#if defined(__x86_64__)
    // At a function's first instruction the stack is 8 bytes off a 16-byte border.
    *--top = 0;
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; i++) *--top = 0;
    fiber.stack_pointer = top;
#elif defined(__aarch64__)
    top -= 20;
    for (int i = 0; i < 20; i++) top[i] = 0;
    top[11] = reinterpret_cast<uint64_t>(entry);
    fiber.stack_pointer = top;
#else
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top) - 1;
    getcontext(context);
    context->uc_stack = {.ss_sp = fiber.bottom, .ss_size = fiber.bytes - sizeof *context};
    makecontext(context, entry, 0);
    fiber.stack_pointer = context;
#endif
}

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.sanitizer_stack, to.bottom, to.bytes);
#endif
    emulated_switch(&from.stack_pointer, to.stack_pointer);
    if (!ends) entered(from);
}

void entered([[maybe_unused]] Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, nullptr, nullptr);
#endif
}

bool overflows(const Fiber& fiber, const void* address) {
    const char* at = static_cast<const char*>(address);
    return at < fiber.bottom && at >= fiber.bottom - GUARD;
}

}  // namespace emulator
