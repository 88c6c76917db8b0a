// The least that queuing a kernel costs on the host: cudaLaunchKernelExC of an empty kernel, in a loop without Python.
//
// nvcc -O2 -shared -Xcompiler -fPIC -o libbare_launch.so bare_launch.cu
#include <chrono>

#include <cuda_runtime.h>

namespace {

// As many bytes of arguments as a kernel takes that gets several pointers, strides and options in one structure.
struct Arguments {
    unsigned char bytes[128];
};

__global__ void nothing(Arguments) {}

} // namespace

// Nanoseconds of `calls` launches on the stream, `dependent` with programmatic dependent launch. 0, or CUDA's error.
extern "C" int bare_launch(void *stream, int calls, int dependent, double *nanoseconds) {
    Arguments arguments = {};
    void *pointers[] = {&arguments};
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(256);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = dependent ? 1 : 0;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; i++) {
        const cudaError_t status = cudaLaunchKernelExC(&config, reinterpret_cast<const void *>(nothing), pointers);
        if (status != cudaSuccess) return static_cast<int>(status);
    }
    const auto end = std::chrono::steady_clock::now();
    *nanoseconds = std::chrono::duration<double, std::nano>(end - begin).count();
    return 0;
}
