// The CPU's kernels on tiles (tile.h), for the instruction set that the including file is compiled
// for. Everything here is local to that file.
#pragma once

#include "tile_product.h"
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
    put_from_float(to + i, activated<kActivation>(v));
  }
  if (i < count) {
    Vector v = load(sum + i) + shift;
    if (residual != nullptr) v += load_some(residual + i, count - i);
    put_some(to + i, activated<kActivation>(v), count - i);
  }
}

// Writes `pixels` pixels of up to L channels of a channels_last image of `channels` channels.
template <Activation kActivation, typename scalar_t>
void store_pixels(scalar_t* to, const float* const* sums, int64_t few, int64_t pixels,
                  int64_t channels, Vector bias, const scalar_t* residual) {
  for (int64_t i = 0; i < pixels; i += L) {
    const int64_t some = least<int64_t>(L, pixels - i);
    Vector block[L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) block[k] = load(sums[k] + i);
    transpose(block);
    if (some == L && few == L) {
      SBF_UNROLL
      for (int k = 0; k < L; ++k) {
        const int64_t at = (i + k) * channels;
        Vector v = block[k] + bias;
        if (residual != nullptr) v += load_as_float(residual + at);
        put_from_float(to + at, activated<kActivation>(v));
      }
      continue;
    }
    float rows[L * L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) put(rows + k * L, block[k]);
    for (int64_t k = 0; k < some; ++k) {
      const int64_t at = (i + k) * channels;
      Vector v = load(rows + k * L) + bias;
      if (residual != nullptr) v += load_some(residual + at, few);
      put_some(to + at, activated<kActivation>(v), few);
    }
  }
}

template <Activation kActivation, typename scalar_t>
void store_tile(const MixTask& task, const Planes& planes, int64_t n, int64_t h0, int64_t h1,
                Range channels, float* sums) {
  const Mixer mixer{task, planes};
  const int64_t area = task.height * task.width;
  const int64_t offset = n * task.outputs * area;
  scalar_t* image = static_cast<scalar_t*>(task.output) + offset;
  const scalar_t* added =
      task.residual == nullptr ? nullptr : static_cast<const scalar_t*>(task.residual) + offset;
  const int64_t pixels = (h1 - h0) * task.width, start = h0 * task.width;
  if (!task.channels_last) {
    for (int64_t c = channels.first; c < channels.last; ++c) {
      const int64_t at = c * area + start;
      store_plane<kActivation>(image + at, mixer(sums, c, 0, pixels), pixels,
                               task.bias == nullptr ? 0.0F : task.bias[c],
                               added == nullptr ? nullptr : added + at);
    }
    return;
  }
  for (int64_t i = 0; i < pixels; i += kChunk) {
    const int64_t some = least(kChunk, pixels - i);
    for (int64_t c = channels.first; c < channels.last; c += L) {
      const int64_t few = least<int64_t>(L, channels.last - c);
      const float* planes_of_block[L];
      for (int64_t k = 0; k < L; ++k) {
        planes_of_block[k] =
            k < few ? mixer(sums + k * kChunk, c + k, i, some) : planes_of_block[0];
      }
      const int64_t at = (start + i) * task.outputs + c;
      store_pixels<kActivation>(image + at, planes_of_block, few, some, task.outputs,
                                task.bias == nullptr ? Vector{} : load(task.bias + c),
                                added == nullptr ? nullptr : added + at);
    }
  }
}

// ---------------------------------------------------------------- tasks

int64_t mix_workspace(const MixTask& task, const Product* product) {
  const Planes planes(nullptr, task.rows, task.width, task.m);
  const int64_t sums =
      task.channels_last ? L * kChunk : round_up(task.rows * task.width, L) + kChunk;
  return planes.floats(task.inputs) + round_up(sums, 16) +
         (product == nullptr ? 0 : Multiplier::workspace(task, *product));
}

