#include "facts.h"

#include <utility>

#include "exchange.h"

namespace dsa_rt {
namespace {

// Python objects the checks compare with and names they ask for; made once and never destroyed, as the interpreter may be
// gone by then.
struct TorchObjects {
  py::object tensor, parameter;
  struct Known {
    py::object dtype;
    Dtype value;
    int64_t itemsize;
  };
  std::vector<Known> dtypes;
  decltype(dlpack::ExchangeApi::describe) describe = nullptr;
  py::str shape{"shape"}, stride{"stride"}, dtype{"dtype"}, is_cpu{"is_cpu"}, data_ptr{"data_ptr"},
      is_conj{"is_conj"}, is_neg{"is_neg"}, requires_grad{"requires_grad"};

  static const TorchObjects& get() {
    static py::gil_safe_call_once_and_store<TorchObjects> storage;
    return storage
        .call_once_and_store_result([] {
          const auto torch = py::module_::import("torch");
          TorchObjects objects{torch.attr("Tensor"), torch.attr("nn").attr("Parameter"), {}};
          objects.describe = dlpack::describe_of(objects.tensor);
          for (const auto& [name, value] :
               {std::pair{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16}, {"float16", Dtype::float16},
                {"float8_e4m3fn", Dtype::float8_e4m3fn}, {"int64", Dtype::int64}, {"uint8", Dtype::uint8},
                {"bool", Dtype::boolean}}) {
            const py::object dtype = torch.attr(name);
            objects.dtypes.push_back({dtype, value, dtype.attr("itemsize").cast<int64_t>()});
          }
          return objects;
        })
        .get_stored();
  }

  // The object itself, and neither a subclass nor what stands for one.
  bool is_plain(py::handle object) const {
    const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(object.ptr()));
    return type == tensor.ptr() || type == parameter.ptr();
  }
};

py::object get(py::handle object, const py::str& name) {
  PyObject* value = PyObject_GetAttr(object.ptr(), name.ptr());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
py::object ask(py::handle object, const py::str& method) {
  PyObject* value = PyObject_CallMethodNoArgs(object.ptr(), method.ptr());
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
bool truth(py::handle object) { return object.ptr() == Py_True; }

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

Device device_of(py::handle tensor) {
  if (truth(get(tensor, TorchObjects::get().is_cpu))) return {DeviceKind::cpu, 0};
  const auto kind = tensor.attr("is_cuda").cast<bool>() ? DeviceKind::cuda : DeviceKind::other;
  return {kind, tensor.attr("get_device")().cast<int>()};
}

Dtype dtype_of(const dlpack::Tensor& tensor) {
  const auto is = [&](dlpack::Code code, int bits) {
    return tensor.dtype_code == code && tensor.dtype_bits == bits && tensor.dtype_lanes == 1;
  };
  if (is(dlpack::floating, 32)) return Dtype::float32;
  if (is(dlpack::bfloat, 16)) return Dtype::bfloat16;
  if (is(dlpack::floating, 16)) return Dtype::float16;
  if (is(dlpack::float8_e4m3fn, 8)) return Dtype::float8_e4m3fn;
  if (is(dlpack::signed_integer, 64)) return Dtype::int64;
  if (is(dlpack::boolean, 8)) return Dtype::boolean;
  if (is(dlpack::unsigned_integer, 8)) return Dtype::uint8;
  return Dtype::other;
}

}  // namespace

bool is_tensor(py::handle object) {
  const auto& torch = TorchObjects::get();
  return torch.is_plain(object) || py::isinstance(object, torch.tensor);
}

bool plain(py::handle tensor, bool grad_enabled) {
  const auto& torch = TorchObjects::get();
  return torch.is_plain(tensor) && !(grad_enabled && truth(get(tensor, torch.requires_grad)));
}

PlainOnCpu::PlainOnCpu(py::handle tensor) {
  const auto& torch = TorchObjects::get();
  if (!torch.is_plain(tensor)) return;
  dlpack::Tensor found;
  if (torch.describe && !torch.describe(tensor.ptr(), &found)) {
    yes = found.device_type == dlpack::cpu;
    dtype = dtype_of(found);
  } else {
    PyErr_Clear();
    yes = truth(get(tensor, torch.is_cpu));
  }
  if (yes && dtype == Dtype::other) dtype_object = get(tensor, torch.dtype);
}

Facts::Facts(py::handle tensor) : tensor_(tensor) {
  if (described()) return;
  const auto& torch = TorchObjects::get();
  for (const auto& tuple : {get(tensor, torch.shape), ask(tensor, torch.stride)})
    for (py::handle number : py::reinterpret_borrow<py::tuple>(tuple)) owned_.push_back(integer(number.ptr()));
  dims = owned_.size() / 2;
  shape = owned_.data();
  stride = shape + dims;
  device = device_of(tensor);
  dtype_object = get(tensor, torch.dtype);
  for (const auto& known : torch.dtypes)
    if (known.dtype.is(dtype_object)) {
      dtype = known.value;
      itemsize = known.itemsize;
      return;
    }
  itemsize = dtype_object.attr("itemsize").cast<int64_t>();
}

bool Facts::described() {
  const auto& torch = TorchObjects::get();
  dlpack::Tensor found;
  if (!torch.describe || !torch.is_plain(tensor_)) return false;
  if (torch.describe(tensor_.ptr(), &found)) {
    PyErr_Clear();  // such as a sparse one: its attributes say what is wrong
    return false;
  }
  dtype = dtype_of(found);
  if (found.device_type != dlpack::cpu || dtype == Dtype::other || !found.data || !found.strides) {
    dtype = Dtype::other;
    return false;
  }
  itemsize = found.dtype_bits / 8;
  dims = static_cast<size_t>(found.dims);
  shape = found.shape;
  stride = found.strides;
  data_ = static_cast<char*>(found.data) + found.byte_offset;
  return true;
}

void* Facts::data() const {
  return data_ ? data_ : reinterpret_cast<void*>(integer(ask(tensor_, TorchObjects::get().data_ptr).ptr()));
}

bool Facts::conjugated() const { return truth(ask(tensor_, TorchObjects::get().is_conj)); }
bool Facts::negated() const { return truth(ask(tensor_, TorchObjects::get().is_neg)); }

}  // namespace dsa_rt
