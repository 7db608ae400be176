// The operators' arguments: checks, shapes, and the inverse of the wiring.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorUtils.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "epilogue.h"
#include "expand.h"

namespace sbf {

inline Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kReLU;
  if (name == "relu6") return Activation::kReLU6;
  if (name == "silu") return Activation::kSiLU;
  if (name == "hardswish") return Activation::kHardSwish;
  TORCH_CHECK(false, "activation must be one of none, relu, relu6, silu, hardswish, got ", name);
}

struct Shape {
  int64_t batch, height, width;
  int64_t channels, basis, rebuilt, sources_each;  // channels = basis + rebuilt
  int m;
  at::MemoryFormat format;  // of all features

  int64_t terms() const { return rebuilt * sources_each; }
  bool channels_last() const { return format == at::MemoryFormat::ChannelsLast; }
};

// What is done to each sum: activation(sum + bias + residual).
struct Epilogue {
  std::optional<at::Tensor> bias, residual;
  Activation activation = Activation::kNone;
};

struct Convolution {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

inline Strides strides_of(const at::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Kernels read all tensors at their addresses, which mean something on one device alone.
inline void check_device(const char* name, const at::Tensor& tensor, const char* other_name,
                         const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ", other_name,
              ", ", other.device(), ", got ", tensor.device());
}

inline void check_like(const char* name, const at::Tensor& tensor, const char* other_name,
                       const at::Tensor& other) {
  check_device(name, tensor, other_name, other);
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the dtype of ",
              other_name, ", ", other.scalar_type(), ", got ", tensor.scalar_type());
}

// Checks the shapes of the features (z, or the gradient of the output) and of the wiring.
inline Shape check_wiring(const char* name, const at::Tensor& features, const at::Tensor& sources,
                          const at::Tensor& order, int64_t m) {
  TORCH_CHECK(features.dim() == 4, name, " must have 4 dimensions (N, C, H, W), got shape ",
              features.sizes());
  TORCH_CHECK(at::isFloatingType(features.scalar_type()), name,
              " must be floating point, got dtype ", features.scalar_type());
  TORCH_CHECK(m > 0 && m % 2 == 1 && m < 256, "transforms must be m x m with m odd, got m = ", m);
  TORCH_CHECK(sources.dim() == 2 && sources.size(1) > 0,
              "sources must have shape (P, S) with S >= 1, got ", sources.sizes());
  TORCH_CHECK(order.dim() == 1, "order must have shape (C_out,), got ", order.sizes());
  const auto wiring = {std::make_pair("sources", &sources), std::make_pair("order", &order)};
  for (const auto& [wire, tensor] : wiring) {
    TORCH_CHECK(tensor->scalar_type() == at::kLong, wire, " must be int64, got dtype ",
                tensor->scalar_type());
    check_device(wire, *tensor, name, features);
  }
  const Shape shape{features.size(0),
                    features.size(2),
                    features.size(3),
                    order.size(0),
                    order.size(0) - sources.size(0),
                    sources.size(0),
                    sources.size(1),
                    static_cast<int>(m),
                    features.suggest_memory_format()};
  TORCH_CHECK(shape.basis >= 0, "order must name every rebuilt channel: it has length ",
              shape.channels, " where sources has ", shape.rebuilt, " rows");
  return shape;
}

// Checks the wiring's values, on the CPU only: elsewhere that would wait for the device.
inline void check_values(const Shape& shape, const at::Tensor& sources, const at::Tensor& order) {
  if (!sources.is_cpu()) return;
  const at::Tensor source_values = sources.contiguous(), order_values = order.contiguous();
  const int64_t* source = source_values.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < shape.terms(); ++i) {
    TORCH_CHECK(source[i] >= 0 && source[i] < shape.basis, "sources must lie in [0, ", shape.basis,
                "), the positions of the basis features, got ", source[i], " for rebuilt channel ",
                i / shape.sources_each);
  }
  const int64_t* entry = order_values.const_data_ptr<int64_t>();
  std::vector<bool> seen(shape.channels);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const bool inside = entry[c] >= 0 && entry[c] < shape.channels;
    TORCH_CHECK(inside && !seen[entry[c]], "order must be a permutation of 0..", shape.channels - 1,
                ", got ", entry[c], inside ? " twice" : "");
    seen[entry[c]] = true;
  }
}

inline void check_transforms(const at::Tensor& transforms) {
  TORCH_CHECK(transforms.dim() == 4 && transforms.size(2) == transforms.size(3),
              "transforms must have shape (P, S, m, m), got ", transforms.sizes());
}

inline void check_transforms(const at::Tensor& transforms, const at::Tensor& sources,
                             const char* name, const at::Tensor& features) {
  TORCH_CHECK(transforms.sizes().slice(0, 2) == sources.sizes(),
              "transforms must begin with the shape of sources (P, S), ", sources.sizes(), ", got ",
              transforms.sizes());
  check_like("transforms", transforms, name, features);
}

