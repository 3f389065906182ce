// Capture of streams into graphs, and graphs.
#include <algorithm>

#include "driver.hpp"

namespace driver {

int invalidate(Capture& capture, int code) {
    capture.invalid = true;
    return code;
}

// Whether each node comes before one of `leaves` or is one.
static bool all_joined(const Graph& graph, const std::vector<size_t>& leaves) {
    std::vector<bool> reached(graph.nodes.size());
    std::vector<size_t> open = leaves;
    while (!open.empty()) {
        size_t node = open.back();
        open.pop_back();
        if (reached[node]) continue;
        reached[node] = true;
        for (size_t before : graph.nodes[node].after) open.push_back(before);
    }
    return std::ranges::count(reached, false) == 0;
}

}  // namespace driver

using namespace driver;

EXPORT int cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER(CONTEXT);
    Stream* stream = stream_of(handle);
    if (stream == &stream->device->null_stream) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return INVALID_VALUE;
    stream->capture = std::make_shared<Capture>(Capture{{}, stream, std::this_thread::get_id(), {stream}});
    stream->capture->relaxed = mode == 2;
    stream->leaves.clear();
    return SUCCESS;
}
EXPORT int cuStreamEndCapture(void* handle, void** graph) {
    ENTER(CONTEXT);
    *graph = nullptr;
    Stream* stream = stream_of(handle);
    CaptureRef capture = stream->capture;
    if (!capture) return INVALID_VALUE;
    if (capture->origin != stream) return CAPTURE_UNMATCHED;
    if (!capture->relaxed && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    int result = capture->invalid                               ? CAPTURE_INVALIDATED
                 : all_joined(capture->graph, stream->leaves) ? SUCCESS
                                                                : CAPTURE_UNJOINED;
    for (Device* device : devices())
        for (Stream* other : device->streams)
            if (other->capture == capture) other->capture = nullptr, other->leaves.clear();
    capture->origin = nullptr;
    if (result == SUCCESS) *graph = new Graph(std::move(capture->graph));
    return result;
}
EXPORT int cuStreamIsCapturing(void* handle, int* status) {
    ENTER(CONTEXT);
    Stream* stream = stream_of(handle);
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return SUCCESS;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
    ENTER(INITIALIZED);
    *mode = 0;
    return SUCCESS;
}

EXPORT int cuGraphInstantiateWithFlags(void** exec, void* graph, uint64_t) {
    ENTER(CONTEXT);
    *exec = new GraphExec{*static_cast<Graph*>(graph), nullptr};
    return SUCCESS;
}
EXPORT int cuGraphGetNodes(void* graph, void** nodes, size_t* count) {
    ENTER(INITIALIZED);
    std::vector<Node>& all = static_cast<Graph*>(graph)->nodes;
    for (size_t i = 0; nodes && i < std::min(*count, all.size()); i++) nodes[i] = &all[i];
    *count = all.size();
    return SUCCESS;
}
EXPORT int cuGraphUpload(void*, void*) {
    ENTER(CONTEXT);
    return SUCCESS;
}
EXPORT int cuGraphLaunch(void* exec, void* stream) {
    ENTER(CONTEXT);
    return launch_graph(*static_cast<GraphExec*>(exec), stream_of(stream));
}
// Launches under way keep what they need.
EXPORT int cuGraphExecDestroy(void* exec) {
    ENTER(INITIALIZED);
    delete static_cast<GraphExec*>(exec);
    return SUCCESS;
}
EXPORT int cuGraphDestroy(void* graph) {
    ENTER(INITIALIZED);
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}
