// The stand-in driver: order of streams, memory, modules, failures. A test's variables choose the mode.
#include "api.hpp"
#include "check.hpp"
#include "machine.hpp"

namespace {
#include "device.cuh"

KERNEL(64, add, (u32* to, const u32* from, u32 count, u32 more)) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from[i] + more;
}
KERNEL(64, stuck, (u32 unused)) {
    if (threadIdx.x == unused) __syncwarp();
    else __syncthreads();
}
KERNEL(64, sized, (u8 a, f64 b, u16 c, const u32* d)) {
    DYNAMIC_SHARED(bytes);
    bytes[threadIdx.x] = (u8)(a + (u8)b + c + (d != nullptr));
}

const char* TEXT =
    "//\n.version 8.0\n.target sm_80\n.visible .entry add(\n.visible .entry stuck(\n.visible .entry sized(\n";
}  // namespace

Gpu::Gpu() {
    cuInit(0);
    cuDevicePrimaryCtxRetain(&context, 0);
    cuCtxSetCurrent(context);
    cuStreamCreate(&one, 1);
    cuStreamCreate(&other, 1);
    cuModuleLoadData(&module, TEXT);
}
void* Gpu::function(const char* name) const {
    void* found = nullptr;
    cuModuleGetFunction(&found, module, name);
    return found;
}

// to = from + more, for 64 numbers.
static int enqueue_add(const Gpu& gpu, void* stream, u32* to, const u32* from, u32 more) {
    u32 count = 64;
    void* parameters[] = {&to, &from, &count, &more};
    return cuLaunchKernel(gpu.function("add"), 1, 1, 1, 64, 1, 1, 0, stream, parameters, nullptr);
}

// A value goes through both streams, with an event between them or without.
static u32 across_streams(bool event) {
    Gpu gpu;
    u32 *a = device<u32>(64), *b = device<u32>(64), *host = pinned<u32>(64);
    void* done = nullptr;
    cuEventCreate(&done, 2);
    cuMemsetD32Async(a, 5, 64, gpu.other);
    cuStreamSynchronize(gpu.other);
    enqueue_add(gpu, gpu.one, b, a, 1);
    cuEventRecord(done, gpu.one);
    if (event) cuStreamWaitEvent(gpu.other, done, 0);
    cuMemcpyDtoHAsync_v2(host, b, 256, gpu.other);
    cuStreamSynchronize(gpu.other);
    return host[63];
}
TEST(eager_streams_are_in_order) { EXPECT(across_streams(true) == 6 && across_streams(false) == 6); }
TEST(lazy_streams_show_a_missing_event, "STREAMS=lazy") {
    EXPECT(across_streams(true) == 6 && across_streams(false) == ~0u);
}

// b = a + 1 on one stream, and then a is set on the other.
static u32 overwritten(bool event) {
    Gpu gpu;
    u32 *a = device<u32>(64), *b = device<u32>(64), *host = pinned<u32>(64);
    void* read = nullptr;
    cuEventCreate(&read, 2);
    cuMemsetD32Async(a, 5, 64, gpu.one);
    cuStreamSynchronize(gpu.one);
    enqueue_add(gpu, gpu.one, b, a, 1);
    cuEventRecord(read, gpu.one);
    if (event) cuStreamWaitEvent(gpu.other, read, 0);
    cuMemsetD32Async(a, 7, 64, gpu.other);
    cuMemcpyDtoHAsync_v2(host, b, 4, gpu.one);
    cuStreamSynchronize(gpu.other);
    cuMemcpyDtoHAsync_v2(host + 1, a, 4, gpu.other);
    cuStreamSynchronize(gpu.other);
    cuStreamSynchronize(gpu.one);
    return host[0] * 10 + host[1];
}
TEST(a_slow_stream_is_overtaken, "STREAMS=slow-0") { EXPECT(overwritten(false) == 87); }
TEST(a_slow_stream_is_waited_for, "STREAMS=slow-0") { EXPECT(overwritten(true) == 67); }
TEST(a_slow_stream_that_is_another_is_not, "STREAMS=slow-1") { EXPECT(overwritten(false) == 67); }

