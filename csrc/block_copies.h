// How a block of threads copies between memory and shared memory, by *runs*: the stretches that are
// contiguous in memory, which are the channels of a pixel in channels_last and the pixels of a row
// otherwise.
#pragma once

#include "block.h"

namespace sbf {

// What one access moves. Words of it are what shared memory takes: two-byte elements that lie at
// an odd place have words of their own.
template <int kBytes, typename scalar_t>
struct SBF_MAY_ALIAS alignas(kBytes) Pack {
  using Word = std::conditional_t<kBytes == 2, uint16_t,
                                  std::conditional_t<sizeof(scalar_t) == 8, uint64_t, uint32_t>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  Word word[kWords];
};

// The channels [first, first + channels) and pixels [h0, h0 + rows) x [w0, w0 + columns) of an
// image whose channel 0 begins at `data`. With `padded`, rows and columns may lie outside the
// image.
template <typename scalar_t>
struct Region {
  scalar_t* data;
  int height, width, all_channels;
  bool channels_last;
  int first, channels, h0, rows, w0, columns;

  C10_HOST_DEVICE int length() const { return channels_last ? channels : columns; }
};

// The runs first, first + step, ... of a region: where each begins in memory, and in a buffer that
// holds the region's corner at (0, row0, column0). Only the first one takes a division.
template <typename element_t>
class Runs {
 public:
  C10_HOST_DEVICE Runs(const Region<element_t>& region, const Buffer& buffer, int row0, int column0,
                       int first, int step)
      : region_(region),
        buffer_(buffer),
        row0_(row0),
        column0_(column0),
        inner_(region.channels_last ? region.columns : region.rows),
        outers_(region.channels_last ? region.rows : region.channels),
        outer_(divide(first, inner_)),
        rest_(first - outer_ * inner_),
        outer_step_(divide(step, inner_)),
        rest_step_(step - outer_step_ * inner_) {}

  C10_HOST_DEVICE bool more() const { return outer_ < outers_; }
  C10_HOST_DEVICE void next() {
    outer_ += outer_step_;
    rest_ += rest_step_;
    if (rest_ >= inner_) {
      rest_ -= inner_;
      ++outer_;
    }
  }

  // In rows of pixels only what lies in the image is asked for.
  C10_HOST_DEVICE bool inside() const {
    const int w = column(region_.w0), h = row(region_.h0);
    return h >= 0 && h < region_.height && w >= 0 && w < region_.width;
  }
  C10_HOST_DEVICE int global() const {
    const int w = column(region_.w0), h = row(region_.h0);
    return region_.channels_last
               ? (h * region_.width + w) * region_.all_channels + region_.first
               : ((region_.first + outer_) * region_.height + h) * region_.width + w;
  }
  C10_HOST_DEVICE int shared() const {
    return buffer_.at(region_.channels_last ? 0 : outer_, row(row0_), column(column0_));
  }

 private:
  C10_HOST_DEVICE int row(int first) const {
    return first + (region_.channels_last ? outer_ : rest_);
  }
  C10_HOST_DEVICE int column(int first) const {
    return first + (region_.channels_last ? rest_ : 0);
  }

