// CUDA: the gradient of expand by the transforms. The kernels run the functions of
// transforms_block.h, or of expand.h where a tile does not fit into shared memory. Each block adds
// up its share in a slab of its own, and the slabs are added in a fixed order: no atomics, the same
// result every time.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>

#include "cuda_launch.h"
#include "transforms_block.h"

namespace sbf {
namespace {

constexpr int kWarp = 32;
// Blocks that a sum is divided among.
constexpr int64_t kMaxBlocksPerSum = 512;
constexpr int64_t kMaxSlabBytes = 64 << 20;

template <int M, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(max_threads_of(sizeof(scalar_t))) transforms_tiles_kernel(
    const __grid_constant__ TransformsArguments<scalar_t, acc_t> arguments) {
  extern __shared__ __align__(16) char shared[];
  transforms_tiles<M, scalar_t, acc_t>(Team{}, arguments, shared, blockIdx.x, gridDim.x,
                                       blockIdx.y);
}

// How a block of the general kernel is divided: neighbouring threads should read neighbours in
// memory, so lanes are pixels in one layout and terms (mostly neighbouring channels) in the other.
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

template <typename scalar_t, typename acc_t>
struct StripArguments {
  acc_t* slabs;  // (slices, terms, m * m)
  const scalar_t* grad;
  const scalar_t* z;
  const int64_t* sources;
  const int64_t* rebuilt_at;  // where each rebuilt channel is among the output's
  Strides grad_strides, z_strides;
  StripGrid grid;  // of single planes
  int64_t terms, basis;
  int sources_each, m;
  Lanes lanes;
};

// Grid: groups of terms, slices of the strips, patches of M x M taps.
template <int M, typename scalar_t, typename acc_t>
__global__ void __launch_bounds__(kThreads)
    transforms_strips_kernel(const __grid_constant__ StripArguments<scalar_t, acc_t> args) {
  const Lanes& lanes = args.lanes;
  const StripGrid& grid = args.grid;
  const int thread = threadIdx.x, m = args.m;
  const int64_t term = static_cast<int64_t>(blockIdx.x) * lanes.terms() + lanes.term(thread);
  const int a0 = blockIdx.z / (m / M) * M, b0 = blockIdx.z % (m / M) * M;

  acc_t sum[M * M];
#pragma unroll
  for (int i = 0; i < M * M; ++i) sum[i] = acc_t(0);
  if (term < args.terms) {
    const int64_t source = args.sources[term];
    CUDA_KERNEL_ASSERT(source >= 0 && source < args.basis &&
                       "sources must be positions in the basis");
    const int64_t channel = args.rebuilt_at[term / args.sources_each];
    const int64_t step = static_cast<int64_t>(gridDim.y) * lanes.pixels();
    for (int64_t index = static_cast<int64_t>(blockIdx.y) * lanes.pixels() + lanes.pixel(thread);
         index < grid.count(); index += step) {
      const Strip strip = grid.at(index);
      add_strip_products<M>(
          sum,
          plane_of(args.grad, args.grad_strides, grid.height, grid.width, strip.image, channel),
          plane_of(args.z, args.z_strides, grid.height, grid.width, strip.image, source), strip.h0,
          strip.w, m, a0, b0);
    }
  }

  __shared__ acc_t sums[kThreads];
#pragma unroll
  for (int i = 0; i < M * M; ++i) {
    sums[thread] = sum[i];
    __syncthreads();
    if (lanes.pixel(thread) == 0 && term < args.terms) {
      acc_t total = acc_t(0);
      for (int pixel = 0; pixel < lanes.pixels(); ++pixel) {
        total += sums[lanes.thread(lanes.term(thread), pixel)];
      }
      args.slabs[((blockIdx.y * args.terms + term) * m + a0 + i / M) * m + b0 + i % M] = total;
    }
    __syncthreads();
  }
}

template <typename scalar_t, typename acc_t>
at::Tensor tile_sums(const at::Tensor& grad, const at::Tensor& z, const ForwardWiring& wiring,
                     const Shape& shape, const Tiling& tiling) {
  const int64_t slab_bytes =
      shape.terms() * shape.m * shape.m * static_cast<int64_t>(sizeof(acc_t));
  const int64_t slabs = std::clamp<int64_t>(
      std::min<int64_t>(tiling.resident, kMaxSlabBytes / slab_bytes), 1, tiling.tiles());
  const at::Tensor sums = at::empty({slabs, shape.terms(), shape.m * shape.m},
                                    z.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  const TransformsArguments<scalar_t, acc_t> arguments{sums.mutable_data_ptr<acc_t>(),
                                                       grad.const_data_ptr<scalar_t>(),
                                                       z.const_data_ptr<scalar_t>(),
                                                       wiring,
                                                       shape.terms(),
                                                       tiling};
  launch(shape.m == 3 ? transforms_tiles_kernel<3, scalar_t, acc_t>
                      : transforms_tiles_kernel<1, scalar_t, acc_t>,
         dim3(slabs, tiling.splits), tiling.threads, tiling.bytes, arguments);
  return sums.sum(0);
}

template <typename scalar_t, typename acc_t>
at::Tensor strip_sums(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                      const at::Tensor& order, const Shape& shape) {
  const bool channels_last = shape.channels_last();
  const Lanes lanes{channels_last};
  const StripGrid grid{shape.batch, 1, shape.height, shape.width, channels_last};
  const int64_t patches = shape.m == 3 ? 1 : shape.m * shape.m;
  const int64_t groups = ceil_div(shape.terms(), lanes.terms());
  // Enough blocks to fill a GPU, but at least four strips for each thread, and no grid axis beyond
  // its limit of 65535.
  const int64_t slices =
      std::clamp<int64_t>(std::min(ceil_div(4 * kMaxBlocksPerSum, groups * patches),
                                   ceil_div(grid.count(), 4 * lanes.pixels())),
                          1, 65535);
  const at::Tensor position = inverse_order(order);
  const at::Tensor sums = at::empty({slices, shape.terms(), shape.m * shape.m},
                                    z.options().dtype(c10::CppTypeToScalarType<acc_t>::value));
  const StripArguments<scalar_t, acc_t> arguments{sums.mutable_data_ptr<acc_t>(),
                                                  grad.const_data_ptr<scalar_t>(),
                                                  z.const_data_ptr<scalar_t>(),
                                                  sources.const_data_ptr<int64_t>(),
                                                  position.const_data_ptr<int64_t>() + shape.basis,
                                                  strides_of(grad),
                                                  strides_of(z),
                                                  grid,
                                                  shape.terms(),
                                                  shape.basis,
                                                  static_cast<int>(shape.sources_each),
                                                  shape.m,
                                                  lanes};
  launch(shape.m == 3 ? transforms_strips_kernel<3, scalar_t, acc_t>
                      : transforms_strips_kernel<1, scalar_t, acc_t>,
         dim3(groups, slices, patches), kThreads, 0, arguments);
  return sums.sum(0);
}

}  // namespace

at::Tensor cuda_expand_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                       const at::Tensor& sources, const at::Tensor& order,
                                       const Shape& shape) {
  const ForwardWiring wiring{order.const_data_ptr<int64_t>(), sources.const_data_ptr<int64_t>(),
                             shape.basis, shape.channels, shape.sources_each};
  at::Tensor sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, z.scalar_type(), "sbf::expand_grad_transforms", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const auto tiling =
            tile_for({shape.batch, shape.basis, shape.channels, shape.height, shape.width, shape.m,
                      static_cast<int>(sizeof(scalar_t)), shape.channels_last(), alignment_of(z),
                      alignment_of(grad),
                      shape.m == 3 ? TransformsBlock<3, scalar_t, acc_t>::kSumBytes
                                   : TransformsBlock<1, scalar_t, acc_t>::kSumBytes},
                     /*stage_planes=*/true, current_device());
        sums = tiling.has_value() ? tile_sums<scalar_t, acc_t>(grad, z, wiring, shape, *tiling)
                                  : strip_sums<scalar_t, acc_t>(grad, z, sources, order, shape);
      });
  return sums;
}

}  // namespace sbf
