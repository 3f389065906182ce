// Devices, contexts, settings, errors.
#include "driver.hpp"

#include <dlfcn.h>

#include <fstream>
#include <set>
#include <sstream>

namespace driver {

static std::string variable(const char* name, const char* otherwise) {
    const char* value = std::getenv((std::string("MUPSCALE_EMULATED_") + name).c_str());
    return value && *value ? value : otherwise;
}

static uint64_t bytes_of(const std::string& text) {
    char* end = nullptr;
    double value = std::strtod(text.c_str(), &end);
    const char* units = "KMGT";
    const char* unit = *end ? std::strchr(units, *end & ~32) : nullptr;
    return uint64_t(value * (unit ? double(1ull << 10 * (unit - units + 1)) : 1));
}

static Settings read_settings() {
    Settings s;
    s.devices = std::stoi(variable("GPUS", "1"));
    s.version = std::stoi(variable("DRIVER", "13000"));
    s.multiprocessors = std::stoi(variable("MULTIPROCESSORS", "16"));
    std::sscanf(variable("CAPABILITY", "9.0").c_str(), "%d.%d", &s.major, &s.minor);
    s.memory = bytes_of(variable("MEMORY", "4G"));
    std::string streams = variable("STREAMS", "eager");
    s.lazy = streams == "lazy";
    if (std::sscanf(streams.c_str(), "slow-%d", &s.slow) != 1) s.slow = -1;
    s.log = variable("LOG", "");
    return s;
}

const Settings& settings() {
    static const Settings* read = new Settings(read_settings());
    return *read;
}

int Settings::shared_limit() const {
    // CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    if (major == 8 && minor == 0) return 163 << 10;
    if (major == 9 || major == 10) return 227 << 10;
    return 99 << 10;
}

// Like all that lasts here never destroyed: a program's threads may call until the process has gone.
std::vector<Device*>& devices() {
    static auto* all = new std::vector<Device*>;
    return *all;
}
thread_local Device* current = nullptr;

// FAIL=cuLaunchKernel:17:700,...: the 17th call of that name fails with error 700.
static int injected(const std::string& name) {
    struct Rule {
        std::string name;
        uint64_t call;
        int code;
    };
    static const auto* rules = [] {
        auto* rules = new std::vector<Rule>;
        std::stringstream text(variable("FAIL", ""));
        for (std::string part; std::getline(text, part, ',');) {
            size_t a = part.find(':'), b = part.find(':', a + 1);
            rules->push_back({part.substr(0, a), std::stoull(part.substr(a + 1)), std::stoi(part.substr(b + 1))});
        }
        return rules;
    }();
    static auto* calls = new std::map<std::string, uint64_t>;
    if (rules->empty()) return SUCCESS;
    uint64_t count = ++(*calls)[name];
    for (const Rule& rule : *rules)
        if (rule.name == name && rule.call == count) return rule.code;
    return SUCCESS;
}

void log_line(const std::string& text) {
    if (settings().log.empty()) return;
    static auto* log = new std::ofstream(settings().log, std::ios::app);
    *log << text << std::endl;
}

std::recursive_mutex& big_lock() {
    static std::recursive_mutex* lock = new std::recursive_mutex;
    return *lock;
}

static bool is_sticky(int code) { return (code >= 700 && code <= 720 && code != 701) || code == 214 || code == 999; }

Call::Call(const char* name, Needs needs) : lock(big_lock()), error(SUCCESS) {
    log_line(name);
    if (needs >= INITIALIZED && devices().empty()) error = NOT_INITIALIZED;
    else if (needs >= CONTEXT && !current) error = INVALID_CONTEXT;
    else if (needs >= CONTEXT && current->sticky) error = current->sticky;
    else if ((error = injected(name)) && is_sticky(error) && current) current->sticky = error;
    if (error || needs != UNCAPTURED) return;
    // A capture forbids its own thread what could wait for the device or allocate.
    for (Device* device : devices())
        for (Stream* stream : device->streams) {
            Capture* capture = stream->capture.get();
            if (!capture || capture->relaxed || capture->thread != std::this_thread::get_id()) continue;
            error = invalidate(*capture, CAPTURE_UNSUPPORTED);
        }
}

static const std::map<int, int>& attributes() {
    static const auto* values = [] {
        const Settings& s = settings();
        int kib = 1 << 10;
        // The numbers of CUdevice_attribute: limits of a block and a grid, memory, clocks, what is supported.
        return new std::map<int, int>{
            {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 0x7fffffff}, {6, 65535}, {7, 65535}, {8, 48 * kib},
            {9, 64 * kib}, {10, 32}, {11, 0x7fffffff}, {12, 65536}, {13, 1980000}, {14, 512}, {15, 1},
            {16, s.multiprocessors}, {19, 1}, {31, 1}, {33, 0}, {34, 0}, {36, 2619000}, {37, 5120},
            {38, 50 * kib * kib},
            {39, 2048}, {40, 3}, {41, 1}, {50, 0}, {75, s.major}, {76, s.minor}, {78, 1}, {79, 1}, {80, 1},
            {81, s.shared_limit() + kib}, {82, 65536}, {95, 1}, {97, s.shared_limit()}, {106, 32}, {111, kib}, {115, 1},
        };
    }();
    return *values;
}

}  // namespace driver

