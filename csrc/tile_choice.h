// Which tile a block gets: a model of what the block then does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>

#include "block.h"

namespace sbf {

struct Device {
  int multiprocessors;
  int shared_block, shared_all;  // bytes of shared memory: of a block, of a multiprocessor
};

struct Problem {
  int64_t batch, inputs, outputs, height, width;
  int m, element_size;
  bool channels_last;
  int alignment_in, alignment_out;  // bytes; of the addresses of all tensors of that side
  int64_t extra;                    // bytes of shared memory, besides tile and stage
};

// Output channels that are computed at a time: a line of the cache.
constexpr int chunk_of(int element_size) { return 128 / element_size; }

// Chooses the tile that should occupy a multiprocessor least, by a model that no measurement has
// tuned: elements moved, with surcharges for idle threads and too small a number of blocks on a
// multiprocessor. Returns nullopt where not even the smallest tile fits: the general kernels take
// such problems.
inline std::optional<Tiling> tile_for(const Problem& p, const Device& device) {
  const int64_t border = (p.m - 1) / 2,
                chunk = std::min<int64_t>(chunk_of(p.element_size), p.outputs);
  if (std::max({p.inputs, p.outputs, p.height, p.width}) >= int64_t(1) << 24) return std::nullopt;

  // The widest access that divides every run and where it begins.
  const auto vector_of = [&](int64_t channels, int alignment) {
    int64_t bytes = std::min(alignment, 16);
    const int64_t length = (p.channels_last ? channels : p.width) * p.element_size;
    while (bytes > p.element_size && length % bytes != 0) bytes /= 2;
    return static_cast<int>(bytes);
  };
  const int vector_in = vector_of(p.inputs, p.alignment_in);
  const int vector_out = vector_of(p.outputs, p.alignment_out);
  const int64_t quantum = p.channels_last ? 1 : std::max(vector_in, vector_out) / p.element_size;

  std::optional<Tiling> best;
  double best_cost = 0;
  for (int64_t rows = kStrip; rows <= 4 * kStrip && rows < p.height + kStrip; rows += kStrip) {
    // Widths that cut an image evenly, from wide to narrow.
    for (int64_t columns = std::min<int64_t>(p.width, 128 + quantum), next = columns;
         next >= quantum; next -= quantum) {
      columns = round_up(ceil_div(p.width, ceil_div(p.width, next)), quantum);
      next = columns;
      const int64_t units = columns * rows / kStrip;
      if (units > kThreads) continue;
      const Buffer tile =
          buffer_of(p.channels_last, p.inputs, rows, columns, border, p.element_size);
      const Buffer stage = buffer_of(p.channels_last, chunk, rows, columns, 0, p.element_size);
      const int64_t stage_at = round_up(tile.size * p.element_size, 16);
      const int64_t extra_at = stage_at + round_up(stage.size * p.element_size, 16);
      const int64_t bytes = extra_at + p.extra;
      if (bytes > device.shared_block) continue;

      const int64_t down = ceil_div(p.height, rows), across = ceil_div(p.width, columns);
      const int64_t tiles = p.batch * down * across, chunks = ceil_div(p.outputs, chunk);
      const int64_t splits = tiles >= device.multiprocessors
                                 ? 1
                                 : std::min(chunks, ceil_div(2 * device.multiprocessors, tiles));
      const int64_t resident = std::min<int64_t>(8, device.shared_all / (bytes + 1024));
      // What a block does, in elements moved. It loads the tile, less what lies outside the image
      // ...
      const double loaded = static_cast<double>((p.height + 2 * border * (down - 1)) *
                                                (p.width + 2 * border * (across - 1)) * p.inputs) /
                            static_cast<double>(down * across);
      // ... and computes its share of the outputs, with idle threads where the units do not divide
      // the block, and with bank conflicts where a warp works on several channels.
      const double channels_at_once = std::max(1.0, 32.0 / static_cast<double>(units));
      const double slowed = (1 + 0.35 * std::log2(channels_at_once)) * kThreads /
                            static_cast<double>(kThreads / units * units);
      const double computed = static_cast<double>(rows * columns * p.outputs) /
                              static_cast<double>(splits) * (0.6 + 0.4 * slowed);
      constexpr double kLatency = 4096;
      const double alone = resident >= 3 ? 1.0 : resident == 2 ? 1.15 : 1.5;
      const double turns =
          std::max(1.0, static_cast<double>(tiles * splits) / device.multiprocessors);
      const double cost = turns * (loaded + computed + kLatency) * alone;
      if (best.has_value() && cost >= best_cost) continue;
      best_cost = cost;
      best = Tiling{p.batch,
                    static_cast<int>(p.height),
                    static_cast<int>(p.width),
                    static_cast<int>(p.inputs),
                    static_cast<int>(p.outputs),
                    p.m,
                    p.channels_last,
                    static_cast<int>(rows),
                    static_cast<int>(columns),
                    static_cast<int>(down),
                    static_cast<int>(across),
                    static_cast<int>(chunk),
                    static_cast<int>(splits),
                    vector_in,
                    vector_out,
                    tile,
                    stage,
                    static_cast<int>(stage_at),
                    static_cast<int>(extra_at),
                    static_cast<int>(bytes)};
    }
  }
  return best;
}

}  // namespace sbf
