// What a block does for the gradient of the transforms: sums over a tile's pixels of products of
// the output's gradient with shifted basis features. Each block adds up its tiles in a slab of its
// own; the slabs are added at the end, so that results do not depend on scheduling.
#pragma once

#include "block_copies.h"
#include "channel_order.h"

namespace sbf {

// Threads that share the pixels of a term, at most.
constexpr int kMaxSharers = 8;
// Threads' sums of a tap lie together; an odd distance to the next tap spreads them over the banks.
constexpr int kSumPitch = kMaxThreads + 1;

template <typename scalar_t, typename acc_t>
struct TransformsArguments {
  acc_t* slabs;  // (splits of the tiles, terms, m * m)
  const scalar_t* grad;
  const scalar_t* z;
  ForwardWiring wiring;
  int64_t terms;
  Tiling tiling;
};

// M is m where there is a kernel for it, 1 otherwise.
template <int M, typename scalar_t, typename acc_t>
class TransformsBlock {
 public:
  static constexpr int64_t kSumBytes = sizeof(acc_t) * M * M * kSumPitch;

  C10_HOST_DEVICE TransformsBlock(const TransformsArguments<scalar_t, acc_t>& arguments,
                                  char* shared, const ChannelOrder& order, int64_t tile_index,
                                  int64_t slab, bool first)
      : args_(arguments),
        tiling_(arguments.tiling),
        order_(order),
        place_(arguments.tiling, tile_index),
        tile_(reinterpret_cast<scalar_t*>(shared)),
        stage_(reinterpret_cast<scalar_t*>(shared + arguments.tiling.stage_at)),
        sums_(reinterpret_cast<acc_t*>(shared + arguments.tiling.extra_at)),
        slab_(arguments.slabs + slab * arguments.terms * arguments.tiling.m * arguments.tiling.m),
        first_(first) {
    sharers_ = 1;
    while (sharers_ < kMaxSharers && 2 * sharers_ <= tiling_.units()) sharers_ *= 2;
  }

  C10_HOST_DEVICE void load(Thread thread) const {
    const int64_t size = static_cast<int64_t>(tiling_.inputs) * tiling_.height * tiling_.width;
    load_tile(tiling_, place_, tile_, args_.z + place_.image * size, thread);
  }

  // What lies outside the image becomes zero, up to whole units.
  C10_HOST_DEVICE void load_grad(int chunk, Thread thread) const {
    const int c0 = chunk * tiling_.chunk;
    auto region = output_region(tiling_, place_, args_.grad, c0,
                                smaller(tiling_.chunk, tiling_.outputs - c0));
    region.rows = static_cast<int>(round_up(place_.rows, kStrip));
    const int columns = static_cast<int>(round_up(place_.columns, kWide));
    if (tiling_.channels_last) region.columns = columns;
    load_planes(tiling_.vector_out, stage_, tiling_.stage, 0, 0, region, thread);
    if (region.columns == columns) return;
    Runs runs(region, tiling_.stage, 0, 0, thread.index, thread.count);
    for (; runs.more(); runs.next()) {
      for (int j = region.columns; j < columns; ++j) stage_[runs.shared() + j] = scalar_t(0);
    }
  }

  // How often the terms of a chunk must be worked on.
  C10_HOST_DEVICE int passes(int chunk) const {
    return static_cast<int>(ceil_div(terms(chunk), terms_at_once()));
  }

  // A thread's share of the pixels of one term, for the M x M taps from (a0, b0) on.
  C10_HOST_DEVICE void compute(int chunk, int pass, int a0, int b0, Thread thread) const {
    const int at_once = terms_at_once(), sharer = thread.index / at_once;
    acc_t sum[M * M];
#pragma unroll
    for (int i = 0; i < M * M; ++i) sum[i] = acc_t(0);
    const Term term = term_of(chunk, pass * at_once + thread.index - sharer * at_once);
    if (term.link >= 0) {
      const Buffer &tile = tiling_.tile, &stage = tiling_.stage;
      const int input = static_cast<int>(args_.wiring.input(term.link)), border = tiling_.border();
      for (int i = sharer; i < tiling_.units(); i += sharers_) {
        const Unit unit(tiling_, i);
        if (!unit.inside(place_)) continue;
        acc_t grad[kStrip][kWide];
        const scalar_t* out = stage_ + stage.at(term.channel, unit.row, unit.column);
#pragma unroll
        for (int k = 0; k < kStrip; ++k) read_wide(grad[k], out + k * stage.row);
        add_unit(sum, grad,
                 tile_ + tile.at(input, unit.row + a0 - border, unit.column + b0 - border),
                 b0 == border);
      }
    }
#pragma unroll
    for (int i = 0; i < M * M; ++i) sums_[i * kSumPitch + thread.index] = sum[i];
  }

