// Runs the CPU's tile kernels of every instruction set that this CPU has on random problems, and
// compares them with plain loops. Each buffer is as long as it must be, and what is to be written
// is poisoned, so that the sanitizers see an access beside it, and the comparison a value left out.
//
//     tiles SEED COUNT    prints one line with how many cases of each kind were run
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "epilogue.h"
#include "tile.h"

namespace {

using namespace sbf;

std::mt19937_64 generator;
std::map<std::string, int> counts;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements in memory of their own, aligned as workspaces must be, or as little as tensors may be.
template <typename scalar_t>
class Array {
 public:
  static constexpr std::align_val_t kLine{64};

  Array(int64_t size, bool poisoned, bool aligned = false) : size_(size) {
    const int64_t shift = aligned ? 0 : static_cast<int64_t>(sizeof(scalar_t));
    const int64_t bytes = shift + size * static_cast<int64_t>(sizeof(scalar_t));
    memory_.reset(static_cast<char*>(::operator new[](bytes, kLine)));
    data_ = reinterpret_cast<scalar_t*>(memory_.get() + shift);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < size; ++i) {
      data_[i] = static_cast<scalar_t>(poisoned ? std::numeric_limits<float>::quiet_NaN()
                                                : uniform(generator));
    }
  }
  scalar_t* data() const { return data_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return static_cast<double>(data_[i]); }

 private:
  struct Free {
    void operator()(char* memory) const { ::operator delete[](memory, kLine); }
  };
  std::unique_ptr<char, Free> memory_;
  scalar_t* data_;
  int64_t size_;
};

Array<float> workspace(int64_t floats) { return {floats, /*poisoned=*/true, /*aligned=*/true}; }

// A sum, and that of the magnitudes, to which errors of rounding are in proportion.
struct Sum {
  double value = 0, magnitude = 0;

  void add(double factor, const Sum& term) {
    value += factor * term.value;
    magnitude += std::abs(factor) * term.magnitude;
  }
  void add(double term) { add(1, {term, std::abs(term)}); }
};
constexpr double kAccumulation = 32 * std::numeric_limits<float>::epsilon();

// Planes of float sums, in NCHW.
using Sums = std::vector<Sum>;

struct Case {
  int64_t batch, inputs, outputs, height, width, rows, links_each;
  int m;
  bool channels_last;

  int64_t area() const { return height * width; }
  int64_t blocks() const { return ceil_div(height, rows); }
  // Where a value of an image of `channels` channels is, in an image of these sizes.
  int64_t at(int64_t channels, int64_t n, int64_t c, int64_t h, int64_t w, int64_t rows_of_image,
             int64_t row_width) const {
    return channels_last ? ((n * rows_of_image + h) * row_width + w) * channels + c
                         : ((n * channels + c) * rows_of_image + h) * row_width + w;
  }
  int64_t at(int64_t channels, int64_t n, int64_t c, int64_t h, int64_t w) const {
    return at(channels, n, c, h, w, height, width);
  }
};

Case draw_case() {
  Case c;
  c.batch = draw(1, 3);
  // Whole vectors as often as others.
  c.inputs = draw(0, 1) == 0 ? 16 * draw(1, 3) : draw(1, 37);
  c.outputs = draw(0, 1) == 0 ? 16 * draw(1, 4) : draw(1, 50);
  c.height = draw(1, 11);
  c.width = draw(0, 2) == 0 ? 8 * draw(1, 4) : draw(1, 19);
  c.rows = draw(1, c.height);
  c.links_each = draw(0, 4);
  const int sizes[] = {3, 3, 3, 1, 5, 7};
  c.m = sizes[draw(0, 5)];
  c.channels_last = draw(0, 1) == 0;
  return c;
}

[[noreturn]] void fail(const std::string& what, const Case& c, int64_t index, double got,
                       double wanted) {
  std::printf(
      "%s: element %ld is %.9g, not %.9g\n"
      "  N %ld inputs %ld outputs %ld H %ld W %ld rows %ld m %d\n",
      what.c_str(), index, got, wanted, c.batch, c.inputs, c.outputs, c.height, c.width, c.rows,
      c.m);
  std::exit(1);
}

