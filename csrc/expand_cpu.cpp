// CPU kernels. float, bfloat16 and half work on padded float tiles (tile.h) and vectorise; double,
// which serves gradient checks, takes the plain path that it shares with CUDA (expand.h).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "arguments.h"
#include "epilogue.h"
#include "tile.h"

namespace sbf {
namespace {

// A tile should stay in the second-level cache; below four rows the borders cost too much.
constexpr int64_t kTileBytes = 512 * 1024;
// The sums of a block of channels should stay in the first-level cache.
constexpr int64_t kSumBytes = 16 * 1024;
constexpr int64_t kTileRows = 4;
// Partial sums of the transforms' gradient: a fixed number, so that threads do not change it.
constexpr int64_t kSlices = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Images are cut into blocks of rows; (image, block) is the unit of parallel work.
struct Blocks {
  int64_t each, rows, height;

  // `least`: how many blocks there should be in all, at least.
  Blocks(const Shape& shape, int64_t channels, int64_t pitch, int64_t least)
      : height(shape.height) {
    const int64_t fit =
        kTileBytes / std::max<int64_t>(1, Tile::bytes_per_row(channels, pitch)) - (shape.m - 1);
    each = ceil_div(height, std::max(kTileRows, fit));
    each = std::min(height, std::max(each, ceil_div(least, shape.batch)));
    rows = ceil_div(height, each);
    each = ceil_div(height, rows);
  }
  int64_t image(int64_t task) const { return task / each; }
  int64_t begin(int64_t task) const { return task % each * rows; }
  int64_t end(int64_t task) const { return std::min(height, begin(task) + rows); }
};

template <typename scalar_t>
Image<const scalar_t> image_of(const at::Tensor& tensor, int64_t n, bool channels_last) {
  return {tensor.const_data_ptr<scalar_t>() + n * tensor.stride(0), tensor.size(1), tensor.size(2),
          tensor.size(3), channels_last};
}

template <typename scalar_t>
Image<scalar_t> mutable_image_of(const at::Tensor& tensor, int64_t n, bool channels_last) {
  return {tensor.mutable_data_ptr<scalar_t>() + n * tensor.stride(0), tensor.size(1),
          tensor.size(2), tensor.size(3), channels_last};
}

// output = what the wiring makes of input, for float, bfloat16 and half.
template <typename scalar_t, typename Wiring>
void mix_tiles(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
               const at::Tensor& taps, const std::optional<at::Tensor>& bias, const Shape& shape,
               bool channels_last) {
  const int64_t border = (shape.m - 1) / 2, pitch = shape.width + 2 * border;
  const int64_t inputs = input.size(1), outputs = output.size(1), tap_count = shape.m * shape.m;
  const float* tap = taps.const_data_ptr<float>();
  const float* shift = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  const Blocks blocks(shape, inputs, pitch, at::get_num_threads());

  // Sums stay in the first-level cache, and so does what is stored around the same pixels.
  const int64_t sum_rows = std::clamp<int64_t>(
      kSumBytes / (kBlock * pitch * static_cast<int64_t>(sizeof(float))), 1, blocks.rows);

  at::parallel_for(0, shape.batch * blocks.each, 1, [&](int64_t first, int64_t last) {
    Tile tile(inputs, blocks.rows, shape.width, border, pitch);
    std::vector<float> sums(kBlock * sum_rows * pitch), pixels(kBlock * shape.width);
    for (int64_t task = first; task < last; ++task) {
      const int64_t n = blocks.image(task), top = blocks.begin(task), bottom = blocks.end(task);
      tile.load(image_of<scalar_t>(input, n, channels_last), top);
      const auto image = mutable_image_of<scalar_t>(output, n, channels_last);
      for (int64_t h0 = top; h0 < bottom; h0 += sum_rows) {
        const int64_t h1 = std::min(bottom, h0 + sum_rows);
        const int64_t count = (h1 - h0) * pitch, shifted = (h0 - top) * pitch;
        for (int64_t c0 = 0; c0 < outputs; c0 += kBlock) {
          const int64_t block = std::min<int64_t>(kBlock, outputs - c0);
          const float* planes[kBlock];
          for (int64_t c = 0; c < block; ++c) {
            const Mix mix = wiring.mix(c0 + c);
            const float* copied =
                mix.copied < 0 ? nullptr : tile.plane(mix.copied) + shifted + tile.origin();
            if (mix.first == mix.last && copied != nullptr) {
              planes[c] = copied;
              continue;
            }
            float* sum = sums.data() + c * sum_rows * pitch;
            if (copied == nullptr) {
              std::fill_n(sum, count, 0.0F);
            } else {
              std::copy_n(copied, count, sum);
            }
            for (int64_t link = mix.first; link < mix.last; ++link) {
              add_shifted(sum, tile.plane(wiring.input(link)) + shifted, count, pitch,
                          tap + wiring.term(link) * tap_count, shape.m);
            }
            planes[c] = sum;
          }
          store(image, c0, block, h0, h1, planes, pitch, shift == nullptr ? nullptr : shift + c0,
                pixels.data());
        }
      }
    }
  });
}

// The same for double, strip by strip as on a GPU.
template <int M, typename Wiring>
void mix_strips(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                const Taps<double>& taps, int64_t term_stride,
                const std::optional<at::Tensor>& bias, const Shape& shape, bool channels_last) {
  const StripGrid grid{shape.batch, output.size(1), shape.height, shape.width, channels_last};
  const double* shift = bias.has_value() ? bias->const_data_ptr<double>() : nullptr;
  const double* in = input.const_data_ptr<double>();
  double* out = output.mutable_data_ptr<double>();
  const Strides in_strides = strides_of(input), out_strides = strides_of(output);
  at::parallel_for(0, grid.count(), 1024, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const Strip strip = grid.at(index);
      double sum[kStrip];
      mix_strip<M>(sum, wiring, in, in_strides, shape.height, shape.width, taps, term_stride,
                   shape.m, strip.image, strip.channel, strip.h0, strip.w);
      double* target = out + strip.image * out_strides.batch + strip.channel * out_strides.channel +
                       strip.w * out_strides.column;
      for (int64_t k = 0; k < kStrip && strip.h0 + k < shape.height; ++k) {
        target[(strip.h0 + k) * out_strides.row] =
            shift == nullptr ? sum[k] : sum[k] + shift[strip.channel];
      }
    }
  });
}

