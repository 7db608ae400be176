// The planes of a tile: where they lie and how they are loaded.
#pragma once

#include "tile.h"
#include "tile_vector.h"

namespace sbf {
namespace {

// Pixels that are summed at once for a block of L channels: the sums stay in the first-level cache.
constexpr int64_t kChunk = 16 * L;

// Fetches cache lines, some at each step of other work: pieces of `length` lines
// that begin `stride` bytes apart.
struct Prefetcher {
  const char* piece;
  int64_t length, stride, each;  // each: lines a step
  int64_t done = 0;

  // Lines of `count` pieces of `bytes` bytes, in `steps` steps.
  Prefetcher(const void* first, int64_t bytes, int64_t stride_bytes, int64_t count, int64_t steps)
      : piece(static_cast<const char*>(first)),
        length((bytes + 63) / 64),
        stride(stride_bytes),
        each((length * count + steps - 1) / steps) {}

  template <int kLocality>
  SBF_INLINE void step() {
    for (int64_t i = 0; i < each; ++i) {
      __builtin_prefetch(piece + 64 * done, 0, kLocality);
      if (++done == length) {
        done = 0;
        piece += stride;
      }
    }
  }
};

// Where the planes of a tile are: row r of channel c begins at data + c*size + kGuard + r*width,
// row 0 being `border` rows above the tile's first. Kernels may read kGuard floats before the first
// row and behind the last one; what they compute from those is not used.
struct Planes {
  float* data;
  int64_t size, rows, width, border;

  static constexpr int64_t kGuard = 2 * kChunk;

  Planes(float* at, int64_t tile_rows, int64_t row_width, int m)
      : data(at), rows(tile_rows + (m - 1)), width(row_width), border((m - 1) / 2) {
    // An odd number of cache lines keeps the planes out of each other's cache sets.
    size = 16 * ((rows * width + 2 * kGuard + 15) / 16 | 1);
  }
  float* row(int64_t channel, int64_t r) const {
    return data + channel * size + kGuard + r * width;
  }
  int64_t floats(int64_t channels) const { return channels * size; }

  void clear(int64_t channels, int64_t first, int64_t last) const {
    for (int64_t c = 0; c < channels; ++c) {
      std::memset(row(c, first), 0, sizeof(float) * (last - first) * width);
    }
  }
  // Moves `count` pixels from row `first` on to the top.
  void move_up(int64_t channels, int64_t first, int64_t count) const {
    for (int64_t c = 0; c < channels; ++c) {
      std::memmove(row(c, 0), row(c, first), sizeof(float) * count);
    }
  }

  // How many steps ahead load_image makes.
  static int64_t steps_of(bool channels_last, int64_t channels, int64_t pixels) {
    return channels_last ? (pixels + L - 1) / L * ((channels + L - 1) / L) : channels;
  }

  // Loads rows [h0, h1) of an image of `channels` channels as rows r, r + 1, ...; meanwhile lines
  // of `output` come into the cache.
  template <typename scalar_t>
  void load_image(const scalar_t* image, bool channels_last, int64_t channels, int64_t height,
                  int64_t h0, int64_t h1, int64_t r, Prefetcher output) const {
    const int64_t pixels = (h1 - h0) * width;
    if (!channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        output.step<2>();
        const scalar_t* from = image + (c * height + h0) * width;
        float* to = row(c, r);
        for (int64_t i = 0; i < pixels; ++i) to[i] = as_float(from[i]);
      }
      return;
    }
    const scalar_t* from = image + h0 * width * channels;
    for (int64_t i = 0; i < pixels; i += L) {
      const int64_t block_pixels = min<int64_t>(L, pixels - i);
      for (int64_t c = 0; c < channels; c += L) {
        output.step<2>();
        const int64_t block_channels = min<int64_t>(L, channels - c);
        Vector block[L];
        const scalar_t* at = from + i * channels + c;
        float* to = row(c, r) + i;
        if (block_pixels == L && block_channels == L) {
          SBF_UNROLL
          for (int k = 0; k < L; ++k) block[k] = load_as_float(at + k * channels);
          transpose(block);
          SBF_UNROLL
          for (int k = 0; k < L; ++k) store(to + k * size, block[k]);
          continue;
        }
        for (int64_t k = 0; k < block_channels; ++k) {
          for (int64_t j = 0; j < block_pixels; ++j)
            to[k * size + j] = as_float(at[j * channels + k]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sbf
