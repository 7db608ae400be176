// The CPU's kernels on tiles (tile.h), for the instruction set that the file which includes this is
// compiled for. Everything here is local to that file.
//
// The m = 3 kernel sums columns first: u_b[i] = sum over rows a of t[a][b] * plane[i + (a-1)*width]
// needs no shift, and y[i] = u_0[i-1] + u_1[i] + u_2[i+1] needs two, whatever S is.
#include <cmath>
#include <cstring>
#include <utility>

#include "epilogue.h"
#include "tile.h"

namespace sbf {
namespace {

constexpr int L = SBF_VECTOR_BYTES / 4;  // lanes
// Pixels that are summed at once for a block of L channels: the sums stay in the first-level cache.
constexpr int64_t kChunk = 16 * L;

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
SBF_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

SBF_INLINE int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// ---------------------------------------------------------------- vectors

SBF_INLINE Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
SBF_INLINE void put(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
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
  return __builtin_shufflevector(
      a, b,
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
SBF_INLINE Vector load_some(const scalar_t* from, int64_t count) {
  float values[L] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = as_float(from[i]);
  return load(values);
}

template <typename scalar_t>
SBF_INLINE void put_some(scalar_t* to, Vector value, int64_t count) {
  float values[L];
  put(values, value);
  for (int64_t i = 0; i < count; ++i) from_float(to[i], values[i]);
}

template <typename scalar_t>
SBF_INLINE void put_from_float(scalar_t* to, Vector value) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    put(to, value);
  } else {
    put_some(to, value, L);
  }
}

// ---------------------------------------------------------------- planes

// Where the planes of a tile are: row r of channel c begins at data + c*size + kGuard + r*width,
// row 0 being `border` rows above the tile's first. Kernels may read kGuard floats before the first
// row and behind the last one; what they make of those is not used.
struct Planes {
  float* data;
  int64_t size, rows, width, border;

  static constexpr int64_t kGuard = 2 * kChunk;

  Planes(float* at, int64_t tile_rows, int64_t row_width, int m)
      : data(at), rows(tile_rows + (m - 1)), width(row_width), border((m - 1) / 2) {
    // An odd number of cache lines keeps the planes out of each other's cache sets.
    size = 16 * ((rows * width + 2 * kGuard + 15) / 16 | 1);
  }
  float* row(int64_t channel, int64_t r) const { return data + channel * size + kGuard + r * width; }
  int64_t floats(int64_t channels) const { return channels * size; }

  void clear(int64_t channels, int64_t first, int64_t last) const {
    for (int64_t c = 0; c < channels; ++c) {
      std::memset(row(c, first), 0, sizeof(float) * (last - first) * width);
    }
  }
  // Moves the rows from `first` on, of which there are `count`, to the top.
  void move_up(int64_t channels, int64_t first, int64_t count) const {
    for (int64_t c = 0; c < channels; ++c) {
      std::memmove(row(c, 0), row(c, first), sizeof(float) * count * width);
    }
  }