// `flip` turns the taps around: the gradient of a cross-correlation is one with flipped taps.
template <typename Wiring>
void mix(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
         const at::Tensor& transforms, bool flip, const std::optional<at::Tensor>& bias,
         const Shape& shape, bool channels_last) {
  if (output.numel() == 0) return;
  if (input.scalar_type() == at::kDouble) {
    const at::Tensor taps = transforms.contiguous();
    const auto shift = bias.has_value() ? std::optional(bias->contiguous()) : std::nullopt;
    const double* data = taps.const_data_ptr<double>();
    const int64_t tap_count = shape.m * shape.m;
    const Taps<double> first{flip ? data + tap_count - 1 : data, flip ? -1 : 1};
    const auto run = shape.m == 3 ? mix_strips<3, Wiring> : mix_strips<1, Wiring>;
    run(output, input, wiring, first, tap_count, shift, shape, channels_last);
    return;
  }
  at::Tensor taps = transforms.to(at::kFloat);
  taps = (flip ? taps.flip({2, 3}) : taps).contiguous();
  const auto shift =
      bias.has_value() ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
  AT_DISPATCH_SWITCH(input.scalar_type(), "sbf::expand",
                     AT_DISPATCH_CASE(at::kFloat, [&] {
                       mix_tiles<scalar_t>(output, input, wiring, taps, shift, shape,
                                           channels_last);
                     })
                     AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] {
                       mix_tiles<scalar_t>(output, input, wiring, taps, shift, shape,
                                           channels_last);
                     }));
}

