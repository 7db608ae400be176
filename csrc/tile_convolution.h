// Planes that are a convolution: computed tile by tile and left in the cache.
//
// Sums are kept for L x L values: L pixels by the L filters of a panel. Over channels_last images
// one vector is L filters at one depth, multiplied by each pixel's value, and the block of sums is
// transposed into planes; over NCHW images (1 x 1 filters only) a vector is L pixels.
#pragma once

#include "tile_planes.h"

namespace sbf {
namespace {

constexpr int kDepthStep = 8;  // depths between two steps ahead
constexpr int kUnrolled = L == 16 ? 8 : 4;

// sums[r] += filter r of a panel on L pixels, each depth's pixels being a vector.
SBF_INLINE void add_products_of_planes(Vector (&sums)[L], const float* panel, const float* pixels,
                                       int64_t depth, Prefetcher& output) {
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthStep) {
    output.step<2>();
    for (int64_t k = k0; k < min<int64_t>(k0 + kDepthStep, depth); ++k, panel += L, pixels += L) {
      const Vector x = load(pixels);
      SBF_UNROLL
      for (int r = 0; r < L; ++r) sums[r] += x * panel[r];
    }
  }
}

// sums[r] += all filters of a panel on pixels[r] + shift, for the first R pixels. Several depths at
// a time: the pointers are more than there are registers, and are loaded once for them all.
template <int R>
SBF_INLINE void add_products_of_pixels(Vector (&sums)[L], const float* panel,
                                       const float* const* pixels, int64_t shift, int64_t depth,
                                       Prefetcher& output, Prefetcher& input) {
  int64_t k = 0;
  for (; k + kDepthStep <= depth; k += kDepthStep, panel += kDepthStep * L) {
    output.step<2>();
    input.step<2>();
    SBF_UNROLL
    for (int part = 0; part < kDepthStep; part += kUnrolled) {
      Vector w[kUnrolled];
      SBF_UNROLL
      for (int u = 0; u < kUnrolled; ++u) {
        w[u] = load(panel + (part + u) * L);
        SBF_IN_REGISTER(w[u]);
      }
      SBF_UNROLL
      for (int r = 0; r < R; ++r) {
        const float* pixel = pixels[r] + shift + k + part;
        SBF_UNROLL
        for (int u = 0; u < kUnrolled; ++u) sums[r] += w[u] * pixel[u];
      }
    }
  }
  for (; k < depth; ++k, panel += L) {
    const Vector w = load(panel);
    SBF_UNROLL
    for (int r = 0; r < R; ++r) sums[r] += w * pixels[r][shift + k];
  }
}

class TileConvolution {
 public:
  static constexpr int64_t kLargestGroup = 4;
  static constexpr int64_t kCachedFilterBytes = 1024 * 1024;

  // Computes the planes of `filters`. The lines of the output's `channels` are fetched meanwhile.
  TileConvolution(const ExpandTask& task, const ConvolutionTask& convolution, const Planes& planes,
                  Range filters, Range channels, float* workspace)
      : task_(task),
        convolution_(convolution),
        planes_(planes),
        filters_(filters),
        channels_(channels),
        copied_(workspace),
        panels_((filters.last - filters.first + L - 1) / L),
        depth_(convolution.channels * convolution.kernel_h * convolution.kernel_w) {}

  static int64_t workspace(const ExpandTask& task, const ConvolutionTask& convolution) {
    // A tile's rows with their borders, and less than L pixels of the rows below.
    const int64_t rows = task.rows + task.m - 1 + (L + task.width - 1) / task.width + 1;
    if (!task.channels_last) return round_up(rows * task.width, L) * convolution.channels;
    if (is_pointwise(convolution)) return kLargestGroup * L * pixel_pitch(convolution);
    return ((rows - 1) * convolution.stride_h +
            reach(convolution.kernel_h, convolution.dilation_h)) *
           row_width(task, convolution) * pixel_pitch(convolution);
  }

  // Computes pixels [first, last) of an image's planes, the first of which is float `at` behind the
  // planes' row 0. Meanwhile the lines of rows [h0, h1) of `target`, an image of the output, come
  // into the cache.
  void operator()(const float* image, int64_t first, int64_t last, int64_t at, const float* target,
                  int64_t h0, int64_t h1) const {
    const int64_t area = task_.height * task_.width, pixels = (h1 - h0) * task_.width;
    const int64_t steps = (last - first + L - 1) / L * panels_ * steps_of_block();
    if (!task_.channels_last) {
      Prefetcher output(target + channels_.first * area + h0 * task_.width, 4 * pixels, 4 * area,
                        channels_.last - channels_.first, steps);
      planes_of_planes(image, first, last, at, output);
      return;
    }
    const int64_t bytes = 4 * (channels_.last - channels_.first), stride = 4 * task_.outputs;
    const bool whole = bytes == stride;
    Prefetcher output(target + h0 * task_.width * task_.outputs + channels_.first,
                      whole ? pixels * bytes : bytes, stride, whole ? 1 : pixels, steps);
    planes_of_pixels(image, first, last, at, output);
  }