  // Loads rows [h0, h1) of an image of `channels` channels as rows r, r + 1, ...
  template <typename scalar_t>
  void load_image(const scalar_t* image, bool channels_last, int64_t channels, int64_t height,
                  int64_t h0, int64_t h1, int64_t r) const {
    const int64_t pixels = (h1 - h0) * width;
    if (!channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        const scalar_t* from = image + (c * height + h0) * width;
        float* to = row(c, r);
        for (int64_t i = 0; i < pixels; ++i) to[i] = as_float(from[i]);
      }
      return;
    }
    const scalar_t* from = image + h0 * width * channels;
    for (int64_t i = 0; i < pixels; i += L) {
      const int64_t some = least<int64_t>(L, pixels - i);
      for (int64_t c = 0; c < channels; c += L) {
        const int64_t few = least<int64_t>(L, channels - c);
        Vector block[L];
        const scalar_t* at = from + i * channels + c;
        float* to = row(c, r) + i;
        if (some == L && few == L) {
          SBF_UNROLL
          for (int k = 0; k < L; ++k) block[k] = load_as_float(at + k * channels);
          transpose(block);
          SBF_UNROLL
          for (int k = 0; k < L; ++k) put(to + k * size, block[k]);
          continue;
        }
        for (int64_t k = 0; k < few; ++k) {
          for (int64_t j = 0; j < some; ++j) to[k * size + j] = as_float(at[j * channels + k]);
        }
      }
    }
  }
};

// ---------------------------------------------------------------- sums over taps

// u[b][v] += sum over rows a of taps[a][b] * z[a*width + v*L]; the last column one vector further.
template <int V>
SBF_INLINE void add_columns(Vector (&u)[3][V], const float* z, int64_t width, const float* taps) {
  for (int a = 0; a < 3; ++a, z += width, taps += 3) {
    Vector row[V + 1];
    for (int v = 0; v <= V; ++v) {
      row[v] = load(z + v * L);
      SBF_IN_REGISTER(row[v]);
    }
    for (int v = 0; v < V; ++v) {
      u[0][v] += row[v] * taps[0];
      u[1][v] += row[v] * taps[1];
      u[2][v] += row[v + 1] * taps[2];
    }
  }
}

SBF_INLINE void add_column(Vector& u, const float* z, int64_t width, const float* taps) {
  for (int a = 0; a < 3; ++a) u += load(z + a * width) * taps[3 * a];
}

// Sums `count` pixels of one output channel, from pixel `first` of the tile on, into sum; whole
// vectors are written.
struct Mixer {
  const MixTask& task;
  const Planes& planes;

  SBF_INLINE const float* link(int32_t l, int64_t first) const {
    return planes.row(task.source[l], 0) + first;
  }
  SBF_INLINE const float* taps(int32_t l) const { return task.taps + task.tap[l]; }

  template <int V>
  SBF_INLINE void step3(float* sum, const float* start, int32_t first_link, int32_t last_link,
                        int64_t first, int64_t i, Vector& left, Vector& right) const {
    Vector u[3][V];
    for (int v = 0; v < V; ++v) {
      u[0][v] = Vector{};
      u[1][v] = start == nullptr ? Vector{} : load(start + i + v * L);
      u[2][v] = Vector{};
    }
    for (int32_t l = first_link; l < last_link; ++l) {
      add_columns<V>(u, link(l, first + i), planes.width, taps(l));
    }
    const int32_t* mask = task.mask + first + i;
    for (int v = 0; v < V; ++v) {
      const Vector from_left = before(left, u[0][v]);
      const Vector from_right = after(right, u[2][v]);
      left = u[0][v];
      right = u[2][v];
      put(sum + i + v * L, u[1][v] + keep(from_left, mask + v * L) +
                               keep(from_right, mask + 2 * task.mask_stride + v * L));
    }
  }

  void sum3(float* sum, const float* start, int32_t first_link, int32_t last_link, int64_t first,
            int64_t count) const {
    constexpr int V = L == 16 ? 4 : 2;
    Vector left{}, right{};
    for (int32_t l = first_link; l < last_link; ++l) {
      add_column(left, link(l, first - L), planes.width, taps(l));
      add_column(right, link(l, first), planes.width, taps(l) + 2);
    }
    int64_t i = 0;
    for (; i + (V - 1) * L < count; i += V * L) {
      step3<V>(sum, start, first_link, last_link, first, i, left, right);
    }
    for (; i < count; i += L) {
      step3<1>(sum, start, first_link, last_link, first, i, left, right);
    }
  }

  void sum_any(float* sum, const float* start, int32_t first_link, int32_t last_link,
               int64_t first, int64_t count) const {
    const int m = task.m;
    for (int64_t i = 0; i < count; i += L) {
      Vector total = start == nullptr ? Vector{} : load(start + i);
      for (int32_t l = first_link; l < last_link; ++l) {
        const float* tap = taps(l);
        for (int b = 0; b < m; ++b) {
          const float* z = link(l, first + i) + b - planes.border;
          Vector column{};
          for (int a = 0; a < m; ++a) column += load(z + a * planes.width) * tap[a * m + b];
          total += keep(column, task.mask + b * task.mask_stride + first + i);
        }
      }
      put(sum + i, total);
    }
  }

