// How a block of threads works on a tile: geometry, and copies between memory and shared memory.
// tile_choice.h chooses the tile. Nothing here needs a GPU: the host runs the same functions,
// thread by thread.
//
// A block loads a tile of pixels with its border and with all input channels into shared memory, as
// *planes*: one for each channel, whatever the layout in memory, so that a thread reads eight
// pixels of a row with one access (two for floats). It computes the output channels a *chunk* at a
// time in a *stage*, which is then written with wide accesses. The stage has the layout of the
// output.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <type_traits>

#include "expand.h"

namespace sbf {

constexpr int kThreads = 256;
// A block that has a multiprocessor to itself has as many threads as two, but for double, whose
// sums would not fit into the registers.
constexpr int kMaxThreads = 2 * kThreads;
constexpr int max_threads_of(int element_size) {
  return element_size == 8 ? kThreads : kMaxThreads;
}
// Neighbouring threads that copy a run together: 8 times 16 bytes is a line of the cache.
constexpr int kLanes = 8;
// Columns that a thread computes at once, of kStrip rows.
constexpr int kWide = 8;
// Output channels that are computed at a time: a line of the cache.
constexpr int chunk_of(int element_size) { return 128 / element_size; }

// A thread of a block: its number, and how many there are.
struct Thread {
  int index, count;
};

// The threads of a block. `phase(f)` has every thread run f(thread) and waits for all of them. The
// host takes the threads one after the other, from either end: results must not depend on it.
struct Team {
#ifdef __CUDACC__
  template <typename F>
  __device__ void phase(const F& f) const {
    f(Thread{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)});
    __syncthreads();
  }
#else
  int count;
  bool backwards = false;

  template <typename F>
  void phase(const F& f) const {
    for (int i = 0; i < count; ++i) f(Thread{backwards ? count - 1 - i : i, count});
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

// a / b for 0 <= a < 2^20 and 0 < b: half away from an integer, a float's rounding does no harm.
C10_HOST_DEVICE inline int divide(int a, int b) {
  const float numerator = static_cast<float>(a) + 0.5f, denominator = static_cast<float>(b);
#ifdef __CUDA_ARCH__
  return static_cast<int>(__fdividef(numerator, denominator));
#else
  return static_cast<int>(numerator / denominator);
#endif
}

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

// Planes: rows begin at multiples of kWide elements, and the columns left of a row are the last of
// the row before it. Where the tile is as wide as the image (`whole`), all columns of the border
// are zero, and those right of a row are those left of the next one. With `spread`, planes lie an
// odd number of 16 bytes apart, so that threads that read the same place of different planes seldom
// meet in a bank. Behind a plane are at least kWide elements, which reads may run into.
inline Buffer planes_of(int64_t channels, int64_t rows, int64_t columns, int64_t border, bool whole,
                        bool spread, int element_size) {
  const int64_t quantum = 16 / element_size;
  const int64_t row = round_up(columns + (whole ? border : 2 * border), kWide);
  const int64_t units = ((rows + 2 * border) * row + kWide) / quantum;
  const int64_t channel = (spread ? units | 1 : units) * quantum;
  const int64_t lead = round_up(border, kWide);
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {narrow(lead + border * row), narrow(channel), narrow(row), 1, lead + channels * channel};
}

// Pixels: the channels of a chunk lie together, and pixels an odd number of words apart, so that
// threads that write different channels of a pixel, or copy neighbouring pixels, use all banks.
template <typename scalar_t>
constexpr int pixel_pitch() {
  constexpr int kSize = sizeof(scalar_t), kPerWord = kSize < 4 ? 4 / kSize : 1;
  return (chunk_of(kSize) / kPerWord | 1) * kPerWord;
}

inline Buffer pixels_of(int64_t rows, int64_t columns, int element_size) {
  const int pitch = element_size == 2   ? pixel_pitch<uint16_t>()
                    : element_size == 4 ? pixel_pitch<uint32_t>()
                                        : pixel_pitch<uint64_t>();
  const int64_t row = round_up(columns, kWide) * pitch;
  return {0, 1, static_cast<int>(row), pitch, rows * row};
}

// How the images of a batch are cut into tiles, and what a block keeps in shared memory.
struct Tiling {
  int64_t batch;
  int height, width, inputs, outputs;  // inputs, outputs: channels
  int m;
  bool channels_last;

  // Of a tile; rows are a multiple of kStrip, columns one of kWide or the image's width.
  int rows, columns;
  int down, across;           // tiles in an image
  int chunk;                  // output channels computed at a time
  int splits;                 // blocks that share the output channels of a tile
  int vector_in, vector_out;  // bytes of an access
  Buffer tile, stage;
  // Bytes of shared memory: where the stage, the order of the channels and what else a kernel needs
  // begin, and all.
  int stage_at, order_at, extra_at, bytes;
  int threads;   // of a block
  int resident;  // blocks that a device can hold, which go on from tile to tile

  C10_HOST_DEVICE int border() const { return (m - 1) / 2; }
  C10_HOST_DEVICE int units_across() const { return (columns + kWide - 1) / kWide; }
  C10_HOST_DEVICE int units() const { return units_across() * (rows / kStrip); }
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

// The part of a tile that one thread computes at a time: kStrip rows of kWide columns.
struct Unit {
  int row, column;

  C10_HOST_DEVICE Unit(const Tiling& tiling, int unit) {
    const int across = tiling.units_across(), strip = divide(unit, across);
    row = strip * kStrip;
    column = (unit - strip * across) * kWide;
  }
  C10_HOST_DEVICE bool inside(const Place& place) const {
    return row < place.rows && column < place.columns;
  }
};

// ---------------------------------------------------------------- reads of kWide elements

// 16 bytes.
template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int kEach = 16 / sizeof(scalar_t);
  scalar_t value[kEach];
};

// `from` must be a multiple of 16 bytes.
template <typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void read_wide(acc_t* to, const scalar_t* from) {
  using Part = Vector<scalar_t>;
#pragma unroll
  for (int i = 0; i < kWide; i += Part::kEach) {
    const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
    for (int j = 0; j < Part::kEach; ++j) to[i + j] = static_cast<acc_t>(part.value[j]);
  }
}

// The same with one element before and one behind.
template <typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void read_window(acc_t (&to)[kWide + 2], const scalar_t* from) {
  to[0] = static_cast<acc_t>(from[-1]);
  read_wide(to + 1, from);
  to[kWide + 1] = static_cast<acc_t>(from[kWide]);
}

// From any place.
template <typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void read_shifted(acc_t (&to)[kWide], const scalar_t* from, bool aligned) {
  if (aligned) {
    read_wide(to, from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j) to[j] = static_cast<acc_t>(from[j]);
}

template <typename acc_t, typename scalar_t>
C10_HOST_DEVICE inline void write_wide(scalar_t* to, const acc_t* from) {
  using Part = Vector<scalar_t>;
#pragma unroll
  for (int i = 0; i < kWide; i += Part::kEach) {
    Part part;
#pragma unroll
    for (int j = 0; j < Part::kEach; ++j) part.value[j] = static_cast<scalar_t>(from[i + j]);
    *reinterpret_cast<Part*>(to + i) = part;
  }
}

// ---------------------------------------------------------------- words

// On the host, elements may be read as words; nvcc, whose device code may do so anyway, cannot take
// the attribute.
#ifdef __CUDACC__
#define SBF_MAY_ALIAS
#else
#define SBF_MAY_ALIAS [[gnu::may_alias]]
#endif

template <typename Word>
struct SBF_MAY_ALIAS Single {
  Word word;
};

}  // namespace sbf
