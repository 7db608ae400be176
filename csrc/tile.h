// The CPU's working copy of some rows of one image: one float plane per channel, padded with zeros.
//
// In a padded plane a tap is a shift: pixel i and its neighbour (a, b) are `a * pitch + b` apart
// everywhere, so the inner loops run over whole planes without a thought for borders and vectorise
// whatever the width. Pixels that fall into the padding get values that nobody reads.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "expand.h"

// The same source compiled for several instruction sets; the loader chooses what the CPU has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define SBF_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SBF_MULTIVERSION
#endif

namespace sbf {
namespace {

// ---------------------------------------------------------------- inner loops

// sum[i] += sum over taps of tap(a, b) * in[i + a*pitch + b]
SBF_MULTIVERSION
void add_shifted(float* __restrict sum, const float* __restrict in, int64_t count, int64_t pitch,
                 const float* __restrict taps, int m) {
  if (m == 3) {
    const float t0 = taps[0], t1 = taps[1], t2 = taps[2];
    const float t3 = taps[3], t4 = taps[4], t5 = taps[5];
    const float t6 = taps[6], t7 = taps[7], t8 = taps[8];
    const float* in1 = in + pitch;
    const float* in2 = in1 + pitch;
    for (int64_t i = 0; i < count; ++i) {
      sum[i] += t0 * in[i] + t1 * in[i + 1] + t2 * in[i + 2] + t3 * in1[i] + t4 * in1[i + 1] +
                t5 * in1[i + 2] + t6 * in2[i] + t7 * in2[i + 1] + t8 * in2[i + 2];
    }
    return;
  }
  for (int a = 0; a < m; ++a) {
    for (int b = 0; b < m; ++b) {
      const float tap = taps[a * m + b];
      const float* shifted = in + a * pitch + b;
      for (int64_t i = 0; i < count; ++i) sum[i] += tap * shifted[i];
    }
  }
}

// dot[a*m + b] += sum over i of grad[i] * in[i + a*pitch + b]
SBF_MULTIVERSION
void dot_shifted(float* __restrict dot, const float* __restrict grad, const float* __restrict in,
                 int64_t count, int64_t pitch, int m) {
  if (m == 3) {
    for (int a = 0; a < 3; ++a) {
      const float* row = in + a * pitch;
      float d0 = 0, d1 = 0, d2 = 0;
#pragma omp simd reduction(+ : d0, d1, d2)
      for (int64_t i = 0; i < count; ++i) {
        d0 += grad[i] * row[i];
        d1 += grad[i] * row[i + 1];
        d2 += grad[i] * row[i + 2];
      }
      dot[3 * a] += d0;
      dot[3 * a + 1] += d1;
      dot[3 * a + 2] += d2;
    }
    return;
  }
  for (int a = 0; a < m; ++a) {
    for (int b = 0; b < m; ++b) {
      const float* shifted = in + a * pitch + b;
      float d = 0;
#pragma omp simd reduction(+ : d)
      for (int64_t i = 0; i < count; ++i) d += grad[i] * shifted[i];
      dot[a * m + b] += d;
    }
  }
}

// Transposition in 8 x 8 blocks, for channels_last. The vectors are the compiler's own, so that
// each version of a function gets the widest that it has.
typedef float Vector8 __attribute__((vector_size(32)));
typedef float UnalignedVector8 __attribute__((vector_size(32), aligned(4)));

inline __attribute__((always_inline)) void transpose8(Vector8 (&r)[8]) {
  Vector8 s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    s[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += i % 4 == 0 ? 1 : 3) {
    t[i] = __builtin_shufflevector(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    t[i + 2] = __builtin_shufflevector(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// planes[c * plane_size + w] = pixels[w * channels + c]
SBF_MULTIVERSION
void planes_from_pixels(float* __restrict planes, int64_t plane_size,
                        const float* __restrict pixels, int64_t width, int64_t channels) {
  if (width < 8 || channels < 8) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t w = 0; w < width; ++w) planes[c * plane_size + w] = pixels[w * channels + c];
    }
    return;
  }
  for (int64_t c0 = 0; c0 < channels; c0 += 8) {
    // The last block overlaps the one before it, rather than being a smaller one.
    const int64_t c = std::min(c0, channels - 8);
    for (int64_t w0 = 0; w0 < width; w0 += 8) {
      const int64_t w = std::min(w0, width - 8);
      Vector8 block[8];
      for (int i = 0; i < 8; ++i) {
        block[i] = *reinterpret_cast<const UnalignedVector8*>(pixels + (w + i) * channels + c);
      }
      transpose8(block);
      for (int i = 0; i < 8; ++i) {
        *reinterpret_cast<UnalignedVector8*>(planes + (c + i) * plane_size + w) = block[i];
      }
    }
  }
}

// pixels[w * stride + c] = planes[c][w] + bias[c]
SBF_MULTIVERSION
void pixels_from_planes(float* __restrict pixels, int64_t stride, const float* const* planes,
                        int64_t channels, int64_t width, const float* bias) {
  if (width < 8 || channels < 8) {
    for (int64_t w = 0; w < width; ++w) {
      for (int64_t c = 0; c < channels; ++c) {
        const float value = planes[c][w];
        pixels[w * stride + c] = bias == nullptr ? value : value + bias[c];
      }
    }
    return;
  }
  for (int64_t c0 = 0; c0 < channels; c0 += 8) {
    const int64_t c = std::min(c0, channels - 8);
    for (int64_t w0 = 0; w0 < width; w0 += 8) {
      const int64_t w = std::min(w0, width - 8);
      Vector8 block[8];
      for (int i = 0; i < 8; ++i) {
        block[i] = *reinterpret_cast<const UnalignedVector8*>(planes[c + i] + w);
      }
      transpose8(block);
      for (int i = 0; i < 8; ++i) {
        if (bias != nullptr) block[i] += *reinterpret_cast<const UnalignedVector8*>(bias + c);
        *reinterpret_cast<UnalignedVector8*>(pixels + (w + i) * stride + c) = block[i];
      }
    }
  }
}

template <typename scalar_t>
SBF_MULTIVERSION void to_float(float* __restrict out, const scalar_t* __restrict in,
                               int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
}

// out[i] = in[i] + bias
template <typename scalar_t>
SBF_MULTIVERSION void from_float(scalar_t* __restrict out, const float* __restrict in,
                                 int64_t count, const float* bias) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<scalar_t>(in[i]);
  } else {
    const float shift = *bias;
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<scalar_t>(in[i] + shift);
  }
}

// ---------------------------------------------------------------- the tile

// Where an image's channels lie: the layout of a (C, H, W) part of a contiguous tensor.
template <typename scalar_t>
struct Image {
  scalar_t* data;
  int64_t channels, height, width;
  bool channels_last;