  // Where the sums are: in `sum`, or in the plane itself where it is only copied.
  SBF_INLINE const float* operator()(float* sum, int64_t channel, int64_t first,
                                     int64_t count) const {
    const int32_t copied = task.copied[channel];
    const int32_t begin = task.begin[channel], end = task.begin[channel + 1];
    const float* start =
        copied < 0 ? nullptr : planes.row(copied, planes.border) + first;
    if (begin == end && start != nullptr) return start;
    if (task.m == 3) {
      sum3(sum, start, begin, end, first, count);
    } else {
      sum_any(sum, start, begin, end, first, count);
    }
    return sum;
  }
};

// ---------------------------------------------------------------- output

// Writes `count` pixels of one channel of an NCHW image.
template <Activation kActivation, typename scalar_t>
void store_plane(scalar_t* to, const float* sum, int64_t count, float bias,
                 const scalar_t* residual) {
  const Vector shift = splat(bias);
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vector v = load(sum + i) + shift;
    if (residual != nullptr) v += load_as_float(residual + i);
    put_from_float(to + i, activated<kActivation>(v));
  }
  if (i < count) {
    Vector v = load(sum + i) + shift;
    if (residual != nullptr) v += load_some(residual + i, count - i);
    put_some(to + i, activated<kActivation>(v), count - i);
  }
}

// Writes `pixels` pixels of up to L channels of a channels_last image of `channels` channels.
template <Activation kActivation, typename scalar_t>
void store_pixels(scalar_t* to, const float* const* sums, int64_t few, int64_t pixels,
                  int64_t channels, Vector bias, const scalar_t* residual) {
  for (int64_t i = 0; i < pixels; i += L) {
    const int64_t some = least<int64_t>(L, pixels - i);
    Vector block[L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) block[k] = load(sums[k] + i);
    transpose(block);
    if (some == L && few == L) {
      SBF_UNROLL
      for (int k = 0; k < L; ++k) {
        const int64_t at = (i + k) * channels;
        Vector v = block[k] + bias;
        if (residual != nullptr) v += load_as_float(residual + at);
        put_from_float(to + at, activated<kActivation>(v));
      }
      continue;
    }
    float rows[L * L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) put(rows + k * L, block[k]);
    for (int64_t k = 0; k < some; ++k) {
      const int64_t at = (i + k) * channels;
      Vector v = load(rows + k * L) + bias;
      if (residual != nullptr) v += load_some(residual + at, few);
      put_some(to + at, activated<kActivation>(v), few);
    }
  }
}

template <Activation kActivation, typename scalar_t>
void store_tile(const MixTask& task, const Planes& planes, int64_t n, int64_t h0, int64_t h1,
                float* sums) {
  const Mixer mixer{task, planes};
  const int64_t area = task.height * task.width;
  const int64_t offset = n * task.outputs * area;
  scalar_t* image = static_cast<scalar_t*>(task.output) + offset;
  const scalar_t* added =
      task.residual == nullptr ? nullptr : static_cast<const scalar_t*>(task.residual) + offset;
  const int64_t pixels = (h1 - h0) * task.width, start = h0 * task.width;
  if (!task.channels_last) {
    for (int64_t c = 0; c < task.outputs; ++c) {
      const int64_t at = c * area + start;
      store_plane<kActivation>(image + at, mixer(sums, c, 0, pixels), pixels,
                               task.bias == nullptr ? 0.0F : task.bias[c],
                               added == nullptr ? nullptr : added + at);
    }
    return;
  }
  for (int64_t i = 0; i < pixels; i += kChunk) {
    const int64_t some = least(kChunk, pixels - i);
    for (int64_t c = 0; c < task.outputs; c += L) {
      const int64_t few = least<int64_t>(L, task.outputs - c);
      const float* planes_of_block[L];
      for (int64_t k = 0; k < L; ++k) {
        planes_of_block[k] =
            k < few ? mixer(sums + k * kChunk, c + k, i, some) : planes_of_block[0];
      }
      const int64_t at = (start + i) * task.outputs + c;
      store_pixels<kActivation>(image + at, planes_of_block, few, some, task.outputs,
                                task.bias == nullptr ? Vector{} : load(task.bias + c),
                                added == nullptr ? nullptr : added + at);
    }
  }
}

// ---------------------------------------------------------------- the 1 x 1 convolution

