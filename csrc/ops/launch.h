// What the op families share: how a call is launched, and how a checked op becomes two Python functions.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels/element.h"
#include "../program.h"
#include "../tensor.h"

namespace dsa_rt {

const std::initializer_list<Dtype> float_dtypes = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// Of a tensor with one of those.
inline Element element_of(const TensorView& view) {
  return view.dtype == Dtype::bfloat16 ? Element::bfloat16
         : view.dtype == Dtype::float16 ? Element::float16
                                        : Element::float32;
}

[[noreturn]] inline void no_kernel(const Signature& op) {
  op.fail_unserved("it was built without those of the tensors' device");
}

template <class Op, class = void>
struct reads_host : std::false_type {};
template <class Op>
struct reads_host<Op, std::void_t<decltype(std::declval<Op&>().read_host())>> : std::true_type {};

// An op as a program keeps it. Its constructor reads whatever it needs on the host; an op whose tensors hold such values
// (row numbers, segments) has a public read_host(), which its constructor calls and which is called before each replay.
template <class Op>
class CallOf : public Call {
 public:
  template <class... Arguments>
  explicit CallOf(const Arguments&... arguments) : op_(arguments...) {}
  void read_host() override {
    if constexpr (reads_host<Op>::value) op_.read_host();
  }
  void run(const Launch& launch) override { op_.run(launch); }

 private:
  Op op_;
};

template <class Argument, class Visit>
void for_tensor(const Argument& argument, Visit visit) {
  if constexpr (std::is_base_of_v<py::object, Argument>)
    if (!argument.is_none()) visit(argument);
}

// Checks, then runs without the GIL. While a program records on the thread, the call is appended to it.
template <class Op, class... Arguments>
void call(const char* name, const Launch& launch, const Arguments&... arguments) {
  if (Program* program = Program::recording()) {
    auto kept = std::make_unique<CallOf<Op>>(arguments...);
    std::vector<py::object> tensors;
    (for_tensor(arguments, [&](const py::object& tensor) { tensors.push_back(tensor); }), ...);
    return program->append(name, tensors, std::move(kept), launch);
  }
  Op op(arguments...);
  py::gil_scoped_release release;
  op.run(launch);
}

// Binds, for the constructor's arguments, three functions. `name`: call() as above. direct_`name`: the same for plain()
// tensors, on the CPU, with no name and no default to match; False, and nothing done, where one is not plain.
// check_`name`: the check alone.
template <class Op, class... Arguments, class... Names>
void bind(py::module_& m, const char* name, const Names&... names) {
  m.def(
      name,
      [name](Arguments... arguments, int threads, std::string instruction_set, uintptr_t stream) {
        call<Op>(name, {threads, std::move(instruction_set), stream}, arguments...);
      },
      names..., py::arg("threads") = 1, py::arg("instruction_set") = "", py::arg("stream") = 0);
  m.def((std::string("direct_") + name).c_str(), [name](Arguments... arguments, int threads, bool grad_enabled) {
    bool direct = true;
    (for_tensor(arguments, [&](py::handle tensor) { direct = direct && plain(tensor, grad_enabled); }), ...);
    if (direct) call<Op>(name, {threads, {}, 0}, arguments...);
    return direct;
  });
  m.def((std::string("check_") + name).c_str(), [](Arguments... arguments) { Op(std::move(arguments)...); }, names...);
}

}  // namespace dsa_rt
