// Device memory, pinned host memory, copies.
#include <sys/mman.h>

#include <algorithm>

#include "driver.hpp"

namespace driver {

std::map<uintptr_t, Range>& allocations() {
    static std::map<uintptr_t, Range>* all = new std::map<uintptr_t, Range>;
    return *all;
}

const Range* find_range(const void* at, size_t bytes) {
    uintptr_t from = reinterpret_cast<uintptr_t>(at);
    auto next = allocations().upper_bound(from);
    if (next == allocations().begin()) return nullptr;
    auto& [first, range] = *std::prev(next);
    return from - first <= range.bytes && bytes <= range.bytes - (from - first) ? &range : nullptr;
}

void check_access(const void* at, size_t bytes, const char* what) {
    const Range* range = find_range(at, bytes);
    if (range && (!range->device || range->device == current)) return;
    char text[160];
    std::snprintf(text, sizeof text, "%s: %zu bytes at %p are no memory of device %d", what, bytes, at,
                  current->ordinal);
    throw Fault{ILLEGAL_ADDRESS, text};
}

// Not a number in any format, and far off as an index.
constexpr int POISON = 0xff;
constexpr size_t BORDER = 256, PAGE = 4096;

// An allocation lies between pages that nothing may touch, its end close to the second, since it begins on a border of
// 256 bytes. A sanitizer's allocator knows the end exactly.
#ifdef __SANITIZE_ADDRESS__
static void* get_memory(size_t bytes) {
    void* at = nullptr;
    return posix_memalign(&at, BORDER, bytes) == 0 ? at : nullptr;
}
static void give_memory_back(void* at, size_t) { free(at); }
#else
static size_t pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }
static void* get_memory(size_t bytes) {
    void* all = mmap(nullptr, pages(bytes) + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(all) + PAGE;
    if (mprotect(first, pages(bytes), PROT_READ | PROT_WRITE) != 0) return nullptr;
    return first + (pages(bytes) - bytes) / BORDER * BORDER;
}
static void give_memory_back(void* at, size_t bytes) {
    char* first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(at) / PAGE * PAGE);
    munmap(first - PAGE, pages(bytes) + 2 * PAGE);
}
#endif

static void* allocate(size_t bytes, Device* device) {
    if (device && device->used + bytes > settings().memory) return nullptr;
    void* at = get_memory(bytes);
    if (!at) return nullptr;
    if (device) device->used += bytes;
    allocations()[reinterpret_cast<uintptr_t>(at)] = {bytes, device};
    return at;
}

static int release(void* at) {
    auto found = allocations().find(reinterpret_cast<uintptr_t>(at));
    if (found == allocations().end()) return INVALID_VALUE;
    auto [bytes, device] = found->second;
    if (device) device->used -= bytes;
    allocations().erase(found);
    give_memory_back(at, bytes);
    return SUCCESS;
}

static bool is_pinned(const void* at, size_t bytes) {
    const Range* range = find_range(at, bytes);
    return range && !range->device;
}

// Both sides in device or pinned memory.
static int copy_on_stream(void* to, const void* from, size_t bytes, Stream* stream) {
    return enqueue(stream, [=] {
        check_access(to, bytes, "a copy's destination");
        check_access(from, bytes, "a copy's source");
        std::memmove(to, from, bytes);
    });
}

// From memory that is not pinned the source is read before the call returns, and nothing else is done by then.
static int copy_to_device(void* to, const void* from, size_t bytes, Stream* stream) {
    if (is_pinned(from, bytes)) return copy_on_stream(to, from, bytes, stream);
    if (stream->capture) return invalidate(*stream->capture, CAPTURE_UNSUPPORTED);
    auto staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
    return enqueue(stream, [=] {
        check_access(to, bytes, "a copy's destination");
        std::memcpy(to, staged->data(), bytes);
    });
}

// Into memory that is not pinned the copy is over when the call returns.
static int copy_from_device(void* to, const void* from, size_t bytes, Stream* stream) {
    if (is_pinned(to, bytes)) return copy_on_stream(to, from, bytes, stream);
    if (stream->capture) return invalidate(*stream->capture, CAPTURE_UNSUPPORTED);
    int error = enqueue(stream, [=] {
        check_access(from, bytes, "a copy's source");
        std::memcpy(to, from, bytes);
    });
    if (!error) finish(stream->last);
    return error ? error : current->sticky;
}

template <class T> static int fill(void* to, T value, size_t count, Stream* stream) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(T) != 0) return INVALID_VALUE;
    return enqueue(stream, [=] {
        check_access(to, count * sizeof(T), "memory to set");
        std::fill_n(static_cast<T*>(to), count, value);
    });
}

static int finish_null_stream(int error) {
    if (error) return error;
    finish(current->null_stream.last);
    return current->sticky;
}

}  // namespace driver

using namespace driver;

