// What a block does for expand and for its gradient by z: output channels are copies and sums of
// input channels, as a wiring says. The tile of the input is read once for all output channels.
#pragma once

#include "block_copies.h"
#include "channel_order.h"
#include "epilogue.h"

namespace sbf {

template <typename scalar_t, typename Wiring>
struct ExpandArguments {
  scalar_t* output;
  const scalar_t* input;
  const scalar_t* residual;  // like output, or null
  const scalar_t* bias;      // one for each output channel, or null
  Taps<scalar_t> taps;       // of term 0; those of the next begin m * m further
  Wiring wiring;
  Activation activation;
  Tiling tiling;
};

// M is m where there is a kernel for it, 1 otherwise.
template <int M, typename scalar_t, typename acc_t, typename Wiring>
class ExpandBlock {
 public:
  C10_HOST_DEVICE ExpandBlock(const ExpandArguments<scalar_t, Wiring>& arguments, char* shared,
                              const ChannelOrder& order, int64_t tile_index)
      : args_(arguments),
        tiling_(arguments.tiling),
        order_(order),
        place_(arguments.tiling, tile_index),
        tile_(reinterpret_cast<scalar_t*>(shared)),
        stage_(reinterpret_cast<scalar_t*>(shared + arguments.tiling.stage_at)) {}

  C10_HOST_DEVICE void load(Thread thread) const {
    const int64_t size = static_cast<int64_t>(tiling_.inputs) * tiling_.height * tiling_.width;
    load_tile(tiling_, place_, tile_, args_.input + place_.image * size, thread);
  }

  // Puts a chunk's residual into the stage. A thread touches the part of the stage that it has
  // stored itself, so this may follow `store` at once.
  C10_HOST_DEVICE void prepare(int chunk, Thread thread) const {
    if (args_.residual == nullptr) return;
    const int c0 = chunk * tiling_.chunk;
    sbf::load(tiling_.vector_out, stage_, tiling_.stage, 0, 0,
              output_region(tiling_, place_, args_.residual, c0, channels(c0)), thread);
  }

  // Computes the channels of a chunk in the stage: neighbouring threads take neighbouring channels
  // of the order, for one unit of pixels after the other.
  C10_HOST_DEVICE void compute(int chunk, Thread thread) const {
    const int c0 = chunk * tiling_.chunk, count = channels(c0), tasks = count * tiling_.units();
    for (int task = thread.index; task < tasks; task += thread.count) {
      const int number = divide(task, count);
      const Unit unit(tiling_, number);
      if (!unit.inside(place_)) continue;
      const int c = order_.channel(chunk, task - number * count);
      acc_t sum[kStrip][kWide];
      sum_channel(sum, c0 + c, unit);
      put(sum, c0 + c, c, unit);
    }
  }

  C10_HOST_DEVICE void store(int chunk, Thread thread) const {
    const int c0 = chunk * tiling_.chunk;
    sbf::store(tiling_.vector_out, stage_, tiling_.stage,
               output_region(tiling_, place_, args_.output, c0, channels(c0)), thread);
  }

 private:
  C10_HOST_DEVICE int channels(int c0) const {
    return smaller(tiling_.chunk, tiling_.outputs - c0);
  }

  C10_HOST_DEVICE void sum_channel(acc_t (&sum)[kStrip][kWide], int channel,
                                   const Unit& unit) const {
    const Buffer& tile = tiling_.tile;
    const ChannelLinks links = args_.wiring.links_of(channel);
    const scalar_t* pixels = tile_ + tile.at(0, unit.row, unit.column);
    if (links.copied >= 0) {
      const scalar_t* from = pixels + static_cast<int>(links.copied) * tile.channel;
#pragma unroll
      for (int k = 0; k < kStrip; ++k) read_wide(sum[k], from + k * tile.row);
    } else {
#pragma unroll
      for (int k = 0; k < kStrip; ++k) {
#pragma unroll
        for (int j = 0; j < kWide; ++j) sum[k][j] = acc_t(0);
      }
    }
    const int m = M == 3 ? 3 : tiling_.m;
    for (int64_t link = links.first; link < links.last; ++link) {
      const int input = static_cast<int>(args_.wiring.input(link));
      add_term(sum, pixels + input * tile.channel,
               args_.taps.data + args_.wiring.term(link) * m * m);
    }
  }

