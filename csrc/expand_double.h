// The CPU's kernels for double, which serves gradient checks: plain strips, the functions of
// expand.h that a GPU runs where a tile does not fit.
#pragma once

#include "arguments.h"

namespace sbf {

// output = what the wiring gives for input, all channels; `flip` turns the taps around. The
// residual lies in memory as output does.
template <typename Wiring>
void expand_double(const at::Tensor& output, const at::Tensor& input, const Wiring& wiring,
                   const at::Tensor& transforms, bool flip, const Epilogue& epilogue,
                   const Shape& shape);

// Gradient of the transforms, (P*S, m*m).
at::Tensor transforms_double(const at::Tensor& grad, const at::Tensor& z, const at::Tensor& sources,
                             const at::Tensor& position, const Shape& shape);

}  // namespace sbf
