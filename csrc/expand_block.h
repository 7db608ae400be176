// What a block does for expand and for its gradient by z: output channels are copies and sums of
// input channels, as a wiring says. The tile of the input is read once for all output channels.
#pragma once

#include <algorithm>

#include "block.h"
#include "epilogue.h"

namespace sbf {

// Taps of a slot lie this many apart: whole vectors for 3 x 3, odd numbers otherwise.
C10_HOST_DEVICE constexpr int tap_pitch(int m) { return m == 3 ? 12 : (m * m) | 1; }

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
  int slots;  // links whose taps fit into shared memory; those beyond are read where they lie
};

// What one output channel is a sum of.
struct alignas(16) ChannelTerms {
  int copied, links, slot, first;  // input channel or -1; slot and link number of the first link
};

// Shared memory after the stage: channels and biases of a chunk, then taps and inputs of its slots.
template <typename acc_t>
struct Table {
  ChannelTerms* channels;
  acc_t* taps;
  acc_t* bias;
  int* inputs;

  C10_HOST_DEVICE Table(char* shared, int chunk, int slots, int m)
      : channels(reinterpret_cast<ChannelTerms*>(shared)),
        taps(reinterpret_cast<acc_t*>(channels + chunk)),
        bias(taps + slots * tap_pitch(m)),
        inputs(reinterpret_cast<int*>(bias + chunk)) {}

  static int64_t bytes(int64_t chunk, int64_t slots, int m) {
    const auto acc = static_cast<int64_t>(sizeof(acc_t));
    return chunk * (static_cast<int64_t>(sizeof(ChannelTerms)) + acc) +
           slots * (tap_pitch(m) * acc + static_cast<int64_t>(sizeof(int)));
  }
};

// How many links of a chunk get their taps into shared memory: those `wanted`, within 16 KiB.
template <typename acc_t>
int64_t slots_within(int64_t wanted, int m) {
  return std::min(16 * 1024 / Table<acc_t>::bytes(0, 1, m), wanted);
}

// M is m where there is a kernel for it, 1 otherwise.
template <int M, typename scalar_t, typename acc_t, typename Wiring>
class ExpandBlock {
 public:
  C10_HOST_DEVICE ExpandBlock(const ExpandArguments<scalar_t, Wiring>& arguments, char* shared,
                              int64_t tile_index)
      : args_(arguments),
        tiling_(arguments.tiling),
        place_(arguments.tiling, tile_index),
        tile_(reinterpret_cast<scalar_t*>(shared)),
        stage_(reinterpret_cast<scalar_t*>(shared + arguments.tiling.stage_at)),
        table_(shared + arguments.tiling.extra_at, arguments.tiling.chunk, arguments.slots,
               arguments.tiling.m) {}

  C10_HOST_DEVICE void load(int thread) const {
    const int64_t size = static_cast<int64_t>(tiling_.inputs) * tiling_.height * tiling_.width;
    load_tile(tiling_, place_, tile_, args_.input + place_.image * size, thread);
  }

  // Puts a chunk's channels and taps into the table, and its residual into the stage. A thread
  // touches the part of the stage that it has stored itself, so this may follow `store` at once.
  C10_HOST_DEVICE void prepare(int chunk, int thread) const {
    const int c0 = chunk * tiling_.chunk, count = channels(c0);
    const int taps = M == 3 ? 9 : tiling_.m * tiling_.m;
    for (int c = thread; c < count; c += kThreads) {
      const ChannelLinks links = args_.wiring.links_of(c0 + c);
      table_.channels[c] = {
          static_cast<int>(links.copied), static_cast<int>(links.last - links.first),
          static_cast<int>(args_.wiring.slot(c0, c0 + c)), static_cast<int>(links.first)};
      table_.bias[c] = args_.bias == nullptr ? acc_t(0) : static_cast<acc_t>(args_.bias[c0 + c]);
    }
    const int64_t wanted = args_.wiring.slots(c0, count);
    const int held = wanted < args_.slots ? static_cast<int>(wanted) : args_.slots;
    for (int slot = thread; slot < held; slot += kThreads) {
      const int64_t link = args_.wiring.link(c0, slot);
      if (link < 0) continue;
      table_.inputs[slot] = static_cast<int>(args_.wiring.input(link));
      const scalar_t* from = args_.taps.data + args_.wiring.term(link) * taps;
#pragma unroll 3
      for (int i = 0; i < taps; ++i) {
        table_.taps[slot * pitch() + i] = static_cast<acc_t>(from[i * args_.taps.stride]);
      }
    }
    if (args_.residual != nullptr) {
      sbf::load(tiling_.vector_out, stage_, tiling_.stage, 0, 0,
                output_region(tiling_, place_, args_.residual, c0, count), thread);
    }
  }