  // Adds the threads' shares and puts them into the slab, always in the same order.
  C10_HOST_DEVICE void reduce(int chunk, int pass, int a0, int b0, Thread thread) const {
    const int m = tiling_.m, at_once = terms_at_once();
    for (int i = thread.index; i < at_once * M * M; i += thread.count) {
      const int place = i / (M * M), tap = i - place * (M * M);
      const Term term = term_of(chunk, pass * at_once + place);
      if (term.link < 0) continue;
      acc_t sum(0);
      for (int j = 0; j < sharers_; ++j) sum += sums_[tap * kSumPitch + j * at_once + place];
      acc_t* target = slab_ + (args_.wiring.term(term.link) * m + a0 + tap / M) * m + b0 + tap % M;
      *target = first_ ? sum : *target + sum;
    }
  }

 private:
  struct Term {
    int channel;   // within the chunk
    int64_t link;  // -1: there is none
  };

  C10_HOST_DEVICE int terms_at_once() const { return tiling_.threads / sharers_; }
  C10_HOST_DEVICE int terms(int chunk) const {
    return order_.linked(chunk) * static_cast<int>(args_.wiring.sources_each);
  }
  C10_HOST_DEVICE Term term_of(int chunk, int number) const {
    if (number >= terms(chunk)) return {0, -1};
    const int each = static_cast<int>(args_.wiring.sources_each), i = divide(number, each);
    const int channel = order_.channel(chunk, i);
    const ChannelLinks links = args_.wiring.links_of(chunk * tiling_.chunk + channel);
    return {channel, links.first + (number - i * each)};
  }

  // sum[a * M + b] += sum over the unit of grad[k][j] * from[k + a][j + b].
  C10_HOST_DEVICE void add_unit(acc_t (&sum)[M * M], const acc_t (&grad)[kStrip][kWide],
                                const scalar_t* from, bool aligned) const {
#pragma unroll
    for (int row = 0; row < kStrip + M - 1; ++row) {
      const scalar_t* values = from + row * tiling_.tile.row;
      acc_t value[kWide + M - 1];
      if constexpr (M == 3) {
        read_window(value, values + 1);
      } else {
        read_shifted(value, values, aligned);
      }
#pragma unroll
      for (int a = 0; a < M; ++a) {
        const int k = row - a;
        if (k >= 0 && k < kStrip) {
#pragma unroll
          for (int b = 0; b < M; ++b) {
#pragma unroll
            for (int j = 0; j < kWide; ++j) sum[a * M + b] += grad[k][j] * value[j + b];
          }
        }
      }
    }
  }

  const TransformsArguments<scalar_t, acc_t>& args_;
  const Tiling& tiling_;
  const ChannelOrder& order_;
  Place place_;
  scalar_t* tile_;
  scalar_t* stage_;
  acc_t* sums_;
  acc_t* slab_;
  bool first_;
  int sharers_;
};

// The whole of a block's work: the tiles slab, slab + step, ... and, of their output channels, the
// part `split`.
template <int M, typename scalar_t, typename acc_t>
SBF_TEAM void transforms_tiles(const Team& team,
                               const TransformsArguments<scalar_t, acc_t>& arguments, char* shared,
                               int64_t slab, int64_t step, int split) {
  const Tiling& tiling = arguments.tiling;
  const int begin = split * tiling.chunks_each();
  const int end = smaller(tiling.chunks(), begin + tiling.chunks_each());
  if (begin >= end) return;
  const ChannelOrder order(shared + tiling.order_at, tiling, begin, end);
  team.phase([&](Thread thread) {
    // What pads planes is multiplied by zero, so it must be finite.
    clear(reinterpret_cast<scalar_t*>(shared), tiling.tile.size, thread);
    clear(reinterpret_cast<scalar_t*>(shared + tiling.stage_at), tiling.stage.size, thread);
    order.count(arguments.wiring, tiling.outputs, thread);
  });
  team.phase([&](Thread thread) { order.sort(thread); });
  for (int64_t index = slab; index < tiling.tiles(); index += step) {
    const TransformsBlock<M, scalar_t, acc_t> block(arguments, shared, order, index, slab,
                                                    index == slab);
    team.phase([&](Thread thread) {
      block.load(thread);
      block.load_grad(begin, thread);
    });
    for (int chunk = begin; chunk < end; ++chunk) {
      for (int pass = 0; pass < block.passes(chunk); ++pass) {
        for (int a0 = 0; a0 < tiling.m; a0 += M) {
          for (int b0 = 0; b0 < tiling.m; b0 += M) {
            team.phase([&](Thread thread) { block.compute(chunk, pass, a0, b0, thread); });
            team.phase([&](Thread thread) { block.reduce(chunk, pass, a0, b0, thread); });
          }
        }
      }
      if (chunk + 1 < end) {
        team.phase([&](Thread thread) { block.load_grad(chunk + 1, thread); });
      }
    }
  }
}

}  // namespace sbf
