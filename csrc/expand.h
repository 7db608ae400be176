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

C10_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  // Zero outside the plane.
  template <typename acc_t>
  C10_HOST_DEVICE acc_t padded(int64_t h, int64_t w) const {
    const bool inside = h >= 0 && h < height && w >= 0 && w < width;
    return inside ? at<acc_t>(h, w) : acc_t(0);
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

template <typename scalar_t>
Taps<scalar_t> taps_of(const scalar_t* transforms, int m, bool flip) {
  return flip ? Taps<scalar_t>{transforms + m * m - 1, -1} : Taps<scalar_t>{transforms, 1};
}

// The sum of expand. A strip's pixel k is summed over the window from its corner: with `read`
// giving the value that lies `row` rows and `column` columns from the corner of pixel 0,
//     sum[k] += sum over the M x M taps of tap[a*M + b] * read(k + a, b).
template <int M, typename acc_t, typename Read>
C10_HOST_DEVICE inline void add_window(acc_t (&sum)[kStrip], const acc_t (&tap)[M * M],
                                       const Read& read) {
#pragma unroll
  for (int row = 0; row < kStrip + M - 1; ++row) {
    acc_t value[M];
#pragma unroll
    for (int b = 0; b < M; ++b) value[b] = read(row, b);
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

// The sum of the transforms' gradient: sum[a*M + b] += sum over the strip of
//     grad[k] * read(k + a, b).
template <int M, typename acc_t, typename Read>
C10_HOST_DEVICE inline void add_products(acc_t (&sum)[M * M], const acc_t (&grad)[kStrip],
                                         const Read& read) {
#pragma unroll
  for (int row = 0; row < kStrip + M - 1; ++row) {
#pragma unroll
    for (int b = 0; b < M; ++b) {
      const acc_t value = read(row, b);
#pragma unroll
      for (int a = 0; a < M; ++a) {
        const int k = row - a;
        if (k >= 0 && k < kStrip) sum[a * M + b] += grad[k] * value;
      }
    }
  }
}

// ---------------------------------------------------------------- the same, on whole planes

// Adds all m x m taps of one term to the strip from (h0, w) on, with zeros outside the plane; M is
// m where there is a kernel for it, 1 otherwise.
template <int M, typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void add_taps(acc_t (&sum)[kStrip], const Plane<scalar_t>& plane, int64_t h0,
                                     int64_t w, const Taps<scalar_t>& taps, int m) {
  for (int a0 = 0; a0 < m; a0 += M) {
    for (int b0 = 0; b0 < m; b0 += M) {
      acc_t tap[M * M];
#pragma unroll
      for (int i = 0; i < M * M; ++i) {
        tap[i] = static_cast<acc_t>(taps.data[((a0 + i / M) * m + b0 + i % M) * taps.stride]);
      }
      const int64_t top = h0 + a0 - (m - 1) / 2, left = w + b0 - (m - 1) / 2;
      add_window<M>(sum, tap, [&](int row, int column) {
        return plane.template padded<acc_t>(top + row, left + column);
      });
    }
  }
}

// Adds the products of a strip of `grad` with `plane`, for the M x M taps from (a0, b0) on.
template <int M, typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void add_strip_products(acc_t (&sum)[M * M], const Plane<scalar_t>& grad,
                                               const Plane<scalar_t>& plane, int64_t h0, int64_t w,
                                               int m, int a0, int b0) {
  acc_t g[kStrip];
#pragma unroll
  for (int k = 0; k < kStrip; ++k) g[k] = grad.template padded<acc_t>(h0 + k, w);
  const int64_t top = h0 + a0 - (m - 1) / 2, left = w + b0 - (m - 1) / 2;
  add_products<M>(sum, g, [&](int row, int column) {
    return plane.template padded<acc_t>(top + row, left + column);
  });
}

// ---------------------------------------------------------------- which channels a channel is a
// sum of

// One output channel: the input channel that it copies (-1: none), and the links [first, last)
// whose terms it adds.
struct ChannelLinks {
  int64_t copied, first, last;
};

// expand: outputs are its channels, inputs the basis features; a link is a term.
struct ForwardWiring {
  const int64_t* order;
  const int64_t* sources;
  int64_t basis, channels, sources_each;

  C10_HOST_DEVICE ChannelLinks links_of(int64_t channel) const {
    const int64_t entry = order[channel];
    CUDA_KERNEL_ASSERT(entry >= 0 && entry < channels && "order must be a permutation");
    if (entry < basis) return {entry, 0, 0};
    const int64_t first = (entry - basis) * sources_each;
    return {-1, first, first + sources_each};
  }
  C10_HOST_DEVICE int64_t term(int64_t link) const { return link; }

  // The links of neighbouring channels, `count` from c0 on, get numbers, their *slots*: where a
  // channel's begin, how many there are, and which link (-1: none) a slot holds.
  C10_HOST_DEVICE int64_t slot(int64_t c0, int64_t channel) const {
    return (channel - c0) * sources_each;
  }
  C10_HOST_DEVICE int64_t slots(int64_t, int64_t count) const { return count * sources_each; }
  C10_HOST_DEVICE int64_t link(int64_t c0, int slot) const {
    const int each = static_cast<int>(sources_each), c = slot / each;
    const ChannelLinks links = links_of(c0 + c);
    return links.first == links.last ? -1 : links.first + (slot - c * each);
  }
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

  C10_HOST_DEVICE ChannelLinks links_of(int64_t feature) const {
    return {position[feature], begin[feature], begin[feature + 1]};
  }
  C10_HOST_DEVICE int64_t term(int64_t link) const { return terms[link]; }
  C10_HOST_DEVICE int64_t slot(int64_t c0, int64_t channel) const {
    return begin[channel] - begin[c0];
  }
  C10_HOST_DEVICE int64_t slots(int64_t c0, int64_t count) const {
    return begin[c0 + count] - begin[c0];
  }
  C10_HOST_DEVICE int64_t link(int64_t c0, int slot) const { return begin[c0] + slot; }
  C10_HOST_DEVICE int64_t input(int64_t link) const {
    return position[basis + terms[link] / sources_each];
  }
};

// Sums one strip of output channel `channel` of image `image`; what lies below the last row is
// not meaningful.
template <int M, typename acc_t, typename scalar_t, typename Wiring>
C10_HOST_DEVICE inline void expand_strip(acc_t (&sum)[kStrip], const Wiring& wiring,
                                         const scalar_t* input, const Strides& strides,
                                         int64_t height, int64_t width, const Taps<scalar_t>& taps,
                                         int m, int64_t image, int64_t channel, int64_t h0,
                                         int64_t w) {
  const ChannelLinks links = wiring.links_of(channel);
#pragma unroll
  for (int k = 0; k < kStrip; ++k) {
    sum[k] = acc_t(0);
    if (links.copied >= 0 && h0 + k < height) {
      sum[k] = plane_of(input, strides, height, width, image, links.copied)
                   .template at<acc_t>(h0 + k, w);
    }
  }
  for (int64_t link = links.first; link < links.last; ++link) {
    const auto plane = plane_of(input, strides, height, width, image, wiring.input(link));
    add_taps<M>(sum, plane, h0, w,
                Taps<scalar_t>{taps.data + wiring.term(link) * m * m, taps.stride}, m);
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