void compare(const std::string& what, const Case& c, int64_t index, double got, const Sum& wanted,
             double rounding) {
  const double tolerance =
      rounding * (1 + std::abs(wanted.value)) + kAccumulation * wanted.magnitude;
  if (!(std::abs(got - wanted.value) <= tolerance)) {  // also true of NaN
    fail(what, c, index, got, wanted.value);
  }
}

// As long as mask_stride says.
struct Masks {
  int64_t stride;
  Array<int32_t> bits;

  explicit Masks(const Case& c)
      : stride(c.rows * c.width + kMaskPadding), bits(c.m * stride, false) {
    for (int64_t b = 0; b < c.m; ++b) {
      for (int64_t i = 0; i < stride; ++i) {
        const int64_t neighbour = i % c.width + b - (c.m - 1) / 2;
        const bool inside = i < c.rows * c.width && neighbour >= 0 && neighbour < c.width;
        bits.data()[b * stride + i] = inside ? -1 : 0;
      }
    }
  }
};

// A random wiring, bias, residual and activation, and what they give for planes.
template <typename scalar_t>
struct RandomExpand {
  const Case c;
  std::vector<int32_t> copied, begin{0}, source;
  std::vector<int64_t> tap;
  Array<float> taps, bias;
  Array<scalar_t> residual, output;
  Masks masks;
  ExpandTask task;

  RandomExpand(const Case& drawn, int lanes)
      : c(drawn),
        taps(5 * c.m * c.m, false),
        bias(ceil_div(c.outputs, lanes) * lanes, false),
        residual(c.batch * c.outputs * c.area(), false),
        output(c.batch * c.outputs * c.area(), true),
        masks(c) {
    for (int64_t channel = 0; channel < c.outputs; ++channel) {
      copied.push_back(static_cast<int32_t>(draw(-1, c.inputs - 1)));
      for (int64_t l = draw(0, c.links_each); l > 0; --l) {
        source.push_back(static_cast<int32_t>(draw(0, c.inputs - 1)));
        tap.push_back(draw(0, 4) * c.m * c.m);
      }
      begin.push_back(static_cast<int32_t>(source.size()));
    }
    task = {.output = output.data(),
            .input = nullptr,
            .residual = draw(0, 1) == 0 ? residual.data() : nullptr,
            .channels_last = c.channels_last,
            .height = c.height,
            .width = c.width,
            .inputs = c.inputs,
            .outputs = c.outputs,
            .rows = c.rows,
            .blocks = c.blocks(),
            .m = c.m,
            .copied = copied.data(),
            .begin = begin.data(),
            .source = source.data(),
            .tap = tap.data(),
            .taps = taps.data(),
            .bias = draw(0, 1) == 0 ? bias.data() : nullptr,
            .activation = static_cast<Activation>(draw(0, 4)),
            .mask = masks.bits.data(),
            .mask_stride = masks.stride};
  }

  Sum value(const Sums& planes, int64_t n, int64_t channel, int64_t h, int64_t w) const {
    const auto plane = [&](int64_t input, int64_t y, int64_t x) -> const Sum& {
      return planes[((n * c.inputs + input) * c.height + y) * c.width + x];
    };
    Sum sum;
    if (copied[channel] >= 0) sum.add(1, plane(copied[channel], h, w));
    const int64_t border = (c.m - 1) / 2;
    for (int32_t l = begin[channel]; l < begin[channel + 1]; ++l) {
      for (int64_t y = std::max<int64_t>(0, h - border); y <= std::min(c.height - 1, h + border);
           ++y) {
        for (int64_t x = std::max<int64_t>(0, w - border); x <= std::min(c.width - 1, w + border);
             ++x) {
          sum.add(taps[tap[l] + (y - h + border) * c.m + x - w + border], plane(source[l], y, x));
        }
      }
    }
    if (task.bias != nullptr) sum.add(bias[channel]);
    if (task.residual != nullptr) sum.add(residual[c.at(c.outputs, n, channel, h, w)]);
    sum.value = activate(task.activation, sum.value);
    return sum;
  }

