// CUDA's runtime, cuBLAS and NCCL without a GPU: the host's side of them, for libraries that were built for CUDA.
//
// No kernel runs, so results are whatever lies in memory, mostly zeros. What torch does on the host is real: its
// allocator, streams, pinned memory, the choice of kernels, DDP's buckets, ZeRO's gathering. A "device" is a range of
// addresses that nothing backs until it is written to, and torch writes little from the host.
//
// Loaded by LD_PRELOAD before libcudart; what torch asks for and is not here answers 0 ("success"), see __main__.py.

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>

#define API extern "C" __attribute__((visibility("default")))
#undef cudaGetDeviceProperties

namespace {

constexpr int kMostDevices = 16;
constexpr size_t kMemory = 141'000'000'000;     // of an H200
constexpr size_t kAddresses = size_t{1} << 43;  // of each device
constexpr size_t kGranularity = 2 << 20;
constexpr size_t kCopied = 1 << 16;  // bytes, up to which a copy on the device is made: sizes, counts, flags

struct Device {
  char* base = nullptr;
  size_t end = 0, used = 0;
  std::multimap<size_t, char*> free;
};

std::mutex lock;
Device devices[kMostDevices];
std::map<char*, std::pair<size_t, int>> held;  // size and device by address
std::map<char*, size_t> pinned;
thread_local int current = 0;

int device_count() {
  const char* asked = getenv("STANDIN_GPUS");
  return asked ? atoi(asked) : 1;
}

enum class Place { kPageable, kPinned, kDevice };

Place place_of(const void* pointer, int* device) {
  char* address = (char*)pointer;
  std::lock_guard<std::mutex> guard(lock);
  for (int number = 0; number < kMostDevices; ++number) {
    char* base = devices[number].base;
    if (base && address >= base && address < base + kAddresses) return *device = number, Place::kDevice;
  }
  auto next = pinned.upper_bound(address);
  if (next == pinned.begin()) return Place::kPageable;
  --next;
  return address < next->first + next->second ? (*device = 0, Place::kPinned) : Place::kPageable;
}

void copy(void* target, const void* source, size_t bytes) {
  int device;
  bool from_device = place_of(source, &device) == Place::kDevice;
  bool to_device = place_of(target, &device) == Place::kDevice;
  if (from_device && to_device && bytes > kCopied) return;
  memmove(target, source, bytes);
}

double milliseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

template <class Handle>
int make(Handle** handle, int value = 0) {
  *handle = (Handle*)calloc(1, 4096);
  *(int*)*handle = value;
  return 0;
}

}  // namespace

// Devices

API cudaError_t cudaGetDeviceCount(int* count) { return *count = device_count(), cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
API cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 1, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }

API cudaError_t cudaDeviceGetPCIBusId(char* name, int length, int device) {
  return snprintf(name, length, "0000:%02x:00.0", device + 1), cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* told, int device) {
  memset(told, 0, sizeof *told);
  strcpy(told->name, "NVIDIA H200");
  told->totalGlobalMem = kMemory;
  told->major = 9, told->minor = 0;
  told->multiProcessorCount = 132, told->maxBlocksPerMultiProcessor = 32;
  told->warpSize = 32, told->maxThreadsPerBlock = 1024, told->maxThreadsPerMultiProcessor = 2048;
  told->maxThreadsDim[0] = told->maxThreadsDim[1] = 1024, told->maxThreadsDim[2] = 64;
  told->maxGridSize[0] = 2147483647, told->maxGridSize[1] = told->maxGridSize[2] = 65535;
  told->regsPerBlock = told->regsPerMultiprocessor = 65536;
  told->sharedMemPerBlock = 49152, told->sharedMemPerBlockOptin = 232448, told->sharedMemPerMultiprocessor = 233472;
  told->l2CacheSize = 60 << 20, told->memoryBusWidth = 6144;
  told->concurrentKernels = told->unifiedAddressing = told->managedMemory = told->ECCEnabled = 1;
  told->pciBusID = device + 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp told;
  cudaGetDeviceProperties(&told, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = told.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = told.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = told.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = told.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = told.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = told.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = told.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = told.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = told.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = told.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = told.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = told.regsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = told.l2CacheSize; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

// Memory

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  Device& device = devices[current];
  bytes = (bytes + kGranularity - 1) / kGranularity * kGranularity;
  if (device.used + bytes > kMemory) return *pointer = nullptr, cudaErrorMemoryAllocation;
  if (!device.base) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    device.base = (char*)mmap(nullptr, kAddresses, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (device.base == MAP_FAILED) return perror("cuda_standin: mmap"), abort(), cudaErrorMemoryAllocation;
  }
  auto found = device.free.find(bytes);
  char* address = device.base + device.end;
  if (found == device.free.end()) device.end += bytes;
  else address = found->second, device.free.erase(found);
  device.used += bytes;
  held[address] = {bytes, current};
  return *pointer = address, cudaSuccess;
}

API cudaError_t cudaFree(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  auto found = held.find((char*)pointer);
  if (found == held.end()) return cudaSuccess;
  auto [bytes, number] = found->second;
  devices[number].used -= bytes;
  devices[number].free.insert({bytes, found->first});
  held.erase(found);
  return cudaSuccess;
}

API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }

