// The CPU's kernels: float, bfloat16 and half are computed in tiles (tile.h), by the kernels of the
// best instruction set that the CPU has; double, which serves gradient checks, in plain strips
// (expand_double.h).
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <cstdlib>
#include <memory>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "expand_double.h"
#include "kernels.h"
#include "tile.h"
#include "tiling_cpu.h"

namespace sbf {
namespace {

// Planes lie pages apart: with small ones, address translation is what takes the time.
constexpr int64_t kHugePageBytes = 2 * 1024 * 1024;
// Planes of an image that threads share: they should stay in their caches.
constexpr int64_t kMaxSharedFloats = 512 * 1024;
// Partial sums of the transforms' gradient: a fixed number, so that threads do not change it.
constexpr int64_t kNumSlices = 64;

// The kernels of this CPU; the environment's ATEN_CPU_CAPABILITY lowers it, as PyTorch's own.
const TileKernels& tile_kernels() {
  static const TileKernels& chosen = []() -> const TileKernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return tile_kernels_avx512();
    if (capability == "AVX2") return tile_kernels_avx2();
#endif
    return tile_kernels_generic();
  }();
  return chosen;
}

// A thread's own memory, which it keeps: allocating some hundred KiB anew costs page faults. Planes
// that threads share are the second of the calling thread's two.
enum class Memory { kOwn, kShared };
template <Memory>
float* workspace(int64_t floats) {
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (floats > size) {
    const int64_t bytes = ceil_div(floats * sizeof(float), kHugePageBytes) * kHugePageBytes;
    size = 0;  // in case the next line fails
    memory.reset(static_cast<float*>(std::aligned_alloc(kHugePageBytes, bytes)));
    TORCH_CHECK(memory != nullptr, "no memory for a workspace of ", bytes, " bytes");
    size = bytes / static_cast<int64_t>(sizeof(float));
#if defined(__linux__)
    madvise(memory.get(), bytes, MADV_HUGEPAGE);  // where the system has them
#endif
  }
  return memory.get();
}

Element element_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::kFloat;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kHalf;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "sbf operators are not implemented for ",
                                  tensor.scalar_type());
  }
}

// Fewer images than threads, one after the other, by all threads: each computes some of the planes,
// then some of the output's channels. Tiles of one image would each need the rows around it.
void share_images(const ExpandTask& task, const ConvolutionTask& convolution, int64_t batch,
                  const TileKernels& kernels, int64_t floats) {
  const int64_t threads = at::get_num_threads();
  const auto part = [&](int64_t thread, int64_t channels) {
    const int64_t blocks = ceil_div(channels, kernels.lanes);
    const auto bound = [&](int64_t t) {
      return std::min(channels, blocks * t / threads * kernels.lanes);
    };
    return Range{bound(thread), bound(thread + 1)};
  };
  float* planes = workspace<Memory::kShared>(kernels.planes_floats(task));
  for (int64_t n = 0; n < batch; ++n) {
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        kernels.convolve(task, convolution, n, part(t, task.inputs), part(t, task.outputs), planes,
                         workspace<Memory::kOwn>(floats));
      }
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        kernels.expand_planes(task, n, part(t, task.outputs), planes,
                              workspace<Memory::kOwn>(floats));
      }
    });
  }
}

