// CPU operators: float, bfloat16 and half work on tiles (tile.h), with the kernels of the best
// instruction set that the CPU has; double, which serves gradient checks, takes plain strips
// (expand_double.h).
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdlib>
#include <memory>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"
#include "expand_double.h"
#include "mixture.h"
#include "tile.h"

namespace sbf {
namespace {

// What a thread works on at a time should stay in the second-level cache.
constexpr int64_t kTileBytes = 768 * 1024;
// An image of this size is not cut: its tiles would lose more at their borders.
constexpr int64_t kWholeImageBytes = 1536 * 1024;
// Planes lie pages apart: with small ones, address translation is what takes the time.
constexpr int64_t kHugePage = 2 * 1024 * 1024;
// Planes of an image that threads share: they should stay in their caches.
constexpr int64_t kSharedFloats = 512 * 1024;
// Partial sums of the transforms' gradient: a fixed number, so that threads do not change it.
constexpr int64_t kSlices = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
    const int64_t bytes = ceil_div(floats * sizeof(float), kHugePage) * kHugePage;
    size = 0;  // should the next line find none
    memory.reset(static_cast<float*>(std::aligned_alloc(kHugePage, bytes)));
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

// How images are cut into tiles.
struct Tiling {
  int64_t rows, blocks;

  Tiling(int64_t tile_rows, int64_t tiles) : rows(tile_rows), blocks(tiles) {}
  // `bytes`: what a row needs in a tile. `least`: how many tiles there should be in all, at least.
  Tiling(const Shape& shape, int64_t bytes, int64_t least) {
    const int64_t fit = kTileBytes / std::max<int64_t>(1, bytes) - (shape.m - 1);
    blocks =
        ceil_div(shape.height, std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, shape.height)));
    if (shape.height * bytes <= kWholeImageBytes) blocks = 1;
    blocks = std::clamp<int64_t>(ceil_div(least, std::max<int64_t>(shape.batch, 1)),
                                 std::max<int64_t>(blocks, 1), std::max<int64_t>(shape.height, 1));
    rows = ceil_div(shape.height, blocks);
    blocks = ceil_div(shape.height, rows);
  }
};

// For each column of taps the pixels of a tile whose neighbour in that column lies in the row.
struct Masks {
  std::vector<int32_t> bits;
  int64_t stride;

  Masks(int64_t rows, int64_t width, int m) : stride(rows * width + 256) {
    bits.resize(m * stride);
    for (int b = 0; b < m; ++b) {
      const int64_t shift = b - (m - 1) / 2;
      for (int64_t i = 0; i < rows * width; ++i) {
        const int64_t neighbour = i % width + shift;
        bits[b * stride + i] = neighbour >= 0 && neighbour < width ? -1 : 0;
      }
    }
  }
};

// Which plane each output channel copies, and the links that it adds (see MixTask).
struct Links {
  std::vector<int32_t> copied, begin{0}, source;
  std::vector<int64_t> tap;

  template <typename Wiring>
  Links(const Wiring& wiring, int64_t outputs, int m) {
    for (int64_t c = 0; c < outputs; ++c) {
      const Mix mix = wiring.mix(c);
      copied.push_back(static_cast<int32_t>(mix.copied));
      for (int64_t link = mix.first; link < mix.last; ++link) {
        source.push_back(static_cast<int32_t>(wiring.input(link)));
        tap.push_back(wiring.term(link) * m * m);
      }
      begin.push_back(static_cast<int32_t>(source.size()));
    }
  }
};

// Few images, one after the other, by all threads: each makes some of the planes, then some of the
// output's channels. Tiles of one image would each need the rows around it.
void share_images(const MixTask& task, const Product& product, int64_t batch,
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
        kernels.multiply(task, product, n, part(t, task.inputs), part(t, task.outputs), planes,
                         workspace<Memory::kOwn>(floats));
      }
    });
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        kernels.store(task, n, part(t, task.outputs), planes, workspace<Memory::kOwn>(floats));
      }
    });
  }
}