  void check(const std::string& what, const Sums& planes, double rounding) const {
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t channel = 0; channel < c.outputs; ++channel) {
        for (int64_t h = 0; h < c.height; ++h) {
          for (int64_t w = 0; w < c.width; ++w) {
            const int64_t at = c.at(c.outputs, n, channel, h, w);
            compare(what, c, at, output[at], value(planes, n, channel, h, w), rounding);
          }
        }
      }
    }
  }
};

// Runs all tiles, cut into runs as threads would have them.
void run_tiles(const TileKernels& kernels, const ExpandTask& task,
               const ConvolutionTask* convolution, Element element, int64_t batch) {
  const int64_t tiles = batch * task.blocks;
  for (int64_t first = 0; first < tiles;) {
    const int64_t last = draw(first + 1, tiles);
    const Array<float> memory = workspace(kernels.expand_workspace(task, convolution));
    kernels.expand(task, convolution, element, first, last, memory.data());
    first = last;
  }
}

template <typename scalar_t>
void run_mix(const TileKernels& kernels, const std::string& name, const Case& c, Element element,
             double rounding) {
  RandomExpand<scalar_t> random(c, kernels.lanes);
  const Array<scalar_t> input(c.batch * c.inputs * c.area(), false);
  random.task.input = input.data();
  run_tiles(kernels, random.task, nullptr, element, c.batch);
  Sums planes;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t channel = 0; channel < c.inputs; ++channel) {
      for (int64_t h = 0; h < c.height; ++h) {
        for (int64_t w = 0; w < c.width; ++w) {
          planes.emplace_back().add(input[c.at(c.inputs, n, channel, h, w)]);
        }
      }
    }
  }
  random.check("expand/" + name, planes, rounding);
}

// `convolution`'s kernel, stride, padding and dilation are given; its image gets a size that fits.
void run_convolution(const TileKernels& kernels, const std::string& name, Case c,
                     ConvolutionTask convolution, bool shared) {
  if (shared) c.rows = c.height;
  // What the filters' reach leaves unread at the bottom and right is there all the same.
  const auto size = [](int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t smallest = (out - 1) * stride + (kernel - 1) * dilation + 1 - 2 * pad;
    return std::max<int64_t>(1, smallest + draw(0, stride - 1));
  };
  convolution.height = size(c.height, convolution.kernel_h, convolution.stride_h, convolution.pad_h,
                            convolution.dilation_h);
  convolution.width = size(c.width, convolution.kernel_w, convolution.stride_w, convolution.pad_w,
                           convolution.dilation_w);
  c.height = (convolution.height + 2 * convolution.pad_h -
              (convolution.kernel_h - 1) * convolution.dilation_h - 1) /
                 convolution.stride_h +
             1;
  c.width = (convolution.width + 2 * convolution.pad_w -
             (convolution.kernel_w - 1) * convolution.dilation_w - 1) /
                convolution.stride_w +
            1;
  c.rows = shared ? c.height : std::min(c.rows, c.height);

  const int64_t depth = convolution.kernel_h * convolution.kernel_w * convolution.channels;
  const int64_t panels = ceil_div(c.inputs, kernels.lanes);
  const Array<float> weight(c.inputs * depth, false);
  const Array<float> packed(panels * depth * kernels.lanes, true);
  const int64_t middle = draw(0, panels);
  kernels.pack_weight(packed.data(), weight.data(), c.inputs, depth, middle, panels);
  kernels.pack_weight(packed.data(), weight.data(), c.inputs, depth, 0, middle);
  for (int64_t i = 0; i < packed.size(); ++i) {
    const int64_t lane = i % kernels.lanes, k = i / kernels.lanes % depth;
    const int64_t filter = i / kernels.lanes / depth * kernels.lanes + lane;
    const double wanted = filter < c.inputs ? weight[filter * depth + k] : 0;
    if (packed[i] != wanted) fail("pack_weight/" + name, c, i, packed[i], wanted);
  }
  convolution.weight = packed.data();

  RandomExpand<float> random(c, kernels.lanes);
  const int64_t image = convolution.channels * convolution.height * convolution.width;
  const Array<float> input(c.batch * image, false);
  random.task.input = input.data();
  if (shared) {
    const int64_t threads = draw(1, panels);
    const auto part = [&](int64_t t, int64_t channels) {
      const auto bound = [&](int64_t thread) {
        return std::min(channels,
                        ceil_div(channels, kernels.lanes) * thread / threads * kernels.lanes);
      };
      return Range{bound(t), bound(t + 1)};
    };
    for (int64_t n = 0; n < c.batch; ++n) {
      const Array<float> planes = workspace(kernels.planes_floats(random.task));
      for (const bool multiplies : {true, false}) {
        for (int64_t t = threads - 1; t >= 0; --t) {
          const Array<float> memory =
              workspace(kernels.expand_workspace(random.task, &convolution));
          if (multiplies) {
            kernels.convolve(random.task, convolution, n, part(t, c.inputs), part(t, c.outputs),
                             planes.data(), memory.data());
          } else {
            kernels.expand_planes(random.task, n, part(t, c.outputs), planes.data(), memory.data());
          }
        }
      }
    }
  } else {
    run_tiles(kernels, random.task, &convolution, Element::kFloat, c.batch);
  }

  Sums planes;
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t filter = 0; filter < c.inputs; ++filter) {
      for (int64_t h = 0; h < c.height; ++h) {
        for (int64_t w = 0; w < c.width; ++w) {
          Sum& sum = planes.emplace_back();
          for (int64_t a = 0; a < convolution.kernel_h; ++a) {
            for (int64_t b = 0; b < convolution.kernel_w; ++b) {
              const int64_t y =
                  h * convolution.stride_h + a * convolution.dilation_h - convolution.pad_h;
              const int64_t x =
                  w * convolution.stride_w + b * convolution.dilation_w - convolution.pad_w;
              if (y < 0 || y >= convolution.height || x < 0 || x >= convolution.width) continue;
              const int64_t k = (a * convolution.kernel_w + b) * convolution.channels;
              for (int64_t channel = 0; channel < convolution.channels; ++channel) {
                sum.add(weight[filter * depth + k + channel] *
                        input[c.at(convolution.channels, n, channel, y, x, convolution.height,
                                   convolution.width)]);
              }
            }
          }
        }
      }
    }
  }
  random.check((shared ? "shared/" : "convolution/") + name, planes, 1e-6);
}

