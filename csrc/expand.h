// What the kernels of `expand` share, on the host and on a device: index arithmetic and the sums
// over taps.
//
// Words: z (N,B,H,W) are the basis features; transforms (P,S,m,m) rebuild P channels from S basis
// features each; a *term* is one (rebuilt channel, source) pair, numbered p*S + s; order (C,) says
// which entry of cat([z, rebuilt]) each output channel is. Tensors may lie in memory in either
// layout: only strides and the order of traversal differ.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace sbf {

// ---------------------------------------------------------------- sums, for host and device

// Output rows that are summed at once: a column of pixels shares most of what it reads.
constexpr int kStrip = 4;

struct Strides {
  int64_t batch, channel, row, column;
};

// One channel of one image.
template <typename scalar_t>
struct Plane {
  const scalar_t* data;
  int64_t height, width, row_stride, column_stride;

  template <typename acc_t>
  C10_HOST_DEVICE acc_t at(int64_t h, int64_t w) const {
    return static_cast<acc_t>(data[h * row_stride + w * column_stride]);
  }
};

template <typename scalar_t>
C10_HOST_DEVICE inline Plane<scalar_t> plane_of(const scalar_t* data, const Strides& strides,
                                                int64_t height, int64_t width, int64_t image,
                                                int64_t channel) {
  return {data + image * strides.batch + channel * strides.channel, height, width, strides.row,
          strides.column};
}

// The m x m taps of one term: tap i = a*m + b is data[i * stride]. A negative stride, with data at
// the last tap, flips them, which is what the gradient of a cross-correlation needs.
template <typename scalar_t>
struct Taps {
  const scalar_t* data;
  int64_t stride;
};

// sum[k] += sum over the M x M taps from (a0, b0) on of
//     tap(a, b) * plane(h0 + k + a - (m-1)/2, w + b - (m-1)/2), zero outside the plane.
template <int M, typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void add_patch(acc_t (&sum)[kStrip], const Plane<scalar_t>& plane,
                                      int64_t h0, int64_t w, const Taps<scalar_t>& taps, int m,
                                      int a0, int b0) {
  acc_t tap[M * M];
  for (int a = 0; a < M; ++a) {
    for (int b = 0; b < M; ++b) {
      tap[a * M + b] = static_cast<acc_t>(taps.data[((a0 + a) * m + b0 + b) * taps.stride]);
    }
  }
  const int64_t top = h0 + a0 - (m - 1) / 2;
  const int64_t left = w + b0 - (m - 1) / 2;
#pragma unroll
  for (int row = 0; row < kStrip + M - 1; ++row) {
    const int64_t h = top + row;
    const bool inside = h >= 0 && h < plane.height;
    acc_t value[M];
#pragma unroll
    for (int b = 0; b < M; ++b) {
      const int64_t v = left + b;
      value[b] = inside && v >= 0 && v < plane.width ? plane.template at<acc_t>(h, v) : acc_t(0);
    }
#pragma unroll
    for (int a = 0; a < M; ++a) {
      const int k = row - a;
      if (k >= 0 && k < kStrip) {
#pragma unroll
        for (int b = 0; b < M; ++b) sum[k] += tap[a * M + b] * value[b];
      }
    }
  }
}

// The same for all m x m taps; M is m where there is a kernel for it, 1 otherwise.
template <int M, typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void add_taps(acc_t (&sum)[kStrip], const Plane<scalar_t>& plane,
                                     int64_t h0, int64_t w, const Taps<scalar_t>& taps, int m) {
  for (int a0 = 0; a0 < m; a0 += M) {
    for (int b0 = 0; b0 < m; b0 += M) add_patch<M>(sum, plane, h0, w, taps, m, a0, b0);
  }
}

// sum[a*M + b] += sum over the strip's pixels of
//     grad(h0 + k, w) * plane(h0 + k + a0 + a - (m-1)/2, w + b0 + b - (m-1)/2).
template <int M, typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void add_products(acc_t (&sum)[M * M], const Plane<scalar_t>& grad,
                                         const Plane<scalar_t>& plane, int64_t h0, int64_t w,
                                         int m, int a0, int b0) {
  acc_t g[kStrip];
#pragma unroll
  for (int k = 0; k < kStrip; ++k) {
    g[k] = h0 + k < grad.height ? grad.template at<acc_t>(h0 + k, w) : acc_t(0);
  }
  const int64_t top = h0 + a0 - (m - 1) / 2;
  const int64_t left = w + b0 - (m - 1) / 2;
#pragma unroll
  for (int row = 0; row < kStrip + M - 1; ++row) {
    const int64_t h = top + row;
    const bool inside = h >= 0 && h < plane.height;
#pragma unroll
    for (int b = 0; b < M; ++b) {
      const int64_t v = left + b;
      if (!inside || v < 0 || v >= plane.width) continue;
      const acc_t value = plane.template at<acc_t>(h, v);
#pragma unroll
      for (int a = 0; a < M; ++a) {
        const int k = row - a;
        if (k >= 0 && k < kStrip) sum[a * M + b] += g[k] * value;
      }
    }
  }
}

