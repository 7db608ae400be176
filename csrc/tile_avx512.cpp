// Tile kernels for x86 with AVX512. What is included before the pragma is compiled for any CPU: an
// inline function that several files have in common must not be kept in this file's version.
#if defined(__x86_64__)
#define SBF_VECTOR_BYTES 64
#define SBF_TILE_KERNELS tile_kernels_avx512
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "epilogue.h"
#include "tile.h"
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif
#include "tile_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