// output = what the wiring makes of input, or of the planes that `product` makes of it.
template <typename Wiring>
void mix_tiles(const at::Tensor& output, const at::Tensor& input, int64_t inputs,
               const Product* product, const Wiring& wiring, const at::Tensor& taps,
               const Epilogue& epilogue, const Shape& shape, bool channels_last) {
  const int64_t outputs = output.size(1);
  int64_t floats_per_row = (inputs + outputs) * shape.width;
  if (product != nullptr && (!channels_last || product->kernel_h > 1)) {
    floats_per_row += product->channels * product->stride_h * product->stride_w * shape.width;
  }
  const int64_t row_bytes = floats_per_row * static_cast<int64_t>(sizeof(float));
  Tiling tiling(shape, row_bytes, at::get_num_threads());
  const int64_t threads = at::get_num_threads(), panels = ceil_div(inputs, tile_kernels().lanes);
  const bool even = panels % threads == 0 || panels >= 4 * threads;
  const bool shared = product != nullptr && shape.batch < threads && even &&
                      inputs * shape.width * shape.height <= kSharedFloats;
  if (shared) tiling = {shape.height, 1};
  const Masks masks(tiling.rows, shape.width, shape.m);
  const Links links(wiring, outputs, shape.m);
  const TileKernels& kernels = tile_kernels();
  at::Tensor bias;
  if (epilogue.bias.has_value()) {
    bias = at::constant_pad_nd(epilogue.bias->to(at::kFloat), {0, kernels.lanes}).contiguous();
  }
  const MixTask task{
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
  const int64_t floats = kernels.mix_workspace(task, product);
  if (shared) {
    share_images(task, *product, shape.batch, kernels, floats);
    return;
  }
  at::parallel_for(0, shape.batch * tiling.blocks, 1, [&](int64_t first, int64_t last) {
    kernels.mix(task, product, element, first, last, workspace<Memory::kOwn>(floats));
  });
}

// `flip` turns the taps around: the gradient of a cross-correlation is one with flipped taps.
template <typename Wiring>
void mix(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
         const at::Tensor& transforms, bool flip, const Epilogue& epilogue, const Shape& shape,
         bool channels_last) {
  if (output.numel() == 0) return;
  if (input.scalar_type() == at::kDouble) {
    mix_double(output, input, wiring, transforms, flip, epilogue, shape, channels_last);
    return;
  }
  at::Tensor taps = transforms.to(at::kFloat);
  taps = (flip ? taps.flip({2, 3}) : taps).contiguous();
  mix_tiles(output, input, input.size(1), nullptr, wiring, taps, epilogue, shape, channels_last);
}

// Gradient of the transforms, (P*S, m*m) float sums for float, bfloat16 and half.
at::Tensor product_tiles(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                         const at::Tensor& position, const Shape& shape, bool channels_last) {
  const int64_t tap_count = shape.m * shape.m;
  const Tiling tiling(
      shape, (shape.basis + shape.channels) * shape.width * static_cast<int64_t>(sizeof(float)),
      /*least=*/1);
  const int64_t tasks = shape.batch * tiling.blocks, slices = std::min(tasks, kSlices);
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
  const DotTask task{
      .grad = grad.const_data_ptr(),
      .input = z.const_data_ptr(),
      .channels_last = channels_last,
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
  const int64_t floats = kernels.dot_workspace(task);
  at::parallel_for(0, slices, 1, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      kernels.dot(task, element, slice, tasks, slices, sums + slice * shape.terms() * tap_count,
                  workspace<Memory::kOwn>(floats));
    }
  });
  return partial.sum(0);
}

// ---------------------------------------------------------------- operators

at::Tensor expanded(const at::Tensor& z_any, const at::Tensor& transforms,
                    const at::Tensor& sources_any, const at::Tensor& order_any,
                    const Epilogue& epilogue) {
  const Shape shape = check_expand(z_any, transforms, sources_any, order_any, epilogue.bias);
  const auto format = z_any.suggest_memory_format();
  if (is_large_mixture(shape, z_any)) {
    return mixed(z_any, transforms, sources_any, order_any, epilogue, shape, format);
  }
  const at::Tensor z = z_any.contiguous(format);
  const at::Tensor sources = sources_any.contiguous(), order = order_any.contiguous();
  const at::Tensor y =
      at::empty({shape.batch, shape.channels, shape.height, shape.width}, z.options(), format);
  const ForwardWiring wiring{order.const_data_ptr<int64_t>(), sources.const_data_ptr<int64_t>(),
                             shape.basis, shape.channels, shape.sources_each};
  mix(y, z, wiring, transforms, /*flip=*/false, epilogue, shape, is_channels_last(z_any));
  return y;
}

at::Tensor expand(const at::Tensor& z, const at::Tensor& transforms, const at::Tensor& sources,
                  const at::Tensor& order, const std::optional<at::Tensor>& bias) {
  return expanded(z, transforms, sources, order, {bias, std::nullopt, Activation::kNone});
}

// Whether the tiles' own product is the faster one: it saves writing and reading the basis
// features, and is as fast as ATen's convolution while the filters stay in the cache; beyond that
// only where threads share images, with packed filters.
constexpr int64_t kFilterBytes = 640 * 1024;

bool multiplies_tiles(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef padding,
                      int64_t groups, bool is_packed, const Shape& shape) {
  if (x.scalar_type() != at::kFloat || groups != 1) return false;
  if (weight.size(2) == 1 && weight.size(3) == 1 && padding[0] == 0 && padding[1] == 0) return true;
  return is_channels_last(x) &&
         ((is_packed && shape.batch < at::get_num_threads()) ||
          weight.numel() * static_cast<int64_t>(sizeof(float)) <= kFilterBytes);
}

// weight (B, C_in, k_h, k_w) as panels of filters, (panels, k_h * k_w * C_in, lanes).
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
              "packed must be what pack_filters makes of weight on this machine, float ",
              at::IntArrayRef(sizes), ", got ", packed.scalar_type(), " ", packed.sizes());
}