// output = what the wiring gives for input, or for its convolution.
template <typename Wiring>
void expand_tiles(const at::Tensor& output, const at::Tensor& input,
                  const ConvolutionTask* convolution, const Wiring& wiring, const at::Tensor& taps,
                  const Epilogue& epilogue, const Shape& shape) {
  const int64_t outputs = output.size(1);
  const int64_t inputs = convolution == nullptr ? input.size(1) : shape.basis;
  const bool channels_last = shape.channels_last();
  int64_t floats_per_row = (inputs + outputs) * shape.width;
  if (convolution != nullptr && (!channels_last || convolution->kernel_h > 1)) {
    floats_per_row +=
        convolution->channels * convolution->stride_h * convolution->stride_w * shape.width;
  }
  const int64_t row_bytes = floats_per_row * static_cast<int64_t>(sizeof(float));
  RowBlocks tiling(shape, row_bytes, at::get_num_threads());
  const TileKernels& kernels = tile_kernels();
  const int64_t threads = at::get_num_threads(), panels = ceil_div(inputs, kernels.lanes);
  const bool even = panels % threads == 0 || panels >= 4 * threads;
  const bool shared = convolution != nullptr && shape.batch < threads && even &&
                      inputs * shape.width * shape.height <= kMaxSharedFloats;
  if (shared) tiling = {shape.height, 1};
  const Masks masks(tiling.rows, shape.width, shape.m);
  const Links links(wiring, outputs, shape.m);
  at::Tensor bias;
  if (epilogue.bias.has_value()) {
    bias = at::constant_pad_nd(epilogue.bias->to(at::kFloat), {0, kernels.lanes}).contiguous();
  }
  const ExpandTask task{
      .output = output.mutable_data_ptr(),
      .input = input.const_data_ptr(),
      .residual = epilogue.residual.has_value() ? epilogue.residual->const_data_ptr() : nullptr,
      .channels_last = channels_last,
      .height = shape.height,
      .width = shape.width,
      .inputs = inputs,
      .outputs = outputs,
      .rows = tiling.rows,
      .blocks = tiling.blocks,
      .m = shape.m,
      .copied = links.copied.data(),
      .begin = links.begin.data(),
      .source = links.source.data(),
      .tap = links.tap.data(),
      .taps = taps.const_data_ptr<float>(),
      .bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr,
      .activation = epilogue.activation,
      .mask = masks.bits.data(),
      .mask_stride = masks.stride,
  };
  const Element element = element_of(input);
  const int64_t floats = kernels.expand_workspace(task, convolution);
  if (shared) {
    share_images(task, *convolution, shape.batch, kernels, floats);
    return;
  }
  at::parallel_for(0, shape.batch * tiling.blocks, 1, [&](int64_t first, int64_t last) {
    kernels.expand(task, convolution, element, first, last, workspace<Memory::kOwn>(floats));
  });
}

// `flip` turns the taps around: the gradient of a cross-correlation is one with flipped taps.
template <typename Wiring>
void run_expand(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                const at::Tensor& transforms, bool flip, const Epilogue& epilogue,
                const Shape& shape) {
  if (input.scalar_type() == at::kDouble) {
    expand_double(output, input, wiring, transforms, flip, epilogue, shape);
    return;
  }
  at::Tensor taps = transforms.to(at::kFloat);
  taps = (flip ? taps.flip({2, 3}) : taps).contiguous();
  expand_tiles(output, input, nullptr, wiring, taps, epilogue, shape);
}

// Gradient of the transforms, (P*S, m*m) float sums for float, bfloat16 and half.
at::Tensor transforms_sums(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                           const at::Tensor& position, const Shape& shape) {
  const int64_t tap_count = shape.m * shape.m;
  const RowBlocks tiling(
      shape, (shape.basis + shape.channels) * shape.width * static_cast<int64_t>(sizeof(float)),
      /*min_tiles=*/1);
  const int64_t tasks = shape.batch * tiling.blocks, slices = std::min(tasks, kNumSlices);
  const at::Tensor partial = at::zeros({slices, shape.terms(), tap_count}, at::kFloat);
  float* sums = partial.mutable_data_ptr<float>();
  const Masks masks(tiling.rows, shape.width, shape.m);
  const int64_t* rebuilt = position.const_data_ptr<int64_t>() + shape.basis;
  const int64_t* sources_data = sources.const_data_ptr<int64_t>();
  std::vector<int32_t> channel(shape.terms()), source(shape.terms());
  for (int64_t term = 0; term < shape.terms(); ++term) {
    channel[term] = static_cast<int32_t>(rebuilt[term / shape.sources_each]);
    source[term] = static_cast<int32_t>(sources_data[term]);
  }
  const TransformsTask task{
      .grad = grad.const_data_ptr(),
      .input = z.const_data_ptr(),
      .channels_last = shape.channels_last(),
      .height = shape.height,
      .width = shape.width,
      .inputs = shape.basis,
      .outputs = shape.channels,
      .rows = tiling.rows,
      .blocks = tiling.blocks,
      .links = shape.terms(),
      .m = shape.m,
      .channel = channel.data(),
      .source = source.data(),
      .mask = masks.bits.data(),
      .mask_stride = masks.stride,
  };
  const TileKernels& kernels = tile_kernels();
  const Element element = element_of(z);
  const int64_t floats = kernels.transforms_workspace(task);
  at::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      kernels.grad_transforms(task, element, slice, tasks, slices,
                              sums + slice * shape.terms() * tap_count,
                              workspace<Memory::kOwn>(floats));
    }
  });
  return partial.sum(0);
}

