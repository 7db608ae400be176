// Runs the functions that the CUDA kernels are made of on the host, thread by thread, on random
// problems, and compares them with plain loops. Memory is poisoned, and each buffer is as long as
// it must be, so that the sanitizers see an access beside it.
//
//     blocks SEED COUNT    prints one line with how many cases of each kind were run
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "expand_block.h"
#include "tile_choice.h"
#include "transforms_block.h"

namespace {

using namespace sbf;

std::mt19937_64 generator;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// Elements at an address that is a multiple of `alignment`, and of no more, in memory of their own.
template <typename scalar_t>
class Array {
 public:
  Array(int64_t size, int alignment, bool poisoned) : size_(size) {
    const int64_t shift = alignment == 16 ? 0 : alignment;
    const int64_t bytes = shift + size * static_cast<int64_t>(sizeof(scalar_t));
    memory_.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t(32))));
    data_ = reinterpret_cast<scalar_t*>(memory_.get() + shift);
    for (int64_t i = 0; i < size; ++i) {
      data_[i] =
          static_cast<scalar_t>(poisoned ? std::numeric_limits<float>::quiet_NaN()
                                         : std::uniform_real_distribution<float>(-1, 1)(generator));
    }
  }
  scalar_t* data() const { return data_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return static_cast<double>(data_[i]); }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(32)); }
  };
  std::unique_ptr<char, Free> memory_;
  scalar_t* data_;
  int64_t size_;
};

// Error of a sum, relative to the sum of the magnitudes.
template <typename acc_t>
constexpr double kAccumulation = 16 * std::numeric_limits<acc_t>::epsilon();

struct Case {
  int64_t batch, basis, rebuilt, sources_each, height, width;
  int m;
  bool channels_last;
  int align_in, align_out;
  Device device;
  std::vector<int64_t> sources, order, position, terms, begin;

  int64_t channels() const { return basis + rebuilt; }
  int64_t at(int64_t all, int64_t n, int64_t c, int64_t h, int64_t w) const {
    return channels_last ? ((n * height + h) * width + w) * all + c
                         : ((n * all + c) * height + h) * width + w;
  }
  ForwardWiring forward() const {
    return {order.data(), sources.data(), basis, channels(), sources_each};
  }
  BackwardWiring backward() const {
    return {position.data(), terms.data(), begin.data(), basis, sources_each};
  }
};

Case draw_case(int element_size) {
  Case c;
  c.batch = draw(1, 3);
  // Widths of real layers as often as odd ones.
  c.basis = draw(0, 1) == 0 ? 8 * draw(1, 10) : draw(1, 70);
  c.rebuilt = draw(0, 1) == 0 ? 8 * draw(0, 10) : draw(0, 70);
  c.sources_each = draw(1, 4);
  c.height = draw(1, 19);
  c.width = draw(0, 2) == 0 ? 8 * draw(1, 4) : draw(1, 19);
  const int sizes[] = {3, 3, 3, 1, 5, 7};
  c.m = sizes[draw(0, 5)];
  c.channels_last = draw(0, 1) == 0;
  const auto alignment = [&] {
    int bytes = 16;
    while (bytes > element_size && draw(0, 3) == 0) bytes /= 2;
    return bytes;
  };
  c.align_in = alignment();
  c.align_out = alignment();
  const int shared[] = {32, 48, 99, 227};
  const int kib = shared[draw(0, 3)];
  c.device = {static_cast<int>(draw(1, 132)), kib * 1024, (kib + 1) * 1024};

  for (int64_t i = 0; i < c.rebuilt * c.sources_each; ++i) {
    // Now and then nearly all use the same source.
    c.sources.push_back(draw(0, 3) == 0 ? 0 : draw(0, c.basis - 1));
  }
  c.order.resize(c.channels());
  std::iota(c.order.begin(), c.order.end(), 0);
  std::shuffle(c.order.begin(), c.order.end(), generator);
  c.position.resize(c.channels());
  for (int64_t i = 0; i < c.channels(); ++i) c.position[c.order[i]] = i;
  c.terms.resize(c.sources.size());
  std::iota(c.terms.begin(), c.terms.end(), 0);
  std::stable_sort(c.terms.begin(), c.terms.end(),
                   [&](int64_t a, int64_t b) { return c.sources[a] < c.sources[b]; });
  c.begin.assign(c.basis + 1, 0);
  for (const int64_t source : c.sources) ++c.begin[source + 1];
  std::partial_sum(c.begin.begin(), c.begin.end(), c.begin.begin());
  return c;
}

