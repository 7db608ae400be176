// Vectors of the instruction set that the including file is compiled for (SBF_VECTOR_BYTES), and
// the elements of tensors. Everything here is local to that file.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "epilogue.h"

namespace sbf {
namespace {

constexpr int L = SBF_VECTOR_BYTES / 4;  // lanes
typedef float Vector __attribute__((vector_size(SBF_VECTOR_BYTES)));
typedef float LooseVector __attribute__((vector_size(SBF_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(SBF_VECTOR_BYTES)));
typedef int32_t LooseMask __attribute__((vector_size(SBF_VECTOR_BYTES), aligned(4), may_alias));

#define SBF_INLINE inline __attribute__((always_inline))
// Loops over an array of vectors: unless they are unrolled it lies in memory, not in registers.
#define SBF_UNROLL _Pragma("GCC unroll 16")
// Keeps the compiler from loading a vector again for each of its uses.
#if defined(__x86_64__)
#define SBF_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#elif defined(__aarch64__)
#define SBF_IN_REGISTER(vector) __asm__("" : "+w"(vector))
#else
#define SBF_IN_REGISTER(vector)
#endif

template <typename T>
SBF_INLINE T min(T a, T b) {
  return a < b ? a : b;
}

SBF_INLINE int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// ---------------------------------------------------------------- vectors

SBF_INLINE Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
SBF_INLINE void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
SBF_INLINE Vector splat(float value) { return Vector{} + value; }
SBF_INLINE Vector keep(Vector value, const int32_t* mask) {
  return (Vector)((Mask)value & *reinterpret_cast<const LooseMask*>(mask));
}

template <int... I>
SBF_INLINE Vector before(Vector left, Vector right, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(left, right, (L - 1 + I)...);
}
// Each lane's left neighbour: the last of `left`, then all but the last of `right`.
SBF_INLINE Vector before(Vector left, Vector right) {
  return before(left, right, std::make_integer_sequence<int, L>());
}
template <int... I>
SBF_INLINE Vector after(Vector left, Vector right, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(left, right, (1 + I)...);
}
SBF_INLINE Vector after(Vector left, Vector right) {
  return after(left, right, std::make_integer_sequence<int, L>());
}

// Transposition goes from units of 1 to 2 within quarters of 128 bits, then moves the quarters.
template <int Unit, bool High, int... I>
SBF_INLINE Vector interleave(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b,
                                 (I / 4 * 4 + (High ? 2 : 0) +
                                  (Unit == 1 ? I % 4 / 2 + I % 2 * L : I % 2 + I % 4 / 2 * L))...);
}
// Quarter q of the result is quarter (q mod Half) * 2 + High of a for q < Half, of b otherwise.
template <bool High, int... I>
SBF_INLINE Vector quarters(Vector a, Vector b, std::integer_sequence<int, I...>) {
  constexpr int half = L / 8 > 0 ? L / 8 : 1;
  return __builtin_shufflevector(
      a, b, (I / 4 / half * L + (I / 4 % half * 2 + (High ? 1 : 0)) * 4 % L + I % 4)...);
}

SBF_INLINE void transpose(Vector (&r)[L]) {
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  Vector s[L];
  for (int i = 0; i < L; i += 4) {
    const Vector low0 = interleave<1, false>(r[i], r[i + 1], lanes);
    const Vector high0 = interleave<1, true>(r[i], r[i + 1], lanes);
    const Vector low1 = interleave<1, false>(r[i + 2], r[i + 3], lanes);
    const Vector high1 = interleave<1, true>(r[i + 2], r[i + 3], lanes);
    s[i] = interleave<2, false>(low0, low1, lanes);
    s[i + 1] = interleave<2, true>(low0, low1, lanes);
    s[i + 2] = interleave<2, false>(high0, high1, lanes);
    s[i + 3] = interleave<2, true>(high0, high1, lanes);
  }
  // Now quarter q of s[4g + k] is column 4q + k of the rows 4g ... 4g + 3.
  if constexpr (L == 4) {
    for (int k = 0; k < 4; ++k) r[k] = s[k];
  } else if constexpr (L == 8) {
    for (int k = 0; k < 4; ++k) {
      r[k] = quarters<false>(s[k], s[4 + k], lanes);
      r[4 + k] = quarters<true>(s[k], s[4 + k], lanes);
    }
  } else {
    for (int k = 0; k < 4; ++k) {
      const Vector even0 = quarters<false>(s[k], s[4 + k], lanes);
      const Vector odd0 = quarters<true>(s[k], s[4 + k], lanes);
      const Vector even1 = quarters<false>(s[8 + k], s[12 + k], lanes);
      const Vector odd1 = quarters<true>(s[8 + k], s[12 + k], lanes);
      r[k] = quarters<false>(even0, even1, lanes);
      r[8 + k] = quarters<true>(even0, even1, lanes);
      r[4 + k] = quarters<false>(odd0, odd1, lanes);
      r[12 + k] = quarters<true>(odd0, odd1, lanes);
    }
  }
}

// Relative error below 2e-7 for x in [-87, 88], beyond which the result is that of the end.
SBF_INLINE Vector exponential(Vector x) {
  x = x < -87.0F ? splat(-87.0F) : x;
  x = x > 88.0F ? splat(88.0F) : x;
  const Vector magic = splat(12582912.0F);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * 1.44269504F + magic;
  const Vector n = shifted - magic;
  const Vector r = x - n * 0.693359375F + n * 2.12194440e-4F;  // ln 2 in two parts
  Vector p = splat(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 0.5F;
  p = p * r * r + r + 1.0F;
  const Mask power = ((Mask)shifted - (Mask)magic + 127) << 23;
  return p * (Vector)power;
}

template <Activation kActivation>
SBF_INLINE Vector activated(Vector v) {
  if constexpr (kActivation == Activation::kReLU) {
    v = v < 0.0F ? Vector{} : v;
  } else if constexpr (kActivation == Activation::kReLU6) {
    v = v < 0.0F ? Vector{} : v;
    v = v > 6.0F ? splat(6.0F) : v;
  } else if constexpr (kActivation == Activation::kSiLU) {
    v = v / (exponential(-v) + 1.0F);
  } else if constexpr (kActivation == Activation::kHardSwish) {
    Vector gate = v + 3.0F;
    gate = gate < 0.0F ? Vector{} : gate;
    gate = gate > 6.0F ? splat(6.0F) : gate;
    v = v * gate * (1.0F / 6.0F);
  }
  return v;
}

// ---------------------------------------------------------------- elements

struct BFloat16 {
  uint16_t bits;
};

// Not c10's types: their inline functions would be kept in this file's instruction set.
SBF_INLINE float as_float(float value) { return value; }
SBF_INLINE float as_float(_Float16 value) { return static_cast<float>(value); }
SBF_INLINE float as_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

SBF_INLINE void from_float(float& to, float value) { to = value; }
SBF_INLINE void from_float(_Float16& to, float value) { to = static_cast<_Float16>(value); }
SBF_INLINE void from_float(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

template <typename scalar_t>
SBF_INLINE Vector load_as_float(const scalar_t* from) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return load(from);
  } else {
    float values[L];
    for (int i = 0; i < L; ++i) values[i] = as_float(from[i]);
    return load(values);
  }
}

template <typename scalar_t>
SBF_INLINE Vector load_partial(const scalar_t* from, int64_t count) {
  float values[L] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = as_float(from[i]);
  return load(values);
}

template <typename scalar_t>
SBF_INLINE void store_partial(scalar_t* to, Vector value, int64_t count) {
  float values[L];
  store(values, value);
  for (int64_t i = 0; i < count; ++i) from_float(to[i], values[i]);
}

template <typename scalar_t>
SBF_INLINE void store_from_float(scalar_t* to, Vector value) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    store(to, value);
  } else {
    store_partial(to, value, L);
  }
}

}  // namespace
}  // namespace sbf