TEST(lazy_copies_read_late, "STREAMS=lazy") {
    Gpu gpu;
    u32 *to = device<u32>(64), *host = pinned<u32>(64), plain[64] = {1}, read[64];
    host[0] = 1;
    cuMemcpyHtoDAsync_v2(to, host, 256, gpu.one);
    host[0] = 2;
    cuMemcpyDtoHAsync_v2(read, to, 256, gpu.one);
    EXPECT(read[0] == 2);
    // Pageable memory is read before the call returns.
    cuMemcpyHtoDAsync_v2(to, plain, 256, gpu.one);
    plain[0] = 2;
    cuMemcpyDtoHAsync_v2(read, to, 256, gpu.one);
    EXPECT(read[0] == 1);
    // What is pinned arrives when somebody waits.
    void* event = nullptr;
    cuEventCreate(&event, 0);
    cuMemcpyDtoHAsync_v2(host, to, 256, gpu.one);
    cuEventRecord(event, gpu.one);
    EXPECT(host[0] == 2);
    EXPECT(cuEventQuery(event) == 600 && cuEventSynchronize(event) == 0 && cuEventQuery(event) == 0 && host[0] == 1);
}

TEST(the_null_stream_waits_for_blocking_streams, "STREAMS=lazy") {
    Gpu gpu;
    void* blocking = nullptr;
    cuStreamCreate(&blocking, 0);
    u32 *a = device<u32>(64), *b = device<u32>(64), read[64];
    cuMemsetD32Async(a, 1, 64, blocking);
    cuMemsetD32Async(b, 1, 64, gpu.one);
    cuMemcpyDtoH_v2(read, a, 256);
    EXPECT(read[0] == 1);
    cuMemcpyDtoH_v2(read, b, 256);
    EXPECT(read[0] == ~0u);
    cuCtxSynchronize();
    cuMemcpyDtoH_v2(read, b, 256);
    EXPECT(read[0] == 1);
}

TEST(memory_is_limited_poisoned_and_checked, "MEMORY=1M") {
    Gpu gpu;
    size_t free = 0, total = 0;
    void *a = nullptr, *b = nullptr;
    EXPECT(cuMemAlloc_v2(&a, 600 << 10) == 0);
    EXPECT(cuMemAlloc_v2(&b, 600 << 10) == 2);
    EXPECT(cuMemGetInfo_v2(&free, &total) == 0 && total == 1 << 20 && free == 424 << 10);
    uint8_t last = 0;
    EXPECT(cuMemcpyDtoH_v2(&last, (uint8_t*)a + (600 << 10) - 1, 1) == 0 && last == 0xff);
    EXPECT(cuMemFree_v2(a) == 0 && cuMemFree_v2(a) == 1 && cuMemAlloc_v2(&b, 600 << 10) == 0);
    // One byte too many: reported when it runs, and at each call from then on.
    cuMemsetD8Async(b, 0, (600 << 10) + 1, gpu.one);
    EXPECT(cuStreamSynchronize(gpu.one) == 700 && cuMemAlloc_v2(&a, 1) == 700);
}

TEST(freed_in_stream_order, "STREAMS=lazy") {
    Gpu gpu;
    void* a = nullptr;
    size_t before = 0, after = 0, total = 0;
    cuMemGetInfo_v2(&before, &total);
    EXPECT(cuMemAllocAsync(&a, 1024, gpu.one) == 0 && cuMemsetD8Async(a, 1, 1024, gpu.one) == 0);
    EXPECT(cuMemFreeAsync(a, gpu.one) == 0 && cuStreamSynchronize(gpu.one) == 0);
    EXPECT(cuMemGetInfo_v2(&after, &total) == 0 && before == after);
    cuMemsetD8Async(a, 1, 1024, gpu.one);
    EXPECT(cuStreamSynchronize(gpu.one) == 700);
}

