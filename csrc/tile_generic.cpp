// Tile kernels for any CPU.
#define SBF_VECTOR_BYTES 16
#define SBF_TILE_KERNELS tile_kernels_generic
#include "tile_kernels.h"
