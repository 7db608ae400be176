// The operators torch.ops.sbf.*: schemas, checks, allocation, and the choice of the way to compute.
// The kernels are expand_cpu.cpp's and expand_cuda.cu's (kernels.h); shapes for tracing, gradients
// and FLOPs are in ops.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "kernels.h"
#include "matrix_product.h"

namespace sbf {
namespace {

const DeviceKernels& kernels_of(const at::Tensor& features) {
#ifdef WITH_CUDA
  if (features.is_cuda()) return cuda_kernels();
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(features.is_cpu(), "sbf operators are not implemented for ",
                              features.device());
  return cpu_kernels();
}

// The wiring's tensors as kernels read them.
struct ContiguousWiring {
  at::Tensor sources, order;

  ContiguousWiring(const at::Tensor& sources_any, const at::Tensor& order_any)
      : sources(sources_any.contiguous()), order(order_any.contiguous()) {}

  ForwardWiring forward(const Shape& shape) const {
    return {order.const_data_ptr<int64_t>(), sources.const_data_ptr<int64_t>(), shape.basis,
            shape.channels, shape.sources_each};
  }
};

Epilogue contiguous(const Epilogue& epilogue, const Shape& shape) {
  Epilogue result = epilogue;
  if (epilogue.bias.has_value()) result.bias = epilogue.bias->contiguous();
  if (epilogue.residual.has_value()) result.residual = epilogue.residual->contiguous(shape.format);
  return result;
}

at::Tensor empty_like_features(const at::Tensor& features, int64_t channels, const Shape& shape) {
  return at::empty({shape.batch, channels, shape.height, shape.width}, features.options(),
                   shape.format);
}

// ---------------------------------------------------------------- operators

at::Tensor expand_checked(const at::Tensor& z_any, const at::Tensor& transforms,
                          const at::Tensor& sources, const at::Tensor& order,
                          const Epilogue& epilogue, const Shape& shape) {
  const at::Tensor z = z_any.contiguous(shape.format);
  if (use_matrix_product(shape, z)) {
    return expand_by_matrix(z, transforms, sources, order, epilogue, shape);
  }
  const at::Tensor y = empty_like_features(z, shape.channels, shape);
  if (y.numel() == 0) return y;
  const ContiguousWiring wiring(sources, order);
  kernels_of(z).expand(y, z, transforms.contiguous(), wiring.forward(shape),
                       contiguous(epilogue, shape), shape);
  return y;
}

at::Tensor expand(const at::Tensor& z, const at::Tensor& transforms, const at::Tensor& sources,
                  const at::Tensor& order, const std::optional<at::Tensor>& bias) {
  const c10::DeviceGuard guard(z.device());
  const Shape shape = check_expand(z, transforms, sources, order, bias);
  return expand_checked(z, transforms, sources, order, {bias, std::nullopt}, shape);
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& transforms,
                  const at::Tensor& sources, const at::Tensor& order,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups, c10::string_view activation,
                  const std::optional<at::Tensor>& packed) {
  const c10::DeviceGuard guard(x.device());
  const Epilogue epilogue{bias, residual, activation_of(activation)};
  const Convolution convolution{stride, padding, dilation, groups};
  const Shape shape = check_conv2d(x, weight, transforms, sources, order, epilogue, convolution);
  if (packed.has_value()) {
    check_device("packed", *packed, "x", x);
    if (x.is_cpu()) check_packed(*packed, weight);
  }
  if (x.is_cpu() && !use_matrix_product(shape, x) &&
      convolves_in_tiles(x, weight, packed.has_value(), convolution, shape)) {
    const at::Tensor y = empty_like_features(x, shape.channels, shape);
    if (y.numel() == 0) return y;
    const ContiguousWiring wiring(sources, order);
    const PackedFilters filters{packed.has_value() ? *packed : pack_filters(weight), weight.size(2),
                                weight.size(3)};
    convolve_in_tiles(y, x.contiguous(shape.format), filters, transforms.contiguous(),
                      wiring.forward(shape), contiguous(epilogue, shape), convolution, shape);
    return y;
  }
  const at::Tensor z = at::conv2d(x, weight, {}, stride, padding, dilation, groups);
  return expand_checked(z, transforms, sources, order, epilogue, shape);
}

at::Tensor expand_grad_input(const at::Tensor& grad_any, const at::Tensor& transforms,
                             const at::Tensor& sources, const at::Tensor& order) {
  const c10::DeviceGuard guard(grad_any.device());
  const Shape shape = check_grad_input(grad_any, transforms, sources, order);
  if (use_matrix_product(shape, grad_any)) {
    return grad_input_by_matrix(grad_any, transforms, sources, order, shape);
  }
  const at::Tensor grad = grad_any.contiguous(shape.format);
  const at::Tensor grad_z = empty_like_features(grad, shape.basis, shape);
  if (grad_z.numel() == 0) return grad_z;
  const DeviceKernels& kernels = kernels_of(grad);
  const Inverse inverse = kernels.inverse_of(sources.contiguous(), order.contiguous(), shape.basis);
  const BackwardWiring wiring{
      inverse.position.const_data_ptr<int64_t>(), inverse.terms.const_data_ptr<int64_t>(),
      inverse.begin.const_data_ptr<int64_t>(), shape.basis, shape.sources_each};
  kernels.expand_grad_input(grad_z, grad, transforms.contiguous(), wiring, shape);
  return grad_z;
}

at::Tensor expand_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                  const at::Tensor& sources, const at::Tensor& order,
                                  int64_t size) {
  const c10::DeviceGuard guard(z.device());
  const Shape shape = check_grad_transforms(grad, z, sources, order, size);
  const std::vector<int64_t> sizes = {shape.rebuilt, shape.sources_each, size, size};
  if (shape.terms() == 0 || z.numel() == 0) return at::zeros(sizes, z.options());
  // Also where expand itself is not one: the kernels would sum over the pixels once for each term.
  if (has_dense_matrix(shape, z)) return grad_transforms_by_matrix(grad, z, sources, order, shape);
  const at::Tensor sums = kernels_of(z).expand_grad_transforms(
      grad.contiguous(shape.format), z.contiguous(shape.format), sources.contiguous(),
      order.contiguous(), shape);
  return sums.to(z.scalar_type()).view(sizes);
}

void register_operators(torch::Library& m) {
  m.impl("expand", &expand);
  m.impl("conv2d", &conv2d);
  m.impl("expand_grad_input", &expand_grad_input);
  m.impl("expand_grad_transforms", &expand_grad_transforms);
}

#ifndef WITH_CUDA
void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      " got CUDA tensors, but sbf_dist._C was built without CUDA. Build it with a CUDA build of "
      "PyTorch and nvcc on the PATH: SBF_DIST_CUDA=1 pip install --no-build-isolation -e .");
}
#endif

}  // namespace