// Fetches cache lines a few at a time while the arithmetic units are busy: pieces of `length` lines
// that begin `stride` bytes apart.
struct Ahead {
  const char* piece;
  int64_t length, stride, each;  // each: lines a step
  int64_t done = 0;

  // Lines of `count` pieces of `bytes` bytes, in `steps` steps.
  Ahead(const void* first, int64_t bytes, int64_t stride_bytes, int64_t count, int64_t steps)
      : piece(static_cast<const char*>(first)), length((bytes + 63) / 64), stride(stride_bytes),
        each((length * count + steps - 1) / steps) {}

  template <int kLocality>
  SBF_INLINE void step() {
    for (int64_t i = 0; i < each; ++i) {
      __builtin_prefetch(piece + 64 * done, 0, kLocality);
      if (++done == length) {
        done = 0;
        piece += stride;
      }
    }
  }
};

constexpr int64_t kDepthStep = 8;  // depths between two steps ahead

// sums[r] = filter r of a panel on L pixels, each depth's pixels being a vector.
SBF_INLINE void product_of_planes(Vector (&sums)[L], const float* panel, const float* pixels,
                                  int64_t depth, Ahead& output) {
  SBF_UNROLL
  for (int r = 0; r < L; ++r) sums[r] = Vector{};
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthStep) {
    output.step<2>();
    for (int64_t k = k0; k < least(k0 + kDepthStep, depth); ++k, panel += L, pixels += L) {
      const Vector x = load(pixels);
      SBF_UNROLL
      for (int r = 0; r < L; ++r) sums[r] += x * panel[r];
    }
  }
}

// sums[r] = all filters of a panel on pixel r, pixels being rows of `stride` floats.
SBF_INLINE void product_of_pixels(Vector (&sums)[L], const float* panel, const float* pixels,
                                  int64_t stride, int64_t depth, Ahead& output, Ahead& input) {
  SBF_UNROLL
  for (int r = 0; r < L; ++r) sums[r] = Vector{};
  // Rows in groups of four, each with a pointer of its own: one register cannot address them all.
  const float* group[L / 4];
  for (int g = 0; g < L / 4; ++g) group[g] = pixels + 4 * g * stride;
  for (int64_t k0 = 0; k0 < depth; k0 += kDepthStep) {
    output.step<2>();
    input.step<3>();
    for (int64_t k = k0; k < least(k0 + kDepthStep, depth); ++k, panel += L) {
      const Vector w = load(panel);
      SBF_UNROLL
      for (int g = 0; g < L / 4; ++g) {
        SBF_UNROLL
        for (int r = 0; r < 4; ++r) sums[4 * g + r] += w * group[g][r * stride + k];
      }
    }
  }
}

struct Multiplier {
  const MixTask& task;
  const Product& product;
  const Planes& planes;
  float* gathered;  // NCHW: (groups of L pixels, depth, L); channels_last: (L, padded depth)

  static int64_t padded(int64_t depth) { return round_up(depth, 16) + 16; }
  static int64_t floats(const MixTask& task, const Product& product) {
    const int64_t pixels = (task.rows + task.m - 1) * task.width;
    return task.channels_last ? L * padded(product.depth) : round_up(pixels, L) * product.depth;
  }

  // Computes rows [h0, h1) of an image's planes as rows r, r + 1, ...; meanwhile the lines of
  // `target`, rows of the same size of an image of the output, come into the cache.
  void operator()(const float* image, const float* target, int64_t h0, int64_t h1,
                  int64_t r) const {
    const int64_t pixels = (h1 - h0) * task.width, area = task.height * task.width;
    const int64_t steps = (pixels + L - 1) / L * ((task.inputs + L - 1) / L) *
                          ((product.depth + kDepthStep - 1) / kDepthStep);
    if (task.channels_last) {
      Ahead output(target, 4 * pixels * task.outputs, 0, 1, steps);
      rows_of_pixels(image, h0, h1, r, output);
    } else {
      Ahead output(target, 4 * pixels, 4 * area, task.outputs, steps);
      rows_of_planes(image, h0, h1, r, output);
    }
  }

