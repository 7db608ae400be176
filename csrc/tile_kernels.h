// The CPU's kernels on tiles (tile.h), for the instruction set that the including file is compiled
// for. Everything here is local to that file.
#pragma once

#include "tile_convolution.h"
#include "tile_sum.h"

namespace sbf {
namespace {

// ---------------------------------------------------------------- output

// Writes `count` pixels of one channel of an NCHW image.
template <Activation kActivation, typename scalar_t>
void store_plane(scalar_t* to, const float* sum, int64_t count, float bias,
                 const scalar_t* residual) {
  const Vector shift = splat(bias);
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vector v = load(sum + i) + shift;
    if (residual != nullptr) v += load_as_float(residual + i);
    store_from_float(to + i, activated<kActivation>(v));
  }
  if (i < count) {
    Vector v = load(sum + i) + shift;
    if (residual != nullptr) v += load_partial(residual + i, count - i);
    store_partial(to + i, activated<kActivation>(v), count - i);
  }
}

// Writes `pixels` pixels of up to L channels of a channels_last image of `channels` channels.
template <Activation kActivation, typename scalar_t>
void store_pixels(scalar_t* to, const float* const* sums, int64_t block_channels, int64_t pixels,
                  int64_t channels, Vector bias, const scalar_t* residual) {
  for (int64_t i = 0; i < pixels; i += L) {
    const int64_t block_pixels = min<int64_t>(L, pixels - i);
    Vector block[L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) block[k] = load(sums[k] + i);
    transpose(block);
    if (block_pixels == L && block_channels == L) {
      SBF_UNROLL
      for (int k = 0; k < L; ++k) {
        const int64_t at = (i + k) * channels;
        Vector v = block[k] + bias;
        if (residual != nullptr) v += load_as_float(residual + at);
        store_from_float(to + at, activated<kActivation>(v));
      }
      continue;
    }
    float rows[L * L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) store(rows + k * L, block[k]);
    for (int64_t k = 0; k < block_pixels; ++k) {
      const int64_t at = (i + k) * channels;
      Vector v = load(rows + k * L) + bias;
      if (residual != nullptr) v += load_partial(residual + at, block_channels);
      store_partial(to + at, activated<kActivation>(v), block_channels);
    }
  }
}

template <Activation kActivation, typename scalar_t>
void store_tile(const ExpandTask& task, const Planes& planes, int64_t n, int64_t h0, int64_t h1,
                Range channels, float* sums) {
  const ChannelSum channel_sum{task, planes};
  const int64_t area = task.height * task.width;
  const int64_t offset = n * task.outputs * area;
  scalar_t* image = static_cast<scalar_t*>(task.output) + offset;
  const scalar_t* added =
      task.residual == nullptr ? nullptr : static_cast<const scalar_t*>(task.residual) + offset;
  const int64_t pixels = (h1 - h0) * task.width, start = h0 * task.width;
  if (!task.channels_last) {
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const int64_t at = c * area + start;
      store_plane<kActivation>(image + at, channel_sum(sums, c, 0, pixels), pixels,
                               task.bias == nullptr ? 0.0F : task.bias[c],
                               added == nullptr ? nullptr : added + at);
    }
    return;
  }
  for (int64_t i = 0; i < pixels; i += kChunk) {
    const int64_t block_pixels = min(kChunk, pixels - i);
    for (int64_t c = channels.first; c < channels.last; c += L) {
      const int64_t block_channels = min<int64_t>(L, channels.last - c);
      const float* planes_of_block[L];
      for (int64_t k = 0; k < L; ++k) {
        planes_of_block[k] = k < block_channels
                                 ? channel_sum(sums + k * kChunk, c + k, i, block_pixels)
                                 : planes_of_block[0];
      }
      const int64_t at = (start + i) * task.outputs + c;
      store_pixels<kActivation>(image + at, planes_of_block, block_channels, block_pixels,
                                task.outputs, task.bias == nullptr ? Vector{} : load(task.bias + c),
                                added == nullptr ? nullptr : added + at);
    }
  }
}

// ---------------------------------------------------------------- tasks

// How a thread's workspace is divided, in floats.
struct ExpandWorkspace {
  Planes planes;
  float* sums;
  float* convolution;
  int64_t size;

  ExpandWorkspace(const ExpandTask& task, const ConvolutionTask* convolution_task, float* memory)
      : planes(memory, task.rows, task.width, task.m) {
    const int64_t num_sums =
        task.channels_last ? L * kChunk : round_up(task.rows * task.width, L) + kChunk;
    const int64_t sums_at = planes.floats(task.inputs);
    const int64_t convolution_at = sums_at + round_up(num_sums, 16);
    size = convolution_at;
    if (convolution_task != nullptr) size += TileConvolution::workspace(task, *convolution_task);
    // Without memory it is the size alone that is asked for.
    sums = memory == nullptr ? nullptr : memory + sums_at;
    convolution = memory == nullptr ? nullptr : memory + convolution_at;
  }
};

