// The Python module sbf_dist._C: how the extension was built. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "kernels.h"
#include "matrix_product.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Operators torch.ops.sbf.*, registered on import";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
#ifdef WITH_CUDA
        info["cuda"] = true;
        info["cuda_archs"] = SBF_CUDA_ARCHS;
#else
        info["cuda"] = false;
        info["cuda_archs"] = "";
#endif
        info["compiler"] = __VERSION__;
        info["torch"] = TORCH_VERSION;
        info["cpu_lanes"] = sbf::cpu_lanes();
        return info;
      },
      "How this extension was built: cuda, cuda_archs, compiler, torch (its version then); and\n"
      "cpu_lanes, how many floats a vector of the kernels chosen for this CPU has");
  // Multiply-adds of a product of rebuilding up to which conv2d computes it within its tiles, on a
  // CPU.
  m.attr("MAX_TILE_MULTIPLY_ADDS") = sbf::kMaxTileMultiplyAdds;
}