  SBF_INLINE void put_sums(Vector (&sums)[L], int64_t filter, int64_t r, int64_t i,
                           int64_t some) const {
    float* to = planes.row(filter, r) + i;
    const int64_t few = least<int64_t>(L, task.inputs - filter);
    if (some == L && few == L) {
      SBF_UNROLL
      for (int k = 0; k < L; ++k) put(to + k * planes.size, sums[k]);
      return;
    }
    float rows[L * L];
    SBF_UNROLL
    for (int k = 0; k < L; ++k) put(rows + k * L, sums[k]);
    for (int64_t k = 0; k < few; ++k) {
      std::memcpy(to + k * planes.size, rows + k * L, sizeof(float) * some);
    }
  }

  void rows_of_planes(const float* image, int64_t h0, int64_t h1, int64_t r,
                      Ahead& output) const {
    const int64_t depth = product.depth, pixels = (h1 - h0) * task.width;
    const bool dense = product.stride_h == 1 && product.stride_w == 1;
    for (int64_t k = 0; k < depth; ++k) {
      const float* plane = image + k * product.height * product.width;
      if (dense) {
        const float* from = plane + h0 * product.width;
        int64_t i = 0;
        for (; i + L <= pixels; i += L) put(gathered + i * depth + k * L, load(from + i));
        if (i < pixels) put(gathered + i * depth + k * L, load_some(from + i, pixels - i));
        continue;
      }
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t h = (h0 + i / task.width) * product.stride_h;
        const int64_t w = i % task.width * product.stride_w;
        gathered[i / L * L * depth + k * L + i % L] = plane[h * product.width + w];
      }
    }
    for (int64_t i = 0; i < pixels; i += L) {
      for (int64_t filter = 0; filter < task.inputs; filter += L) {
        Vector sums[L];
        product_of_planes(sums, product.weight + filter * depth, gathered + i * depth, depth,
                          output);
        put_sums(sums, filter, r, i, least<int64_t>(L, pixels - i));
      }
    }
  }

  void rows_of_pixels(const float* image, int64_t h0, int64_t h1, int64_t r,
                      Ahead& output) const {
    const int64_t depth = product.depth, pixels = (h1 - h0) * task.width;
    const bool dense = product.stride_h == 1 && product.stride_w == 1;
    // Rows that lie a multiple of 2 KiB apart share few sets of the first-level cache.
    const bool in_place = dense && depth % 512 != 0;
    for (int64_t i = 0; i < pixels; i += L) {
      const int64_t some = least<int64_t>(L, pixels - i);
      const float* from = image + (h0 * product.width + i) * depth;
      int64_t stride = depth;
      if (!in_place || some < L) {
        stride = padded(depth);
        for (int64_t k = 0; k < some; ++k) {
          const int64_t h = (h0 + (i + k) / task.width) * product.stride_h;
          const int64_t w = (i + k) % task.width * product.stride_w;
          std::memcpy(gathered + k * stride, image + (h * product.width + w) * depth,
                      sizeof(float) * depth);
        }
        from = gathered;
      }
      // The next pixels, which lie behind these.
      Ahead input(image + (h0 * product.width + i + L) * depth, 4 * L * depth, 0, in_place ? 1 : 0,
                  (task.inputs + L - 1) / L * ((depth + kDepthStep - 1) / kDepthStep));
      for (int64_t filter = 0; filter < task.inputs; filter += L) {
        Vector sums[L];
        product_of_pixels(sums, product.weight + filter * depth, from, stride, depth, output, input);
        transpose(sums);
        put_sums(sums, filter, r, i, some);
      }
    }
  }
};

void pack_weight(float* packed, const float* weight, int64_t filters, int64_t depth, int64_t first,
                 int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    float* to = packed + panel * L * depth;
    const int64_t few = least<int64_t>(L, filters - panel * L);
    const float* from = weight + panel * L * depth;
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t some = least<int64_t>(L, depth - k);
      Vector block[L];
      for (int i = 0; i < L; ++i) {
        block[i] = i >= few       ? Vector{}
                   : some == L    ? load(from + i * depth + k)
                                  : load_some(from + i * depth + k, some);
      }
      transpose(block);
      for (int64_t i = 0; i < some; ++i) put(to + (k + i) * L, block[i]);
    }
  }
}

// ---------------------------------------------------------------- tasks