// Gradient of the transforms, (P*S, m*m) float sums for float, bfloat16 and half.
template <typename scalar_t>
at::Tensor product_tiles(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                         const at::Tensor& position, const Shape& shape, bool channels_last) {
  const int64_t border = (shape.m - 1) / 2, pitch = shape.width + 2 * border;
  const int64_t tap_count = shape.m * shape.m;
  const Blocks blocks(shape, shape.basis + shape.channels, pitch, 1);
  const int64_t tasks = shape.batch * blocks.each, slices = std::min(tasks, kSlices);
  const at::Tensor partial = at::zeros({slices, shape.terms(), tap_count}, at::kFloat);
  float* sums = partial.mutable_data_ptr<float>();
  const int64_t* source = sources.const_data_ptr<int64_t>();
  const int64_t* channel = position.const_data_ptr<int64_t>() + shape.basis;

  at::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
    Tile inputs(shape.basis, blocks.rows, shape.width, border, pitch);
    Tile grads(shape.channels, blocks.rows, shape.width, 0, pitch);
    for (int64_t slice = first; slice < last; ++slice) {
      float* sum = sums + slice * shape.terms() * tap_count;
      for (int64_t task = slice; task < tasks; task += slices) {
        const int64_t n = blocks.image(task), h0 = blocks.begin(task), h1 = blocks.end(task);
        inputs.load(image_of<scalar_t>(z, n, channels_last), h0);
        grads.load(image_of<scalar_t>(grad, n, channels_last), h0);
        for (int64_t term = 0; term < shape.terms(); ++term) {
          dot_shifted(sum + term * tap_count, grads.plane(channel[term / shape.sources_each]),
                      inputs.plane(source[term]), (h1 - h0) * pitch, pitch, shape.m);
        }
      }
    }
  });
  return partial.sum(0);
}

// The same for double, one term at a time.
template <int M>
at::Tensor product_strips(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                          const at::Tensor& position, const Shape& shape, bool channels_last) {
  const StripGrid grid{shape.batch, 1, shape.height, shape.width, channels_last};
  const at::Tensor sums = at::zeros({shape.terms(), shape.m * shape.m}, z.options());
  double* out = sums.mutable_data_ptr<double>();
  const int64_t* source = sources.const_data_ptr<int64_t>();
  const int64_t* channel = position.const_data_ptr<int64_t>() + shape.basis;
  const double *in = z.const_data_ptr<double>(), *out_grad = grad.const_data_ptr<double>();
  const Strides in_strides = strides_of(z), grad_strides = strides_of(grad);
  at::parallel_for(0, shape.terms(), 1, [&](int64_t first, int64_t last) {
    for (int64_t term = first; term < last; ++term) {
      for (int a0 = 0; a0 < shape.m; a0 += M) {
        for (int b0 = 0; b0 < shape.m; b0 += M) {
          double sum[M * M] = {};
          for (int64_t index = 0; index < grid.count(); ++index) {
            const Strip strip = grid.at(index);
            add_products<M>(sum,
                            plane_of(out_grad, grad_strides, shape.height, shape.width,
                                     strip.image, channel[term / shape.sources_each]),
                            plane_of(in, in_strides, shape.height, shape.width, strip.image,
                                     source[term]),
                            strip.h0, strip.w, shape.m, a0, b0);
          }
          for (int i = 0; i < M * M; ++i) {
            out[(term * shape.m + a0 + i / M) * shape.m + b0 + i % M] = sum[i];
          }
        }
      }
    }
  });
  return sums;
}

// ---------------------------------------------------------------- operators

