// What the launchers of CUDA kernels share.
#pragma once

// Not ATen/cuda/CUDAContext.h: it needs the headers of cuSPARSE and the like.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "arguments.h"
#include "block.h"
#include "tile_choice.h"

namespace sbf {

// Of the current device; no call waits for it.
inline Device current_device() {
  const int index = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, index));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// The largest power of two, up to a vector's 16 bytes, that divides the tensor's address.
inline int alignment_of(const at::Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  int bytes = 16;
  while (address % bytes != 0) bytes /= 2;
  return bytes;
}

// The wiring read backwards, as DeviceKernels has it (inverse_cuda.cu).
Inverse cuda_inverse_of(const at::Tensor& sources, const at::Tensor& order, int64_t basis);

// The gradient of the transforms, as DeviceKernels has it (transforms_cuda.cu).
at::Tensor cuda_expand_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                       const at::Tensor& sources, const at::Tensor& order,
                                       const Shape&);

// Starts `kernel(arguments)` on the current stream.
template <typename Arguments>
void launch(void (*kernel)(Arguments), dim3 blocks, int threads, int shared_bytes,
            const Arguments& arguments) {
  // More than 48 KiB of shared memory must be asked for.
  if (shared_bytes > 48 * 1024) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<blocks, threads, shared_bytes, c10::cuda::getCurrentCUDAStream()>>>(arguments);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace sbf