  scalar_t* row(int64_t c, int64_t h) const {
    return channels_last ? data + h * width * channels + c : data + (c * height + h) * width;
  }
};

class Tile {
 public:
  // Room for `rows` rows of all channels, with `border` rows and columns of padding on each side;
  // each row has `pitch` >= width + 2 * border floats.
  Tile(int64_t channels, int64_t rows, int64_t width, int64_t border, int64_t pitch)
      : channels_(channels), rows_(rows + 2 * border), width_(width), border_(border),
        pitch_(pitch) {
    // Shifts read past the last row by up to 2 * border, and more rows by as many pitches. An odd
    // number of cache lines keeps the planes from falling into the same cache sets.
    const int64_t lines = (rows_ * pitch_ + 2 * (pitch - width) + 15) / 16;
    plane_size_ = 16 * (lines | 1);
    data_.resize(channels_ * plane_size_);
  }

  static int64_t bytes_per_row(int64_t channels, int64_t pitch) {
    return channels * pitch * static_cast<int64_t>(sizeof(float));
  }

  const float* plane(int64_t channel) const { return data_.data() + channel * plane_size_; }
  // Where the first pixel that is no padding lies in a plane.
  int64_t origin() const { return border_ * pitch_ + border_; }

  // Loads the rows from h0 on; those outside the image become zero.
  template <typename scalar_t>
  void load(const Image<const scalar_t>& image, int64_t h0) {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t h = h0 - border_ + row;
      float* target = data_.data() + row * pitch_ + border_;
      if (h < 0 || h >= image.height) {
        for (int64_t c = 0; c < channels_; ++c) {
          std::fill_n(target + c * plane_size_, width_, 0.0F);
        }
      } else if (!image.channels_last) {
        for (int64_t c = 0; c < channels_; ++c) {
          to_float(target + c * plane_size_, image.row(c, h), width_);
        }
      } else if constexpr (std::is_same_v<scalar_t, float>) {
        planes_from_pixels(target, plane_size_, image.row(0, h), width_, channels_);
      } else {
        pixels_.resize(width_ * channels_);
        to_float(pixels_.data(), image.row(0, h), width_ * channels_);
        planes_from_pixels(target, plane_size_, pixels_.data(), width_, channels_);
      }
    }
  }

 private:
  int64_t channels_, rows_, width_, border_, pitch_, plane_size_;
  std::vector<float> data_;
  std::vector<float> pixels_;
};

// How many output channels are made at a time: in channels_last, a cache line of floats.
constexpr int kBlock = 16;

// Stores up to kBlock planes as the channels from c0 on, in rows [h0, h1) of the image. `pixels` is
// room for a row of kBlock channels.
template <typename scalar_t>
void store(const Image<scalar_t>& image, int64_t c0, int64_t count, int64_t h0, int64_t h1,
           const float* const* planes, int64_t pitch, const float* bias, float* pixels) {
  const float* rows[kBlock];
  for (int64_t h = h0; h < h1; ++h) {
    for (int64_t c = 0; c < count; ++c) rows[c] = planes[c] + (h - h0) * pitch;
    scalar_t* target = image.row(c0, h);
    if (!image.channels_last) {
      for (int64_t c = 0; c < count; ++c) {
        from_float(image.row(c0 + c, h), rows[c], image.width,
                   bias == nullptr ? nullptr : bias + c);
      }
    } else if constexpr (std::is_same_v<scalar_t, float>) {
      pixels_from_planes(target, image.channels, rows, count, image.width, bias);
    } else {
      pixels_from_planes(pixels, count, rows, count, image.width, bias);
      for (int64_t w = 0; w < image.width; ++w) {
        from_float(target + w * image.channels, pixels + w * count, count, nullptr);
      }
    }
  }
}

}  // namespace
}  // namespace sbf