at::Tensor expand(const at::Tensor& z_any, const at::Tensor& transforms,
                  const at::Tensor& sources_any, const at::Tensor& order_any,
                  const std::optional<at::Tensor>& bias) {
  const Shape shape = check_expand(z_any, transforms, sources_any, order_any, bias);
  const auto format = z_any.suggest_memory_format();
  const at::Tensor z = z_any.contiguous(format);
  const at::Tensor sources = sources_any.contiguous(), order = order_any.contiguous();
  const at::Tensor y =
      at::empty({shape.batch, shape.channels, shape.height, shape.width}, z.options(), format);
  const ForwardWiring wiring{order.const_data_ptr<int64_t>(), sources.const_data_ptr<int64_t>(),
                             shape.basis, shape.channels, shape.sources_each};
  mix(y, z, wiring, transforms, /*flip=*/false, bias, shape, is_channels_last(z_any));
  return y;
}

at::Tensor expand_grad_input(const at::Tensor& grad_any, const at::Tensor& transforms,
                             const at::Tensor& sources, const at::Tensor& order) {
  const Shape shape = check_grad_input(grad_any, transforms, sources, order);
  const auto format = grad_any.suggest_memory_format();
  const at::Tensor grad = grad_any.contiguous(format);
  const at::Tensor grad_z =
      at::empty({shape.batch, shape.basis, shape.height, shape.width}, grad.options(), format);
  const Inverse inverse = inverse_of(sources, order, shape.basis);
  const BackwardWiring wiring{inverse.position.const_data_ptr<int64_t>(),
                              inverse.terms.const_data_ptr<int64_t>(),
                              inverse.begin.const_data_ptr<int64_t>(), shape.basis,
                              shape.sources_each};
  mix(grad_z, grad, wiring, transforms, /*flip=*/true, std::nullopt, shape,
      is_channels_last(grad_any));
  return grad_z;
}

at::Tensor expand_grad_transforms(const at::Tensor& grad_any, const at::Tensor& z_any,
                                  const at::Tensor& sources_any, const at::Tensor& order,
                                  int64_t size) {
  const Shape shape = check_grad_transforms(grad_any, z_any, sources_any, order, size);
  const std::vector<int64_t> sizes = {shape.rebuilt, shape.sources_each, size, size};
  if (shape.terms() == 0 || z_any.numel() == 0) return at::zeros(sizes, z_any.options());
  const bool channels_last = is_channels_last(z_any);
  const at::Tensor z = z_any.contiguous(z_any.suggest_memory_format());
  const at::Tensor grad = grad_any.contiguous(z_any.suggest_memory_format());
  const at::Tensor sources = sources_any.contiguous(), position = inverse_order(order);
  at::Tensor sums;
  if (z.scalar_type() == at::kDouble) {
    const auto run = shape.m == 3 ? product_strips<3> : product_strips<1>;
    sums = run(grad, z, sources, position, shape, channels_last);
  } else if (z.scalar_type() == at::kFloat) {
    sums = product_tiles<float>(grad, z, sources, position, shape, channels_last);
  } else {
    AT_DISPATCH_REDUCED_FLOATING_TYPES(z.scalar_type(), "sbf::expand_grad_transforms", [&] {
      sums = product_tiles<scalar_t>(grad, z, sources, position, shape, channels_last);
    });
  }
  return sums.to(z.scalar_type()).view(sizes);
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& transforms,
                  const at::Tensor& sources, const at::Tensor& order,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups, c10::string_view activation) {
  const Activation after = activation_of(activation);
  const at::Tensor z = at::conv2d(x, weight, {}, stride, padding, dilation, groups);
  at::Tensor y = expand(z, transforms, sources, order, bias);
  if (residual.has_value()) y.add_(*residual);
  switch (after) {
    case Activation::kNone:
      return y;
    case Activation::kReLU:
      return y.relu_();
    case Activation::kReLU6:
      return y.clamp_(0, 6);
    case Activation::kSiLU:
      return at::silu_(y);
    case Activation::kHardSwish:
      return at::hardswish_(y);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(sbf, CPU, m) {
  m.impl("expand", &expand);
  m.impl("conv2d", &conv2d);
  m.impl("expand_grad_input", &expand_grad_input);
  m.impl("expand_grad_transforms", &expand_grad_transforms);
}

}  // namespace sbf
