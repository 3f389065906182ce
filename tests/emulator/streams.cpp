// Streams and events: work is a graph of what comes after what. Eager streams run it when it is enqueued; lazy ones
// when something waits for it, and of what may run, the latest enqueued first (or what a seed chooses), so that an
// order that nobody asked for is not kept. One lazy stream beside eager ones is a slow device whose others run ahead.
#include <algorithm>

#include "driver.hpp"

namespace driver {

// Work that waits from outside goes on by itself, as on a device: a thread tries it again and again.
static void go_on_alone(const WorkRef& waiting) {
    static auto* all = new std::vector<WorkRef>;
    static bool started = false;
    if (!std::ranges::count(*all, waiting)) all->push_back(waiting);
    if (started) return;
    started = true;
    std::thread([] {
        for (;; std::this_thread::sleep_for(std::chrono::microseconds(200))) {
            std::lock_guard lock(big_lock());
            for (const WorkRef& work : std::vector<WorkRef>(*all)) advance(work);
            size_t before = all->size();
            std::erase_if(*all, [](const WorkRef& work) { return work->done; });
            if (all->size() == before) continue;
            // What came after it.
            for (Device* device : devices())
                for (Stream* stream : device->streams)
                    if (!stream->lazy()) advance(stream->last);
        }
    }).detach();
}

static bool execute(const WorkRef& ref) {
    Work& work = *ref;
    if (work.body && !work.device->sticky) {
        Device* before = current;
        current = work.device;
        try {
            (*work.body)();
        } catch (const Fault& fault) {
            std::fprintf(stderr, "emulated CUDA: %s\n", fault.what.c_str());
            work.device->sticky = fault.code;
        } catch (const Later&) {
            current = before;
            go_on_alone(ref);
            return false;
        }
        current = before;
    }
    work.body = nullptr;
    work.done = true;
    work.when = std::chrono::steady_clock::now();
    return true;
}

bool advance(const WorkRef& target) {
    if (!target || target->done) return true;
    static uint64_t random = emulator::options.seed;
    std::vector<WorkRef> path{target};
    while (!path.empty()) {
        WorkRef work = path.back();
        std::erase_if(work->after, [](const WorkRef& before) { return before->done; });
        if (work->after.empty()) {
            path.pop_back();
            if (!work->done && !execute(work)) return false;
            continue;
        }
        size_t chosen = work->after.size() - 1;
        if (emulator::options.seed) {
            random = random * 6364136223846793005 + 1442695040888963407;
            chosen = (random >> 33) % work->after.size();
        }
        path.push_back(work->after[chosen]);
    }
    return true;
}

void finish(const WorkRef& target) {
    while (!advance(target)) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

void finish_device(Device* device) {
    for (size_t i = device->streams.size(); i-- > 0;) finish(device->streams[i]->last);
    for (const WorkRef& work : device->orphans) finish(work);
    device->orphans.clear();
}

Stream* stream_of(void* handle) {
    // 0, and the names of the legacy and of the thread's default stream.
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return &current->null_stream;
    return static_cast<Stream*>(handle);
}

static bool is_live(Stream* stream) {
    for (Device* device : devices())
        if (std::ranges::count(device->streams, stream)) return true;
    return false;
}

// What the next work of the stream comes after: its last, and the null stream's for streams that it blocks.
static std::vector<WorkRef> predecessors(Stream* stream) {
    std::vector<WorkRef> after;
    for (Stream* other : stream->device->streams) {
        bool null = other == &stream->device->null_stream || stream == &stream->device->null_stream;
        bool ordered = other == stream || (null && other->blocking() && stream->blocking());
        if (ordered && other->last && !other->last->done) after.push_back(other->last);
    }
    return after;
}

static WorkRef append(Stream* stream, std::shared_ptr<const Body> body, std::vector<WorkRef> after) {
    for (WorkRef& work : predecessors(stream)) after.insert(after.begin(), work);
    std::erase_if(after, [](const WorkRef& work) { return !work || work->done; });
    stream->last = std::make_shared<Work>(Work{stream->device, std::move(body), std::move(after), false, {}});
    if (!stream->lazy()) advance(stream->last);
    return stream->last;
}

int enqueue(Stream* stream, Body body) {
    if (!is_live(stream)) return INVALID_HANDLE;
    auto shared = std::make_shared<const Body>(std::move(body));
    if (stream == &stream->device->null_stream)
        for (Stream* other : stream->device->streams)
            if (other->capture && other->blocking()) return invalidate(*other->capture, CAPTURE_IMPLICIT);
    if (!stream->capture) {
        append(stream, shared, {});
        return SUCCESS;
    }
    if (stream->capture->invalid) return CAPTURE_INVALIDATED;
    std::vector<Node>& nodes = stream->capture->graph.nodes;
    nodes.push_back({shared, stream->leaves});
    stream->leaves = {nodes.size() - 1};
    return SUCCESS;
}

WorkRef enqueue_join(Stream* stream, std::vector<WorkRef> after) { return append(stream, nullptr, std::move(after)); }

// Each node after those that its edges name, and after nothing else of the graph.
int launch_graph(GraphExec& exec, Stream* stream) {
    if (stream->capture) {
        // Captured in turn: the nodes become the outer graph's.
        std::vector<Node>& nodes = stream->capture->graph.nodes;
        size_t first = nodes.size();
        std::vector<bool> leaf(exec.graph.nodes.size(), true);
        for (Node node : exec.graph.nodes) {
            for (size_t& before : node.after) leaf[before] = false, before += first;
            if (node.after.empty()) node.after = stream->leaves;
            nodes.push_back(std::move(node));
        }
        if (!leaf.empty()) stream->leaves.clear();
        for (size_t i = 0; i < leaf.size(); i++)
            if (leaf[i]) stream->leaves.push_back(first + i);
        return SUCCESS;
    }
    WorkRef entry = enqueue_join(stream, {exec.last});
    std::vector<WorkRef> works;
    for (const Node& node : exec.graph.nodes) {
        std::vector<WorkRef> after;
        for (size_t before : node.after) after.push_back(works[before]);
        if (after.empty()) after.push_back(entry);
        works.push_back(std::make_shared<Work>(Work{stream->device, node.body, std::move(after), false, {}}));
        if (!stream->lazy()) advance(works.back());
    }
    exec.last = enqueue_join(stream, std::move(works));
    return SUCCESS;
}

}  // namespace driver

using namespace driver;

static Stream* create_stream(unsigned flags, int priority) {
    Stream* made = new Stream{current, flags, std::max(-5, std::min(0, priority)), nullptr, nullptr, {}, current->created++};
    current->streams.push_back(made);
    return made;
}
EXPORT int cuStreamCreate(void** stream, unsigned flags) {
    ENTER(CONTEXT);
    *stream = create_stream(flags, 0);
    return SUCCESS;
}
EXPORT int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
    ENTER(CONTEXT);
    *stream = create_stream(flags, priority);
    return SUCCESS;
}
EXPORT int cuStreamDestroy_v2(void* handle) {
    ENTER(INITIALIZED);
    Stream* stream = static_cast<Stream*>(handle);
    if (!handle || !is_live(stream)) return INVALID_HANDLE;
    if (stream->capture) invalidate(*stream->capture, CAPTURE_INVALIDATED);
    // Its work goes on without it.
    stream->device->orphans.push_back(stream->last);
    std::erase(stream->device->streams, stream);
    delete stream;
    return SUCCESS;
}
EXPORT int cuStreamGetPriority(void* handle, int* priority) {
    ENTER(CONTEXT);
    *priority = stream_of(handle)->priority;
    return SUCCESS;
}
EXPORT int cuStreamSynchronize(void* handle) {
    ENTER(UNCAPTURED);
    Stream* stream = stream_of(handle);
    if (!is_live(stream)) return INVALID_HANDLE;
    if (stream->capture) return invalidate(*stream->capture, CAPTURE_UNSUPPORTED);
    for (const WorkRef& work : predecessors(stream)) finish(work);
    return current->sticky;
}
// What is asked for twice runs, lest a loop of questions has no end.
static int question(const WorkRef& work, unsigned& asked) {
    if (!work || work->done) return SUCCESS;
    if (asked++ % 2 == 0) return NOT_READY;
    return advance(work) ? work->device->sticky : NOT_READY;
}
EXPORT int cuStreamQuery(void* handle) {
    ENTER(UNCAPTURED);
    static unsigned asked = 0;
    Stream* stream = stream_of(handle);
    if (stream->capture) return invalidate(*stream->capture, CAPTURE_UNSUPPORTED);
    return question(stream->last, asked);
}
EXPORT int cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
    ENTER(CONTEXT);
    return enqueue(stream_of(handle), [=] { function(data); });
}