int64_t expand_workspace(const ExpandTask& task, const ConvolutionTask* convolution) {
  return ExpandWorkspace(task, convolution, nullptr).size;
}

template <Activation kActivation, typename scalar_t>
void expand_tiles(const ExpandTask& task, const ConvolutionTask* convolution, int64_t first,
                  int64_t last, float* workspace) {
  const ExpandWorkspace parts(task, convolution, workspace);
  const Planes planes = parts.planes;
  float* sums = parts.sums;
  const int64_t border = planes.border, width = task.width, area = task.height * width;
  int64_t image_before = -1, block_before = -1;
  int64_t ready = 0;  // pixels of the image that its planes hold
  for (int64_t t = first; t < last; ++t) {
    const int64_t n = t / task.blocks, block = t % task.blocks;
    const int64_t h0 = block * task.rows, h1 = min(task.height, h0 + task.rows);
    const int64_t top = (h0 - border) * width;  // the pixel where row 0 begins
    if (n == image_before && block == block_before + 1) {
      planes.move_up(task.inputs, task.rows, ready - top);
    } else {
      const int64_t above = min<int64_t>(border, border - min(border, h0));
      planes.clear(task.inputs, 0, above);
      ready = top + above * width;
    }
    image_before = n;
    block_before = block;
    const int64_t bottom = min(task.height, h1 + border) * width;
    if (ready < bottom) {
      if (convolution != nullptr) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          // Whole blocks of pixels, although some may belong to the next tile.
          const int64_t end = min(area, ready + round_up(bottom - ready, L));
          TileConvolution(task, *convolution, planes, {0, task.inputs}, {0, task.outputs},
                          parts.convolution)(
              static_cast<const float*>(task.input) +
                  n * convolution->channels * convolution->height * convolution->width,
              ready, end, ready - top,
              static_cast<const float*>(task.output) + n * task.outputs * area, h0, h1);
          ready = end;
        }
      } else {
        const int64_t size = sizeof(scalar_t), pixels = (h1 - h0) * width;
        const int64_t steps = Planes::steps_of(task.channels_last, task.inputs, bottom - ready);
        const scalar_t* target =
            static_cast<const scalar_t*>(task.output) + n * task.outputs * area;
        planes.load_image(
            static_cast<const scalar_t*>(task.input) + n * task.inputs * area, task.channels_last,
            task.inputs, task.height, ready / width, bottom / width, (ready - top) / width,
            task.channels_last
                ? Prefetcher(target + h0 * width * task.outputs, size * pixels * task.outputs, 0, 1,
                             steps)
                : Prefetcher(target + h0 * width, size * pixels, size * area, task.outputs, steps));
        ready = bottom;
      }
    }
    if (h1 + border > task.height) {
      const int64_t below = min<int64_t>(border, h1 + border - task.height);
      planes.clear(task.inputs, h1 - h0 + 2 * border - below, h1 - h0 + 2 * border);
    }
    store_tile<kActivation, scalar_t>(task, planes, n, h0, h1, {0, task.outputs}, sums);
  }
}

// Calls work with the activation as a constant.
template <typename Work>
SBF_INLINE void with_activation(Activation activation, const Work& work) {
  switch (activation) {
    case Activation::kNone:
      return work(std::integral_constant<Activation, Activation::kNone>());
    case Activation::kReLU:
      return work(std::integral_constant<Activation, Activation::kReLU>());
    case Activation::kReLU6:
      return work(std::integral_constant<Activation, Activation::kReLU6>());
    case Activation::kSiLU:
      return work(std::integral_constant<Activation, Activation::kSiLU>());
    case Activation::kHardSwish:
      return work(std::integral_constant<Activation, Activation::kHardSwish>());
  }
}

void expand(const ExpandTask& task, const ConvolutionTask* convolution, Element element,
            int64_t first, int64_t last, float* workspace) {
  with_activation(task.activation, [&](auto activation) {
    switch (element) {
      case Element::kFloat:
        return expand_tiles<activation.value, float>(task, convolution, first, last, workspace);
      case Element::kBFloat16:
        return expand_tiles<activation.value, BFloat16>(task, convolution, first, last, workspace);
      case Element::kHalf:
        return expand_tiles<activation.value, _Float16>(task, convolution, first, last, workspace);
    }
  });
}

// ---------------------------------------------------------------- an image shared by threads

int64_t planes_floats(const ExpandTask& task) {
  return Planes(nullptr, task.rows, task.width, task.m).floats(task.inputs);
}