void expand(const at::Tensor& y, const at::Tensor& z, const at::Tensor& transforms,
            const ForwardWiring& wiring, const Epilogue& epilogue, const Shape& shape) {
  run_expand(y, z, wiring, transforms, /*flip=*/false, epilogue, shape);
}

void expand_grad_input(const at::Tensor& grad_z, const at::Tensor& grad,
                       const at::Tensor& transforms, const BackwardWiring& wiring,
                       const Shape& shape) {
  run_expand(grad_z, grad, wiring, transforms, /*flip=*/true, {}, shape);
}

at::Tensor expand_grad_transforms(const at::Tensor& grad, const at::Tensor& z,
                                  const at::Tensor& sources, const at::Tensor& order,
                                  const Shape& shape) {
  const at::Tensor position = inverse_order(order);
  if (z.scalar_type() == at::kDouble) return transforms_double(grad, z, sources, position, shape);
  return transforms_sums(grad, z, sources, position, shape);
}

// Filters up to this size stay in a core's cache.
constexpr int64_t kMaxCachedFilterBytes = 640 * 1024;

}  // namespace

const DeviceKernels& cpu_kernels() {
  static constexpr DeviceKernels kernels{inverse_of, expand, expand_grad_input,
                                         expand_grad_transforms};
  return kernels;
}

int cpu_lanes() { return tile_kernels().lanes; }

// It saves writing and reading the basis features, and is as fast as ATen's convolution while the
// filters stay in the cache; beyond that only where threads share images, with packed filters.
bool convolves_in_tiles(const at::Tensor& x, const at::Tensor& weight, bool is_packed,
                        const Convolution& convolution, const Shape& shape) {
  if (x.scalar_type() != at::kFloat || convolution.groups != 1) return false;
  const at::IntArrayRef padding = convolution.padding;
  if (weight.size(2) == 1 && weight.size(3) == 1 && padding[0] == 0 && padding[1] == 0) return true;
  return shape.channels_last() &&
         ((is_packed && shape.batch < at::get_num_threads()) ||
          weight.numel() * static_cast<int64_t>(sizeof(float)) <= kMaxCachedFilterBytes);
}

at::Tensor pack_filters(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == at::kFloat,
              "weight must be float of shape (B, C_in, k_h, k_w), got ", weight.scalar_type(), " ",
              weight.sizes());
  const TileKernels& kernels = tile_kernels();
  const at::Tensor filters = weight.permute({0, 2, 3, 1}).contiguous();
  const int64_t count = filters.size(0), panels = ceil_div(count, kernels.lanes);
  const int64_t depth = weight.size(1) * weight.size(2) * weight.size(3);
  const at::Tensor packed = at::empty({panels, depth, kernels.lanes}, weight.options());
  const float* from = filters.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    kernels.pack_weight(to, from, count, depth, first, last);
  });
  return packed;
}

void check_packed(const at::Tensor& packed, const at::Tensor& weight) {
  const int64_t lanes = tile_kernels().lanes;
  const std::vector<int64_t> sizes = {ceil_div(weight.size(0), lanes),
                                      weight.size(1) * weight.size(2) * weight.size(3), lanes};
  TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == at::kFloat && packed.is_contiguous() &&
                  packed.sizes() == at::IntArrayRef(sizes),
              "packed must be pack_filters(weight) of this CPU, float ", at::IntArrayRef(sizes),
              ", got ", packed.scalar_type(), " ", packed.sizes());
}

void convolve_in_tiles(const at::Tensor& y, const at::Tensor& x, const PackedFilters& filters,
                       const at::Tensor& transforms, const ForwardWiring& wiring,
                       const Epilogue& epilogue, const Convolution& convolution,
                       const Shape& shape) {
  const ConvolutionTask task{
      .weight = filters.panels.const_data_ptr<float>(),
      .channels = x.size(1),
      .height = x.size(2),
      .width = x.size(3),
      .kernel_h = filters.kernel_h,
      .kernel_w = filters.kernel_w,
      .stride_h = convolution.stride[0],
      .stride_w = convolution.stride[1],
      .pad_h = convolution.padding[0],
      .pad_w = convolution.padding[1],
      .dilation_h = convolution.dilation[0],
      .dilation_w = convolution.dilation[1],
  };
  expand_tiles(y, x, &task, wiring, transforms, epilogue, shape);
}

}  // namespace sbf
