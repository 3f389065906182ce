// Fibers: stacks that hand the processor to each other.
#pragma once

#include <cstddef>

#pragma GCC visibility push(hidden)
namespace emulator {

struct Fiber {
    void* stack_pointer = nullptr;  // While it does not run.
    char* bottom = nullptr;         // Its lowest address, above pages that nothing may touch.
    size_t bytes = 0;
    void* sanitizer_stack = nullptr;
};

// A fiber with a new stack.
Fiber* make_fiber();
// Makes `fiber` stand for the running thread's own stack.
void be_fiber(Fiber& fiber);
// Lets it call `entry`, which must not return, when it is switched to next.
void prepare(Fiber& fiber, void (*entry)());
// Goes on in `to`; comes back when something switches to `from`, unless `from` ends here.
void switch_fiber(Fiber& from, Fiber& to, bool ends);
// The first thing to call in a fiber's entry.
void entered(Fiber& fiber);
// Whether the address is in the page below the fiber's stack.
bool overflows(const Fiber& fiber, const void* address);

}  // namespace emulator
#pragma GCC visibility pop