// A convolution of float, of which each tile is expanded while it is in the cache.
at::Tensor convolved(const at::Tensor& x_any, const at::Tensor& weight, const at::Tensor& packed,
                     const at::Tensor& transforms, const at::Tensor& sources_any,
                     const at::Tensor& order_any, const Epilogue& epilogue, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, const Shape& shape) {
  const auto format = x_any.suggest_memory_format();
  const at::Tensor x = x_any.contiguous(format);
  const at::Tensor sources = sources_any.contiguous(), order = order_any.contiguous();
  const at::Tensor y =
      at::empty({shape.batch, shape.channels, shape.height, shape.width}, x.options(), format);
  if (y.numel() == 0) return y;
  const Product product{
      .weight = packed.const_data_ptr<float>(),
      .channels = x.size(1),
      .height = x.size(2),
      .width = x.size(3),
      .kernel_h = weight.size(2),
      .kernel_w = weight.size(3),
      .stride_h = stride[0],
      .stride_w = stride[1],
      .pad_h = padding[0],
      .pad_w = padding[1],
      .dilation_h = dilation[0],
      .dilation_w = dilation[1],
  };
  const ForwardWiring wiring{order.const_data_ptr<int64_t>(), sources.const_data_ptr<int64_t>(),
                             shape.basis, shape.channels, shape.sources_each};
  mix_tiles(y, x, shape.basis, &product, wiring, transforms.contiguous(), epilogue, shape,
            is_channels_last(x_any));
  return y;
}

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& transforms,
                  const at::Tensor& sources, const at::Tensor& order,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                  int64_t groups, c10::string_view activation,
                  const std::optional<at::Tensor>& packed) {
  const Shape shape = check_conv2d(x, weight, transforms, sources, order, bias, residual, stride,
                                   padding, dilation, groups);
  const auto format = x.suggest_memory_format();
  Epilogue epilogue{bias, residual, activation_of(activation)};
  if (residual.has_value()) epilogue.residual = residual->contiguous(format);
  if (packed.has_value()) check_packed(*packed, weight);
  if (!is_large_mixture(shape, x) &&
      multiplies_tiles(x, weight, padding, groups, packed.has_value(), shape)) {
    return convolved(x, weight, packed.has_value() ? *packed : pack_filters(weight), transforms,
                     sources, order, epilogue, stride, padding, dilation, shape);
  }
  const at::Tensor z = at::conv2d(x, weight, {}, stride, padding, dilation, groups);
  return expanded(z.contiguous(format), transforms, sources, order, epilogue);
}

at::Tensor expand_grad_input(const at::Tensor& grad_any, const at::Tensor& transforms,
                             const at::Tensor& sources, const at::Tensor& order) {
  const Shape shape = check_grad_input(grad_any, transforms, sources, order);
  if (is_large_mixture(shape, grad_any)) {
    return mixed_grad_input(grad_any, transforms, sources, order, shape);
  }
  const auto format = grad_any.suggest_memory_format();
  const at::Tensor grad = grad_any.contiguous(format);
  const at::Tensor grad_z =
      at::empty({shape.batch, shape.basis, shape.height, shape.width}, grad.options(), format);
  const Inverse inverse = inverse_of(sources, order, shape.basis);
  const BackwardWiring wiring{
      inverse.position.const_data_ptr<int64_t>(), inverse.terms.const_data_ptr<int64_t>(),
      inverse.begin.const_data_ptr<int64_t>(), shape.basis, shape.sources_each};
  mix(grad_z, grad, wiring, transforms, /*flip=*/true, {}, shape, is_channels_last(grad_any));
  return grad_z;
}

at::Tensor expand_grad_transforms(const at::Tensor& grad_any, const at::Tensor& z_any,
                                  const at::Tensor& sources_any, const at::Tensor& order,
                                  int64_t size) {
  const Shape shape = check_grad_transforms(grad_any, z_any, sources_any, order, size);
  const std::vector<int64_t> sizes = {shape.rebuilt, shape.sources_each, size, size};
  if (shape.terms() == 0 || z_any.numel() == 0) return at::zeros(sizes, z_any.options());
  if (is_mixture(shape, z_any)) {
    return mixed_grad_transforms(grad_any, z_any, sources_any, order, shape);
  }
  const bool channels_last = is_channels_last(z_any);
  const at::Tensor z = z_any.contiguous(z_any.suggest_memory_format());
  const at::Tensor grad = grad_any.contiguous(z_any.suggest_memory_format());
  const at::Tensor sources = sources_any.contiguous(), position = inverse_order(order);
  at::Tensor sums;
  if (z.scalar_type() == at::kDouble) {
    sums = product_double(grad, z, sources, position, shape, channels_last);
  } else {
    sums = product_tiles(grad, z, sources, position, shape, channels_last);
  }
  return sums.to(z.scalar_type()).view(sizes);
}

}  // namespace

int cpu_lanes() { return tile_kernels().lanes; }
int64_t mixed_in_tiles() { return kMixedInTiles; }

TORCH_LIBRARY_IMPL(sbf, CPU, m) {
  m.impl("expand", &expand);
  m.impl("conv2d", &conv2d);
  m.impl("pack_filters", &pack_filters);
  m.impl("expand_grad_input", &expand_grad_input);
  m.impl("expand_grad_transforms", &expand_grad_transforms);
}

}  // namespace sbf