int64_t mix_workspace(const MixTask& task, const Product* product) {
  const Planes planes(nullptr, task.rows, task.width, task.m);
  const int64_t sums = task.channels_last ? L * kChunk : round_up(task.rows * task.width, L) + kChunk;
  return planes.floats(task.inputs) + round_up(sums, 16) +
         (product == nullptr ? 0 : Multiplier::floats(task, *product));
}

template <Activation kActivation, typename scalar_t>
void mix_tiles(const MixTask& task, const Product* product, int64_t first, int64_t last,
               float* workspace) {
  const Planes planes(workspace, task.rows, task.width, task.m);
  float* sums = workspace + planes.floats(task.inputs);
  float* gathered = sums + round_up(task.channels_last ? L * kChunk
                                                       : round_up(task.rows * task.width, L) + kChunk,
                                    16);
  const int64_t border = planes.border;
  int64_t before_image = -1, before_block = -1;
  for (int64_t t = first; t < last; ++t) {
    const int64_t n = t / task.blocks, block = t % task.blocks;
    const int64_t h0 = block * task.rows, h1 = least(task.height, h0 + task.rows);
    // Rows from `top` on are needed; those that the tile above had as well are there.
    int64_t r = 0;
    if (n == before_image && block == before_block + 1) {
      planes.move_up(task.inputs, task.rows, 2 * border);
      r = 2 * border;
    }
    before_image = n;
    before_block = block;
    if (r == 0 && border > 0) {
      const int64_t above = least<int64_t>(border, border - least(border, h0));
      planes.clear(task.inputs, 0, above);
      r = above;
    }
    const int64_t from = h0 - border + r;
    const int64_t to = least(task.height, h1 + border);
    if (from < to) {
      if (product != nullptr) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          const int64_t image = product->depth * product->height * product->width;
          const int64_t above = (task.channels_last ? task.outputs : 1) * h0 * task.width;
          Multiplier{task, *product, planes, gathered}(
              static_cast<const float*>(task.input) + n * image,
              static_cast<const float*>(task.output) + n * task.outputs * task.height * task.width +
                  above,
              from, to, r);
        }
      } else {
        const scalar_t* image =
            static_cast<const scalar_t*>(task.input) + n * task.inputs * task.height * task.width;
        planes.load_image(image, task.channels_last, task.inputs, task.height, from, to, r);
      }
    }
    const int64_t filled = r + (from < to ? to - from : 0);
    planes.clear(task.inputs, filled, h1 - h0 + 2 * border);
    store_tile<kActivation, scalar_t>(task, planes, n, h0, h1, sums);
  }
}

template <typename scalar_t>
void mix_as(const MixTask& task, const Product* product, int64_t first, int64_t last,
            float* workspace) {
  switch (task.activation) {
    case Activation::kNone:
      return mix_tiles<Activation::kNone, scalar_t>(task, product, first, last, workspace);
    case Activation::kReLU:
      return mix_tiles<Activation::kReLU, scalar_t>(task, product, first, last, workspace);
    case Activation::kReLU6:
      return mix_tiles<Activation::kReLU6, scalar_t>(task, product, first, last, workspace);
    case Activation::kSiLU:
      return mix_tiles<Activation::kSiLU, scalar_t>(task, product, first, last, workspace);
    case Activation::kHardSwish:
      return mix_tiles<Activation::kHardSwish, scalar_t>(task, product, first, last, workspace);
  }
}

void mix(const MixTask& task, const Product* product, Element element, int64_t first, int64_t last,
         float* workspace) {
  switch (element) {
    case Element::kFloat:
      return mix_as<float>(task, product, first, last, workspace);
    case Element::kBFloat16:
      return mix_as<BFloat16>(task, product, first, last, workspace);
    case Element::kHalf:
      return mix_as<_Float16>(task, product, first, last, workspace);
  }
}

// ---------------------------------------------------------------- gradient of the transforms

SBF_INLINE float total(Vector v) {
  float values[L], sum = 0;
  put(values, v);
  for (int i = 0; i < L; ++i) sum += values[i];
  return sum;
}

