// Modules, functions, launches: the image says which kernels there are, the host code of the same name runs.
#include <algorithm>
#include <sstream>

#include "driver.hpp"
#include "image.hpp"

#pragma GCC visibility push(hidden)
namespace driver {

struct Module {
    Device* device;
    Image image;
};
struct Function {
    const emulator::Kernel* kernel;
    const Module* module;
    size_t static_shared;
    size_t most_dynamic = 48 << 10;  // Until the attribute raises it.
};

constexpr int MAX_THREADS = 0, STATIC_SHARED = 1, REGISTERS = 4, BINARY_VERSION = 6, MOST_DYNAMIC_SHARED = 8;

// Pointers that a kernel gets are absent, or memory that its device reaches (or the end of such).
static void check_parameters(const emulator::Kernel& kernel, void* const* parameters) {
    for (size_t i = 0; i < kernel.parameters.size(); i++) {
        void* at = nullptr;
        if (!kernel.parameters[i].pointer) continue;
        std::memcpy(&at, parameters[i], sizeof at);
        if (at) check_access(at, 0, (std::string(kernel.name) + ", parameter " + std::to_string(i)).c_str());
    }
}

static std::string describe(const char* name, dim3 grid, dim3 block, size_t dynamic) {
    std::ostringstream text;
    text << "  " << name << " grid " << grid.x << " " << grid.y << " " << grid.z << " block " << block.x << " "
         << block.y << " " << block.z << " shared " << dynamic;
    return text.str();
}

// The parameters' values as they are now, and the launch with them whenever it comes.
static Body launch_body(const emulator::Kernel& kernel, dim3 grid, dim3 block, size_t dynamic, void** parameters) {
    constexpr size_t SLOT = 16;
    std::string values(kernel.parameters.size() * SLOT, '\0');
    for (size_t i = 0; i < kernel.parameters.size(); i++)
        std::memcpy(&values[i * SLOT], parameters[i], kernel.parameters[i].bytes);
    return [=, &kernel] {
        std::vector<void*> pointers;
        for (size_t i = 0; i < kernel.parameters.size(); i++)
            pointers.push_back(const_cast<char*>(values.data()) + i * SLOT);
        check_parameters(kernel, pointers.data());
        emulator::Failure failed = emulator::launch(kernel, grid, block, dynamic, pointers.data());
        if (!failed.what.empty()) throw Fault{failed.access ? ILLEGAL_ADDRESS : LAUNCH_FAILED, failed.what};
    };
}

static int active_blocks(const Function& function, int threads, size_t dynamic) {
    if (threads <= 0 || threads > int(function.kernel->threads)) return 0;
    // A block costs 1 KiB of shared memory of its own.
    size_t shared = function.static_shared + dynamic + 1024;
    size_t limit = size_t(settings().shared_limit()) + 1024;
    return int(std::min({limit / shared, size_t(2048) / size_t(threads), size_t(32)}));
}

}  // namespace driver
#pragma GCC visibility pop

using namespace driver;