ConvolutionTask draw_convolution(bool channels_last) {
  ConvolutionTask convolution{};
  convolution.channels = draw(0, 1) == 0 ? 8 * draw(1, 5) : draw(1, 37);
  convolution.kernel_h = convolution.kernel_w = convolution.dilation_h = convolution.dilation_w = 1;
  convolution.stride_h = draw(0, 2) == 0 ? draw(2, 3) : 1;
  convolution.stride_w = draw(0, 2) == 0 ? draw(2, 3) : 1;
  if (channels_last && draw(0, 3) > 0) {
    convolution.kernel_h = draw(1, 4);
    convolution.kernel_w = draw(1, 4);
    convolution.dilation_h = draw(1, 3);
    convolution.dilation_w = draw(1, 3);
    convolution.pad_h = draw(0, 5);
    convolution.pad_w = draw(0, 5);
  }
  return convolution;
}

template <typename scalar_t>
void run_dot(const TileKernels& kernels, const std::string& name, const Case& c, Element element) {
  const Array<scalar_t> grad(c.batch * c.outputs * c.area(), false);
  const Array<scalar_t> input(c.batch * c.inputs * c.area(), false);
  const Masks masks(c);
  const int64_t links = draw(1, 9), taps = c.m * c.m;
  std::vector<int32_t> channel, source;
  for (int64_t l = 0; l < links; ++l) {
    channel.push_back(static_cast<int32_t>(draw(0, c.outputs - 1)));
    source.push_back(static_cast<int32_t>(draw(0, c.inputs - 1)));
  }
  const TransformsTask task{.grad = grad.data(),
                            .input = input.data(),
                            .channels_last = c.channels_last,
                            .height = c.height,
                            .width = c.width,
                            .inputs = c.inputs,
                            .outputs = c.outputs,
                            .rows = c.rows,
                            .blocks = c.blocks(),
                            .links = links,
                            .m = c.m,
                            .channel = channel.data(),
                            .source = source.data(),
                            .mask = masks.bits.data(),
                            .mask_stride = masks.stride};
  const int64_t tiles = c.batch * c.blocks(), slices = draw(1, tiles);
  std::vector<double> got(links * taps);
  for (int64_t slice = 0; slice < slices; ++slice) {
    const Array<float> memory = workspace(kernels.transforms_workspace(task));
    const Array<float> sums(links * taps, false);
    std::fill_n(sums.data(), sums.size(), 0.0F);
    kernels.grad_transforms(task, element, slice, tiles, slices, sums.data(), memory.data());
    for (int64_t i = 0; i < sums.size(); ++i) got[i] += sums[i];
  }
  for (int64_t i = 0; i < links * taps; ++i) {
    const int64_t l = i / taps, a = i % taps / c.m, b = i % c.m;
    Sum sum;
    for (int64_t n = 0; n < c.batch; ++n) {
      for (int64_t h = 0; h < c.height; ++h) {
        const int64_t y = h + a - (c.m - 1) / 2;
        if (y < 0 || y >= c.height) continue;
        for (int64_t w = 0; w < c.width; ++w) {
          const int64_t x = w + b - (c.m - 1) / 2;
          if (x < 0 || x >= c.width) continue;
          sum.add(grad[c.at(c.outputs, n, channel[l], h, w)] *
                  input[c.at(c.inputs, n, source[l], y, x)]);
        }
      }
    }
    compare("transforms/" + name, c, i, got[i], sum, 1e-6);
  }
}

