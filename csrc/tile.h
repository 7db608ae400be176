// The interface of the CPU's tile kernels: their arguments, and the table of functions of each
// instruction set. The kernels (tile_kernels.h) are compiled once for each set, without PyTorch.
//
// A tile holds some rows of all channels of one image, a float plane for each channel. Planes are
// not padded at the sides: pixel i of a tile and its neighbour one row on are `width` apart
// everywhere, and what a shift to the left or right brings in from the next row is masked. Above
// the first and below the last row of the image there are rows of zeros.
#pragma once

#include <cstdint>

namespace sbf {

enum class Activation : int;

// Whole vectors of masks are read, some behind a tile's last pixel.
constexpr int64_t kMaskPadding = 256;

enum class Element { kFloat, kBFloat16, kHalf };

// output = activation(what the wiring gives for planes + bias + residual), where the planes are
// those of `input`, or its convolution (see ConvolutionTask).
struct ExpandTask {
  void* output;
  const void* input;
  const void* residual;  // like output, or null
  bool channels_last;
  int64_t height, width;    // of the output, and of the planes
  int64_t inputs, outputs;  // channels: planes and output
  int64_t rows, blocks;     // rows of a tile; tiles of an image
  int m;

  // Output channel c copies plane copied[c] (-1: none) and adds links [begin[c], begin[c+1]):
  // link l is the plane source[l] cross-correlated with the m x m taps that begin at taps + tap[l].
  const int32_t* copied;
  const int32_t* begin;
  const int32_t* source;
  const int64_t* tap;
  const float* taps;
  const float* bias;  // (outputs,), padded to whole vectors, or null
  Activation activation;

  const int32_t* mask;  // (m, mask_stride): bits of the pixels whose neighbour lies in the row
  int64_t mask_stride;  // rows * width + kMaskPadding
};

// Planes that are a convolution of `input`, whose images have these channels, height and width.
// weight: packed by pack_weight, depths in the order (row, column, channel). Over NCHW images the
// filters must be 1 x 1 without padding.
struct ConvolutionTask {
  const float* weight;
  int64_t channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// sums[l, a, b] += the products of the gradient's channel with the shifted plane source[l].
struct TransformsTask {
  const void* grad;   // outputs channels
  const void* input;  // inputs channels
  bool channels_last;
  int64_t height, width, inputs, outputs, rows, blocks, links;
  int m;
  const int32_t* channel;  // (links,) of grad
  const int32_t* source;   // (links,) of input
  const int32_t* mask;
  int64_t mask_stride;
};

struct Range {
  int64_t first, last;
};

struct TileKernels {
  int lanes;  // floats in a vector
  // Floats that a thread needs as workspace, 64-byte aligned.
  int64_t (*expand_workspace)(const ExpandTask&, const ConvolutionTask*);
  int64_t (*transforms_workspace)(const TransformsTask&);
  // Do the tiles [first, last) of those of all images; convolution may be null.
  void (*expand)(const ExpandTask&, const ConvolutionTask*, Element, int64_t first, int64_t last,
                 float* workspace);
  // The two halves of expand for an image that is one tile (rows = height), so that threads can
  // share it: planes of some filters (from a multiple of `lanes` on), and some channels of the
  // output (as well), for which all planes are needed. planes: planes_floats; workspace:
  // expand_workspace.
  int64_t (*planes_floats)(const ExpandTask&);
  void (*convolve)(const ExpandTask&, const ConvolutionTask&, int64_t image, Range filters,
                   Range channels, float* planes, float* workspace);
  void (*expand_planes)(const ExpandTask&, int64_t image, Range channels, float* planes,
                        float* workspace);
  // Do the tiles first, first + step, ... below last.
  void (*grad_transforms)(const TransformsTask&, Element, int64_t first, int64_t last, int64_t step,
                          float* sums, float* workspace);
  // packed: (panels of `lanes` filters, depth, lanes) of weight (filters, depth); the last panel
  // is filled up with zeros. Packs panels [first, last).
  void (*pack_weight)(float* packed, const float* weight, int64_t filters, int64_t depth,
                      int64_t first, int64_t last);
};

const TileKernels& tile_kernels_generic();
#if defined(__x86_64__)
const TileKernels& tile_kernels_avx2();
const TileKernels& tile_kernels_avx512();
#endif

}  // namespace sbf
