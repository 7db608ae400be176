// CUDA: the wiring read backwards. One kernel instead of two sorts and a search, which would take
// longer than the gradient that they serve.
#include "cuda_launch.h"
#include "kernels.h"

namespace sbf {
namespace {

constexpr int kWarp = 32;

struct InverseArguments {
  const int64_t* sources;
  const int64_t* order;
  int64_t terms, basis, channels;
  int64_t* position;
  int64_t* sorted;
  int64_t* begin;
};

// A warp for each basis feature counts the terms of those before it, and writes its own in order.
__global__ void __launch_bounds__(kThreads)
    inverse_kernel(const __grid_constant__ InverseArguments args) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t channel = thread; channel < args.channels; channel += threads) {
    const int64_t entry = args.order[channel];
    CUDA_KERNEL_ASSERT(entry >= 0 && entry < args.channels && "order must be a permutation");
    args.position[entry] = channel;
  }

  const int lane = threadIdx.x % kWarp;
  // Number `basis` has no terms, only an end of those before it.
  for (int64_t feature = thread / kWarp; feature <= args.basis; feature += threads / kWarp) {
    int before = 0;
    for (int64_t term = lane; term < args.terms; term += kWarp) {
      before += args.sources[term] < feature ? 1 : 0;
    }
#pragma unroll
    for (int away = kWarp / 2; away > 0; away /= 2) before += __shfl_xor_sync(~0u, before, away);
    if (lane == 0) args.begin[feature] = before;
    int64_t next = before;
    for (int64_t first = 0; first < args.terms; first += kWarp) {
      const int64_t term = first + lane;
      const bool own = term < args.terms && args.sources[term] == feature;
      const unsigned owners = __ballot_sync(~0u, own);
      if (own) args.sorted[next + __popc(owners & ((1u << lane) - 1))] = term;
      next += __popc(owners);
    }
  }
}

}  // namespace

Inverse cuda_inverse_of(const at::Tensor& sources, const at::Tensor& order, int64_t basis) {
  const Inverse inverse{at::empty_like(order), at::empty({sources.numel()}, sources.options()),
                        at::empty({basis + 1}, sources.options())};
  const InverseArguments arguments{sources.const_data_ptr<int64_t>(),
                                   order.const_data_ptr<int64_t>(),
                                   sources.numel(),
                                   basis,
                                   order.numel(),
                                   inverse.position.mutable_data_ptr<int64_t>(),
                                   inverse.terms.mutable_data_ptr<int64_t>(),
                                   inverse.begin.mutable_data_ptr<int64_t>()};
  const int64_t warps = basis + 1;
  const dim3 blocks(
      static_cast<unsigned>(std::min<int64_t>(ceil_div(warps * kWarp, kThreads), 1024)));
  launch(inverse_kernel, blocks, kThreads, 0, arguments);
  return inverse;
}

}  // namespace sbf