template <Activation kActivation, typename scalar_t>
void mix_tiles(const MixTask& task, const Product* product, int64_t first, int64_t last,
               float* workspace) {
  const Planes planes(workspace, task.rows, task.width, task.m);
  float* sums = workspace + planes.floats(task.inputs);
  float* workspace_of_product =
      sums +
      round_up(task.channels_last ? L * kChunk : round_up(task.rows * task.width, L) + kChunk, 16);
  const int64_t border = planes.border, width = task.width, area = task.height * width;
  int64_t image_before = -1, block_before = -1;
  int64_t ready = 0;  // pixels of the image that its planes hold
  for (int64_t t = first; t < last; ++t) {
    const int64_t n = t / task.blocks, block = t % task.blocks;
    const int64_t h0 = block * task.rows, h1 = least(task.height, h0 + task.rows);
    const int64_t top = (h0 - border) * width;  // the pixel where row 0 begins
    if (n == image_before && block == block_before + 1) {
      planes.move_up(task.inputs, task.rows, ready - top);
    } else {
      const int64_t above = least<int64_t>(border, border - least(border, h0));
      planes.clear(task.inputs, 0, above);
      ready = top + above * width;
    }
    image_before = n;
    block_before = block;
    const int64_t bottom = least(task.height, h1 + border) * width;
    if (ready < bottom) {
      if (product != nullptr) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          // Whole blocks of pixels, although some may belong to the next tile.
          const int64_t end = least(area, ready + round_up(bottom - ready, L));
          Multiplier(task, *product, planes, {0, task.inputs}, {0, task.outputs},
                     workspace_of_product)(
              static_cast<const float*>(task.input) +
                  n * product->channels * product->height * product->width,
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
                ? Ahead(target + h0 * width * task.outputs, size * pixels * task.outputs, 0, 1,
                        steps)
                : Ahead(target + h0 * width, size * pixels, size * area, task.outputs, steps));
        ready = bottom;
      }
    }
    if (h1 + border > task.height) {
      const int64_t below = least<int64_t>(border, h1 + border - task.height);
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

void mix(const MixTask& task, const Product* product, Element element, int64_t first, int64_t last,
         float* workspace) {
  with_activation(task.activation, [&](auto activation) {
    switch (element) {
      case Element::kFloat:
        return mix_tiles<activation.value, float>(task, product, first, last, workspace);
      case Element::kBFloat16:
        return mix_tiles<activation.value, BFloat16>(task, product, first, last, workspace);
      case Element::kHalf:
        return mix_tiles<activation.value, _Float16>(task, product, first, last, workspace);
    }
  });
}

// ---------------------------------------------------------------- an image shared by threads

int64_t planes_floats(const MixTask& task) {
  return Planes(nullptr, task.rows, task.width, task.m).floats(task.inputs);
}

void multiply(const MixTask& task, const Product& product, int64_t image, Range filters,
              Range channels, float* at, float* workspace) {
  const Planes planes(at, task.rows, task.width, task.m);
  const int64_t area = task.height * task.width;
  for (int64_t c = filters.first; c < filters.last; ++c) {
    const int64_t border = sizeof(float) * planes.border * task.width;
    std::memset(planes.row(c, 0), 0, border);
    std::memset(planes.row(c, planes.border + task.height), 0, border);
  }
  const int64_t input_size = product.channels * product.height * product.width;
  Multiplier(task, product, planes, filters, channels, workspace)(
      static_cast<const float*>(task.input) + image * input_size, 0, area,
      planes.border * task.width,
      static_cast<const float*>(task.output) + image * task.outputs * area, 0, task.height);
}

void store(const MixTask& task, int64_t image, Range channels, float* at, float* workspace) {
  const Planes planes(at, task.rows, task.width, task.m);
  with_activation(task.activation, [&](auto activation) {
    store_tile<activation.value, float>(task, planes, image, 0, task.height, channels, workspace);
  });
}

// ---------------------------------------------------------------- gradient of the transforms

int64_t dot_workspace(const DotTask& task) {
  return Planes(nullptr, task.rows, task.width, task.m).floats(task.inputs) +
         Planes(nullptr, task.rows, task.width, 1).floats(task.outputs);
}

template <typename scalar_t>
void dot_tiles(const DotTask& task, int64_t first, int64_t last, int64_t step, float* sums,
               float* workspace) {
  const Planes inputs(workspace, task.rows, task.width, task.m);
  const Planes grads(workspace + inputs.floats(task.inputs), task.rows, task.width, 1);
  const int64_t border = inputs.border, area = task.height * task.width;
  const Ahead nothing(nullptr, 0, 0, 0, 1);
  for (int64_t t = first; t < last; t += step) {
    const int64_t n = t / task.blocks;
    const int64_t h0 = t % task.blocks * task.rows, h1 = least(task.height, h0 + task.rows);
    const int64_t above = border - least(border, h0);
    const int64_t from = h0 - border + above, to = least(task.height, h1 + border);
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

void dot(const DotTask& task, Element element, int64_t first, int64_t last, int64_t step,
         float* sums, float* workspace) {
  switch (element) {
    case Element::kFloat:
      return dot_tiles<float>(task, first, last, step, sums, workspace);
    case Element::kBFloat16:
      return dot_tiles<BFloat16>(task, first, last, step, sums, workspace);
    case Element::kHalf:
      return dot_tiles<_Float16>(task, first, last, step, sums, workspace);
  }
}

}  // namespace

const TileKernels& SBF_TILE_KERNELS() {
  static constexpr TileKernels kernels{.lanes = L,
                                       .mix_workspace = mix_workspace,
                                       .dot_workspace = dot_workspace,
                                       .mix = mix,
                                       .planes_floats = planes_floats,
                                       .multiply = multiply,
                                       .store = store,
                                       .dot = dot,
                                       .pack_weight = pack_weight};
  return kernels;
}

}  // namespace sbf
