// Operator schemas, and the Python module sbf_dist._C, which tells how the extension was built.
// The CPU and CUDA implementations register themselves; fakes, autograd and FLOPs are in ops.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>
#include <torch/version.h>

namespace sbf {
int cpu_lanes();  // expand_cpu.cpp
int64_t mixed_in_tiles();
}  // namespace sbf

TORCH_LIBRARY(sbf, m) {
  m.def(
      "expand(Tensor z, Tensor transforms, Tensor sources, Tensor order, Tensor? bias)"
      " -> Tensor");
  // activation(expand(convolution(x, weight), ...) + bias + residual), for inference.
  m.def(
      "conv2d(Tensor x, Tensor weight, Tensor transforms, Tensor sources, Tensor order,"
      " Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, int[2] dilation, int groups,"
      " str activation, Tensor? packed) -> Tensor");
  // The filters of weight in the order that the CPU's kernels read them; what conv2d takes as
  // packed.
  m.def("pack_filters(Tensor weight) -> Tensor");
  // The gradient of z, and of transforms, given that of expand's output.
  m.def(
      "expand_grad_input(Tensor grad, Tensor transforms, Tensor sources, Tensor order) -> Tensor");
  m.def(
      "expand_grad_transforms(Tensor grad, Tensor z, Tensor sources, Tensor order, int size)"
      " -> Tensor");
}

// PyTorch would only warn in the backward pass, and leave the gradients out.
TORCH_LIBRARY_IMPL(sbf, Autograd, m) {
  m.impl("conv2d", torch::autograd::autogradNotImplementedFallback());
  m.impl("pack_filters", torch::autograd::autogradNotImplementedFallback());
}

#ifndef WITH_CUDA
namespace {

void built_without_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.schema().name(),
      " got CUDA tensors, but sbf_dist._C was built without CUDA. Build it with a CUDA build of "
      "PyTorch and nvcc on the PATH: SBF_DIST_CUDA=1 pip install --no-build-isolation -e .");
}

}  // namespace

TORCH_LIBRARY_IMPL(sbf, CUDA, m) {
  for (const char* name : {"expand", "conv2d", "expand_grad_input", "expand_grad_transforms"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&built_without_cuda>());
  }
}
#endif

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
  // Multiply-adds of a mixture up to which conv2d makes it within its tiles, on a CPU.
  m.attr("MIXED_IN_TILES") = sbf::mixed_in_tiles();
}