[[noreturn]] void fail(const char* what, const Case& c, const Tiling& t, int64_t index, double got,
                       double wanted) {
  std::printf(
      "%s: element %ld is %.9g, not %.9g\n"
      "  N %ld B %ld P %ld S %ld H %ld W %ld m %d %s alignment %d %d\n"
      "  tile %d x %d, chunk %d, splits %d, access %d %d, shared %d\n",
      what, index, got, wanted, c.batch, c.basis, c.rebuilt, c.sources_each, c.height, c.width, c.m,
      c.channels_last ? "channels_last" : "contiguous", c.align_in, c.align_out, t.rows, t.columns,
      t.chunk, t.splits, t.vector_in, t.vector_out, t.bytes);
  std::exit(1);
}

void compare(const char* what, const Case& c, const Tiling& t, int64_t index, double got,
             double wanted, double tolerance) {
  // Also true of NaN.
  if (!(std::abs(got - wanted) <= tolerance)) fail(what, c, t, index, got, wanted);
}

double epilogue(double value, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kReLU:
      return std::max(value, 0.0);
    case Activation::kReLU6:
      return std::min(std::max(value, 0.0), 6.0);
    case Activation::kSiLU:
      return value / (1 + std::exp(-value));
    case Activation::kHardSwish:
      return value * std::min(std::max(value + 3, 0.0), 6.0) / 6;
  }
  return value;
}

// A sum, and that of the magnitudes, to which errors of rounding are in proportion.
struct Sum {
  double value = 0, magnitude = 0;

  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// Adds the cross-correlation of a plane with taps (or with taps turned around), at one pixel.
template <typename scalar_t>
void add_term_at(Sum& sum, const Case& c, const Array<scalar_t>& input, int64_t all, int64_t n,
                 int64_t channel, int64_t h, int64_t w, const Array<scalar_t>& taps, int64_t term,
                 bool flip) {
  for (int a = 0; a < c.m; ++a) {
    for (int b = 0; b < c.m; ++b) {
      const int64_t y = h + a - (c.m - 1) / 2, x = w + b - (c.m - 1) / 2;
      if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
      const int tap = a * c.m + b;
      sum.add(taps[term * c.m * c.m + (flip ? c.m * c.m - 1 - tap : tap)] *
              input[c.at(all, n, channel, y, x)]);
    }
  }
}

template <typename acc_t>
std::unique_ptr<Array<acc_t>> poisoned_shared(const Tiling& tiling) {
  const auto size = static_cast<int64_t>(sizeof(acc_t));
  return std::make_unique<Array<acc_t>>((tiling.bytes + size - 1) / size, 16, true);
}

template <typename scalar_t, typename acc_t, typename Wiring>
bool run_expand(const char* name, const Case& c, const Wiring& wiring, bool flip, double rounding) {
  const int64_t inputs = flip ? c.channels() : c.basis, outputs = flip ? c.basis : c.channels();
  const int64_t pixels = c.batch * c.height * c.width;
  const Array<scalar_t> input(pixels * inputs, c.align_in, false);
  const Array<scalar_t> taps(c.rebuilt * c.sources_each * c.m * c.m, 16, false);
  const Array<scalar_t> bias(outputs, sizeof(scalar_t), false);
  const Array<scalar_t> residual(pixels * outputs, c.align_out, false);
  const bool with_bias = draw(0, 1) == 0, with_residual = draw(0, 1) == 0;
  const auto activation = static_cast<Activation>(draw(0, 4));

  const auto tiling =
      tile_for({c.batch, inputs, outputs, c.height, c.width, c.m,
                static_cast<int>(sizeof(scalar_t)), c.channels_last, c.align_in, c.align_out, 0},
               /*stage_planes=*/false, c.device);
  if (!tiling.has_value()) return false;
  for (const bool backwards : {false, true}) {
    const Array<scalar_t> output(pixels * outputs, c.align_out, true);
    const ExpandArguments<scalar_t, Wiring> arguments{
        output.data(),
        input.data(),
        with_residual ? residual.data() : nullptr,
        with_bias ? bias.data() : nullptr,
        taps_of(static_cast<const scalar_t*>(taps.data()), c.m, flip),
        wiring,
        activation,
        *tiling};
    const int64_t blocks = std::min<int64_t>(tiling->tiles(), draw(1, 5));
    for (int64_t block = 0; block < blocks; ++block) {
      for (int split = 0; split < tiling->splits; ++split) {
        const auto shared = poisoned_shared<acc_t>(*tiling);
        const auto run = c.m == 3 ? expand_tiles<3, scalar_t, acc_t, Wiring>
                                  : expand_tiles<1, scalar_t, acc_t, Wiring>;
        run(Team{tiling->threads, backwards}, arguments, reinterpret_cast<char*>(shared->data()),
            block, blocks, split);
      }
    }
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t channel = 0; channel < outputs; ++channel) {
        const ChannelLinks links = wiring.links_of(channel);
        for (int64_t h = 0; h < c.height; ++h) {
          for (int64_t w = 0; w < c.width; ++w) {
            Sum sum;
            if (links.copied >= 0) sum.add(input[c.at(inputs, n, links.copied, h, w)]);
            for (int64_t link = links.first; link < links.last; ++link) {
              add_term_at(sum, c, input, inputs, n, wiring.input(link), h, w, taps,
                          wiring.term(link), flip);
            }
            const int64_t at = c.at(outputs, n, channel, h, w);
            if (with_bias) sum.add(bias[channel]);
            if (with_residual) sum.add(residual[at]);
            const double wanted = epilogue(sum.value, activation);
            compare(name, c, *tiling, at, output[at], wanted,
                    rounding * (1 + std::abs(wanted)) + kAccumulation<acc_t> * sum.magnitude);
          }
        }
      }
    }
  }
  return true;
}