TEST(kernels_get_memory_of_their_device, "GPUS=2") {
    Gpu gpu;
    void *second = nullptr, *stream = nullptr;
    u32* here = device<u32>(64);
    cuDevicePrimaryCtxRetain(&second, 1);
    cuCtxSetCurrent(second);
    u32* there = device<u32>(64);
    cuStreamCreate(&stream, 1);
    // A module belongs to its context.
    EXPECT(enqueue_add(gpu, stream, there, there, 0) == 400);
    cuCtxSetCurrent(gpu.context);
    EXPECT(enqueue_add(gpu, gpu.one, here, here, 0) == 0 && cuStreamSynchronize(gpu.one) == 0);
    enqueue_add(gpu, gpu.one, here, there, 0);
    EXPECT(cuStreamSynchronize(gpu.one) == 700);
    // The other device goes on.
    cuCtxSetCurrent(second);
    EXPECT(cuMemsetD8Async(there, 0, 256, stream) == 0 && cuStreamSynchronize(stream) == 0);
}
TEST(kernels_do_not_get_the_hosts_memory) {
    Gpu gpu;
    u32 *here = device<u32>(64), *page = pinned<u32>(64), host[64];
    EXPECT(enqueue_add(gpu, gpu.one, here, page, 0) == 0 && cuStreamSynchronize(gpu.one) == 0);
    EXPECT(enqueue_add(gpu, gpu.one, here, host, 0) == 0 && cuStreamSynchronize(gpu.one) == 700);
}

TEST(an_access_out_of_bounds_is_a_fault) {
    Gpu gpu;
    u32 *a = device<u32>(64), *b = device<u32>(64), count = 64, more = 0;
    b += 1;
    void* parameters[] = {&a, &b, &count, &more};
    EXPECT(cuLaunchKernel(gpu.function("add"), 1, 1, 1, 64, 1, 1, 0, gpu.one, parameters, nullptr) == 0);
    EXPECT(cuStreamSynchronize(gpu.one) == 700 && cuStreamSynchronize(gpu.one) == 700);
}

TEST(a_kernel_that_hangs_is_a_fault) {
    Gpu gpu;
    u32 zero = 0;
    void* parameters[] = {&zero};
    EXPECT(cuLaunchKernel(gpu.function("stuck"), 1, 1, 1, 64, 1, 1, 0, gpu.one, parameters, nullptr) == 0);
    EXPECT(cuStreamSynchronize(gpu.one) == 719 && cuCtxSynchronize() == 719);
}

TEST(the_nth_call_fails, "FAIL=cuLaunchKernel:2:701,cuMemAlloc_v2:4:700") {
    Gpu gpu;
    u32 *a = device<u32>(64), *b = device<u32>(64);
    EXPECT(enqueue_add(gpu, gpu.one, a, b, 0) == 0 && enqueue_add(gpu, gpu.one, a, b, 0) == 701);
    EXPECT(enqueue_add(gpu, gpu.one, a, b, 0) == 0 && device<u32>(1) && cuStreamSynchronize(gpu.one) == 0);
    EXPECT(!device<u32>(1) && cuStreamSynchronize(gpu.one) == 700);
}

TEST(images_suit_device_and_driver, "CAPABILITY=8.9", "DRIVER=12040") {
    Gpu gpu;
    void *module = nullptr, *function = nullptr;
    EXPECT(gpu.function("add") && cuModuleGetFunction(&function, gpu.module, "product") == 500);
    EXPECT(cuModuleLoadData(&module, ".version 8.4\n.target sm_89\n") == 0);
    EXPECT(cuModuleLoadData(&module, ".version 8.5\n.target sm_80\n") == 222);
    EXPECT(cuModuleLoadData(&module, ".version 8.0\n.target sm_90\n") == 209);
    EXPECT(cuModuleLoadData(&module, "nothing") == 200);
    int version = 0, shared = 0;
    EXPECT(cuDriverGetVersion(&version) == 0 && version == 12040);
    EXPECT(cuDeviceGetAttribute(&shared, 97, 0) == 0 && shared == 99 << 10);
}

TEST(parameters_and_shared_memory_are_checked) {
    Gpu gpu;
    void* sized = gpu.function("sized");
    size_t offset = 0, bytes = 0, offsets[] = {0, 8, 16, 24}, sizes[] = {1, 8, 2, 8};
    for (size_t i = 0; i < 4; i++)
        EXPECT(cuFuncGetParamInfo(sized, i, &offset, &bytes) == 0 && offset == offsets[i] && bytes == sizes[i]);
    EXPECT(cuFuncGetParamInfo(sized, 4, &offset, &bytes) == 1);
    u64 zero = 0;
    void* parameters[] = {&zero, &zero, &zero, &zero};
    auto launch = [&](unsigned threads, unsigned shared) {
        return cuLaunchKernel(sized, 1, 1, 1, threads, 1, 1, shared, gpu.one, parameters, nullptr);
    };
    EXPECT(launch(64, 64) == 0 && launch(65, 65) == 1 && launch(64, 48 << 10) == 0 && launch(64, (48 << 10) + 1) == 1);
    EXPECT(cuFuncSetAttribute(sized, 8, 227 << 10) == 0 && launch(64, 227 << 10) == 0);
    EXPECT(cuFuncSetAttribute(sized, 8, (227 << 10) + 1) == 1 && cuStreamSynchronize(gpu.one) == 0);
}