void run_cases(const TileKernels& kernels, const std::string& set, int64_t count) {
  const auto run_element = [&]<typename scalar_t>(scalar_t, Element element, const char* dtype,
                                                  double rounding) {
    const Case c = draw_case();
    const std::string name =
        (c.channels_last ? "channels_last/" : "contiguous/") + set + "/" + dtype;
    run_mix<scalar_t>(kernels, name, c, element, rounding);
    run_dot<scalar_t>(kernels, name, c, element);
    ++counts["expand/" + name];
    ++counts["transforms/" + name];
  };
  for (int64_t i = 0; i < count; ++i) {
    run_element(float(), Element::kFloat, "float", 1e-6);
    run_element(c10::Half(), Element::kHalf, "half", 1e-3);
    run_element(c10::BFloat16(), Element::kBFloat16, "bfloat16", 8e-3);
    for (const bool shared : {false, true}) {
      const Case c = draw_case();
      const std::string name = (c.channels_last ? "channels_last/" : "contiguous/") + set;
      run_convolution(kernels, name, c, draw_convolution(c.channels_last), shared);
      ++counts[(shared ? "shared/" : "convolution/") + name];
    }
  }
  // What small random problems do not reach: transforms beyond the image, pixels that lie so far
  // apart that they are copied, filters that do not fit the cache.
  for (const bool channels_last : {false, true}) {
    const Case wide{1, 3, 4, 3, 2, 2, 1, 255, channels_last};
    run_mix<float>(kernels, set + "/largest transforms", wide, Element::kFloat, 1e-6);
    run_dot<float>(kernels, set + "/largest transforms", wide, Element::kFloat);
  }
  const auto run_deep = [&](int64_t kernel, int64_t filters, int64_t width, bool shared) {
    const ConvolutionTask deep{nullptr, 512, 0,          0,          kernel, kernel,
                               1,       1,   kernel / 2, kernel / 2, 1,      1};
    run_convolution(kernels, set + "/deep", {1, filters, 40, 5, width, 5, 1, 3, true}, deep,
                    shared);
  };
  run_deep(1, 24, 7, /*shared=*/true);
  run_deep(1, 520, 13, /*shared=*/false);
  run_deep(3, 72, 7, /*shared=*/false);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  generator.seed(std::strtoull(argv[1], nullptr, 10));
  const int64_t count = std::strtoll(argv[2], nullptr, 10);
  run_cases(tile_kernels_generic(), "generic", count);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) run_cases(tile_kernels_avx2(), "avx2", count);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    run_cases(tile_kernels_avx512(), "avx512", count);
  }
#endif
  for (const auto& [kind, number] : counts) std::printf("%s=%d ", kind.c_str(), number);
  std::printf("\n");
  return 0;
}
