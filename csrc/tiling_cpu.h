// What the CPU's operators prepare for the kernels on tiles (tile.h): how images are cut, which
// pixels have neighbours, and the wiring as arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "tile.h"

namespace sbf {

// What a thread works on at a time should stay in the second-level cache.
constexpr int64_t kMaxTileBytes = 768 * 1024;
// An image of this size is not cut: its tiles would lose more at their borders.
constexpr int64_t kMaxWholeImageBytes = 1536 * 1024;

// How images are cut into tiles.
struct RowBlocks {
  int64_t rows, blocks;

  RowBlocks(int64_t tile_rows, int64_t tiles) : rows(tile_rows), blocks(tiles) {}
  // `bytes`: what a row needs in a tile. `min_tiles`: how many tiles there should be in all, at
  // least.
  RowBlocks(const Shape& shape, int64_t bytes, int64_t min_tiles) {
    const int64_t fit = kMaxTileBytes / std::max<int64_t>(1, bytes) - (shape.m - 1);
    blocks =
        ceil_div(shape.height, std::clamp<int64_t>(fit, 1, std::max<int64_t>(1, shape.height)));
    if (shape.height * bytes <= kMaxWholeImageBytes) blocks = 1;
    blocks = std::clamp<int64_t>(ceil_div(min_tiles, std::max<int64_t>(shape.batch, 1)),
                                 std::max<int64_t>(blocks, 1), std::max<int64_t>(shape.height, 1));
    rows = ceil_div(shape.height, blocks);
    blocks = ceil_div(shape.height, rows);
  }
};

// For each column of taps the pixels of a tile whose neighbour in that column lies in the row.
struct Masks {
  std::vector<int32_t> bits;
  int64_t stride;

  Masks(int64_t rows, int64_t width, int m) : stride(rows * width + kMaskPadding) {
    bits.resize(m * stride);
    for (int b = 0; b < m; ++b) {
      const int64_t shift = b - (m - 1) / 2;
      for (int64_t i = 0; i < rows * width; ++i) {
        const int64_t neighbour = i % width + shift;
        bits[b * stride + i] = neighbour >= 0 && neighbour < width ? -1 : 0;
      }
    }
  }
};

// Which plane each output channel copies, and the links that it adds (see ExpandTask).
struct Links {
  std::vector<int32_t> copied, begin{0}, source;
  std::vector<int64_t> tap;

  template <typename Wiring>
  Links(const Wiring& wiring, int64_t outputs, int m) {
    for (int64_t c = 0; c < outputs; ++c) {
      const ChannelLinks links = wiring.links_of(c);
      copied.push_back(static_cast<int32_t>(links.copied));
      for (int64_t link = links.first; link < links.last; ++link) {
        source.push_back(static_cast<int32_t>(wiring.input(link)));
        tap.push_back(wiring.term(link) * m * m);
      }
      begin.push_back(static_cast<int32_t>(source.size()));
    }
  }
};

}  // namespace sbf
