// The stand-in driver (libcuda.so.1): devices, memory, streams as graphs of work, capture. One lock serves all calls,
// and work runs under it in the thread that enqueues it or waits for it.
#pragma once

#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "machine.hpp"

#define EXPORT extern "C" __attribute__((visibility("default")))

#pragma GCC visibility push(hidden)
namespace driver {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

struct Settings {
    int devices, version, major, minor, multiprocessors;
    uint64_t memory;
    bool lazy;
    int slow;  // The only stream that is lazy, counted from 0 as they are created; -1 for none.
    std::string log;

    int shared_limit() const;  // Bytes of shared memory that a block may ask for.
};
const Settings& settings();

struct Device;

// What a device does at some time; it may be run again, from a graph. Throws a `Fault`.
using Body = std::function<void()>;
struct Fault {
    int code;
    std::string what;
};
// Thrown by work that needs something from outside, which is not there yet: it is run again later.
struct Later {};

struct Work {
    Device* device;
    std::shared_ptr<const Body> body;  // Null for one that only joins others.
    std::vector<std::shared_ptr<Work>> after;
    bool done = false;
    std::chrono::steady_clock::time_point when;
};
using WorkRef = std::shared_ptr<Work>;

struct Node {
    std::shared_ptr<const Body> body;
    std::vector<size_t> after;
};
struct Graph {
    std::vector<Node> nodes;
};
struct GraphExec {
    Graph graph;
    WorkRef last;  // Launches of one graph do not overlap.
};

struct Stream;
struct Capture {
    Graph graph;
    Stream* origin;
    std::thread::id thread;
    std::vector<Stream*> streams;
    bool relaxed = false, invalid = false;
};
using CaptureRef = std::shared_ptr<Capture>;

struct Stream {
    Device* device;
    unsigned flags;
    int priority;
    WorkRef last;
    CaptureRef capture;          // While what is enqueued becomes nodes,
    std::vector<size_t> leaves;  // of which the next comes after these.
    int number = -1;             // In the order of creation; the null stream has none.

    bool blocking() const { return !(flags & 1); }
    // Whether its work runs only when something waits for it.
    bool lazy() const { return settings().lazy || (number >= 0 && number == settings().slow); }
};

struct Event {
    Device* device;
    unsigned flags;
    WorkRef work;          // Null until it is recorded.
    CaptureRef capture;    // Recorded in a capture, after these nodes.
    std::vector<size_t> nodes;
    unsigned queries = 0;
};

// A context is its device's primary one.
struct Device {
    explicit Device(int ordinal) : ordinal(ordinal) {}
    int ordinal;
    int sticky = 0;  // The error that no call gets past.
    uint64_t used = 0;
    Stream null_stream{this, 0, 0, nullptr, nullptr, {}};
    std::vector<Stream*> streams{&null_stream};
    int created = 0;  // Streams so far.
    std::vector<WorkRef> orphans;  // Of destroyed streams.
};
std::vector<Device*>& devices();
extern thread_local Device* current;

struct Range {
    size_t bytes;
    Device* device;  // Null: pinned host memory.
};
// Live allocations by their first address.
std::map<uintptr_t, Range>& allocations();
// The allocation that holds all of the bytes; null where none does.
const Range* find_range(const void* at, size_t bytes);
// Throws a fault unless the bytes are memory that the device reaches.
void check_access(const void* at, size_t bytes, const char* what);

// How each entry point begins. Needs, beside that the driver is initialised:
enum Needs { NOTHING = 0, INITIALIZED = 1, CONTEXT = 3, UNCAPTURED = 7 };
struct Call {
    std::unique_lock<std::recursive_mutex> lock;
    int error;
    Call(const char* name, Needs needs);
};
#define ENTER(needs)                      \
    driver::Call call(__func__, needs);   \
    if (call.error) return call.error
// What serves all calls, one after the other.
std::recursive_mutex& big_lock();
// Adds a line to the log.
void log_line(const std::string& text);

// The stream behind a handle: null is the device's own.
Stream* stream_of(void* handle);
// Appends to the stream, or to the graph that is being captured from it.
int enqueue(Stream* stream, Body body);
// Appends a point that comes after `after` too; for internal joins and events.
WorkRef enqueue_join(Stream* stream, std::vector<WorkRef> after);
int launch_graph(GraphExec& exec, Stream* stream);
// Runs it and all that it comes after, as far as that is possible now. False where some of it waits from outside.
bool advance(const WorkRef& work);
// The same, until it is done.
void finish(const WorkRef& work);
void finish_device(Device* device);
// A call that this capture cannot bear.
int invalidate(Capture& capture, int code);

}  // namespace driver
#pragma GCC visibility pop
