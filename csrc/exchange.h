// The part of DLPack's C exchange API that is used here: where a Python tensor lies and what it is, in some 20 ns, with
// none of its attributes. Newer versions of torch have it; the structs are DLPack's, whose layout stays within a major
// version.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dsa_rt::dlpack {

namespace py = pybind11;

constexpr int32_t cpu = 1;
enum Code : uint8_t {
  signed_integer = 0,
  unsigned_integer = 1,
  floating = 2,
  bfloat = 4,
  boolean = 6,
  float8_e4m3fn = 10
};

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dims;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* makes_and_takes[3];
  int (*describe)(void* object, Tensor* out);  // 0, or -1 with a Python error; may be null
  void* current_stream;
};

// That of a type, or null where it has none that is understood here.
inline decltype(ExchangeApi::describe) describe_of(py::handle type) {
  const py::object capsule = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
  constexpr const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) return nullptr;
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), name));
  return api->major == 1 ? api->describe : nullptr;
}

}  // namespace dsa_rt::dlpack