// sums[a*m + b] += the products of the gradient's pixels with the plane's, shifted by (a, b). It is
// the gradient that is shifted sideways: its masked shifts serve all m rows.
void add_dots(const DotTask& task, float* sums, const float* grad, const float* plane,
              int64_t pixels) {
  const int m = task.m, border = (m - 1) / 2;
  for (int b = 0; b < m; ++b) {
    // The pixel to the plane's left (b = 0) is one whose own right neighbour lies in the row.
    const int32_t* mask = task.mask + (m - 1 - b) * task.mask_stride;
    const float* shifted = grad + border - b;
    if (m == 3) {
      Vector total0{}, total1{}, total2{};
      for (int64_t i = 0; i < pixels; i += L) {
        const Vector g = keep(load(shifted + i), mask + i);
        total0 += g * load(plane + i);
        total1 += g * load(plane + task.width + i);
        total2 += g * load(plane + 2 * task.width + i);
      }
      sums[b] += total(total0);
      sums[3 + b] += total(total1);
      sums[6 + b] += total(total2);
      continue;
    }
    for (int a = 0; a < m; ++a) {
      Vector sum{};
      for (int64_t i = 0; i < pixels; i += L) {
        sum += keep(load(shifted + i), mask + i) * load(plane + a * task.width + i);
      }
      sums[a * m + b] += total(sum);
    }
  }
}

int64_t dot_workspace(const DotTask& task) {
  return Planes(nullptr, task.rows, task.width, task.m).floats(task.inputs) +
         Planes(nullptr, task.rows, task.width, 1).floats(task.outputs);
}

template <typename scalar_t>
void dot_tiles(const DotTask& task, int64_t first, int64_t last, int64_t step, float* sums,
               float* workspace) {
  const Planes inputs(workspace, task.rows, task.width, task.m);
  const Planes grads(workspace + inputs.floats(task.inputs), task.rows, task.width, 1);
  const int64_t border = inputs.border, area = task.height * task.width;
  for (int64_t t = first; t < last; t += step) {
    const int64_t n = t / task.blocks;
    const int64_t h0 = t % task.blocks * task.rows, h1 = least(task.height, h0 + task.rows);
    const int64_t above = border - least(border, h0);
    const int64_t from = h0 - border + above, to = least(task.height, h1 + border);
    inputs.clear(task.inputs, 0, above);
    inputs.load_image(static_cast<const scalar_t*>(task.input) + n * task.inputs * area,
                      task.channels_last, task.inputs, task.height, from, to, above);
    inputs.clear(task.inputs, above + to - from, h1 - h0 + 2 * border);
    grads.load_image(static_cast<const scalar_t*>(task.grad) + n * task.outputs * area,
                     task.channels_last, task.outputs, task.height, h0, h1, 0);
    // Whole vectors are multiplied: behind the last pixel the gradient must be zero, and so must
    // what is shifted in. What the planes hold there must be a number.
    const int64_t pixels = (h1 - h0) * task.width, reach = L + border;
    for (int64_t c = 0; c < task.outputs; ++c) {
      float* row = grads.row(c, 0);
      std::memset(row - reach, 0, sizeof(float) * reach);
      std::memset(row + pixels, 0, sizeof(float) * reach);
    }
    for (int64_t c = 0; c < task.inputs; ++c) {
      std::memset(inputs.row(c, 0) + (h1 - h0 + 2 * border) * task.width, 0, sizeof(float) * reach);
    }
    for (int64_t l = 0; l < task.links; ++l) {
      add_dots(task, sums + l * task.m * task.m, grads.row(task.channel[l], 0),
               inputs.row(task.source[l], 0), pixels);
    }
  }
}

void dot(const DotTask& task, Element element, int64_t first, int64_t last, int64_t step,
         float* sums, float* workspace) {
  switch (element) {
    case Element::kFloat:
      return dot_tiles<float>(task, first, last, step, sums, workspace);
    case Element::kBFloat16:
      return dot_tiles<BFloat16>(task, first, last, step, sums, workspace);
    case Element::kHalf:
      return dot_tiles<_Float16>(task, first, last, step, sums, workspace);
  }
}

}  // namespace

const TileKernels& SBF_TILE_KERNELS() {
  static constexpr TileKernels kernels{L, mix_workspace, dot_workspace, mix, dot, pack_weight};
  return kernels;
}

}  // namespace sbf
