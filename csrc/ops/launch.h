// What the op families share: how a call is launched, and how a checked op becomes two Python functions.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "../../kernels/element.h"
#include "../tensor.h"

namespace dsa_rt {

const std::initializer_list<Dtype> float_dtypes = {Dtype::float32, Dtype::bfloat16};

inline Element element_of(const TensorView& view) {
  return view.dtype == Dtype::bfloat16 ? Element::bfloat16 : Element::float32;
}

// Where and how to run: threads and instruction set for CPU tensors, the stream for CUDA tensors.
struct Launch {
  int threads;
  std::string instruction_set;
  uintptr_t stream;
};

[[noreturn]] inline void no_kernel(const Signature& op) {
  op.fail_unserved("it was built without those of the tensors' device");
}

// Binds `name` (check, then run without the GIL) and check_`name` (check alone) for the constructor's arguments.
template <class Op, class... Arguments, class... Names>
void bind(py::module_& m, const std::string& name, const Names&... names) {
  m.def(
      name.c_str(),
      [](Arguments... arguments, int threads, std::string instruction_set, uintptr_t stream) {
        Op op(std::move(arguments)...);
        py::gil_scoped_release release;
        op.run({threads, std::move(instruction_set), stream});
      },
      names..., py::arg("threads") = 1, py::arg("instruction_set") = "", py::arg("stream") = 0);
  m.def(("check_" + name).c_str(), [](Arguments... arguments) { Op(std::move(arguments)...); }, names...);
}

}  // namespace dsa_rt
