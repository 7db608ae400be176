// What a block does for the gradient of the transforms: sums over a tile's pixels of products of
// the output's gradient with shifted basis features. Each block adds up its tiles in a slab of its
// own; the slabs are added at the end, so that results do not depend on scheduling.
#pragma once

#include "block.h"

namespace sbf {

// Neighbouring threads that share the pixels of a term.
constexpr int kSharers = 8;
constexpr int kTermsAtOnce = kThreads / kSharers;
// Threads' sums of a tap lie together; an odd distance to the next tap spreads them over the banks.
constexpr int kSumPitch = kThreads + 1;

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
                                  char* shared, int64_t tile_index, int64_t slab, bool first)
      : args_(arguments),
        tiling_(arguments.tiling),
        place_(arguments.tiling, tile_index),
        tile_(reinterpret_cast<scalar_t*>(shared)),
        stage_(reinterpret_cast<scalar_t*>(shared + arguments.tiling.stage_at)),
        sums_(reinterpret_cast<acc_t*>(shared + arguments.tiling.extra_at)),
        slab_(arguments.slabs + slab * arguments.terms * arguments.tiling.m * arguments.tiling.m),
        first_(first) {}

  C10_HOST_DEVICE void load(int thread) const {
    const int64_t size = static_cast<int64_t>(tiling_.inputs) * tiling_.height * tiling_.width;
    load_tile(tiling_, place_, tile_, args_.z + place_.image * size, thread);
  }

  C10_HOST_DEVICE void load_grad(int chunk, int thread) const {
    const int c0 = chunk * tiling_.chunk;
    sbf::load(tiling_.vector_out, stage_, tiling_.stage, 0, 0,
              output_region(tiling_, place_, args_.grad, c0, channels(c0)), thread);
  }

  // How often kTermsAtOnce slots of a chunk must be worked on.
  C10_HOST_DEVICE int passes() const {
    return static_cast<int>(ceil_div(tiling_.chunk * args_.wiring.sources_each, kTermsAtOnce));
  }

  // A thread's share of the pixels of one term, for the M x M taps from (a0, b0) on.
  C10_HOST_DEVICE void compute(int chunk, int pass, int a0, int b0, int thread) const {
    const int c0 = chunk * tiling_.chunk;
    const int slot = pass * kTermsAtOnce + thread / kSharers;
    acc_t sum[M * M];
#pragma unroll
    for (int i = 0; i < M * M; ++i) sum[i] = acc_t(0);
    const int64_t link = link_of(c0, slot);
    if (link >= 0) {
      const Buffer &tile = tiling_.tile, &stage = tiling_.stage;
      const int c = slot / static_cast<int>(args_.wiring.sources_each);
      const int input = static_cast<int>(args_.wiring.input(link));
      for (int i = thread % kSharers; i < tiling_.units(); i += kSharers) {
        const Unit unit(tiling_, i);
        if (!unit.inside(place_)) continue;
        const scalar_t* out = stage_ + stage.at(c, unit.row, unit.column);
        acc_t grad[kStrip];
#pragma unroll
        for (int k = 0; k < kStrip; ++k) {
          grad[k] = unit.row + k < place_.rows ? static_cast<acc_t>(out[k * stage.row]) : acc_t(0);
        }
        const int border = tiling_.border();
        const scalar_t* corner =
            tile_ + tile.at(input, unit.row + a0 - border, unit.column + b0 - border);
        add_products<M>(sum, grad, [&](int row, int column) {
          return static_cast<acc_t>(corner[row * tile.row + column * tile.column]);
        });
      }
    }
#pragma unroll
    for (int i = 0; i < M * M; ++i) sums_[i * kSumPitch + thread] = sum[i];
  }

  // Adds the threads' shares and puts them into the slab, always in the same order.
  C10_HOST_DEVICE void reduce(int chunk, int pass, int a0, int b0, int thread) const {
    const int c0 = chunk * tiling_.chunk, m = tiling_.m;
    for (int i = thread; i < kTermsAtOnce * M * M; i += kThreads) {
      const int term = i / (M * M), tap = i - term * (M * M);
      const int64_t link = link_of(c0, pass * kTermsAtOnce + term);
      if (link < 0) continue;
      acc_t sum(0);
#pragma unroll
      for (int j = 0; j < kSharers; ++j) sum += sums_[tap * kSumPitch + term * kSharers + j];
      acc_t* target = slab_ + (args_.wiring.term(link) * m + a0 + tap / M) * m + b0 + tap % M;
      *target = first_ ? sum : *target + sum;
    }
  }

 private:
  C10_HOST_DEVICE int channels(int c0) const {
    return smaller(tiling_.chunk, tiling_.outputs - c0);
  }
  C10_HOST_DEVICE int64_t link_of(int c0, int slot) const {
    return slot < args_.wiring.slots(c0, channels(c0)) ? args_.wiring.link(c0, slot) : -1;
  }

  const TransformsArguments<scalar_t, acc_t>& args_;
  const Tiling& tiling_;
  Place place_;
  scalar_t* tile_;
  scalar_t* stage_;
  acc_t* sums_;
  acc_t* slab_;
  bool first_;
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
  for (int64_t index = slab; index < tiling.tiles(); index += step) {
    const TransformsBlock<M, scalar_t, acc_t> block(arguments, shared, index, slab, index == slab);
    team.phase([&](int thread) {
      block.load(thread);
      block.load_grad(begin, thread);
    });
    for (int chunk = begin; chunk < end; ++chunk) {
      for (int pass = 0; pass < block.passes(); ++pass) {
        for (int a0 = 0; a0 < tiling.m; a0 += M) {
          for (int b0 = 0; b0 < tiling.m; b0 += M) {
            team.phase([&](int thread) { block.compute(chunk, pass, a0, b0, thread); });
            team.phase([&](int thread) { block.reduce(chunk, pass, a0, b0, thread); });
          }
        }
      }
      if (chunk + 1 < end) {
        team.phase([&](int thread) { block.load_grad(chunk + 1, thread); });
      }
    }
  }
}

}  // namespace sbf
