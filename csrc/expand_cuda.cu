// CUDA kernels: index arithmetic and sums are those of expand.h. Outputs gather, so nothing is
// added atomically and results do not depend on scheduling; nothing waits for the device, so that
// all of it can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
// Not ATen/cuda/CUDAContext.h: it needs the headers of cuSPARSE and the like.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "arguments.h"

namespace sbf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// A fixed number, not the device's: sums must come out the same on every device.
constexpr int64_t kReductionBlocks = 2048;
constexpr int64_t kMaxGrid = INT32_MAX;

// One thread makes one strip of one output channel, and goes on a grid's length further.
template <int M, typename scalar_t, typename acc_t, typename Wiring>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(scalar_t* __restrict__ output, Strides out_strides,
               const scalar_t* __restrict__ input, Strides in_strides, Wiring wiring,
               Taps<scalar_t> taps, int64_t term_stride, const scalar_t* __restrict__ bias,
               StripGrid grid, int m) {
  const int64_t count = grid.count();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += step) {
    const Strip strip = grid.at(index);
    acc_t sum[kStrip];
    mix_strip<M>(sum, wiring, input, in_strides, grid.height, grid.width, taps, term_stride, m,
                 strip.image, strip.channel, strip.h0, strip.w);
    if (bias != nullptr) {
      const acc_t shift = static_cast<acc_t>(bias[strip.channel]);
#pragma unroll
      for (int k = 0; k < kStrip; ++k) sum[k] += shift;
    }
    scalar_t* target = output + strip.image * out_strides.batch +
                       strip.channel * out_strides.channel + strip.w * out_strides.column;
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      if (strip.h0 + k < grid.height) {
        target[(strip.h0 + k) * out_strides.row] = static_cast<scalar_t>(sum[k]);
      }
    }
  }
}

// How a block of the transforms' gradient is divided: neighbouring threads should read neighbours
// in memory, so lanes are pixels in one layout and terms (mostly neighbouring channels) in the
// other.
struct Lanes {
  bool channels_last;

  C10_HOST_DEVICE int terms() const { return channels_last ? kWarp : kThreads / kWarp; }
  C10_HOST_DEVICE int pixels() const { return kThreads / terms(); }
  C10_HOST_DEVICE int term(int thread) const {
    return channels_last ? thread % kWarp : thread / kWarp;
  }
  C10_HOST_DEVICE int pixel(int thread) const {
    return channels_last ? thread / kWarp : thread % kWarp;
  }
  C10_HOST_DEVICE int thread(int term, int pixel) const {
    return channels_last ? pixel * kWarp + term : term * kWarp + pixel;
  }
};