  // Adds one term: `pixels` is where the unit's first pixel is in the plane of its input.
  C10_HOST_DEVICE void add_term(acc_t (&sum)[kStrip][kWide], const scalar_t* pixels,
                                const scalar_t* taps) const {
    const int row_pitch = tiling_.tile.row;
    if constexpr (M == 3) {
      acc_t tap[9];
#pragma unroll
      for (int i = 0; i < 9; ++i) tap[i] = static_cast<acc_t>(taps[i * args_.taps.stride]);
#pragma unroll
      for (int row = 0; row < kStrip + 2; ++row) {
        acc_t value[kWide + 2];
        read_window(value, pixels + (row - 1) * row_pitch);
#pragma unroll
        for (int a = 0; a < 3; ++a) {
          const int k = row - a;
          if (k >= 0 && k < kStrip) {
#pragma unroll
            for (int b = 0; b < 3; ++b) {
#pragma unroll
              for (int j = 0; j < kWide; ++j) sum[k][j] += tap[a * 3 + b] * value[j + b];
            }
          }
        }
      }
    } else {
      const int m = tiling_.m, border = tiling_.border();
      for (int a = 0; a < m; ++a) {
        for (int b = 0; b < m; ++b) {
          const auto tap = static_cast<acc_t>(taps[(a * m + b) * args_.taps.stride]);
          const scalar_t* from = pixels + (a - border) * row_pitch + b - border;
#pragma unroll
          for (int k = 0; k < kStrip; ++k) {
            acc_t value[kWide];
            read_shifted(value, from + k * row_pitch, b == border);
#pragma unroll
            for (int j = 0; j < kWide; ++j) sum[k][j] += tap * value[j];
          }
        }
      }
    }
  }

  // Adds bias and residual, applies the activation, and puts the unit into the stage.
  C10_HOST_DEVICE void put(acc_t (&sum)[kStrip][kWide], int channel, int c,
                           const Unit& unit) const {
    const Buffer& stage = tiling_.stage;
    const acc_t bias = args_.bias == nullptr ? acc_t(0) : static_cast<acc_t>(args_.bias[channel]);
    scalar_t* out = stage_ + stage.at(c, unit.row, unit.column);
#pragma unroll
    for (int k = 0; k < kStrip; ++k, out += stage.row) {
      if (unit.row + k >= place_.rows) break;
#pragma unroll
      for (int j = 0; j < kWide; ++j) sum[k][j] += bias;
      if (tiling_.channels_last) {
        constexpr int kPitch = pixel_pitch<scalar_t>();
        if (args_.residual != nullptr) {
#pragma unroll
          for (int j = 0; j < kWide; ++j) sum[k][j] += static_cast<acc_t>(out[j * kPitch]);
        }
        activate_all(args_.activation, sum[k]);
#pragma unroll
        for (int j = 0; j < kWide; ++j) out[j * kPitch] = static_cast<scalar_t>(sum[k][j]);
      } else {
        if (args_.residual != nullptr) {
          acc_t residual[kWide];
          read_wide(residual, out);
#pragma unroll
          for (int j = 0; j < kWide; ++j) sum[k][j] += residual[j];
        }
        activate_all(args_.activation, sum[k]);
        write_wide(out, sum[k]);
      }
    }
  }

  const ExpandArguments<scalar_t, Wiring>& args_;
  const Tiling& tiling_;
  const ChannelOrder& order_;
  Place place_;
  scalar_t* tile_;
  scalar_t* stage_;
};

// The whole of a block's work: the tiles index, index + step, ... and, of their output channels,
// the part `split`.
template <int M, typename scalar_t, typename acc_t, typename Wiring>
SBF_TEAM void expand_tiles(const Team& team, const ExpandArguments<scalar_t, Wiring>& arguments,
                           char* shared, int64_t index, int64_t step, int split) {
  const Tiling& tiling = arguments.tiling;
  const int begin = split * tiling.chunks_each();
  const int end = smaller(tiling.chunks(), begin + tiling.chunks_each());
  if (begin >= end) return;
  const ChannelOrder order(shared + tiling.order_at, tiling, begin, end);
  team.phase([&](Thread thread) {
    clear(reinterpret_cast<scalar_t*>(shared), tiling.tile.size, thread);
    order.count(arguments.wiring, tiling.outputs, thread);
  });
  team.phase([&](Thread thread) { order.sort(thread); });
  for (; index < tiling.tiles(); index += step) {
    const ExpandBlock<M, scalar_t, acc_t, Wiring> block(arguments, shared, order, index);
    team.phase([&](Thread thread) {
      block.load(thread);
      block.prepare(begin, thread);
    });
    for (int chunk = begin; chunk < end; ++chunk) {
      team.phase([&](Thread thread) { block.compute(chunk, thread); });
      team.phase([&](Thread thread) {
        block.store(chunk, thread);
        if (chunk + 1 < end) block.prepare(chunk + 1, thread);
      });
    }
  }
}

}  // namespace sbf