TORCH_LIBRARY(sbf, m) {
  m.def(
      "expand(Tensor z, Tensor transforms, Tensor sources, Tensor order, Tensor? bias)"
      " -> Tensor");
  // activation(expand(convolution(x, weight), ...) + bias + residual), for inference.
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor transforms, Tensor sources, Tensor order,"
      " Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, int groups,"
      " str activation, Tensor? packed) -> Tensor");
  // The filters of weight in the order that the CPU's kernels read them: conv2d's `packed`.
  m.def("pack_filters(Tensor weight) -> Tensor");
  // The gradient of z, and of transforms, given that of expand's output.
  m.def(
      "expand_grad_input(Tensor grad, Tensor transforms, Tensor sources, Tensor order) -> Tensor");
  m.def(
      "expand_grad_transforms(Tensor grad, Tensor z, Tensor sources, Tensor order, int size)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(sbf, CPU, m) {
  register_operators(m);
  m.impl("pack_filters", &pack_filters);
}

TORCH_LIBRARY_IMPL(sbf, CUDA, m) {
#ifdef WITH_CUDA
  register_operators(m);
#else
  for (const char* name : {"expand", "conv2d", "expand_grad_input", "expand_grad_transforms"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&built_without_cuda>());
  }
#endif
}

// PyTorch would only warn in the backward pass, and leave the gradients out.
TORCH_LIBRARY_IMPL(sbf, Autograd, m) {
  m.impl("conv2d", torch::autograd::autogradNotImplementedFallback());
  m.impl("pack_filters", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace sbf