template <typename scalar_t, typename acc_t>
bool run_transforms(const Case& c) {
  const int64_t pixels = c.batch * c.height * c.width, terms = c.rebuilt * c.sources_each;
  if (terms == 0) return false;
  const Array<scalar_t> z(pixels * c.basis, c.align_in, false);
  const Array<scalar_t> grad(pixels * c.channels(), c.align_out, false);
  const auto tiling =
      tile_for({c.batch, c.basis, c.channels(), c.height, c.width, c.m,
                static_cast<int>(sizeof(scalar_t)), c.channels_last, c.align_in, c.align_out,
                c.m == 3 ? TransformsBlock<3, scalar_t, acc_t>::kSumBytes
                         : TransformsBlock<1, scalar_t, acc_t>::kSumBytes},
               /*stage_planes=*/true, c.device);
  if (!tiling.has_value()) return false;
  for (const bool backwards : {false, true}) {
    const int64_t slabs = std::min<int64_t>(tiling->tiles(), draw(1, 5)), taps = c.m * c.m;
    const Array<acc_t> sums(slabs * terms * taps, 16, true);
    const TransformsArguments<scalar_t, acc_t> arguments{sums.data(), grad.data(), z.data(),
                                                         c.forward(), terms,       *tiling};
    for (int64_t slab = 0; slab < slabs; ++slab) {
      for (int split = 0; split < tiling->splits; ++split) {
        const auto shared = poisoned_shared<acc_t>(*tiling);
        const auto run =
            c.m == 3 ? transforms_tiles<3, scalar_t, acc_t> : transforms_tiles<1, scalar_t, acc_t>;
        run(Team{tiling->threads, backwards}, arguments, reinterpret_cast<char*>(shared->data()),
            slab, slabs, split);
      }
    }
    for (int64_t term = 0; term < terms; ++term) {
      const int64_t channel = c.position[c.basis + term / c.sources_each];
      for (int64_t tap = 0; tap < taps; ++tap) {
        Sum sum;
        double got = 0;
        for (int64_t n = 0; n < c.batch; ++n) {
          for (int64_t h = 0; h < c.height; ++h) {
            for (int64_t w = 0; w < c.width; ++w) {
              const int64_t y = h + tap / c.m - (c.m - 1) / 2, x = w + tap % c.m - (c.m - 1) / 2;
              if (y < 0 || y >= c.height || x < 0 || x >= c.width) continue;
              sum.add(grad[c.at(c.channels(), n, channel, h, w)] *
                      z[c.at(c.basis, n, c.sources[term], y, x)]);
            }
          }
        }
        for (int64_t slab = 0; slab < slabs; ++slab) {
          got += sums[(slab * terms + term) * taps + tap];
        }
        compare("transforms", c, *tiling, term * taps + tap, got, sum.value,
                kAccumulation<acc_t> * (1 + sum.magnitude));
      }
    }
  }
  return true;
}

std::map<std::string, int> counts;

template <typename scalar_t, typename acc_t>
void run_case(const char* dtype, double rounding) {
  const Case c = draw_case(sizeof(scalar_t));
  const std::string layout = c.channels_last ? "channels_last" : "contiguous";
  const bool forward =
      run_expand<scalar_t, acc_t>("forward", c, c.forward(), /*flip=*/false, rounding);
  const bool backward =
      run_expand<scalar_t, acc_t>("backward", c, c.backward(), /*flip=*/true, rounding);
  const bool transforms = run_transforms<scalar_t, acc_t>(c);
  for (const auto& [kind, run] : {std::pair("forward", forward), std::pair("backward", backward),
                                  std::pair("transforms", transforms)}) {
    if (run) ++counts[std::string(kind) + "/" + layout + "/" + dtype];
    if (!run) ++counts["no-tile"];
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  generator.seed(std::strtoull(argv[1], nullptr, 10));
  for (int64_t i = 0; i < std::strtoll(argv[2], nullptr, 10); ++i) {
    run_case<float, float>("float", 1e-6);
    run_case<c10::Half, float>("half", 1e-3);
    run_case<c10::BFloat16, float>("bfloat16", 8e-3);
    run_case<double, double>("double", 1e-14);
  }
  for (const auto& [kind, count] : counts) std::printf("%s=%d ", kind.c_str(), count);
  std::printf("\n");
  return 0;
}
