#include "direct.h"

#include <stdexcept>

namespace dsa_rt {
namespace {

// Never destroyed, as the interpreter may be gone by then.
struct Asked {
  py::tuple listeners;
  py::dict tables;
  py::object native_first, threads, grad_enabled;
  py::str implementations{"IMPLEMENTATIONS"}, measured{"MEASURED"};
};
Asked* asked = nullptr;

py::object ask(py::handle function) {
  PyObject* answer = PyObject_CallNoArgs(function.ptr());
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

bool truth(py::handle object) {
  const int answer = PyObject_IsTrue(object.ptr());
  if (answer < 0) throw py::error_already_set();
  return answer;
}

py::handle item(py::handle dict, py::handle key) {  // borrowed
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!value && !PyErr_Occurred()) throw py::key_error(py::str(key));
  if (!value) throw py::error_already_set();
  return value;
}

}  // namespace

bool Direct::native_first(py::handle backend, const PlainOnCpu& decides, py::handle tensor) {
  const py::handle row = item(item(asked->tables, asked->implementations), op_), measured = item(asked->tables, asked->measured);
  const py::handle object = decides.dtype_object;
  for (const Known& known : known_)
    if (known.row.is(row) && known.backend.is(backend) && known.dtype == decides.dtype && known.dtype_object.is(object) &&
        known.measured.is(measured))
      return known.native_first;
  const bool found = truth(asked->native_first(op_, tensor.attr("dtype"), backend));
  Known& place = known_[next_++ % known_.size()];
  const Known old = place;
  place = {decides.dtype, object.inc_ref(), backend.inc_ref(), row.inc_ref(), measured.inc_ref(), found};
  for (py::handle kept : {old.dtype_object, old.backend, old.row, old.measured}) kept.dec_ref();
  return found;
}

bool Direct::open(py::handle backend, py::handle decides, int* threads, bool* grad_enabled) {
  if (!asked) throw std::logic_error("direct calls are not set up: import dsa_rt.ops.dispatch");
  const PlainOnCpu found(decides);
  if (!found) return false;
  for (py::handle listener : asked->listeners)
    if (truth(ask(listener))) return false;
  if (!native_first(backend, found, decides)) return false;
  *grad_enabled = truth(ask(asked->grad_enabled));
  *threads = static_cast<int>(PyLong_AsLong(ask(asked->threads).ptr()));
  return true;
}

void unpack(const char* op, PyObject* const* given, Py_ssize_t count, py::handle* arguments, size_t wanted) {
  size_t made = 0;
  for (Py_ssize_t i = 2; i < count; ++i) {
    const Py_ssize_t size = PyTuple_Check(given[i]) ? PyTuple_GET_SIZE(given[i]) : -1;
    if (size < 0 || made + size > wanted) break;
    for (Py_ssize_t j = 0; j < size; ++j) arguments[made++] = PyTuple_GET_ITEM(given[i], j);
  }
  if (count != 4 || made != wanted)
    throw py::type_error(std::string(op) + ": expected backend, the tensor that decides, and two tuples of " +
                         std::to_string(wanted) + " arguments");
}

void bind_direct(py::module_& m) {
  m.def(
      "direct_calls",
      [](py::tuple listeners, py::dict tables, py::object native_first, py::object threads, py::object grad_enabled) {
        auto* replaced = asked;
        asked = new Asked{listeners, tables, native_first, threads, grad_enabled};
        delete replaced;
      },
      py::arg("listeners"), py::arg("tables"), py::arg("native_first"), py::arg("threads"), py::arg("grad_enabled"));
}

}  // namespace dsa_rt
