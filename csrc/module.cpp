// dsa_rt._native: checks, dispatch and launch for the ops; a line per op family. Its functions take torch tensors by
// their Python attributes, so that one build serves every torch version. Call it through dsa_rt.ops.
#include <pybind11/pybind11.h>

#include "cpu_features.h"
#include "direct.h"
#include "ops/ops.h"
#include "parallel.h"
#include "program.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list sets;
  for (const auto& entry : dsa_rt::instruction_sets()) sets.append(entry.second);
  py::dict info;
  info["compiler"] = DSA_RT_COMPILER;
  info["instruction_sets"] = sets;
  info["amx_bf16"] = dsa_rt::has_amx_bf16();
  info["last_cache"] = dsa_rt::last_cache();
  info["threads"] = dsa_rt::parallel_backend();
  info["cuda"] = DSA_RT_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of dsa_rt; use them through dsa_rt.ops.";
  py::module_::import("torch");  // first, or a second OpenMP runtime could enter the process
  dsa_rt::register_errors(m);
  m.def("build_info", build_info,
        "compiler; instruction_sets that run here, best first; amx_bf16: whether the processor has that matrix unit, "
        "which no kernel here uses; last_cache: bytes; threads: 'openmp' (PyTorch's own team) or 'threads'; cuda: architectures compiled "
        "for, '' without CUDA.");
  dsa_rt::bind_step(m);
  dsa_rt::bind_attention(m);
  dsa_rt::bind_layers(m);
  dsa_rt::bind_linear(m);
  dsa_rt::bind_quantize(m);
  dsa_rt::bind_program(m);
  dsa_rt::bind_direct(m);
}
