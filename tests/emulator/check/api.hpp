// The calls of CUDA's driver that the tests make.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
int cuInit(unsigned);
int cuDriverGetVersion(int*);
int cuDeviceGetCount(int*);
int cuDeviceGetAttribute(int*, int, int);
int cuDevicePrimaryCtxRetain(void**, int);
int cuCtxSetCurrent(void*);
int cuCtxSynchronize();
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuStreamIsCapturing(void*, int*);
int cuEventCreate(void**, unsigned);
int cuEventDestroy_v2(void*);
int cuEventRecord(void*, void*);
int cuEventSynchronize(void*);
int cuEventQuery(void*);
int cuEventElapsedTime(float*, void*, void*);
int cuMemAlloc_v2(void**, size_t);
int cuMemAllocAsync(void**, size_t, void*);
int cuMemFree_v2(void*);
int cuMemFreeAsync(void*, void*);
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemcpyHtoDAsync_v2(void*, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, const void*, size_t, void*);
int cuMemcpyDtoDAsync_v2(void*, const void*, size_t, void*);
int cuMemcpyDtoH_v2(void*, const void*, size_t);
int cuMemsetD8Async(void*, uint8_t, size_t, void*);
int cuMemsetD32Async(void*, uint32_t, size_t, void*);
int cuModuleLoadData(void**, const void*);
int cuModuleUnload(void*);
int cuModuleGetFunction(void**, void*, const char*);
int cuFuncSetAttribute(void*, int, int);
int cuFuncGetParamInfo(void*, size_t, size_t*, size_t*);
int cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
int cuGraphInstantiateWithFlags(void**, void*, uint64_t);
int cuGraphLaunch(void*, void*);
int cuGraphGetNodes(void*, void**, size_t*);
int cuGraphExecDestroy(void*);
int cuGraphDestroy(void*);
}

// A device made current, with streams and kernels of check/driver.cpp.
struct Gpu {
    void *context = nullptr, *module = nullptr, *one = nullptr, *other = nullptr;
    Gpu();
    void* function(const char* name) const;
};
// Device memory, and pinned host memory.
template <class T> T* device(size_t count) {
    void* at = nullptr;
    return cuMemAlloc_v2(&at, count * sizeof(T)) ? nullptr : static_cast<T*>(at);
}
template <class T> T* pinned(size_t count) {
    void* at = nullptr;
    return cuMemHostAlloc(&at, count * sizeof(T), 0) ? nullptr : static_cast<T*>(at);
}
