// Rebuilt channels that are sums over most of the basis, pixel by pixel (m = 1): a matrix product,
// at which ATen is faster than sums channel by channel once there is enough to multiply.
#pragma once

#include <ATen/ATen.h>

#include "arguments.h"

namespace sbf {

// Up to so many sources are summed faster than multiplied by a matrix that is mostly zero.
constexpr int64_t kMaxSummedSources = 8;
// Multiply-adds of a product up to which a CPU's tiles take less time than one more operator. They
// meet between one and two million, with feature maps of 5 px as of 56 (docs/kernels.md).
constexpr int64_t kMaxTileMultiplyAdds = 3 << 19;

// Whether the matrix is mostly nonzero, and its product as exact as sums are.
inline bool has_dense_matrix(const Shape& shape, const at::Tensor& features) {
  const auto type = features.scalar_type();
  // On a CPU, ATen's products of half precision are rounded between the steps, or slow.
  const bool is_exact = !features.is_cpu() || type == at::kFloat || type == at::kDouble;
  return is_exact && shape.m == 1 && shape.sources_each > kMaxSummedSources &&
         2 * shape.sources_each > shape.basis;
}

// Whether expand and its gradient by z are a matrix product, which needs an operator of its own.
inline bool use_matrix_product(const Shape& shape, const at::Tensor& features) {
  const int64_t pixels = shape.batch * shape.height * shape.width;
  const bool is_large = pixels * shape.channels * shape.basis > kMaxTileMultiplyAdds;
  return has_dense_matrix(shape, features) && (is_large || !features.is_cpu());
}

// (C, B, 1, 1): the coefficients of each output channel; those of a kept one are 0 and a single 1.
inline at::Tensor matrix_of(const at::Tensor& transforms, const at::Tensor& sources,
                            const at::Tensor& order, const Shape& shape) {
  const at::Tensor rebuilt =
      at::zeros({shape.rebuilt, shape.basis}, transforms.options())
          .scatter_add_(1, sources, transforms.view({shape.rebuilt, shape.sources_each}));
  return at::cat({at::eye(shape.basis, transforms.options()), rebuilt})
      .index_select(0, order)
      .view({shape.channels, shape.basis, 1, 1});
}

// Adds the residual, and applies the activation; the bias is added already.
inline void apply_epilogue_(at::Tensor& y, const Epilogue& epilogue) {
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

// How many channels a product gets more than it needs. Tensor cores take elements of two bytes in
// eights of channels; on an H200 (cuDNN 9.19), a training in half with 6 to 31 basis channels ended
// in a misaligned address.
inline int64_t missing_channels(int64_t channels, const at::Tensor& features) {
  const bool on_tensor_cores = features.is_cuda() && features.element_size() == 2;
  return on_tensor_cores ? (8 - channels % 8) % 8 : 0;
}

// (N, C, H, W) with channels of zeros behind the others, where any are missing.
inline at::Tensor with_whole_eights(const at::Tensor& features) {
  const int64_t missing = missing_channels(features.size(1), features);
  if (missing == 0) return features;
  return at::constant_pad_nd(features, {0, 0, 0, 0, 0, missing}, 0);
}

// The convolution of features by a (C', C, 1, 1) matrix.
inline at::Tensor mixed(const at::Tensor& features, const at::Tensor& matrix,
                        const std::optional<at::Tensor>& bias) {
  const int64_t outputs = matrix.size(0), inputs = matrix.size(1);
  const int64_t more_out = missing_channels(outputs, features),
                more_in = missing_channels(inputs, features);
  if (more_out == 0 && more_in == 0) return at::conv2d(features, matrix, bias);
  const at::Tensor padded = at::constant_pad_nd(matrix, {0, 0, 0, 0, 0, more_in, 0, more_out}, 0);
  std::optional<at::Tensor> padded_bias;
  if (bias.has_value()) padded_bias = at::constant_pad_nd(*bias, {0, more_out}, 0);
  return at::conv2d(with_whole_eights(features), padded, padded_bias).narrow(1, 0, outputs);
}

inline at::Tensor expand_by_matrix(const at::Tensor& z, const at::Tensor& transforms,
                                   const at::Tensor& sources, const at::Tensor& order,
                                   const Epilogue& epilogue, const Shape& shape) {
  const at::Tensor matrix = matrix_of(transforms.contiguous(), sources, order, shape);
  at::Tensor y = mixed(z, matrix, epilogue.bias).contiguous(shape.format);
  apply_epilogue_(y, epilogue);
  return y;
}

inline at::Tensor grad_input_by_matrix(const at::Tensor& grad, const at::Tensor& transforms,
                                       const at::Tensor& sources, const at::Tensor& order,
                                       const Shape& shape) {
  const at::Tensor matrix = matrix_of(transforms.contiguous(), sources, order, shape);
  return mixed(grad, matrix.transpose(0, 1), std::nullopt).contiguous(shape.format);
}

inline at::Tensor grad_transforms_by_matrix(const at::Tensor& grad, const at::Tensor& z,
                                            const at::Tensor& sources, const at::Tensor& order,
                                            const Shape& shape) {
  const at::Tensor products =
      at::einsum("nchw,nbhw->cb", {with_whole_eights(grad), with_whole_eights(z)});
  const at::Tensor position = at::argsort(order).slice(0, shape.basis);
  return products.index_select(0, position)
      .gather(1, sources)
      .view({shape.rebuilt, shape.sources_each, 1, 1});
}

}  // namespace sbf