API cudaError_t cudaMemGetInfo(size_t* free, size_t* all) {
  return *all = kMemory, *free = kMemory - devices[current].used, cudaSuccess;
}

API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  std::lock_guard<std::mutex> guard(lock);
  return pinned[(char*)pointer] = bytes, cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  return pinned.erase((char*)pointer), cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  return cudaHostRegister(*pointer, bytes, flags);
}

API cudaError_t cudaFreeHost(void* pointer) { return cudaHostUnregister(pointer), free(pointer), cudaSuccess; }

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* told, const void* pointer) {
  int device = -2;
  Place place = place_of(pointer, &device);
  bool on_device = place == Place::kDevice, in_host = place == Place::kPinned;
  told->type = on_device ? cudaMemoryTypeDevice : in_host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  told->device = device;
  told->devicePointer = on_device ? (void*)pointer : nullptr;
  told->hostPointer = in_host ? (void*)pointer : nullptr;
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  return copy(target, source, bytes), cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(target, source, bytes), cudaSuccess;
}

API cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch,
                                  size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    copy((char*)target + row * target_pitch, (const char*)source + row * source_pitch, width);
  return cudaSuccess;
}

API cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 20];
  return *pointer = symbol, cudaSuccess;
}

// Streams and events: all is done when it is asked for

static cudaError_t make_stream(cudaStream_t* stream) {
  static long number = 1000;
  return *stream = (cudaStream_t)number++, cudaSuccess;
}

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make_stream(stream); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make_stream(stream); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return make_stream(stream); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }

API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                         cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (id) *id = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = (cudaEvent_t) new double(0), cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete (double*)event, cudaSuccess; }

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *(double*)event = milliseconds(), cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

API cudaError_t cudaEventElapsedTime(float* elapsed, cudaEvent_t begin, cudaEvent_t end) {
  double passed = *(double*)end - *(double*)begin;
  return *elapsed = passed < 1e-3 ? 1e-3f : (float)passed, cudaSuccess;
}

// Kernels

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* told, const void*) {
  memset(told, 0, sizeof *told);
  told->maxThreadsPerBlock = 1024, told->numRegs = 32, told->maxDynamicSharedSizeBytes = 232448;
  told->ptxVersion = told->binaryVersion = 90;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[2];
  return handle;
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3{1, 1, 1};
  return *shared = 0, *(void**)stream = nullptr, cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  *function = driver ? dlsym(driver, name) : nullptr;
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : cudaErrorSymbolNotFound;
}

API const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaError";
}

API const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "not there in the stand-in";
}

// cuBLAS

API int cublasCreate_v2(void** handle) { return make(handle); }
API int cublasGetMathMode(void*, int* mode) { return *mode = 0; }
API int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0; }
API size_t cublasLtGetVersion() { return 130000; }
API int cublasLtMatmulDescCreate(void** handle, int, int) { return make(handle); }
API int cublasLtMatmulPreferenceCreate(void** handle) { return make(handle); }
API int cublasLtMatrixLayoutCreate(void** handle, int, size_t, size_t, long) { return make(handle); }

API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  return *found = 1, 0;
}

// NCCL: each rank takes its own for what the others would send, where it is small

namespace {

struct Communicator {
  int ranks;
};

size_t bytes_of(int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};  // ncclDataType_t
  return sizes[type];
}

int take(void* target, const void* source, size_t bytes) {
  if (target != source && bytes <= kCopied) memmove(target, source, bytes);
  return 0;
}

}  // namespace

API int ncclGetVersion(int* version) { return *version = 22800, 0; }
API int ncclGetUniqueId(char* id) { return memset(id, 7, 128), 0; }
API const char* ncclGetErrorString(int) { return "not there in the stand-in"; }
API const char* ncclGetLastError(void*) { return ""; }
API int ncclCommInitRank(Communicator** made, int ranks, ...) { return make(made, ranks); }
API int ncclCommInitRankConfig(Communicator** made, int ranks, ...) { return make(made, ranks); }
API int ncclCommInitRankScalable(Communicator** made, int ranks, ...) { return make(made, ranks); }
API int ncclCommSplit(Communicator* from, int, int, Communicator** made, void*) { return make(made, from->ranks); }
API int ncclCommCount(Communicator* of, int* ranks) { return *ranks = of->ranks, 0; }
API int ncclCommGetAsyncError(void*, int* error) { return *error = 0; }

API int ncclAllGather(const void* source, void* target, size_t count, int type, Communicator* of, void*) {
  size_t bytes = count * bytes_of(type);
  for (int rank = 0; rank < of->ranks; ++rank) take((char*)target + rank * bytes, source, bytes);
  return 0;
}

API int ncclAllReduce(const void* source, void* target, size_t count, int type, int, void*, void*) {
  return take(target, source, count * bytes_of(type));
}

API int ncclReduce(const void* source, void* target, size_t count, int type, int, int, void*, void*) {
  return take(target, source, count * bytes_of(type));
}

API int ncclReduceScatter(const void* source, void* target, size_t count, int type, int, void*, void*) {
  return take(target, source, count * bytes_of(type));
}

API int ncclBroadcast(const void* source, void* target, size_t count, int type, int, void*, void*) {
  return take(target, source, count * bytes_of(type));
}
