// What the operators (expand.cpp) leave to a device: the kernels. The operators have checked and
// allocated: tensors are on the kernels' device; features, outputs and the residual are contiguous
// in shape.format; transforms, wiring and bias are contiguous; and there is at least one value to
// write.
#pragma once

#include <ATen/ATen.h>

#include "arguments.h"

namespace sbf {

struct DeviceKernels {
  // Of contiguous tensors.
  Inverse (*inverse_of)(const at::Tensor& sources, const at::Tensor& order, int64_t basis);
  // y = activation(what the wiring gives for z + bias + residual)
  void (*expand)(const at::Tensor& y, const at::Tensor& z, const at::Tensor& transforms,
                 const ForwardWiring&, const Epilogue&, const Shape&);
  void (*expand_grad_input)(const at::Tensor& grad_z, const at::Tensor& grad,
                            const at::Tensor& transforms, const BackwardWiring&, const Shape&);
  // Returns (P*S, m*m) in the dtype that sums are accumulated in.
  at::Tensor (*expand_grad_transforms)(const at::Tensor& grad, const at::Tensor& z,
                                       const at::Tensor& sources, const at::Tensor& order,
                                       const Shape&);
};

const DeviceKernels& cpu_kernels();
#ifdef WITH_CUDA
const DeviceKernels& cuda_kernels();
#endif

// ---------------------------------------------------------------- a convolution in the CPU's tiles

int cpu_lanes();  // floats in a vector of the kernels chosen for this CPU

// Whether tiles of the basis features had better be computed where they are expanded.
bool convolves_in_tiles(const at::Tensor& x, const at::Tensor& weight, bool is_packed,
                        const Convolution&, const Shape&);

// weight (B, C_in, k_h, k_w), float, as panels of filters, (panels, k_h * k_w * C_in, lanes).
at::Tensor pack_filters(const at::Tensor& weight);
void check_packed(const at::Tensor& packed, const at::Tensor& weight);

struct PackedFilters {
  at::Tensor panels;
  int64_t kernel_h, kernel_w;
};

// y = what cpu_kernels().expand gives for the convolution of x with the filters.
void convolve_in_tiles(const at::Tensor& y, const at::Tensor& x, const PackedFilters&,
                       const at::Tensor& transforms, const ForwardWiring&, const Epilogue&,
                       const Convolution&, const Shape&);

}  // namespace sbf
