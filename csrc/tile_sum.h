// Sums over taps: the output's channels from the planes of a tile, and the gradient of the taps.
//
// The m = 3 kernel sums columns first: u_b[i] = sum over rows a of t[a][b] * plane[i + (a-1)*width]
// needs no shift, and y[i] = u_0[i-1] + u_1[i] + u_2[i+1] needs two, whatever S is.
#pragma once

#include "tile_planes.h"

namespace sbf {
namespace {

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
struct ChannelSum {
  const ExpandTask& task;
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
      store(sum + i + v * L, u[1][v] + keep(from_left, mask + v * L) +
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

  // Without neighbours: a row of taps times the planes, several vectors of pixels at a time, so
  // that sums do not wait for each other.
  template <int V>
  SBF_INLINE void step1(float* sum, const float* start, int32_t first_link, int32_t last_link,
                        int64_t first, int64_t i) const {
    Vector total[V];
    for (int v = 0; v < V; ++v) total[v] = start == nullptr ? Vector{} : load(start + i + v * L);
    for (int32_t l = first_link; l < last_link; ++l) {
      const float* z = link(l, first + i);
      const float tap = *taps(l);
      for (int v = 0; v < V; ++v) total[v] += load(z + v * L) * tap;
    }
    for (int v = 0; v < V; ++v) store(sum + i + v * L, total[v]);
  }

  void sum1(float* sum, const float* start, int32_t first_link, int32_t last_link, int64_t first,
            int64_t count) const {
    constexpr int V = 8;
    int64_t i = 0;
    for (; i + (V - 1) * L < count; i += V * L) {
      step1<V>(sum, start, first_link, last_link, first, i);
    }
    for (; i + L < count; i += 2 * L) step1<2>(sum, start, first_link, last_link, first, i);
    for (; i < count; i += L) step1<1>(sum, start, first_link, last_link, first, i);
  }

  void sum_any(float* sum, const float* start, int32_t first_link, int32_t last_link, int64_t first,
               int64_t count) const {
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
      store(sum + i, total);
    }
  }

  // Where the sums are: in `sum`, or in the plane itself where it is only copied.
  SBF_INLINE const float* operator()(float* sum, int64_t channel, int64_t first,
                                     int64_t count) const {
    const int32_t copied = task.copied[channel];
    const int32_t begin = task.begin[channel], end = task.begin[channel + 1];
    const float* start = copied < 0 ? nullptr : planes.row(copied, planes.border) + first;
    if (begin == end && start != nullptr) return start;
    if (task.m == 3) {
      sum3(sum, start, begin, end, first, count);
    } else if (task.m == 1) {
      sum1(sum, start, begin, end, first, count);
    } else {
      sum_any(sum, start, begin, end, first, count);
    }
    return sum;
  }
};

SBF_INLINE float total(Vector v) {
  float values[L], sum = 0;
  store(values, v);
  for (int i = 0; i < L; ++i) sum += values[i];
  return sum;
}

// sums[a*m + b] += the products of the gradient's pixels with the plane's, shifted by (a, b). It is
// the gradient that is shifted sideways: its masked shifts serve all m rows.
void add_dots(const TransformsTask& task, float* sums, const float* grad, const float* plane,
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

}  // namespace
}  // namespace sbf