TEST(time_passes_between_events, "STREAMS=lazy") {
    Gpu gpu;
    void *from = nullptr, *to = nullptr, *untimed = nullptr;
    float milliseconds = -1;
    cuEventCreate(&from, 0);
    cuEventCreate(&to, 0);
    cuEventCreate(&untimed, 2);
    u32* a = device<u32>(1 << 20);
    cuEventRecord(from, gpu.one);
    for (u32 i = 0; i < 10; i++) cuMemsetD32Async(a, i, 1 << 20, gpu.one);
    cuEventRecord(to, gpu.one);
    cuEventRecord(untimed, gpu.one);
    EXPECT(cuEventElapsedTime(&milliseconds, from, to) == 600 && cuStreamSynchronize(gpu.one) == 0);
    EXPECT(cuEventElapsedTime(&milliseconds, from, to) == 0 && milliseconds > 0);
    EXPECT(cuEventElapsedTime(&milliseconds, from, untimed) == 400);
}

// Captures a -> b on one stream and a -> c on the other, joined by events; and d = b + 1, after c where `joined`.
static int capture(const Gpu& gpu, u32* const (&at)[4], bool joined, void** graph) {
    void *fork = nullptr, *join = nullptr;
    cuEventCreate(&fork, 2);
    cuEventCreate(&join, 2);
    cuStreamBeginCapture_v2(gpu.one, 1);
    cuMemsetD32Async(at[0], 10, 64, gpu.one);
    cuEventRecord(fork, gpu.one);
    cuStreamWaitEvent(gpu.other, fork, 0);
    enqueue_add(gpu, gpu.one, at[1], at[0], 1);
    enqueue_add(gpu, gpu.other, at[2], at[0], 2);
    cuEventRecord(join, gpu.other);
    if (joined) cuStreamWaitEvent(gpu.one, join, 0);
    enqueue_add(gpu, gpu.one, at[3], at[1], 3);
    return cuStreamEndCapture(gpu.one, graph);
}

static void replay() {
    Gpu gpu;
    u32* at[4];
    for (u32*& memory : at) memory = device<u32>(64);
    void *graph = nullptr, *exec = nullptr;
    size_t nodes = 0;
    u32 read[64];
    EXPECT(capture(gpu, at, false, &graph) == 904);
    int status = 1;
    EXPECT(cuStreamIsCapturing(gpu.other, &status) == 0 && status == 0);
    EXPECT(capture(gpu, at, true, &graph) == 0 && cuGraphGetNodes(graph, nullptr, &nodes) == 0 && nodes == 4);
    // Nothing has run yet.
    EXPECT(cuMemcpyDtoH_v2(read, at[3], 256) == 0 && read[0] == ~0u);
    EXPECT(cuGraphInstantiateWithFlags(&exec, graph, 0) == 0 && cuGraphDestroy(graph) == 0);
    for (int i = 0; i < 3; i++) {
        cuMemsetD32Async(at[3], 0, 64, gpu.one);
        EXPECT(cuGraphLaunch(exec, gpu.one) == 0);
    }
    EXPECT(cuGraphExecDestroy(exec) == 0 && cuStreamSynchronize(gpu.one) == 0);
    u32 expected[] = {10, 11, 12, 14};
    for (u32 i = 0; i < 4; i++) EXPECT(cuMemcpyDtoH_v2(read, at[i], 256) == 0 && read[63] == expected[i]);
}
TEST(eager_graphs_replay) { replay(); }
TEST(lazy_graphs_replay, "STREAMS=lazy") { replay(); }