inline Shape check_expand(const at::Tensor& z, const at::Tensor& transforms,
                          const at::Tensor& sources, const at::Tensor& order,
                          const std::optional<at::Tensor>& bias) {
  check_transforms(transforms);
  const Shape shape = check_wiring("z", z, sources, order, transforms.size(3));
  check_transforms(transforms, sources, "z", z);
  TORCH_CHECK(z.size(1) == shape.basis,
              "order must have length B + P = ", z.size(1) + shape.rebuilt,
              " (z has B = ", z.size(1), " channels, sources P = ", shape.rebuilt, " rows), got ",
              shape.channels);
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.channels, "bias must have shape (",
                shape.channels, ",), got ", bias->sizes());
    check_like("bias", *bias, "z", z);
  }
  check_values(shape, sources, order);
  return shape;
}

inline Shape check_grad_input(const at::Tensor& grad, const at::Tensor& transforms,
                              const at::Tensor& sources, const at::Tensor& order) {
  check_transforms(transforms);
  const Shape shape = check_wiring("grad", grad, sources, order, transforms.size(3));
  check_transforms(transforms, sources, "grad", grad);
  TORCH_CHECK(grad.size(1) == shape.channels, "grad must have ", shape.channels,
              " channels, the length of order, got ", grad.size(1));
  check_values(shape, sources, order);
  return shape;
}

inline Shape check_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                   const at::Tensor& sources, const at::Tensor& order, int64_t m) {
  const Shape shape = check_wiring("z", z, sources, order, m);
  check_like("grad", grad, "z", z);
  TORCH_CHECK(z.size(1) == shape.basis, "z must have ", shape.basis,
              " channels, the length of order less the rows of sources, got ", z.size(1));
  const std::vector<int64_t> sizes = {shape.batch, shape.channels, shape.height, shape.width};
  TORCH_CHECK(grad.sizes() == at::IntArrayRef(sizes), "grad must have shape ",
              at::IntArrayRef(sizes), ", got ", grad.sizes());
  check_values(shape, sources, order);
  return shape;
}

// Checks the arguments of conv2d; the shape is that of the basis features and the output.
inline Shape check_conv2d(const at::Tensor& x, const at::Tensor& weight,
                          const at::Tensor& transforms, const at::Tensor& sources,
                          const at::Tensor& order, const Epilogue& epilogue,
                          const Convolution& convolution) {
  const auto& [stride, padding, dilation, groups] = convolution;
  const auto& [bias, residual, activation] = epilogue;
  check_transforms(transforms);
  Shape shape = check_wiring("x", x, sources, order, transforms.size(3));
  check_transforms(transforms, sources, "x", x);
  check_like("weight", weight, "x", x);
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == shape.basis,
              "weight must have shape (B, C_in / groups, k_h, k_w) with B = ", shape.basis,
              ", the length of order less the rows of sources, got ", weight.sizes());
  TORCH_CHECK(weight.size(1) > 0 && weight.size(2) > 0 && weight.size(3) > 0,
              "weight must have filters of at least one value, got shape ", weight.sizes());
  TORCH_CHECK(groups > 0 && shape.basis % groups == 0, "groups must divide the ", shape.basis,
              " basis filters, got ", groups);
  TORCH_CHECK(x.size(1) == weight.size(1) * groups, "x must have ", weight.size(1) * groups,
              " channels, those of weight times groups, got ", x.size(1));
  const std::pair<const char*, at::IntArrayRef> pairs[] = {
      {"stride", stride}, {"padding", padding}, {"dilation", dilation}};
  for (const auto& [name, pair] : pairs) {
    const int64_t lowest = name == pairs[1].first ? 0 : 1;
    TORCH_CHECK(pair.size() == 2 && pair[0] >= lowest && pair[1] >= lowest, name,
                " must be two numbers of at least ", lowest, ", got ", pair);
  }
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    const int64_t room = x.size(2 + axis) + 2 * padding[axis] - reach;
    TORCH_CHECK(room >= 0, "x must be no smaller than the filters of weight, ", reach,
                " with dilation, got ", x.sizes(), " with padding ", padding);
    (axis == 0 ? shape.height : shape.width) = room / stride[axis] + 1;
  }
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape.channels, "bias must have shape (",
                shape.channels, ",), got ", bias->sizes());
    check_like("bias", *bias, "x", x);
  }
  if (residual.has_value()) {
    const std::vector<int64_t> sizes = {shape.batch, shape.channels, shape.height, shape.width};
    TORCH_CHECK(residual->sizes() == at::IntArrayRef(sizes), "residual must have shape ",
                at::IntArrayRef(sizes), ", got ", residual->sizes());
    check_like("residual", *residual, "x", x);
  }
  check_values(shape, sources, order);
  return shape;
}

// The wiring read backwards. All of it stays on the device of the arguments.
struct Inverse {
  at::Tensor position;  // (C,)   where each entry of cat([z, rebuilt]) is among the channels
  at::Tensor terms;     // (P*S,) terms, sorted by their source
  at::Tensor begin;     // (B+1,) where each source's terms begin
};

inline at::Tensor inverse_order(const at::Tensor& order) { return at::argsort(order); }

inline Inverse inverse_of(const at::Tensor& sources, const at::Tensor& order, int64_t basis) {
  auto [sorted, terms] =
      at::sort(sources.flatten(), /*stable=*/std::optional<bool>(true), /*dim=*/0,
               /*descending=*/false);
  const at::Tensor begin = at::searchsorted(sorted, at::arange(basis + 1, sources.options()));
  return {inverse_order(order), terms, begin};
}

}  // namespace sbf