// ---------------------------------------------------------------- which channel is made of what

// One output channel: the input channel that it copies (-1: none), and the links [first, last)
// whose terms it adds.
struct Mix {
  int64_t copied, first, last;
};

// expand: outputs are its channels, inputs the basis features; a link is a term.
struct ForwardWiring {
  const int64_t* order;
  const int64_t* sources;
  int64_t basis, channels, sources_each;

  C10_HOST_DEVICE Mix mix(int64_t channel) const {
    const int64_t entry = order[channel];
    CUDA_KERNEL_ASSERT(entry >= 0 && entry < channels && "order must be a permutation");
    if (entry < basis) return {entry, 0, 0};
    const int64_t first = (entry - basis) * sources_each;
    return {-1, first, first + sources_each};
  }
  C10_HOST_DEVICE int64_t term(int64_t link) const { return link; }
  C10_HOST_DEVICE int64_t input(int64_t link) const {
    const int64_t source = sources[link];
    CUDA_KERNEL_ASSERT(source >= 0 && source < basis && "sources must be positions in the basis");
    return source;
  }
};

// Gradient of z: outputs are the basis features, inputs the channels; a link is a use of a basis
// feature, and links are sorted by it, so that each output gathers and nothing is added atomically.
struct BackwardWiring {
  const int64_t* position;  // (C,)   inverse of order: where each entry of cat([z, rebuilt]) went
  const int64_t* terms;     // (P*S,) terms, sorted by their source
  const int64_t* begin;     // (B+1,) where each source's terms begin
  int64_t basis, sources_each;

  C10_HOST_DEVICE Mix mix(int64_t feature) const {
    return {position[feature], begin[feature], begin[feature + 1]};
  }
  C10_HOST_DEVICE int64_t term(int64_t link) const { return terms[link]; }
  C10_HOST_DEVICE int64_t input(int64_t link) const {
    return position[basis + terms[link] / sources_each];
  }
};

// Sums one strip of output channel `channel` of image `image`; what lies below the last row is
// not meaningful.
template <int M, typename acc_t, typename scalar_t, typename Wiring>
C10_HOST_DEVICE inline void mix_strip(acc_t (&sum)[kStrip], const Wiring& wiring,
                                      const scalar_t* input, const Strides& strides,
                                      int64_t height, int64_t width, const Taps<scalar_t>& taps,
                                      int64_t term_stride, int m, int64_t image, int64_t channel,
                                      int64_t h0, int64_t w) {
  const Mix mix = wiring.mix(channel);
#pragma unroll
  for (int k = 0; k < kStrip; ++k) {
    sum[k] = acc_t(0);
    if (mix.copied >= 0 && h0 + k < height) {
      sum[k] = plane_of(input, strides, height, width, image, mix.copied)
                   .template at<acc_t>(h0 + k, w);
    }
  }
  for (int64_t link = mix.first; link < mix.last; ++link) {
    const auto plane = plane_of(input, strides, height, width, image, wiring.input(link));
    add_taps<M>(sum, plane, h0, w,
                Taps<scalar_t>{taps.data + wiring.term(link) * term_stride, taps.stride}, m);
  }
}

// ---------------------------------------------------------------- traversal

struct Strip {
  int64_t image, channel, h0, w;
};

// All strips of a (batch, channels, height, width) tensor, numbered so that neighbours in number
// are neighbours in memory. With channels = 1 it numbers the strips of planes alone.
struct StripGrid {
  int64_t batch, channels, height, width;
  bool channels_last;

  C10_HOST_DEVICE int64_t strips() const { return (height + kStrip - 1) / kStrip; }
  C10_HOST_DEVICE int64_t count() const { return batch * channels * strips() * width; }

  C10_HOST_DEVICE Strip at(int64_t index) const {
    // 64-bit division is slow on a GPU, and hardly ever needed.
    return count() <= INT32_MAX ? split<uint32_t>(index) : split<int64_t>(index);
  }

  template <typename index_t>
  C10_HOST_DEVICE Strip split(index_t index) const {
    const index_t c_count = channels, h_count = strips(), w_count = width;
    index_t channel = 0;
    if (channels_last) {
      channel = index % c_count;
      index /= c_count;
    }
    const index_t w = index % w_count;
    index /= w_count;
    const index_t strip = index % h_count;
    index /= h_count;
    if (!channels_last) {
      channel = index % c_count;
      index /= c_count;
    }
    return {static_cast<int64_t>(index), static_cast<int64_t>(channel),
            static_cast<int64_t>(strip) * kStrip, static_cast<int64_t>(w)};
  }
};

}  // namespace sbf