TEST(a_graph_keeps_its_edges_alone, "STREAMS=lazy") {
    Gpu gpu;
    u32 *a = device<u32>(64), *b = device<u32>(64), read[64];
    void *fork = nullptr, *join = nullptr, *graph = nullptr, *exec = nullptr;
    cuEventCreate(&fork, 2);
    cuEventCreate(&join, 2);
    cuMemsetD32Async(a, 0, 64, gpu.one);
    cuStreamSynchronize(gpu.one);
    // The other stream reads what the first writes, with no edge between the two.
    cuStreamBeginCapture_v2(gpu.one, 1);
    cuEventRecord(fork, gpu.one);
    cuStreamWaitEvent(gpu.other, fork, 0);
    cuMemsetD32Async(a, 7, 64, gpu.one);
    enqueue_add(gpu, gpu.other, b, a, 0);
    cuEventRecord(join, gpu.other);
    cuStreamWaitEvent(gpu.one, join, 0);
    EXPECT(cuStreamEndCapture(gpu.one, &graph) == 0 && cuGraphInstantiateWithFlags(&exec, graph, 0) == 0);
    EXPECT(cuGraphLaunch(exec, gpu.one) == 0 && cuStreamSynchronize(gpu.one) == 0);
    EXPECT(cuMemcpyDtoH_v2(read, b, 256) == 0 && read[0] == 0);
}

TEST(a_graph_within_a_graph, "STREAMS=lazy") {
    Gpu gpu;
    u32* at[4];
    for (u32*& memory : at) memory = device<u32>(64);
    void *inner = nullptr, *outer = nullptr, *exec = nullptr;
    u32 read[64];
    EXPECT(capture(gpu, at, true, &inner) == 0 && cuGraphInstantiateWithFlags(&exec, inner, 0) == 0);
    // What is before the inner graph comes before it, and what is behind it after.
    cuStreamBeginCapture_v2(gpu.one, 1);
    cuMemsetD32Async(at[0], 1, 64, gpu.one);
    EXPECT(cuGraphLaunch(exec, gpu.one) == 0);
    enqueue_add(gpu, gpu.one, at[2], at[3], 5);
    EXPECT(cuStreamEndCapture(gpu.one, &outer) == 0 && cuGraphInstantiateWithFlags(&exec, outer, 0) == 0);
    EXPECT(cuGraphLaunch(exec, gpu.one) == 0 && cuStreamSynchronize(gpu.one) == 0);
    u32 expected[] = {10, 11, 19, 14};
    for (u32 i = 0; i < 4; i++) EXPECT(cuMemcpyDtoH_v2(read, at[i], 256) == 0 && read[63] == expected[i]);
}

TEST(captures_forbid_what_waits_or_allocates) {
    Gpu gpu;
    u32 *a = device<u32>(64), host[64];
    void *graph = nullptr, *event = nullptr, *memory = nullptr;
    cuEventCreate(&event, 2);
    auto spoiled = [&](auto call, int code) {
        cuStreamBeginCapture_v2(gpu.one, 1);
        bool refused = call() == code;
        return refused && cuMemsetD8Async(a, 0, 256, gpu.one) == 901 && cuStreamEndCapture(gpu.one, &graph) == 901;
    };
    EXPECT(spoiled([&] { return cuStreamSynchronize(gpu.one); }, 900));
    EXPECT(spoiled([&] { return cuStreamSynchronize(gpu.other); }, 900));
    EXPECT(spoiled([&] { return cuCtxSynchronize(); }, 900));
    EXPECT(spoiled([&] { return cuMemAlloc_v2(&memory, 1); }, 900));
    EXPECT(spoiled([&] { return cuMemFree_v2(a); }, 900));
    EXPECT(spoiled([&] { return cuMemcpyDtoHAsync_v2(host, a, 256, gpu.one); }, 900));
    // An event from before the capture.
    cuEventRecord(event, gpu.other);
    EXPECT(spoiled([&] { return cuStreamWaitEvent(gpu.one, event, 0); }, 905));
    // One from within it is nothing to wait for on the host.
    cuStreamBeginCapture_v2(gpu.one, 1);
    cuEventRecord(event, gpu.one);
    EXPECT(cuStreamEndCapture(gpu.one, &graph) == 0 && cuEventSynchronize(event) == 907);
    EXPECT(cuMemsetD8Async(a, 0, 256, gpu.one) == 0 && cuStreamSynchronize(gpu.one) == 0);
}
