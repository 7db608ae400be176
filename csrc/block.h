// How a block of threads works on a tile: geometry, and copies between memory and shared memory.
// tile_choice.h chooses the tile. Nothing here needs a GPU: the host runs the same functions,
// thread by thread.
//
// A block loads a tile of pixels with its border and with all input channels into shared memory,
// and computes the output channels a *chunk* at a time in a *stage*, which is then written with
// wide accesses. Copies go by *runs*, the stretches that are contiguous in memory and in shared
// memory: the channels of a pixel in channels_last, the pixels of a row otherwise. In shared memory
// runs lie an odd number of words apart, so that neighbouring threads, which compute neighbouring
// pixels, read and write different banks in either layout.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "expand.h"

namespace sbf {

constexpr int kThreads = 256;
// Neighbouring threads that copy a run together: 8 times 16 bytes is a line of the cache.
constexpr int kLanes = 8;

// The threads of a block. `phase(f)` has every thread run f(thread) and waits for all of them. The
// host takes the threads one after the other, from either end: results must not depend on it.
struct Team {
#ifdef __CUDACC__
  template <typename F>
  __device__ void phase(const F& f) const {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
#else
  bool backwards = false;

  template <typename F>
  void phase(const F& f) const {
    for (int i = 0; i < kThreads; ++i) f(backwards ? kThreads - 1 - i : i);
  }
#endif
};

// Functions that call Team::phase run where Team does.
#ifdef __CUDACC__
#define SBF_TEAM __device__
#else
#define SBF_TEAM
#endif

// ---------------------------------------------------------------- geometry

C10_HOST_DEVICE inline int smaller(int a, int b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Elements in a word, the unit in which shared memory is written.
constexpr int per_word(int element_size) { return element_size < 4 ? 4 / element_size : 1; }

// Where pixels lie in shared memory: (channel, row, column) is element
// origin + channel * .channel + row * .row + column * .column; rows and columns of the border are
// negative or beyond the last.
struct Buffer {
  int origin, channel, row, column;
  int64_t size;  // elements

  C10_HOST_DEVICE int at(int c, int h, int w) const {
    return origin + c * channel + h * row + w * column;
  }
};

inline Buffer buffer_of(bool channels_last, int64_t channels, int64_t rows, int64_t columns,
                        int64_t border, int element_size) {
  const int64_t word = per_word(element_size);
  const auto pitch_of = [&](int64_t length) { return (ceil_div(length, word) | 1) * word; };
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const int64_t all_rows = rows + 2 * border;
  if (channels_last) {
    const int64_t column = pitch_of(channels), row = (columns + 2 * border) * column;
    return {narrow(border * (row + column)), 1, narrow(row), narrow(column), all_rows * row};
  }
  // The first column that is no border begins a word.
  const int64_t lead = round_up(border, word), row = pitch_of(lead + columns + border);
  return {narrow(border * row + lead), narrow(all_rows * row), narrow(row), 1,
          channels * all_rows * row};
}

// How the images of a batch are cut into tiles, and what a block keeps in shared memory.
struct Tiling {
  int64_t batch;
  int height, width, inputs, outputs;  // inputs, outputs: channels
  int m;
  bool channels_last;

  int rows, columns;          // of a tile; rows are a multiple of kStrip
  int down, across;           // tiles in an image
  int chunk;                  // output channels computed at a time
  int splits;                 // blocks that share the output channels of a tile
  int vector_in, vector_out;  // bytes of an access
  Buffer tile, stage;
  int stage_at, extra_at, bytes;  // of shared memory; what else a kernel needs begins at extra_at

  C10_HOST_DEVICE int border() const { return (m - 1) / 2; }
  C10_HOST_DEVICE int units() const { return columns * (rows / kStrip); }
  C10_HOST_DEVICE int64_t tiles() const { return batch * down * across; }
  C10_HOST_DEVICE int chunks() const { return static_cast<int>(ceil_div(outputs, chunk)); }
  C10_HOST_DEVICE int chunks_each() const { return static_cast<int>(ceil_div(chunks(), splits)); }
};

// One tile of one image.
struct Place {
  int64_t image;
  int h0, w0, rows, columns;  // what of the tile lies in the image

  C10_HOST_DEVICE Place(const Tiling& tiling, int64_t index) {
    // 64-bit division is slow on a GPU, and hardly ever needed.
    if (index <= INT32_MAX) {
      set(tiling, static_cast<uint32_t>(index));
    } else {
      set(tiling, index);
    }
  }

 private:
  template <typename index_t>
  C10_HOST_DEVICE void set(const Tiling& tiling, index_t index) {
    const index_t across = tiling.across, down = tiling.down;
    const index_t line = index / across;
    image = static_cast<int64_t>(line / down);
    h0 = static_cast<int>(line % down) * tiling.rows;
    w0 = static_cast<int>(index % across) * tiling.columns;
    rows = smaller(tiling.rows, tiling.height - h0);
    columns = smaller(tiling.columns, tiling.width - w0);
  }
};

// A strip of a tile, the part of it that one thread computes at a time.
struct Unit {
  int row, column;

  C10_HOST_DEVICE Unit(const Tiling& tiling, int unit)
      : row(unit / tiling.columns * kStrip), column(unit % tiling.columns) {}
  C10_HOST_DEVICE bool inside(const Place& place) const {
    return row < place.rows && column < place.columns;
  }
};

// ---------------------------------------------------------------- copies

// On the host, elements may be read as words; nvcc, whose device code may do so anyway, cannot take
// the attribute.
#ifdef __CUDACC__
#define SBF_MAY_ALIAS
#else
#define SBF_MAY_ALIAS [[gnu::may_alias]]
#endif

// What one access moves. Words of it are what shared memory takes: two-byte elements that lie at
// an odd place have words of their own.
template <int kBytes, typename scalar_t>
struct SBF_MAY_ALIAS alignas(kBytes) Pack {
  using Word = std::conditional_t<kBytes == 2, uint16_t,
                                  std::conditional_t<sizeof(scalar_t) == 8, uint64_t, uint32_t>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  Word word[kWords];
};

template <typename Word>
struct SBF_MAY_ALIAS Single {
  Word word;
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

  C10_HOST_DEVICE int runs() const { return channels_last ? rows * columns : channels * rows; }
  C10_HOST_DEVICE int length() const { return channels_last ? channels : columns; }
};

// One run of a region: where it begins in memory, and in a buffer that holds the region's corner at
// (0, row0, column0).
struct Run {
  int64_t global;
  int shared;
  bool inside;

  template <typename scalar_t>
  C10_HOST_DEVICE Run(const Region<scalar_t>& region, const Buffer& buffer, int row0, int column0,
                      int run) {
    const int inner = region.channels_last ? region.columns : region.rows;
    const int outer = run / inner, rest = run - outer * inner;
    const int c = region.channels_last ? 0 : outer;
    const int row = region.channels_last ? outer : rest;
    const int column = region.channels_last ? rest : 0;
    const int64_t h = region.h0 + row, w = region.w0 + column;
    // In rows of pixels only what lies in the image is asked for.
    inside = h >= 0 && h < region.height && w >= 0 && w < region.width;
    global = region.channels_last
                 ? (h * region.width + w) * region.all_channels + region.first
                 : (static_cast<int64_t>(region.first + c) * region.height + h) * region.width + w;
    shared = buffer.at(c, row0 + row, column0 + column);
  }
};

template <int kBytes, typename scalar_t, typename element_t>
C10_HOST_DEVICE inline void load_runs(scalar_t* shared, const Buffer& buffer, int row0, int column0,
                                      const Region<element_t>& region, int thread) {
  using Moved = Pack<kBytes, scalar_t>;
  constexpr int kEach = kBytes / sizeof(scalar_t), kPerWord = kEach / Moved::kWords;
  const int runs = region.runs(), length = region.length();
  for (int i = thread / kLanes; i < runs; i += kThreads / kLanes) {
    const Run run(region, buffer, row0, column0, i);
#pragma unroll 4
    for (int at = thread % kLanes * kEach; at < length; at += kLanes * kEach) {
      Moved moved{};
      if (run.inside) moved = *reinterpret_cast<const Moved*>(region.data + run.global + at);
#pragma unroll
      for (int j = 0; j < Moved::kWords; ++j) {
        using Word = Single<typename Moved::Word>;
        reinterpret_cast<Word*>(shared + run.shared + at + j * kPerWord)->word = moved.word[j];
      }
    }
  }
}

template <int kBytes, typename scalar_t>
C10_HOST_DEVICE inline void store_runs(const scalar_t* shared, const Buffer& buffer,
                                       const Region<scalar_t>& region, int thread) {
  using Moved = Pack<kBytes, scalar_t>;
  constexpr int kEach = kBytes / sizeof(scalar_t), kPerWord = kEach / Moved::kWords;
  const int runs = region.runs(), length = region.length();
  for (int i = thread / kLanes; i < runs; i += kThreads / kLanes) {
    const Run run(region, buffer, 0, 0, i);
#pragma unroll 4
    for (int at = thread % kLanes * kEach; at < length; at += kLanes * kEach) {
      Moved moved;
#pragma unroll
      for (int j = 0; j < Moved::kWords; ++j) {
        using Word = const Single<typename Moved::Word>;
        moved.word[j] = reinterpret_cast<Word*>(shared + run.shared + at + j * kPerWord)->word;
      }
      *reinterpret_cast<Moved*>(region.data + run.global + at) = moved;
    }
  }
}

// Loads a region with accesses of `bytes` each; what lies outside the image becomes zero.
template <typename scalar_t>
C10_HOST_DEVICE inline void load(int bytes, scalar_t* shared, const Buffer& buffer, int row0,
                                 int column0, const Region<const scalar_t>& region, int thread) {
  constexpr int kSize = sizeof(scalar_t);
  if (bytes == 16) {
    load_runs<16>(shared, buffer, row0, column0, region, thread);
  } else if (kSize < 8 && bytes == 8) {
    load_runs<8>(shared, buffer, row0, column0, region, thread);
  } else if (kSize < 4 && bytes == 4) {
    load_runs<(kSize < 4 ? 4 : 16)>(shared, buffer, row0, column0, region, thread);
  } else {
    load_runs<kSize>(shared, buffer, row0, column0, region, thread);
  }
}

template <typename scalar_t>
C10_HOST_DEVICE inline void store(int bytes, const scalar_t* shared, const Buffer& buffer,
                                  const Region<scalar_t>& region, int thread) {
  constexpr int kSize = sizeof(scalar_t);
  if (bytes == 16) {
    store_runs<16>(shared, buffer, region, thread);
  } else if (kSize < 8 && bytes == 8) {
    store_runs<8>(shared, buffer, region, thread);
  } else if (kSize < 4 && bytes == 4) {
    store_runs<(kSize < 4 ? 4 : 16)>(shared, buffer, region, thread);
  } else {
    store_runs<kSize>(shared, buffer, region, thread);
  }
}

// Loads the tile at `place` of an input whose image begins at `image`: all channels, all rows that
// a strip of the place reads, and the border.
template <typename scalar_t>
C10_HOST_DEVICE inline void load_tile(const Tiling& tiling, const Place& place, scalar_t* tile,
                                      const scalar_t* image, int thread) {
  const int border = tiling.border();
  const int rows = (place.rows + kStrip - 1) / kStrip * kStrip + 2 * border;
  Region<const scalar_t> region{
      image,         tiling.height,     tiling.width, tiling.inputs, tiling.channels_last, 0,
      tiling.inputs, place.h0 - border, rows,         place.w0,      place.columns};
  if (tiling.channels_last) {
    region.w0 -= border;
    region.columns += 2 * border;
    load(tiling.vector_in, tile, tiling.tile, -border, -border, region, thread);
    return;
  }
  load(tiling.vector_in, tile, tiling.tile, -border, 0, region, thread);
  // Left and right of the rows.
  for (int i = thread / kLanes; i < region.runs(); i += kThreads / kLanes) {
    const Run run(region, tiling.tile, -border, 0, i);
    for (int j = thread % kLanes; j < 2 * border; j += kLanes) {
      const int column = j < border ? j - border : place.columns + j - border;
      const int w = place.w0 + column;
      const bool inside = run.inside && w >= 0 && w < tiling.width;
      tile[run.shared + column] = inside ? image[run.global + column] : scalar_t(0);
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
