// Which tile a block gets: a model of what the block then does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "channel_order.h"

namespace sbf {

struct Device {
  int multiprocessors;
  int shared_block, shared_all;  // bytes of shared memory: of a block, of a multiprocessor
};

// Blocks of kThreads that registers let a multiprocessor hold, and what the system takes of the
// shared memory for each.
constexpr int kBlocksAtOnce = kMaxThreads / kThreads, kReservedBytes = 1024;

struct Problem {
  int64_t batch, inputs, outputs, height, width;
  int m, element_size;
  bool channels_last;
  int alignment_in, alignment_out;  // bytes; of the addresses of all tensors of that side
  int64_t extra;                    // bytes of shared memory, besides tile and stage
};

// Chooses the tile that should occupy a multiprocessor least, by a model of the instructions that a
// block runs, with surcharges for too small a number of blocks on a multiprocessor. `stage_planes`
// asks for a stage of planes in either layout. Returns nullopt where not even the smallest tile
// fits: the general kernels take such problems.
inline std::optional<Tiling> tile_for(const Problem& p, bool stage_planes, const Device& device) {
  const int64_t border = (p.m - 1) / 2, chunk = chunk_of(p.element_size);
  // Places in an image are counted in 32 bits.
  if (std::max(p.inputs, p.outputs) * p.height * p.width > INT32_MAX) return std::nullopt;
  // A border may be no longer than what lies behind a plane.
  if (border > kWide) return std::nullopt;

  // The widest access that divides every run and where it begins.
  const auto vector_of = [&](int64_t channels, int alignment) {
    int64_t bytes = std::min(alignment, 16);
    const int64_t length = (p.channels_last ? channels : p.width) * p.element_size;
    while (bytes > p.element_size && length % bytes != 0) bytes /= 2;
    return static_cast<int>(bytes);
  };

  const int64_t chunks = ceil_div(p.outputs, chunk);
  std::optional<Tiling> best;
  double best_cost = 0;
  const auto consider = [&](int64_t rows, int64_t columns, bool spread) {
    const bool whole = columns == p.width;
    const Buffer tile = planes_of(p.inputs, rows, columns, border, whole, spread, p.element_size);
    const Buffer stage = p.channels_last && !stage_planes
                             ? pixels_of(rows, columns, p.element_size)
                             : planes_of(chunk, rows, columns, 0, whole, true, p.element_size);
    const int64_t down = ceil_div(p.height, rows), across = ceil_div(p.width, columns);
    const int64_t tiles = p.batch * down * across;
    const int64_t splits = tiles >= device.multiprocessors
                               ? 1
                               : std::min(chunks, ceil_div(2 * device.multiprocessors, tiles));
    const int64_t stage_at = round_up(tile.size * p.element_size, 16);
    const int64_t order_at = stage_at + round_up(stage.size * p.element_size, 16);
    const int64_t extra_at =
        order_at + round_up(ChannelOrder::bytes(static_cast<int>(ceil_div(chunks, splits)),
                                                static_cast<int>(chunk)),
                            16);
    const int64_t bytes = extra_at + p.extra;
    if (bytes > device.shared_block) return;

    const int64_t resident =
        std::min<int64_t>(kBlocksAtOnce, device.shared_all / (bytes + kReservedBytes));
    const int64_t threads = resident >= kBlocksAtOnce ? kThreads : max_threads_of(p.element_size);
    const int64_t units = ceil_div(columns, kWide) * (rows / kStrip);
    // Instructions of a warp: for an element of the tile ...
    const double loaded =
        3.0 * static_cast<double>((rows + 2 * border) * (columns + 2 * border) * p.inputs);
    // ... and for one of the output, idle threads included ...
    const int64_t turns_of_chunk = ceil_div(chunk * units, threads);
    const double computed =
        12.0 * static_cast<double>(turns_of_chunk * threads * kStrip * kWide * chunks) /
        static_cast<double>(splits);
    // ... and what a block waits for its loads and barriers.
    const double waited = 1e5 + 2e4 * static_cast<double>(chunks) / static_cast<double>(splits);
    // A single block waits for itself.
    const double alone = resident >= kBlocksAtOnce ? 1.0 : 1.3;
    const double turns =
        std::max(1.0, static_cast<double>(tiles * splits) / device.multiprocessors);
    const double cost = turns * (loaded + computed + waited) * alone;
    if (best.has_value() && cost >= best_cost) return;
    best_cost = cost;
    const auto narrow = [](int64_t value) { return static_cast<int>(value); };
    best = Tiling{p.batch,
                  narrow(p.height),
                  narrow(p.width),
                  narrow(p.inputs),
                  narrow(p.outputs),
                  p.m,
                  p.channels_last,
                  narrow(rows),
                  narrow(columns),
                  narrow(down),
                  narrow(across),
                  narrow(chunk),
                  narrow(splits),
                  vector_of(p.inputs, p.alignment_in),
                  vector_of(p.outputs, p.alignment_out),
                  tile,
                  stage,
                  narrow(stage_at),
                  narrow(order_at),
                  narrow(extra_at),
                  narrow(bytes),
                  narrow(threads),
                  narrow(resident * device.multiprocessors)};
  };
  for (const bool spread : {true, false}) {
    for (int64_t rows = kStrip; rows <= 4 * kStrip && rows < p.height + kStrip; rows += kStrip) {
      consider(rows, p.width, spread);
      // Widths that cut an image evenly, from wide to narrow.
      for (int64_t columns = round_up(p.width, kWide) - kWide; columns > 0;) {
        columns = round_up(ceil_div(p.width, ceil_div(p.width, columns)), kWide);
        if (columns <= 2 * kThreads) consider(rows, columns, spread);
        columns -= kWide;
      }
    }
    if (best.has_value()) break;
  }
  return best;
}

}  // namespace sbf