using namespace driver;

EXPORT int cuInit(unsigned) {
    ENTER(NOTHING);
    if (settings().devices == 0) return NO_DEVICE;
    while (int(devices().size()) < settings().devices) devices().push_back(new Device(int(devices().size())));
    return SUCCESS;
}
EXPORT int cuDriverGetVersion(int* version) {
    *version = settings().version;
    return SUCCESS;
}
// NVRTC asks for a table of functions that nobody documents, and goes on without one.
EXPORT int cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}
EXPORT int cuDeviceGetCount(int* count) {
    ENTER(INITIALIZED);
    *count = int(devices().size());
    return SUCCESS;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
    ENTER(INITIALIZED);
    if (ordinal < 0 || ordinal >= int(devices().size())) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
    ENTER(INITIALIZED);
    std::snprintf(name, size_t(length), "Emulated GPU");
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid_v2(char* uuid, int device) {
    ENTER(INITIALIZED);
    std::memset(uuid, 0, 16);
    uuid[15] = char(device);
    return SUCCESS;
}
EXPORT int cuDeviceGetUuid(char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
EXPORT int cuDeviceGetPCIBusId(char* text, int length, int device) {
    ENTER(INITIALIZED);
    std::snprintf(text, size_t(length), "0000:%02x:00.0", device);
    return SUCCESS;
}
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    ENTER(INITIALIZED);
    *bytes = settings().memory;
    return SUCCESS;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    ENTER(INITIALIZED);
    if (device < 0 || device >= int(devices().size())) return INVALID_DEVICE;
    auto found = attributes().find(attribute);
    *value = found == attributes().end() ? 0 : found->second;
    return SUCCESS;
}
EXPORT int cuDeviceCanAccessPeer(int* can, int, int) {
    ENTER(INITIALIZED);
    *can = 1;
    return SUCCESS;
}
EXPORT int cuCtxEnablePeerAccess(void*, unsigned) {
    ENTER(CONTEXT);
    return SUCCESS;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    ENTER(INITIALIZED);
    if (device < 0 || device >= int(devices().size())) return INVALID_DEVICE;
    *context = devices()[size_t(device)];
    return SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRelease_v2(int) {
    ENTER(INITIALIZED);
    return SUCCESS;
}
EXPORT int cuCtxSetCurrent(void* context) {
    ENTER(INITIALIZED);
    current = static_cast<Device*>(context);
    return SUCCESS;
}
EXPORT int cuCtxGetCurrent(void** context) {
    ENTER(INITIALIZED);
    *context = current;
    return SUCCESS;
}
EXPORT int cuCtxGetDevice(int* device) {
    ENTER(CONTEXT);
    *device = current->ordinal;
    return SUCCESS;
}
EXPORT int cuCtxSetFlags(unsigned) {
    ENTER(CONTEXT);
    return SUCCESS;
}
EXPORT int cuCtxSynchronize() {
    ENTER(UNCAPTURED);
    finish_device(current);
    return current->sticky;
}
EXPORT int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    ENTER(CONTEXT);
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}

static const std::map<int, const char*>& names() {
    static const std::map<int, const char*> names = {
        {SUCCESS, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
        {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"}, {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
        {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"}, {NOT_READY, "CUDA_ERROR_NOT_READY"},
        {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
        {716, "CUDA_ERROR_MISALIGNED_ADDRESS"}, {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
        {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"}, {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
        {CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE"}, {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"},
        {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
        {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
        {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"}, {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT"},
        {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"}, {999, "CUDA_ERROR_UNKNOWN"},
    };
    return names;
}
EXPORT int cuGetErrorName(int code, const char** name) {
    auto found = names().find(code);
    *name = found == names().end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return SUCCESS;
}
// In words of the emulator's own, so that nobody takes them for a device's.
EXPORT int cuGetErrorString(int code, const char** text) {
    static std::map<int, std::string> texts;
    static std::mutex lock;
    std::lock_guard guard(lock);
    const char* name = nullptr;
    cuGetErrorName(code, &name);
    std::string words = "emulated error";
    for (const char* p = name + (code ? 10 : 4); *p; p++) words += *p == '_' ? ' ' : char(*p | 32);
    *text = (texts[code] = words).c_str();
    return SUCCESS;
}
EXPORT int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    // Names of later forms come first, as the newest is asked for.
    *function = nullptr;
    for (const char* form : {"_v2", ""})
        if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + form).c_str());
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
EXPORT int cuProfilerStart() { return SUCCESS; }
EXPORT int cuProfilerStop() { return SUCCESS; }
