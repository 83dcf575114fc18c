// What a Python tensor is and where it lies, asked for without torch headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dsa_rt {

namespace py = pybind11;

enum class Dtype { float32, bfloat16, float16, float8_e4m3fn, int64, boolean, uint8, other };

enum class DeviceKind { cpu, cuda, other };
struct Device {
  DeviceKind kind;
  int index;
  bool operator==(const Device& other) const { return kind == other.kind && index == other.index; }
};

bool is_tensor(py::handle object);  // or of a subclass

// Whether a call by its Python objects takes the path that torch's dispatcher would: a torch.Tensor or Parameter itself,
// no subclass, and no gradient that is wanted.
bool plain(py::handle tensor, bool grad_enabled);

// Whether it is such an object, whatever it wants, on the CPU; then also its dtype, as torch's object where it is `other`
// or torch has no exchange API.
struct PlainOnCpu {
  explicit PlainOnCpu(py::handle tensor);
  explicit operator bool() const { return yes; }
  bool yes = false;
  Dtype dtype = Dtype::other;
  py::object dtype_object;
};

// Asked of torch's exchange API where it has one and the tensor is one on the CPU of a known dtype; else of the tensor's
// attributes, `data` last, as not every kind of tensor has an address.
class Facts {
 public:
  explicit Facts(py::handle tensor);
  Facts(const Facts&) = delete;

  void* data() const;
  bool conjugated() const;  // when it is read: the memory does not have it so
  bool negated() const;

  size_t dims = 0;
  const int64_t *shape = nullptr, *stride = nullptr;
  Device device{DeviceKind::cpu, 0};
  Dtype dtype = Dtype::other;
  int64_t itemsize = 0;
  py::object dtype_object;  // where it is `other`, at least

 private:
  bool described();

  py::handle tensor_;
  void* data_ = nullptr;
  std::vector<int64_t> owned_;
};

}  // namespace dsa_rt