void convolve(const ExpandTask& task, const ConvolutionTask& convolution, int64_t image,
              Range filters, Range channels, float* at, float* workspace) {
  const Planes planes(at, task.rows, task.width, task.m);
  const int64_t area = task.height * task.width;
  for (int64_t c = filters.first; c < filters.last; ++c) {
    const int64_t border = sizeof(float) * planes.border * task.width;
    std::memset(planes.row(c, 0), 0, border);
    std::memset(planes.row(c, planes.border + task.height), 0, border);
  }
  const int64_t input_size = convolution.channels * convolution.height * convolution.width;
  TileConvolution(task, convolution, planes, filters, channels, workspace)(
      static_cast<const float*>(task.input) + image * input_size, 0, area,
      planes.border * task.width,
      static_cast<const float*>(task.output) + image * task.outputs * area, 0, task.height);
}

void expand_planes(const ExpandTask& task, int64_t image, Range channels, float* at,
                   float* workspace) {
  const Planes planes(at, task.rows, task.width, task.m);
  with_activation(task.activation, [&](auto activation) {
    store_tile<activation.value, float>(task, planes, image, 0, task.height, channels, workspace);
  });
}

// ---------------------------------------------------------------- gradient of the transforms

struct TransformsWorkspace {
  Planes inputs, grads;

  TransformsWorkspace(const TransformsTask& task, float* memory)
      : inputs(memory, task.rows, task.width, task.m),
        grads(memory == nullptr ? nullptr : memory + inputs.floats(task.inputs), task.rows,
              task.width, 1) {}
};

int64_t transforms_workspace(const TransformsTask& task) {
  const TransformsWorkspace parts(task, nullptr);
  return parts.inputs.floats(task.inputs) + parts.grads.floats(task.outputs);
}

template <typename scalar_t>
void transforms_tiles(const TransformsTask& task, int64_t first, int64_t last, int64_t step,
                      float* sums, float* workspace) {
  const TransformsWorkspace parts(task, workspace);
  const Planes inputs = parts.inputs, grads = parts.grads;
  const int64_t border = inputs.border, area = task.height * task.width;
  const Prefetcher nothing(nullptr, 0, 0, 0, 1);
  for (int64_t t = first; t < last; t += step) {
    const int64_t n = t / task.blocks;
    const int64_t h0 = t % task.blocks * task.rows, h1 = min(task.height, h0 + task.rows);
    const int64_t above = border - min(border, h0);
    const int64_t from = h0 - border + above, to = min(task.height, h1 + border);
    inputs.clear(task.inputs, 0, above);
    inputs.load_image(static_cast<const scalar_t*>(task.input) + n * task.inputs * area,
                      task.channels_last, task.inputs, task.height, from, to, above, nothing);
    inputs.clear(task.inputs, above + to - from, h1 - h0 + 2 * border);
    grads.load_image(static_cast<const scalar_t*>(task.grad) + n * task.outputs * area,
                     task.channels_last, task.outputs, task.height, h0, h1, 0, nothing);
    // Whole vectors are multiplied: behind the last pixel the gradient must be zero, and so must
    // what is shifted in. What the planes hold there must be a number.
    const int64_t pixels = (h1 - h0) * task.width, reach = L + border;
    for (int64_t c = 0; c < task.outputs; ++c) {
      float* row = grads.row(c, 0);
      std::memset(row - reach, 0, sizeof(float) * reach);
      std::memset(row + pixels, 0, sizeof(float) * reach);
    }
    for (int64_t c = 0; c < task.inputs; ++c) {
      std::memset(inputs.row(c, 0) + (h1 - h0 + 2 * border) * task.width, 0, sizeof(float) * reach);
    }
    for (int64_t l = 0; l < task.links; ++l) {
      add_dots(task, sums + l * task.m * task.m, grads.row(task.channel[l], 0),
               inputs.row(task.source[l], 0), pixels);
    }
  }
}

void grad_transforms(const TransformsTask& task, Element element, int64_t first, int64_t last,
                     int64_t step, float* sums, float* workspace) {
  switch (element) {
    case Element::kFloat:
      return transforms_tiles<float>(task, first, last, step, sums, workspace);
    case Element::kBFloat16:
      return transforms_tiles<BFloat16>(task, first, last, step, sums, workspace);
    case Element::kHalf:
      return transforms_tiles<_Float16>(task, first, last, step, sums, workspace);
  }
}

}  // namespace

const TileKernels& SBF_TILE_KERNELS() {
  static constexpr TileKernels kernels{.lanes = L,
                                       .expand_workspace = expand_workspace,
                                       .transforms_workspace = transforms_workspace,
                                       .expand = expand,
                                       .planes_floats = planes_floats,
                                       .convolve = convolve,
                                       .expand_planes = expand_planes,
                                       .grad_transforms = grad_transforms,
                                       .pack_weight = pack_weight};
  return kernels;
}

}  // namespace sbf
