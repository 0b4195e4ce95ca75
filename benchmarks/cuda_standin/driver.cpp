// CUDA's driver without a GPU, for torch and Triton: libcuda.so.1, beside runtime.cpp.

#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

#define API extern "C" __attribute__((visibility("default")))
#undef cuDeviceTotalMem
#undef cuGetProcAddress

extern "C" int cudaDeviceGetAttribute(int*, int, int);
extern "C" int cudaGetDeviceCount(int*);
extern "C" int cudaGetDevice(int*);

static char context[64];

template <class Handle>
static CUresult make(Handle* handle) {
  return *handle = (Handle)calloc(1, 64), CUDA_SUCCESS;
}

API CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count), CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  return strncpy(name, "NVIDIA H200", length), CUDA_SUCCESS;
}
API CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = 141'000'000'000, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return cudaDeviceGetAttribute(value, attribute, device), CUDA_SUCCESS;  // both have the same numbers
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  return *flags = 0, *is_active = 1, CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* made, CUdevice) { return *made = (CUcontext)context, CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext* now) { return *now = (CUcontext)context, CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* device) { return cudaGetDevice(device), CUDA_SUCCESS; }
API CUresult cuStreamGetCtx(CUstream, CUcontext* of) { return *of = (CUcontext)context, CUDA_SUCCESS; }
API CUresult cuModuleLoadData(CUmodule* module, const void*) { return make(module); }
API CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) { return make(module); }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) { return make(function); }
API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  bool is_threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  bool is_registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS;
  return *value = is_threads ? 1024 : is_registers ? 32 : 0, CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
  return *blocks = 2, CUDA_SUCCESS;
}
API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  return *clusters = 8, CUDA_SUCCESS;
}
API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) *(int*)value = 0;
  else if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = pointer;
  else *(void**)value = context;
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** text) { return *text = "not there in the stand-in", CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult, const char** text) { return *text = "CUresult", CUDA_SUCCESS; }
API CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t,
                                 CUdriverProcAddressQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