EXPORT int cuMemAlloc_v2(void** at, size_t bytes) {
    ENTER(UNCAPTURED);
    if (bytes == 0) return INVALID_VALUE;
    *at = allocate(bytes, current);
    if (!*at) return OUT_OF_MEMORY;
    std::memset(*at, POISON, bytes);
    return SUCCESS;
}
// In a capture it would become the graph's own memory, which the emulated driver does not have.
EXPORT int cuMemAllocAsync(void** at, size_t bytes, void* handle) {
    ENTER(UNCAPTURED);
    if (bytes == 0) return INVALID_VALUE;
    void* made = *at = allocate(bytes, current);
    if (!made) return OUT_OF_MEMORY;
    return enqueue(stream_of(handle), [=] { std::memset(made, POISON, bytes); });
}
EXPORT int cuMemFree_v2(void* at) {
    ENTER(UNCAPTURED);
    if (!at) return SUCCESS;
    finish_device(current);
    return release(at);
}
EXPORT int cuMemFreeAsync(void* at, void* handle) {
    ENTER(UNCAPTURED);
    return enqueue(stream_of(handle), [=] {
        if (release(at) != SUCCESS) throw Fault{ILLEGAL_ADDRESS, "cuMemFreeAsync of what is not allocated"};
    });
}
EXPORT int cuMemGetInfo_v2(size_t* free, size_t* total) {
    ENTER(CONTEXT);
    *total = settings().memory;
    *free = *total - current->used;
    return SUCCESS;
}
EXPORT int cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    ENTER(UNCAPTURED);
    *at = allocate(bytes, nullptr);
    if (!*at) return OUT_OF_MEMORY;
    std::memset(*at, POISON, bytes);
    return SUCCESS;
}
EXPORT int cuMemFreeHost(void* at) {
    ENTER(UNCAPTURED);
    for (Device* device : devices()) finish_device(device);
    return release(at);
}
EXPORT int cuMemHostGetDevicePointer_v2(void** device, void* host, unsigned) {
    ENTER(CONTEXT);
    *device = host;
    return is_pinned(host, 0) ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuMemHostRegister_v2(void* at, size_t bytes, unsigned) {
    ENTER(UNCAPTURED);
    allocations()[reinterpret_cast<uintptr_t>(at)] = {bytes, nullptr};
    return SUCCESS;
}
EXPORT int cuMemHostUnregister(void* at) {
    ENTER(UNCAPTURED);
    for (Device* device : devices()) finish_device(device);
    return allocations().erase(reinterpret_cast<uintptr_t>(at)) ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuPointerGetAttribute(void* value, int attribute, void* at) {
    ENTER(CONTEXT);
    const Range* range = find_range(at, 1);
    if (!range || (attribute != 2 && attribute != 9)) return INVALID_VALUE;
    // The kind of memory (1 host, 2 device), or the device's ordinal.
    int device = range->device ? range->device->ordinal : 0;
    int answer = attribute == 9 ? device : range->device ? 2 : 1;
    std::memcpy(value, &answer, sizeof answer);
    return SUCCESS;
}

EXPORT int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* handle) {
    ENTER(CONTEXT);
    return copy_to_device(to, from, bytes, stream_of(handle));
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* handle) {
    ENTER(CONTEXT);
    return copy_from_device(to, from, bytes, stream_of(handle));
}
EXPORT int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* handle) {
    ENTER(CONTEXT);
    return copy_on_stream(to, from, bytes, stream_of(handle));
}
EXPORT int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(UNCAPTURED);
    return finish_null_stream(copy_to_device(to, from, bytes, &current->null_stream));
}
EXPORT int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) {
    ENTER(UNCAPTURED);
    return finish_null_stream(copy_from_device(to, from, bytes, &current->null_stream));
}
EXPORT int cuMemcpyDtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(UNCAPTURED);
    return copy_on_stream(to, from, bytes, &current->null_stream);
}
// Between devices (their contexts are the devices).
EXPORT int cuMemcpyPeerAsync(void* to, void*, const void* from, void*, size_t bytes, void* handle) {
    ENTER(CONTEXT);
    if (!find_range(to, bytes) || !find_range(from, bytes)) return INVALID_VALUE;
    return enqueue(stream_of(handle), [=] { std::memmove(to, from, bytes); });
}
EXPORT int cuMemsetD8Async(void* to, uint8_t value, size_t count, void* handle) {
    ENTER(CONTEXT);
    return fill(to, value, count, stream_of(handle));
}
EXPORT int cuMemsetD16Async(void* to, uint16_t value, size_t count, void* handle) {
    ENTER(CONTEXT);
    return fill(to, value, count, stream_of(handle));
}
EXPORT int cuMemsetD32Async(void* to, uint32_t value, size_t count, void* handle) {
    ENTER(CONTEXT);
    return fill(to, value, count, stream_of(handle));
}
EXPORT int cuMemsetD8_v2(void* to, uint8_t value, size_t count) {
    ENTER(UNCAPTURED);
    return fill(to, value, count, &current->null_stream);
}

EXPORT int cuDeviceGetDefaultMemPool(void** pool, int device) {
    ENTER(INITIALIZED);
    *pool = devices()[size_t(device)];
    return SUCCESS;
}
EXPORT int cuMemPoolSetAttribute(void*, int, void*) {
    ENTER(INITIALIZED);
    return SUCCESS;
}
EXPORT int cuMemPoolTrimTo(void*, size_t) {
    ENTER(INITIALIZED);
    return SUCCESS;
}