EXPORT int cuEventCreate(void** event, unsigned flags) {
    ENTER(CONTEXT);
    *event = new Event{current, flags, nullptr, nullptr, {}};
    return SUCCESS;
}
EXPORT int cuEventDestroy_v2(void* event) {
    ENTER(INITIALIZED);
    delete static_cast<Event*>(event);
    return SUCCESS;
}
EXPORT int cuEventRecord(void* handle, void* stream_handle) {
    ENTER(CONTEXT);
    Event* event = static_cast<Event*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !is_live(stream) || event->device != stream->device) return INVALID_HANDLE;
    event->capture = stream->capture;
    event->nodes = stream->leaves;
    event->queries = 0;
    if (!stream->capture) event->work = enqueue_join(stream, {});
    return stream->capture && stream->capture->invalid ? CAPTURE_INVALIDATED : SUCCESS;
}
EXPORT int cuStreamWaitEvent(void* stream_handle, void* handle, unsigned) {
    ENTER(CONTEXT);
    Event* event = static_cast<Event*>(handle);
    Stream* stream = stream_of(stream_handle);
    if (!event || !is_live(stream)) return INVALID_HANDLE;
    if (!event->capture) {
        if (stream->capture) return event->work ? invalidate(*stream->capture, CAPTURE_ISOLATION) : SUCCESS;
        if (event->work) enqueue_join(stream, {event->work});
        return SUCCESS;
    }
    if (event->capture->invalid) return CAPTURE_INVALIDATED;
    if (stream->capture && stream->capture != event->capture) return invalidate(*stream->capture, CAPTURE_MERGE);
    if (!stream->capture) {
        // The stream joins the capture that the event belongs to, if that still goes on.
        if (!event->capture->origin) return INVALID_VALUE;
        stream->capture = event->capture;
        stream->capture->streams.push_back(stream);
    }
    for (size_t node : event->nodes)
        if (!std::ranges::count(stream->leaves, node)) stream->leaves.push_back(node);
    return SUCCESS;
}
EXPORT int cuEventSynchronize(void* handle) {
    ENTER(UNCAPTURED);
    Event* event = static_cast<Event*>(handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    finish(event->work);
    return current->sticky;
}
EXPORT int cuEventQuery(void* handle) {
    ENTER(UNCAPTURED);
    Event* event = static_cast<Event*>(handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    return question(event->work, event->queries);
}
EXPORT int cuEventElapsedTime_v2(float* milliseconds, void* from, void* to) {
    ENTER(CONTEXT);
    Event *start = static_cast<Event*>(from), *end = static_cast<Event*>(to);
    if (!start->work || !end->work || (start->flags | end->flags) & 2) return INVALID_HANDLE;
    if (!start->work->done || !end->work->done) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(end->work->when - start->work->when).count();
    return SUCCESS;
}
EXPORT int cuEventElapsedTime(float* milliseconds, void* from, void* to) {
    return cuEventElapsedTime_v2(milliseconds, from, to);
}

// For the stand-ins of other libraries (cublasLt): work on a stream with a copy of its argument, run with the text of
// what went wrong to fill (at most 256 bytes); and a check of an operand.
EXPORT int emulated_enqueue(void* stream, const char* name, void (*run)(const void*, char*), const void* data,
                            size_t n) {
    Call call(name, CONTEXT);
    if (call.error) return call.error;
    std::string copy(static_cast<const char*>(data), n);
    return enqueue(stream_of(stream), [=] {
        char failed[256] = "";
        run(copy.data(), failed);
        if (*failed) throw Fault{ILLEGAL_ADDRESS, failed};
    });
}
// The same of work that asks for another try by returning nonzero: it waits for another process.
EXPORT int emulated_enqueue_waiting(void* stream, const char* name, int (*run)(void*, char*), void* data) {
    Call call(name, CONTEXT);
    if (call.error) return call.error;
    return enqueue(stream_of(stream), [=] {
        char failed[256] = "";
        if (run(data, failed)) throw Later{};
        if (*failed) throw Fault{ILLEGAL_ADDRESS, failed};
    });
}
EXPORT int emulated_reaches(const void* at, size_t bytes) {
    const Range* range = find_range(at, bytes);
    return range && (!range->device || range->device == current);
}