 private:
  static bool is_pointwise(const ConvolutionTask& convolution) {
    return convolution.kernel_h == 1 && convolution.kernel_w == 1 && convolution.pad_h == 0 &&
           convolution.pad_w == 0;
  }
  // Pixels that lie a multiple of 2 KiB apart fall into the same sets of the first-level cache.
  static bool collides(int64_t depth) { return depth % 512 == 0; }
  static int64_t pixel_pitch(const ConvolutionTask& convolution) {
    return convolution.channels + (collides(convolution.channels) ? 16 : 0);
  }
  // Filters that do not fit the second-level cache are read once for several blocks of pixels.
  static int64_t blocks_of_group(const ConvolutionTask& convolution, int64_t panels) {
    const int64_t bytes =
        4 * L * panels * convolution.channels * convolution.kernel_h * convolution.kernel_w;
    return bytes > kCachedFilterBytes ? kLargestGroup : 1;
  }
  static int64_t reach(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }
  static int64_t row_width(const ExpandTask& task, const ConvolutionTask& convolution) {
    return (task.width - 1) * convolution.stride_w +
           reach(convolution.kernel_w, convolution.dilation_w);
  }
  int64_t steps_of_block() const {
    return (convolution_.channels + kDepthStep - 1) / kDepthStep * convolution_.kernel_h *
           convolution_.kernel_w;
  }

  SBF_INLINE void store_sums(Vector (&sums)[L], int64_t filter, int64_t at,
                             int64_t num_pixels) const {
    float* to = planes_.row(filter, 0) + at;
    const int64_t num_filters = min<int64_t>(L, filters_.last - filter);
    if (num_pixels == L && num_filters == L) {
      SBF_UNROLL
      for (int k = 0; k < L; ++k) store(to + k * planes_.size, sums[k]);
      return;
    }
    float rows[L * L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) store(rows + k * L, sums[k]);
    for (int64_t k = 0; k < num_filters; ++k) {
      std::memcpy(to + k * planes_.size, rows + k * L, sizeof(float) * num_pixels);
    }
  }

  // The float of a channels_last image or of an NCHW plane (`each` = 1) that a 1 x 1 filter sees.
  int64_t seen(int64_t pixel, int64_t each) const {
    return (pixel / task_.width * convolution_.stride_h * convolution_.width +
            pixel % task_.width * convolution_.stride_w) *
           each;
  }

  void planes_of_planes(const float* image, int64_t first, int64_t last, int64_t at,
                        Prefetcher& output) const {
    const int64_t pixels = last - first;
    const bool dense = convolution_.stride_h == 1 && convolution_.stride_w == 1;
    for (int64_t k = 0; k < depth_; ++k) {
      const float* plane = image + k * convolution_.height * convolution_.width;
      int64_t i = 0;
      if (dense) {
        for (; i + L <= pixels; i += L)
          store(copied_ + i * depth_ + k * L, load(plane + first + i));
      }
      for (; i < pixels; ++i) {
        copied_[i / L * L * depth_ + k * L + i % L] = plane[seen(first + i, 1)];
      }
    }
    for (int64_t i = 0; i < pixels; i += L) {
      for (int64_t filter = filters_.first; filter < filters_.last; filter += L) {
        Vector sums[L] = {};
        add_products_of_planes(sums, convolution_.weight + filter * depth_, copied_ + i * depth_,
                               depth_, output);
        store_sums(sums, filter, at + i, min<int64_t>(L, pixels - i));
      }
    }
  }