static int load(void** module, const void* bytes) {
    Module made{current, {}};
    int error = read_image(bytes, settings().major * 10 + settings().minor, settings().version, made.image);
    if (!error) *module = new Module(std::move(made));
    return error;
}
EXPORT int cuModuleLoadData(void** module, const void* bytes) {
    ENTER(UNCAPTURED);
    return load(module, bytes);
}
EXPORT int cuModuleLoadDataEx(void** module, const void* bytes, unsigned, int*, void**) {
    ENTER(UNCAPTURED);
    return load(module, bytes);
}
EXPORT int cuModuleLoadFatBinary(void** module, const void* bytes) {
    ENTER(UNCAPTURED);
    return load(module, bytes);
}
EXPORT int cuModuleUnload(void* module) {
    ENTER(UNCAPTURED);
    for (Device* device : devices()) finish_device(device);
    delete static_cast<Module*>(module);
    return SUCCESS;
}
EXPORT int cuModuleGetFunction(void** handle, void* module_handle, const char* name) {
    ENTER(CONTEXT);
    Module* module = static_cast<Module*>(module_handle);
    if (!module) return INVALID_HANDLE;
    if (!module->image.has(name)) return NOT_FOUND;
    const emulator::Kernel* kernel = emulator::find_kernel(name);
    if (!kernel) {
        std::fprintf(stderr, "emulated CUDA: the stand-in driver was built without a kernel %s\n", name);
        return NOT_FOUND;
    }
    *handle = new Function{kernel, module, module->image.static_shared(name)};
    return SUCCESS;
}
EXPORT int cuFuncGetAttribute(int* value, int attribute, void* handle) {
    ENTER(CONTEXT);
    const Function* function = static_cast<Function*>(handle);
    const std::map<int, size_t> values = {
        {MAX_THREADS, function->kernel->threads},
        {STATIC_SHARED, function->static_shared},
        {REGISTERS, 32},
        {BINARY_VERSION, size_t(settings().major * 10 + settings().minor)},
        {MOST_DYNAMIC_SHARED, function->most_dynamic},
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : int(found->second);
    return SUCCESS;
}
EXPORT int cuFuncSetAttribute(void* handle, int attribute, int value) {
    ENTER(CONTEXT);
    Function* function = static_cast<Function*>(handle);
    if (attribute != MOST_DYNAMIC_SHARED) return SUCCESS;
    if (value < 0 || value + function->static_shared > size_t(settings().shared_limit())) return INVALID_VALUE;
    function->most_dynamic = size_t(value);
    return SUCCESS;
}
EXPORT int cuFuncSetCacheConfig(void*, int) {
    ENTER(CONTEXT);
    return SUCCESS;
}
EXPORT int cuFuncGetParamInfo(void* handle, size_t index, size_t* offset, size_t* bytes) {
    ENTER(CONTEXT);
    const std::vector<emulator::Parameter>& all = static_cast<Function*>(handle)->kernel->parameters;
    if (index >= all.size()) return INVALID_VALUE;
    // Each on a border of its own size.
    size_t at = 0;
    for (size_t i = 0; i <= index; i++) {
        at = (at + all[i].bytes - 1) / all[i].bytes * all[i].bytes;
        if (i < index) at += all[i].bytes;
    }
    *offset = at;
    if (bytes) *bytes = all[index].bytes;
    return SUCCESS;
}

EXPORT int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned dynamic, void* stream, void** parameters, void** extra) {
    ENTER(CONTEXT);
    const Function* function = static_cast<Function*>(handle);
    if (!function || function->module->device != stream_of(stream)->device) return INVALID_HANDLE;
    dim3 grid(gx, gy, gz), block(bx, by, bz);
    log_line(describe(function->kernel->name, grid, block, dynamic));
    bool sizes = grid.volume() && block.volume() && gx <= 0x7fffffff && gy <= 65535 && gz <= 65535 && bz <= 64;
    bool fits = block.volume() <= function->kernel->threads && dynamic <= function->most_dynamic &&
                dynamic + function->static_shared <= size_t(settings().shared_limit());
    if (!sizes || !fits || extra || (!parameters && !function->kernel->parameters.empty())) return INVALID_VALUE;
    return enqueue(stream_of(stream), launch_body(*function->kernel, grid, block, dynamic, parameters));
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* handle, int threads, size_t dynamic) {
    ENTER(CONTEXT);
    *blocks = active_blocks(*static_cast<Function*>(handle), threads, dynamic);
    return SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void* handle, int threads, size_t dynamic,
                                                                unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, handle, threads, dynamic);
}
EXPORT int cuOccupancyMaxPotentialBlockSize(int* grid, int* block, void* handle, size_t (*dynamic)(int), size_t fixed,
                                            int limit) {
    ENTER(CONTEXT);
    const Function& function = *static_cast<Function*>(handle);
    *block = int(function.kernel->threads);
    if (limit > 0) *block = std::min(*block, limit);
    *grid = settings().multiprocessors * active_blocks(function, *block, dynamic ? dynamic(*block) : fixed);
    return SUCCESS;
}