  // Computes the channels of a chunk in the stage. A thread keeps to its strip of pixels.
  C10_HOST_DEVICE void compute(int chunk, int thread) const {
    const int count = channels(chunk * tiling_.chunk), units = tiling_.units();
    const int each = kThreads / units, first = thread / units;
    const Unit unit(tiling_, thread - first * units);
    if (first >= each || !unit.inside(place_)) return;
    const Buffer &tile = tiling_.tile, &stage = tiling_.stage;
    const scalar_t* pixels = tile_ + tile.at(0, unit.row, unit.column);
    const scalar_t* corners = pixels - tiling_.border() * (tile.row + tile.column);
    for (int c = first; c < count; c += each) {
      const ChannelTerms terms = table_.channels[c];
      acc_t sum[kStrip];
#pragma unroll
      for (int k = 0; k < kStrip; ++k) {
        sum[k] = terms.copied < 0
                     ? acc_t(0)
                     : static_cast<acc_t>(pixels[terms.copied * tile.channel + k * tile.row]);
      }
      for (int link = 0; link < terms.links; ++link) {
        const int slot = terms.slot + link;
        const bool held = slot < args_.slots;
        const int64_t far = terms.first + link;
        const int input = held ? table_.inputs[slot] : static_cast<int>(args_.wiring.input(far));
        add_term(sum, corners + input * tile.channel, table_.taps + slot * pitch(),
                 held ? -1 : args_.wiring.term(far));
      }
      scalar_t* out = stage_ + stage.at(c, unit.row, unit.column);
      const acc_t bias = table_.bias[c];
#pragma unroll
      for (int k = 0; k < kStrip; ++k) {
        acc_t value = sum[k] + bias;
        if (args_.residual != nullptr) value += static_cast<acc_t>(out[k * stage.row]);
        out[k * stage.row] = static_cast<scalar_t>(activate(args_.activation, value));
      }
    }
  }

  C10_HOST_DEVICE void store(int chunk, int thread) const {
    const int c0 = chunk * tiling_.chunk;
    sbf::store(tiling_.vector_out, stage_, tiling_.stage,
               output_region(tiling_, place_, args_.output, c0, channels(c0)), thread);
  }

 private:
  C10_HOST_DEVICE int channels(int c0) const {
    return smaller(tiling_.chunk, tiling_.outputs - c0);
  }
  C10_HOST_DEVICE int pitch() const { return tap_pitch(M == 3 ? 3 : tiling_.m); }

  // Adds a term whose taps are in shared memory or, with far >= 0, where term `far` was given.
  C10_HOST_DEVICE void add_term(acc_t (&sum)[kStrip], const scalar_t* corner, const acc_t* held,
                                int64_t far) const {
    const int m = M == 3 ? 3 : tiling_.m;
    const int row_pitch = tiling_.tile.row, column_pitch = tiling_.tile.column;
    const scalar_t* given = args_.taps.data + far * m * m;
    for (int at = 0; at < m * m; at += M * M) {
      acc_t tap[M * M];
      if (far >= 0) {
#pragma unroll
        for (int i = 0; i < M * M; ++i) {
          tap[i] = static_cast<acc_t>(given[(at + i) * args_.taps.stride]);
        }
      } else if constexpr (M == 3) {
        load_taps(tap, held);
      } else {
        tap[0] = held[at];
      }
      const int a = M == 3 ? 0 : at / m, b = M == 3 ? 0 : at - a * m;
      const scalar_t* from = corner + a * row_pitch + b * column_pitch;
      add_window<M>(sum, tap, [&](int row, int column) {
        return static_cast<acc_t>(from[row * row_pitch + column * column_pitch]);
      });
    }
  }

  // Nine taps as whole vectors.
  C10_HOST_DEVICE static void load_taps(acc_t (&tap)[M * M], const acc_t* held) {
    constexpr int kEach = 16 / sizeof(acc_t);
    struct alignas(16) Vector {
      acc_t value[kEach];
    };
#pragma unroll
    for (int i = 0; i < M * M; i += kEach) {
      const Vector vector = *reinterpret_cast<const Vector*>(held + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (i + j < M * M) tap[i + j] = vector.value[j];
      }
    }
  }

  const ExpandArguments<scalar_t, Wiring>& args_;
  const Tiling& tiling_;
  Place place_;
  scalar_t* tile_;
  scalar_t* stage_;
  Table<acc_t> table_;
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
  for (; index < tiling.tiles(); index += step) {
    const ExpandBlock<M, scalar_t, acc_t, Wiring> block(arguments, shared, index);
    team.phase([&](int thread) {
      block.load(thread);
      block.prepare(begin, thread);
    });
    for (int chunk = begin; chunk < end; ++chunk) {
      team.phase([&](int thread) { block.compute(chunk, thread); });
      team.phase([&](int thread) {
        block.store(chunk, thread);
        if (chunk + 1 < end) block.prepare(chunk + 1, thread);
      });
    }
  }
}

}  // namespace sbf