// partial[slice, term, tap] = the sum over this slice of the strips. Grid: groups of terms, slices,
// patches of M x M taps.
template <int M, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads)
    product_kernel(acc_t* __restrict__ partial, const scalar_t* __restrict__ grad,
                   Strides grad_strides, const scalar_t* __restrict__ z, Strides z_strides,
                   const int64_t* __restrict__ sources, const int64_t* __restrict__ rebuilt_at,
                   StripGrid grid, int64_t terms, int64_t basis, int sources_each, int m,
                   Lanes lanes) {
  const int thread = threadIdx.x;
  const int64_t term = static_cast<int64_t>(blockIdx.x) * lanes.terms() + lanes.term(thread);
  const int a0 = blockIdx.z / (m / M) * M, b0 = blockIdx.z % (m / M) * M;

  acc_t sum[M * M];
#pragma unroll
  for (int i = 0; i < M * M; ++i) sum[i] = acc_t(0);
  if (term < terms) {
    const int64_t source = sources[term];
    CUDA_KERNEL_ASSERT(source >= 0 && source < basis && "sources must be positions in the basis");
    const int64_t channel = rebuilt_at[term / sources_each];
    const int64_t count = grid.count();
    const int64_t step = static_cast<int64_t>(gridDim.y) * lanes.pixels();
    for (int64_t index = static_cast<int64_t>(blockIdx.y) * lanes.pixels() + lanes.pixel(thread);
         index < count; index += step) {
      const Strip strip = grid.at(index);
      add_products<M>(
          sum, plane_of(grad, grad_strides, grid.height, grid.width, strip.image, channel),
          plane_of(z, z_strides, grid.height, grid.width, strip.image, source), strip.h0, strip.w,
          m, a0, b0);
    }
  }

  __shared__ acc_t sums[kThreads];
#pragma unroll
  for (int i = 0; i < M * M; ++i) {
    sums[thread] = sum[i];
    __syncthreads();
    if (lanes.pixel(thread) == 0 && term < terms) {
      acc_t total = acc_t(0);
      for (int pixel = 0; pixel < lanes.pixels(); ++pixel) {
        total += sums[lanes.thread(lanes.term(thread), pixel)];
      }
      partial[((blockIdx.y * terms + term) * m + a0 + i / M) * m + b0 + i % M] = total;
    }
    __syncthreads();
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// output = what the wiring makes of input; `flip` turns the taps around (see expand_cpu.cpp).
template <typename Wiring>
void mix(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
         const at::Tensor& transforms, bool flip, const std::optional<at::Tensor>& bias_any,
         const Shape& shape, bool channels_last) {
  if (output.numel() == 0) return;
  const int tap_count = shape.m * shape.m;
  // Neighbouring threads are neighbouring channels in channels_last: let their taps be neighbours.
  const at::Tensor by_term = transforms.reshape({shape.terms(), tap_count});
  const at::Tensor taps = (channels_last ? by_term.t() : by_term).contiguous();
  const int64_t tap_stride = channels_last ? shape.terms() : 1;
  const int64_t term_stride = channels_last ? 1 : tap_count;
  const at::Tensor bias = bias_any.has_value() ? bias_any->contiguous() : at::Tensor();

  const StripGrid grid{shape.batch, output.size(1), shape.height, shape.width, channels_last};
  const auto blocks =
      static_cast<unsigned>(std::min(kMaxGrid, ceil_div(grid.count(), kThreads)));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "sbf::expand", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const scalar_t* data = taps.const_data_ptr<scalar_t>();
        const Taps<scalar_t> first = flip
                                         ? Taps<scalar_t>{data + (tap_count - 1) * tap_stride,
                                                          -tap_stride}
                                         : Taps<scalar_t>{data, tap_stride};
        const auto kernel = shape.m == 3 ? mix_kernel<3, scalar_t, acc_t, Wiring>
                                         : mix_kernel<1, scalar_t, acc_t, Wiring>;
        kernel<<<blocks, kThreads, 0, stream>>>(
            output.mutable_data_ptr<scalar_t>(), strides_of(output),
            input.const_data_ptr<scalar_t>(), strides_of(input), wiring, first, term_stride,
            bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr, grid, shape.m);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

// ---------------------------------------------------------------- operators

at::Tensor expand(const at::Tensor& z_any, const at::Tensor& transforms,
                  const at::Tensor& sources_any, const at::Tensor& order_any,
                  const std::optional<at::Tensor>& bias) {
  const c10::cuda::CUDAGuard guard(z_any.device());
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
  const c10::cuda::CUDAGuard guard(grad_any.device());
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
  const c10::cuda::CUDAGuard guard(z_any.device());
  const Shape shape = check_grad_transforms(grad_any, z_any, sources_any, order, size);
  const std::vector<int64_t> sizes = {shape.rebuilt, shape.sources_each, size, size};
  if (shape.terms() == 0 || z_any.numel() == 0) return at::zeros(sizes, z_any.options());
  const auto format = z_any.suggest_memory_format();
  const bool channels_last = is_channels_last(z_any);
  const at::Tensor z = z_any.contiguous(format), grad = grad_any.contiguous(format);
  const at::Tensor sources = sources_any.contiguous(), position = inverse_order(order);

  const Lanes lanes{channels_last};
  const StripGrid grid{shape.batch, 1, shape.height, shape.width, channels_last};
  const int64_t patches = shape.m == 3 ? 1 : shape.m * shape.m;
  const int64_t groups = ceil_div(shape.terms(), lanes.terms());
  // Enough blocks to fill a GPU, but at least four strips for each thread, and no grid axis beyond
  // its limit of 65535.
  const int64_t slices =
      std::clamp<int64_t>(std::min(ceil_div(kReductionBlocks, groups * patches),
                                   ceil_div(grid.count(), 4 * lanes.pixels())),
                          1, 65535);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "sbf::expand_grad_transforms", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const at::Tensor partial =
            at::empty({slices, shape.terms(), shape.m * shape.m},
                      z.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
        const auto kernel =
            shape.m == 3 ? product_kernel<3, scalar_t, acc_t> : product_kernel<1, scalar_t, acc_t>;
        const dim3 blocks(groups, slices, patches);
        kernel<<<blocks, kThreads, 0, stream>>>(
            partial.mutable_data_ptr<acc_t>(), grad.const_data_ptr<scalar_t>(), strides_of(grad),
            z.const_data_ptr<scalar_t>(), strides_of(z), sources.const_data_ptr<int64_t>(),
            position.const_data_ptr<int64_t>() + shape.basis, grid, shape.terms(), shape.basis,
            static_cast<int>(shape.sources_each), shape.m, lanes);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        sums = partial.sum(0);
      });
  return sums.to(z.scalar_type()).view(sizes);
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& transforms,
                  const at::Tensor& sources, const at::Tensor& order,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups, c10::string_view activation,
                  const std::optional<at::Tensor>& /*packed: the CPU's*/) {
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

TORCH_LIBRARY_IMPL(sbf, CUDA, m) {
  m.impl("expand", &expand);
  m.impl("conv2d", &conv2d);
  m.impl("expand_grad_input", &expand_grad_input);
  m.impl("expand_grad_transforms", &expand_grad_transforms);
}

}  // namespace sbf
