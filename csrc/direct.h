// A call of an op from Python that passes by torch's dispatcher and pybind11's, each of which takes as long as a small op
// or longer: for plain tensors on the CPU, where nothing listens at torch's dispatcher.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
#include <type_traits>

#include "facts.h"

namespace dsa_rt {

namespace py = pybind11;

// What such a call asks of Python, given once by dsa_rt.ops.dispatch: `listeners`, functions that return something true
// where somebody would miss the call; `tables`, the namespace whose IMPLEMENTATIONS and MEASURED decide what serves an op,
// and `native_first(op, dtype, backend)`, what they say, asked again when one of them is another object; how many threads
// there are, and whether gradients are wanted.
void bind_direct(py::module_& m);

// The way of one op. It is kept for as long as the process.
class Direct {
 public:
  explicit Direct(const char* op) : op_(PyUnicode_InternFromString(op)) {}

  // Whether the call may take this way: native is what serves `decides`, a tensor on the CPU, and `backend` does not ask
  // for another one. Sets how many threads there are, and whether gradients are wanted.
  bool open(py::handle backend, py::handle decides, int* threads, bool* grad_enabled);

 private:
  struct Known {
    Dtype dtype;
    py::handle dtype_object, backend, row, measured;  // references that are kept
    bool native_first;
  };
  bool native_first(py::handle backend, const PlainOnCpu& decides, py::handle tensor);

  py::handle op_;
  std::array<Known, 8> known_{};
  size_t next_ = 0;
};

// The arguments of a call as it brings them, (backend, decides, tensors, others): those of the op one after another.
void unpack(const char* op, PyObject* const* given, Py_ssize_t count, py::handle* arguments, size_t wanted);

template <class T>
T argument(const char* op, py::handle given) {
  if constexpr (std::is_base_of_v<py::object, T>) {
    return py::reinterpret_borrow<T>(given);
  } else {
    py::detail::make_caster<T> caster;
    if (!caster.load(given, true))
      throw py::type_error(std::string(op) + ": an argument is " + std::string(py::repr(given)) + ", expected " +
                           (std::is_same_v<T, double> ? "a number" : std::is_integral_v<T> ? "an integer" : "a string"));
    return py::detail::cast_op<T>(std::move(caster));
  }
}

}  // namespace dsa_rt