  const Region<element_t>& region_;
  const Buffer& buffer_;
  int row0_, column0_, inner_, outers_, outer_, rest_, outer_step_, rest_step_;
};

// Copies runs into a buffer that has them as they are in memory.
template <int kBytes, typename scalar_t, typename element_t>
C10_HOST_DEVICE inline void load_runs(scalar_t* shared, const Buffer& buffer, int row0, int column0,
                                      const Region<element_t>& region, Thread thread) {
  using Moved = Pack<kBytes, scalar_t>;
  constexpr int kEach = kBytes / sizeof(scalar_t), kPerWord = kEach / Moved::kWords;
  const int length = region.length();
  Runs runs(region, buffer, row0, column0, thread.index / kLanes, thread.count / kLanes);
  for (; runs.more(); runs.next()) {
    const element_t* from = region.data + runs.global();
    scalar_t* to = shared + runs.shared();
    const bool inside = runs.inside();
#pragma unroll 4
    for (int at = thread.index % kLanes * kEach; at < length; at += kLanes * kEach) {
      Moved moved{};
      if (inside) moved = *reinterpret_cast<const Moved*>(from + at);
#pragma unroll
      for (int j = 0; j < Moved::kWords; ++j) {
        using Word = Single<typename Moved::Word>;
        reinterpret_cast<Word*>(to + at + j * kPerWord)->word = moved.word[j];
      }
    }
  }
}

// Copies pixels of channels_last into planes. Neighbouring threads read 32 bytes of a pixel, the
// least that memory gives, and then the next pixel, so that most write into one plane.
template <int kBytes, typename scalar_t, typename element_t>
C10_HOST_DEVICE inline void load_pixels(scalar_t* shared, const Buffer& planes, int row0,
                                        int column0, const Region<element_t>& region,
                                        Thread thread) {
  constexpr int kEach = kBytes / sizeof(scalar_t), kAcross = 32 / kBytes, kBatch = 4;
  struct alignas(kBytes) Moved {
    scalar_t value[kEach];
  };
  const int length = region.length();
  Runs runs(region, planes, row0, column0, thread.index / kAcross, thread.count / kAcross);
  for (; runs.more(); runs.next()) {
    const element_t* pixel = region.data + runs.global();
    scalar_t* place = shared + runs.shared();
    const bool inside = runs.inside();
    for (int at = thread.index % kAcross * kEach; at < length; at += kBatch * kAcross * kEach) {
      // All are under way before the first is used.
      Moved moved[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int from = at + k * kAcross * kEach;
        moved[k] = Moved{};
        if (inside && from < length) moved[k] = *reinterpret_cast<const Moved*>(pixel + from);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int from = at + k * kAcross * kEach;
        if (from >= length) break;
        scalar_t* to = place + from * planes.channel;
#pragma unroll
        for (int j = 0; j < kEach; ++j) to[j * planes.channel] = moved[k].value[j];
      }
    }
  }
}

template <int kBytes, typename scalar_t>
C10_HOST_DEVICE inline void store_runs(const scalar_t* shared, const Buffer& buffer,
                                       const Region<scalar_t>& region, Thread thread) {
  using Moved = Pack<kBytes, scalar_t>;
  constexpr int kEach = kBytes / sizeof(scalar_t), kPerWord = kEach / Moved::kWords;
  const int length = region.length();
  Runs runs(region, buffer, 0, 0, thread.index / kLanes, thread.count / kLanes);
  for (; runs.more(); runs.next()) {
    scalar_t* to = region.data + runs.global();
    const scalar_t* from = shared + runs.shared();
#pragma unroll 4
    for (int at = thread.index % kLanes * kEach; at < length; at += kLanes * kEach) {
      Moved moved;
#pragma unroll
      for (int j = 0; j < Moved::kWords; ++j) {
        using Word = const Single<typename Moved::Word>;
        moved.word[j] = reinterpret_cast<Word*>(from + at + j * kPerWord)->word;
      }
      *reinterpret_cast<Moved*>(to + at) = moved;
    }
  }
}

// Calls load(kBytes as a constant) for an access of `bytes`.
template <typename scalar_t, typename Load>
C10_HOST_DEVICE inline void with_access(int bytes, const Load& load) {
  constexpr int kSize = sizeof(scalar_t);
  if (bytes == 16) {
    load(std::integral_constant<int, 16>());
  } else if (kSize < 8 && bytes == 8) {
    load(std::integral_constant<int, 8>());
  } else if (kSize < 4 && bytes == 4) {
    load(std::integral_constant < int, kSize<4 ? 4 : 16>());
  } else {
    load(std::integral_constant<int, kSize>());
  }
}

// Loads a region with accesses of `bytes` each; what lies outside the image becomes zero.
template <typename scalar_t>
C10_HOST_DEVICE inline void load(int bytes, scalar_t* shared, const Buffer& buffer, int row0,
                                 int column0, const Region<const scalar_t>& region, Thread thread) {
  with_access<scalar_t>(bytes, [&](auto kBytes) {
    load_runs<kBytes>(shared, buffer, row0, column0, region, thread);
  });
}

// The same into planes, from either layout.
template <typename scalar_t>
C10_HOST_DEVICE inline void load_planes(int bytes, scalar_t* shared, const Buffer& planes, int row0,
                                        int column0, const Region<const scalar_t>& region,
                                        Thread thread) {
  with_access<scalar_t>(bytes, [&](auto kBytes) {
    if (region.channels_last) {
      load_pixels<kBytes>(shared, planes, row0, column0, region, thread);
    } else {
      load_runs<kBytes>(shared, planes, row0, column0, region, thread);
    }
  });
}

// Clears a buffer that begins at a multiple of 16 bytes, and is as long.
template <typename scalar_t>
C10_HOST_DEVICE inline void clear(scalar_t* shared, int64_t size, Thread thread) {
  using Part = Vector<scalar_t>;
  for (int64_t i = thread.index * Part::kEach; i < size; i += thread.count * Part::kEach) {
    *reinterpret_cast<Part*>(shared + i) = Part{};
  }
}

template <typename scalar_t>
C10_HOST_DEVICE inline void store(int bytes, const scalar_t* shared, const Buffer& buffer,
                                  const Region<scalar_t>& region, Thread thread) {
  with_access<scalar_t>(bytes,
                        [&](auto kBytes) { store_runs<kBytes>(shared, buffer, region, thread); });
}

// Loads the tile at `place` of an input whose image begins at `image`: all channels, all rows that
// a strip of the place reads, and the border.
template <typename scalar_t>
C10_HOST_DEVICE inline void load_tile(const Tiling& tiling, const Place& place, scalar_t* tile,
                                      const scalar_t* image, Thread thread) {
  const int border = tiling.border();
  const int rows = (place.rows + kStrip - 1) / kStrip * kStrip + 2 * border;
  const bool whole = tiling.across == 1;
  Region<const scalar_t> region{
      image,         tiling.height,     tiling.width, tiling.inputs, tiling.channels_last, 0,
      tiling.inputs, place.h0 - border, rows,         place.w0,      place.columns};
  if (tiling.channels_last) {
    // A whole row's border is zero, and stays so.
    const int beside = whole ? 0 : border;
    region.w0 -= beside;
    region.columns += 2 * beside;
    load_planes(tiling.vector_in, tile, tiling.tile, -border, -beside, region, thread);
    return;
  }
  load_planes(tiling.vector_in, tile, tiling.tile, -border, 0, region, thread);
  if (whole) return;
  // Left and right of the rows.
  Runs runs(region, tiling.tile, -border, 0, thread.index / kLanes, thread.count / kLanes);
  for (; runs.more(); runs.next()) {
    for (int j = thread.index % kLanes; j < 2 * border; j += kLanes) {
      const int column = j < border ? j - border : place.columns + j - border;
      const int w = place.w0 + column;
      const bool inside = runs.inside() && w >= 0 && w < tiling.width;
      tile[runs.shared() + column] = inside ? image[runs.global() + column] : scalar_t(0);
    }
  }
}

// The part of an output that a chunk of a place is.
template <typename scalar_t>
C10_HOST_DEVICE inline Region<scalar_t> output_region(const Tiling& tiling, const Place& place,
                                                      scalar_t* data, int first, int channels) {
  scalar_t* image =
      data + place.image * tiling.outputs * tiling.height * static_cast<int64_t>(tiling.width);
  return {image,    tiling.height, tiling.width, tiling.outputs, tiling.channels_last, first,
          channels, place.h0,      place.rows,   place.w0,       place.columns};
}

}  // namespace sbf