  void planes_of_pixels(const float* image, int64_t first, int64_t last, int64_t at,
                        Prefetcher& output) const {
    const int64_t channels = convolution_.channels, pitch = pixel_pitch(convolution_);
    const bool pointwise = is_pointwise(convolution_), copies = collides(channels);
    const int64_t width = pointwise ? convolution_.width : row_width(task_, convolution_);
    int64_t h0 = 0;  // the row of the output that the first copied row is for
    if (!pointwise) {
      h0 = first / task_.width;
      copy_rows(image, h0 * convolution_.stride_h - convolution_.pad_h,
                ((last - 1) / task_.width - h0) * convolution_.stride_h +
                    reach(convolution_.kernel_h, convolution_.dilation_h));
    }
    const int64_t group = blocks_of_group(convolution_, panels_);
    const bool dense = pointwise && convolution_.stride_h == 1 && convolution_.stride_w == 1;
    for (int64_t i = first; i < last; i += group * L) {
      const int64_t count = min(group * L, last - i);
      const float* seen_pixels[kLargestGroup * L];
      for (int64_t k = 0; k < group * L; ++k) {
        const int64_t pixel = min(i + k, last - 1);
        const int64_t place = (pixel / task_.width - h0) * convolution_.stride_h * width +
                              pixel % task_.width * convolution_.stride_w;
        if (!pointwise) {
          seen_pixels[k] = copied_ + place * pitch;
        } else if (!copies) {
          seen_pixels[k] = image + place * channels;
        } else {
          seen_pixels[k] = copied_ + min(k, count - 1) * pitch;
          if (k < count) {
            std::memcpy(copied_ + k * pitch, image + place * channels, sizeof(float) * channels);
          }
        }
      }
      // The next pixels, which lie behind these.
      Prefetcher input(image + (i + group * L) * channels, 4 * group * L * channels, 0,
                       dense ? 1 : 0, group * panels_ * steps_of_block());
      for (int64_t filter = filters_.first; filter < filters_.last; filter += L) {
        for (int64_t j = 0; j < count; j += L) {
          const int64_t num_pixels = min<int64_t>(L, count - j);
          Vector sums[L] = {};
          if (num_pixels > L / 2) {
            add_taps<L>(sums, filter, seen_pixels + j, width, output, input);
          } else if (num_pixels > L / 4) {
            add_taps<L / 2>(sums, filter, seen_pixels + j, width, output, input);
          } else {
            add_taps<L / 4>(sums, filter, seen_pixels + j, width, output, input);
          }
          transpose(sums);
          store_sums(sums, filter, at + i - first + j, num_pixels);
        }
      }
    }
  }

  template <int R>
  SBF_INLINE void add_taps(Vector (&sums)[L], int64_t filter, const float* const* pixels,
                           int64_t width, Prefetcher& output, Prefetcher& input) const {
    const float* panel = convolution_.weight + filter * depth_;
    const int64_t channels = convolution_.channels, pitch = pixel_pitch(convolution_);
    for (int64_t a = 0; a < convolution_.kernel_h; ++a) {
      for (int64_t b = 0; b < convolution_.kernel_w; ++b, panel += channels * L) {
        const int64_t shift =
            (a * convolution_.dilation_h * width + b * convolution_.dilation_w) * pitch;
        add_products_of_pixels<R>(sums, panel, pixels, shift, channels, output, input);
      }
    }
  }

  // Copies `count` rows of a channels_last image from row `top` on, which may lie outside, with the
  // columns of padding.
  void copy_rows(const float* image, int64_t top, int64_t count) const {
    const int64_t channels = convolution_.channels, pitch = pixel_pitch(convolution_);
    const int64_t width = row_width(task_, convolution_);
    const int64_t left = min(width, convolution_.pad_w);
    for (int64_t row = 0; row < count; ++row) {
      float* to = copied_ + row * width * pitch;
      const int64_t h = top + row;
      const bool outside = h < 0 || h >= convolution_.height;
      const int64_t inside = outside ? 0 : min(width - left, convolution_.width);
      std::memset(to, 0, sizeof(float) * left * pitch);
      to += left * pitch;
      const float* from = image + h * convolution_.width * channels;
      if (pitch == channels && inside > 0) {
        std::memcpy(to, from, sizeof(float) * inside * channels);
      } else {
        for (int64_t w = 0; w < inside; ++w) {
          std::memcpy(to + w * pitch, from + w * channels, sizeof(float) * channels);
        }
      }
      std::memset(to + inside * pitch, 0, sizeof(float) * (width - left - inside) * pitch);
    }
  }

  const ExpandTask& task_;
  const ConvolutionTask& convolution_;
  const Planes& planes_;
  Range filters_, channels_;
  float* copied_;
  int64_t panels_, depth_;
};

void pack_weight(float* packed, const float* weight, int64_t filters, int64_t depth, int64_t first,
                 int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    float* to = packed + panel * L * depth;
    const int64_t num_filters = min<int64_t>(L, filters - panel * L);
    const float* from = weight + panel * L * depth;
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t num_depths = min<int64_t>(L, depth - k);
      Vector block[L];
      for (int i = 0; i < L; ++i) {
        block[i] = i >= num_filters  ? Vector{}
                   : num_depths == L ? load(from + i * depth + k)
                                     : load_partial(from + i * depth + k, num_depths);
      }
      transpose(block);
      for (int64_t i = 0; i < num_depths; ++i) store(to + (k + i) * L, block[i]);
    }
  }
}

}  // namespace
}  // namespace sbf
