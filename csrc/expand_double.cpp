#include "expand_double.h"

#include <ATen/Parallel.h>

namespace sbf {
namespace {

template <int M, typename Wiring>
void expand_strips(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                   const Taps<double>& taps, const double* bias, const double* residual,
                   Activation activation, const Shape& shape) {
  const StripGrid grid{shape.batch, output.size(1), shape.height, shape.width,
                       shape.channels_last()};
  const double* in = input.const_data_ptr<double>();
  double* out = output.mutable_data_ptr<double>();
  const Strides in_strides = strides_of(input), out_strides = strides_of(output);
  at::parallel_for(0, grid.count(), 1024, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const Strip strip = grid.at(index);
      double sum[kStrip];
      expand_strip<M>(sum, wiring, in, in_strides, shape.height, shape.width, taps, shape.m,
                      strip.image, strip.channel, strip.h0, strip.w);
      const int64_t column = strip.image * out_strides.batch + strip.channel * out_strides.channel +
                             strip.w * out_strides.column;
      for (int64_t k = 0; k < kStrip && strip.h0 + k < shape.height; ++k) {
        const int64_t at = column + (strip.h0 + k) * out_strides.row;
        if (bias != nullptr) sum[k] += bias[strip.channel];
        if (residual != nullptr) sum[k] += residual[at];
        out[at] = activate(activation, sum[k]);
      }
    }
  });
}

// One term at a time.
template <int M>
void transforms_strips(const at::Tensor& sums, const at::Tensor& grad, const at::Tensor& z,
                       const int64_t* source, const int64_t* rebuilt_at, const Shape& shape) {
  const StripGrid grid{shape.batch, 1, shape.height, shape.width, shape.channels_last()};
  double* out = sums.mutable_data_ptr<double>();
  const double *in = z.const_data_ptr<double>(), *out_grad = grad.const_data_ptr<double>();
  const Strides in_strides = strides_of(z), grad_strides = strides_of(grad);
  at::parallel_for(0, shape.terms(), 1, [&](int64_t first, int64_t last) {
    for (int64_t term = first; term < last; ++term) {
      for (int a0 = 0; a0 < shape.m; a0 += M) {
        for (int b0 = 0; b0 < shape.m; b0 += M) {
          double sum[M * M] = {};
          for (int64_t index = 0; index < grid.count(); ++index) {
            const Strip strip = grid.at(index);
            add_strip_products<M>(
                sum,
                plane_of(out_grad, grad_strides, shape.height, shape.width, strip.image,
                         rebuilt_at[term / shape.sources_each]),
                plane_of(in, in_strides, shape.height, shape.width, strip.image, source[term]),
                strip.h0, strip.w, shape.m, a0, b0);
          }
          for (int i = 0; i < M * M; ++i) {
            out[(term * shape.m + a0 + i / M) * shape.m + b0 + i % M] = sum[i];
          }
        }
      }
    }
  });
}

}  // namespace

template <typename Wiring>
void expand_double(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                   const at::Tensor& transforms, bool flip, const Epilogue& epilogue,
                   const Shape& shape) {
  const auto run = shape.m == 3 ? expand_strips<3, Wiring> : expand_strips<1, Wiring>;
  run(output, input, wiring, taps_of(transforms.const_data_ptr<double>(), shape.m, flip),
      epilogue.bias.has_value() ? epilogue.bias->const_data_ptr<double>() : nullptr,
      epilogue.residual.has_value() ? epilogue.residual->const_data_ptr<double>() : nullptr,
      epilogue.activation, shape);
}

template void expand_double(const at::Tensor&, const at::Tensor&, const ForwardWiring&,
                            const at::Tensor&, bool, const Epilogue&, const Shape&);
template void expand_double(const at::Tensor&, const at::Tensor&, const BackwardWiring&,
                            const at::Tensor&, bool, const Epilogue&, const Shape&);

at::Tensor transforms_double(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                             const at::Tensor& position, const Shape& shape) {
  const at::Tensor sums = at::zeros({shape.terms(), shape.m * shape.m}, z.options());
  const auto run = shape.m == 3 ? transforms_strips<3> : transforms_strips<1>;
  run(sums, grad, z, sources.const_data_ptr<int64_t>(),
      position.const_data_ptr<int64_t>() + shape.basis, shape);
  return sums;
}

}  // namespace sbf
