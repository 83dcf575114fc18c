// What the op families share: how a call is launched, and how a checked op becomes two Python functions.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../kernels/element.h"
#include "../direct.h"
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

template <class Op, class = void>
struct may_be_brief : std::false_type {};
template <class Op>
struct may_be_brief<Op, std::void_t<decltype(std::declval<Op&>().brief())>> : std::true_type {};

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

// Checks, then runs without the GIL; with it where the op has a brief() that says it takes less than a microsecond, of which
// giving it up would be a part. While a program records on the thread, the call is appended to it.
template <class Op, class... Arguments>
void call(const char* name, const Launch& launch, const Arguments&... arguments) {
  if (Program* program = Program::recording()) {
    auto kept = std::make_unique<CallOf<Op>>(arguments...);
    std::vector<py::object> tensors;
    (for_tensor(arguments, [&](const py::object& tensor) { tensors.push_back(tensor); }), ...);
    return program->append(name, tensors, std::move(kept), launch);
  }
  Op op(arguments...);
  if constexpr (may_be_brief<Op>::value)
    if (op.brief()) return op.run(launch);
  py::gil_scoped_release release;
  op.run(launch);
}

// direct_`name`: call() for a call that Direct lets through; False, and nothing done, for any other.
template <class Op, class... Arguments>
class DirectCall {
 public:
  static void bind(py::module_& m, const char* name) {
    op = name;
    way = new Direct(name);
    static const std::string method_name = std::string("direct_") + name;
    static PyMethodDef method = {method_name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&enter)),
                                 METH_FASTCALL, nullptr};
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  }

 private:
  static constexpr size_t count = sizeof...(Arguments);

  static PyObject* enter(PyObject*, PyObject* const* given, Py_ssize_t given_count) noexcept {
    try {
      py::handle arguments[count];
      unpack(op, given, given_count, arguments, count);
      return PyBool_FromLong(run(given[0], given[1], arguments, std::index_sequence_for<Arguments...>{}));
    } catch (...) {
      set_error();
      return nullptr;
    }
  }

  template <size_t... i>
  static bool run(py::handle backend, py::handle decides, py::handle* arguments, std::index_sequence<i...>) {
    int threads = 1;
    bool grad_enabled = false;
    if (!way->open(backend, decides, &threads, &grad_enabled)) return false;
    if (!((!std::is_base_of_v<py::object, Arguments> || arguments[i].is_none() || plain(arguments[i], grad_enabled)) && ...))
      return false;
    call<Op>(op, {threads, {}, 0}, argument<Arguments>(op, arguments[i])...);
    return true;
  }

  static inline const char* op = nullptr;
  static inline Direct* way = nullptr;
};

// Binds, for the constructor's arguments, three functions. `name`: call() as above. direct_`name`: the same for calls that
// need no dispatcher. check_`name`: the check alone.
template <class Op, class... Arguments, class... Names>
void bind(py::module_& m, const char* name, const Names&... names) {
  m.def(
      name,
      [name](Arguments... arguments, int threads, std::string instruction_set, uintptr_t stream) {
        call<Op>(name, {threads, std::move(instruction_set), stream}, arguments...);
      },
      names..., py::arg("threads") = 1, py::arg("instruction_set") = "", py::arg("stream") = 0);
  DirectCall<Op, Arguments...>::bind(m, name);
  m.def((std::string("check_") + name).c_str(), [](Arguments... arguments) { Op(std::move(arguments)...); }, names...);
}

}  // namespace dsa_rt
