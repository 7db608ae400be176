// What may follow a channel's sum: an activation, after bias and residual. For host and device.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

namespace sbf {

enum class Activation : int { kNone, kReLU, kReLU6, kSiLU, kHardSwish };

// As PyTorch does, a NaN stays one: max(NaN, 0) must not be 0.
template <typename acc_t>
C10_HOST_DEVICE inline acc_t activate(Activation activation, acc_t value) {
  const acc_t zero(0), six(6);
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kReLU:
      return value < zero ? zero : value;
    case Activation::kReLU6:
      return value < zero ? zero : value > six ? six : value;
    case Activation::kSiLU:
      return value / (acc_t(1) + std::exp(-value));
    case Activation::kHardSwish: {
      const acc_t gate = value + acc_t(3);
      return value * (gate < zero ? zero : gate > six ? six : gate) / six;
    }
  }
  return value;
}

#ifdef __CUDACC__
#define SBF_NOINLINE __noinline__
#else
#define SBF_NOINLINE
#endif

// Not inline: where it stands for many values, its code would push the sums out of the
// instruction cache.
template <typename acc_t>
C10_HOST_DEVICE SBF_NOINLINE acc_t activate_called(Activation activation, acc_t value) {
  return activate(activation, value);
}

// The same for several values, with one decision for all.
template <typename acc_t, int kCount>
C10_HOST_DEVICE inline void activate_all(Activation activation, acc_t (&value)[kCount]) {
  if (activation == Activation::kNone) return;
  if (activation == Activation::kReLU) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) value[i] = activate(Activation::kReLU, value[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) value[i] = activate_called(activation, value[i]);
}

}  // namespace sbf
