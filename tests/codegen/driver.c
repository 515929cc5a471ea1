/* A CUDA driver that launches nothing: it says it is an H100 or H200 and keeps what the last launch was given. */
#include <cuda.h>
#include <string.h>

long launches = 0;
int parameters = 0;      /* of the kernel to be launched next, */
int sizes[256];          /* and how many bytes each of them has */
unsigned long long values[256];

#define YES(name, ...) CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

YES(cuInit, unsigned flags)
YES(cuFuncSetAttribute, CUfunction f, CUfunction_attribute a, int v)
YES(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache c)
YES(cuCtxSetCurrent, CUcontext c)
YES(cuCtxSetLimit, CUlimit l, size_t v)
YES(cuModuleUnload, CUmodule m)
YES(cuTensorMapEncodeTiled, CUtensorMap *map, CUtensorMapDataType t, cuuint32_t rank, void *at, const cuuint64_t *dim,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s,
    CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f)
YES(cuTensorMapEncodeIm2col, CUtensorMap *map, CUtensorMapDataType t, cuuint32_t rank, void *at, const cuuint64_t *dim,
    const cuuint64_t *strides, const int *lower, const int *upper, cuuint32_t channels, cuuint32_t pixels,
    const cuuint32_t *steps, CUtensorMapInterleave i, CUtensorMapSwizzle s, CUtensorMapL2promotion p, CUtensorMapFloatOOBfill f)

#define TELL(name, type, value, ...) CUresult name(type *out, ##__VA_ARGS__) { *out = value; return CUDA_SUCCESS; }

TELL(cuDriverGetVersion, int, 13000)
TELL(cuDeviceGetCount, int, 1)
TELL(cuDeviceGet, CUdevice, ordinal, int ordinal)
TELL(cuCtxGetDevice, CUdevice, 0)
TELL(cuCtxGetCurrent, CUcontext, (CUcontext)1)
TELL(cuDevicePrimaryCtxRetain, CUcontext, (CUcontext)1, CUdevice d)
TELL(cuCtxGetLimit, size_t, 1 << 20, CUlimit l)
TELL(cuModuleLoadData, CUmodule, (CUmodule)1, const void *image)
TELL(cuModuleGetFunction, CUfunction, (CUfunction)m, CUmodule m, const char *name)
TELL(cuFuncGetAttribute, int, a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUfunction_attribute a, CUfunction f)
TELL(cuOccupancyMaxActiveClusters, int, 132, CUfunction f, const CUlaunchConfig *c)

CUresult cuGetErrorString(CUresult e, const char **s) {
  *s = "the driver of tests/codegen";
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *out, CUdevice_attribute a, CUdevice d) {
  *out = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN       ? 232448
         : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
         : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK          ? 49152
         : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                 ? 132
         : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE                            ? 32
         : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR             ? 9
         : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR             ? 0
                                                                         : 65536;
  return CUDA_SUCCESS;
}

/* Any address is one of the device. */
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr at) {
  *(CUdeviceptr *)out = at;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **out, CUdeviceptr at) {
  for (unsigned i = 0; i < n; i++)
    if (out[i]) *(CUdeviceptr *)out[i] = at;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **given, void **extra) {
  launches++;
  for (int i = 0; i < parameters; i++) {
    values[i] = 0;
    memcpy(&values[i], given[i], sizes[i]);
  }
  return CUDA_SUCCESS;
}
