// CUDA: the kernels of expand and of its gradient by z. They run the functions of expand_block.h,
// or of expand.h where a tile does not fit into shared memory. Outputs gather, so nothing is added
// atomically and results do not depend on scheduling; nothing waits for the device, so that all of
// it can be captured in a CUDA graph.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include "cuda_launch.h"
#include "expand_block.h"
#include "kernels.h"

namespace sbf {
namespace {

template <int M, typename scalar_t, typename acc_t, typename Wiring>
__global__ void __launch_bounds__(max_threads_of(sizeof(scalar_t)))
    expand_tiles_kernel(const __grid_constant__ ExpandArguments<scalar_t, Wiring> arguments) {
  extern __shared__ __align__(16) char shared[];
  expand_tiles<M, scalar_t, acc_t>(Team{}, arguments, shared, blockIdx.x, gridDim.x, blockIdx.y);
}

template <typename scalar_t, typename Wiring>
struct StripArguments {
  scalar_t* output;
  const scalar_t* input;
  const scalar_t* residual;
  const scalar_t* bias;
  Taps<scalar_t> taps;
  Wiring wiring;
  Activation activation;
  Strides out_strides, in_strides;  // the residual's are the output's
  StripGrid grid;
  int m;
};

// One thread computes one strip of one output channel, and goes on a grid's length further.
template <int M, typename scalar_t, typename acc_t, typename Wiring>
__global__ void __launch_bounds__(kThreads, 2)
    expand_strips_kernel(const __grid_constant__ StripArguments<scalar_t, Wiring> args) {
  const StripGrid& grid = args.grid;
  const int64_t count = grid.count(), step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += step) {
    const Strip strip = grid.at(index);
    acc_t sum[kStrip];
    expand_strip<M>(sum, args.wiring, args.input, args.in_strides, grid.height, grid.width,
                    args.taps, args.m, strip.image, strip.channel, strip.h0, strip.w);
    const acc_t bias =
        args.bias == nullptr ? acc_t(0) : static_cast<acc_t>(args.bias[strip.channel]);
    const int64_t corner = strip.image * args.out_strides.batch +
                           strip.channel * args.out_strides.channel +
                           strip.w * args.out_strides.column;
#pragma unroll
    for (int k = 0; k < kStrip; ++k) {
      if (strip.h0 + k >= grid.height) break;
      const int64_t at = corner + (strip.h0 + k) * args.out_strides.row;
      acc_t value = sum[k] + bias;
      if (args.residual != nullptr) value += static_cast<acc_t>(args.residual[at]);
      args.output[at] = static_cast<scalar_t>(activate(args.activation, value));
    }
  }
}

// output = what the wiring gives for input, which lies in memory as output does. `flip` turns the
// taps around: the gradient of a cross-correlation is one with flipped taps.
template <typename Wiring>
void launch_expand(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                   const at::Tensor& transforms, bool flip, const Epilogue& epilogue,
                   const Shape& shape) {
  const bool channels_last = shape.channels_last();
  int alignment_out = alignment_of(output);
  if (epilogue.residual.has_value()) {
    alignment_out = std::min(alignment_out, alignment_of(*epilogue.residual));
  }

  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "sbf::expand", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const auto optional_data = [](const std::optional<at::Tensor>& tensor) {
          return tensor.has_value() ? tensor->const_data_ptr<scalar_t>() : nullptr;
        };
        scalar_t* out = output.mutable_data_ptr<scalar_t>();
        const scalar_t* in = input.const_data_ptr<scalar_t>();
        const auto taps = taps_of(transforms.const_data_ptr<scalar_t>(), shape.m, flip);

        const auto tiling = tile_for({shape.batch, input.size(1), output.size(1), shape.height,
                                      shape.width, shape.m, static_cast<int>(sizeof(scalar_t)),
                                      channels_last, alignment_of(input), alignment_out, 0},
                                     /*stage_planes=*/false, current_device());
        if (tiling.has_value()) {
          const ExpandArguments<scalar_t, Wiring> arguments{out,
                                                            in,
                                                            optional_data(epilogue.residual),
                                                            optional_data(epilogue.bias),
                                                            taps,
                                                            wiring,
                                                            epilogue.activation,
                                                            *tiling};
          const dim3 blocks(
              static_cast<unsigned>(std::min<int64_t>(tiling->tiles(), tiling->resident)),
              tiling->splits);
          launch(shape.m == 3 ? expand_tiles_kernel<3, scalar_t, acc_t, Wiring>
                              : expand_tiles_kernel<1, scalar_t, acc_t, Wiring>,
                 blocks, tiling->threads, tiling->bytes, arguments);
          return;
        }
        const StripGrid grid{shape.batch, output.size(1), shape.height, shape.width, channels_last};
        const StripArguments<scalar_t, Wiring> arguments{out,
                                                         in,
                                                         optional_data(epilogue.residual),
                                                         optional_data(epilogue.bias),
                                                         taps,
                                                         wiring,
                                                         epilogue.activation,
                                                         strides_of(output),
                                                         strides_of(input),
                                                         grid,
                                                         shape.m};
        const dim3 blocks(
            static_cast<unsigned>(std::min<int64_t>(ceil_div(grid.count(), kThreads), INT32_MAX)));
        launch(shape.m == 3 ? expand_strips_kernel<3, scalar_t, acc_t, Wiring>
                            : expand_strips_kernel<1, scalar_t, acc_t, Wiring>,
               blocks, kThreads, 0, arguments);
      });
}

void expand(const at::Tensor& y, const at::Tensor& z, const at::Tensor& transforms,
            const ForwardWiring& wiring, const Epilogue& epilogue, const Shape& shape) {
  launch_expand(y, z, wiring, transforms, /*flip=*/false, epilogue, shape);
}

void expand_grad_input(const at::Tensor& grad_z, const at::Tensor& grad,
                       const at::Tensor& transforms, const BackwardWiring& wiring,
                       const Shape& shape) {
  launch_expand(grad_z, grad, wiring, transforms, /*flip=*/true, {}, shape);
}

}  // namespace

const DeviceKernels& cuda_kernels() {
  static constexpr DeviceKernels kernels{cuda_inverse_of, expand, expand_grad_input,
                                         cuda_expand_grad_transforms};
  return kernels;
}

}  // namespace sbf
