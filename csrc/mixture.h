// Rebuilt channels that are mixtures of most of the basis, without a look at the neighbours: a
// matrix product of every pixel's features, at which ATen is faster than sums channel by channel
// once there is enough to multiply.
#pragma once

#include <ATen/ATen.h>

#include "arguments.h"

namespace sbf {

// Fewer sources are gathered faster than multiplied with a matrix that is mostly zero.
constexpr int64_t kFewSources = 8;
// Multiply-adds of a product up to which a CPU's tiles take less time than an operator more. They
// meet between one and two million, with feature maps of 5 px as of 56 (docs/kernels.md).
constexpr int64_t kMixedInTiles = 3 << 19;

// Whether channels are rebuilt from so much of the basis that a product is the way to make them.
inline bool is_mixture(const Shape& shape, const at::Tensor& features) {
  const auto type = features.scalar_type();
  // On a CPU, ATen's products of half precision are rounded between the steps, or slow.
  const bool is_exact = !features.is_cpu() || type == at::kFloat || type == at::kDouble;
  return is_exact && shape.m == 1 && shape.sources_each > kFewSources &&
         2 * shape.sources_each > shape.basis;
}

// Whether that product is worth an operator of its own on a CPU.
inline bool is_large_mixture(const Shape& shape, const at::Tensor& features) {
  const int64_t pixels = shape.batch * shape.height * shape.width;
  return is_mixture(shape, features) && pixels * shape.channels * shape.basis > kMixedInTiles;
}

// (C, B, 1, 1): what each output channel is made of, kept ones of themselves.
inline at::Tensor mixing_matrix(const at::Tensor& transforms, const at::Tensor& sources,
                                const at::Tensor& order, const Shape& shape) {
  const at::Tensor made =
      at::zeros({shape.rebuilt, shape.basis}, transforms.options())
          .scatter_add_(1, sources, transforms.view({shape.rebuilt, shape.sources_each}));
  return at::cat({at::eye(shape.basis, transforms.options()), made})
      .index_select(0, order)
      .view({shape.channels, shape.basis, 1, 1});
}

inline void finish(at::Tensor& y, const Epilogue& epilogue) {
  if (epilogue.residual.has_value()) y.add_(*epilogue.residual);
  switch (epilogue.activation) {
    case Activation::kNone:
      break;
    case Activation::kReLU:
      y.relu_();
      break;
    case Activation::kReLU6:
      y.clamp_(0, 6);
      break;
    case Activation::kSiLU:
      at::silu_(y);
      break;
    case Activation::kHardSwish:
      at::hardswish_(y);
      break;
  }
}

inline at::Tensor mixed(const at::Tensor& z, const at::Tensor& transforms,
                        const at::Tensor& sources, const at::Tensor& order,
                        const Epilogue& epilogue, const Shape& shape, at::MemoryFormat format) {
  const at::Tensor matrix = mixing_matrix(transforms.contiguous(), sources, order, shape);
  at::Tensor y = at::conv2d(z, matrix, epilogue.bias).contiguous(format);
  finish(y, epilogue);
  return y;
}

inline at::Tensor mixed_grad_input(const at::Tensor& grad, const at::Tensor& transforms,
                                   const at::Tensor& sources, const at::Tensor& order,
                                   const Shape& shape) {
  const at::Tensor matrix = mixing_matrix(transforms.contiguous(), sources, order, shape);
  return at::conv2d(grad, matrix.transpose(0, 1)).contiguous(grad.suggest_memory_format());
}

inline at::Tensor mixed_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                        const at::Tensor& sources, const at::Tensor& order,
                                        const Shape& shape) {
  const at::Tensor products = at::einsum("nchw,nbhw->cb", {grad, z});
  const at::Tensor position = at::argsort(order).slice(0, shape.basis);
  return products.index_select(0, position)
      .gather(1, sources)
      .view({shape.rebuilt, shape.sources_each, 1, 1});
}

}  // namespace sbf
