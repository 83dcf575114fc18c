// Tensors as the native module sees them, and the checks at its door.
//
// An op states what it takes once, in the order of its arguments:
//
//   Signature op("cached_step");
//   const auto& x = op.tensor("x", x_object, {"B", "N", "P"}, {"X", {Dtype::float32, Dtype::bfloat16}}, Access::write);
//   const auto& rows = op.tensor("rows", rows_object, {"A"}, Dtype::int64);
//   op.check_overlap();
//
// Dimension and dtype names are bound by the first argument that has them and must agree in every later one; so must
// the device. A mismatch throws ShapeError, which Python sees as dsa_rt.errors.ShapeError.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dsa_rt {

namespace py = pybind11;

struct ShapeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct OptionError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void register_errors();

enum class Dtype { float32, bfloat16, int64, uint8, boolean, other };
int64_t element_size(Dtype dtype);

enum class DeviceKind { cpu, cuda, other };
struct Device {
  DeviceKind kind;
  int index;
  bool operator==(const Device& other) const { return kind == other.kind && index == other.index; }
};

enum class Access { read, write };

constexpr int max_dims = 4;

struct TensorView {
  const char* name = nullptr;
  void* data = nullptr;
  Dtype dtype = Dtype::other;
  Device device{};
  Access access = Access::read;
  int dims = 0;
  std::array<int64_t, max_dims> shape{}, stride{};  // stride in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Dtypes an argument may have. With a variable, all arguments that name it have the same one.
struct DtypeRule {
  DtypeRule(Dtype only) : allowed{only} {}
  DtypeRule(std::initializer_list<Dtype> any_of) : allowed(any_of) {}
  DtypeRule(const char* name, std::initializer_list<Dtype> any_of) : variable(name), allowed(any_of) {}
  const char* variable = nullptr;
  std::vector<Dtype> allowed;
};

class Signature {
 public:
  explicit Signature(const char* op) : op_(op) {}

  // The view of `tensor` once its type, device, dtype, shape, strides and alignment are as stated. The last dimension
  // must be contiguous; elements of an output must not share memory with each other. The view lives as long as *this.
  const TensorView& tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims,
                           DtypeRule dtypes, Access access = Access::read);

  int64_t size(const char* dim) const;
  Device device() const { return views_.front().device; }

  // Throws where an output shares memory with another argument; `exempt` lists pairs that may be one and the same
  // tensor, and they may only be that.
  void check_overlap(std::initializer_list<std::pair<const char*, const char*>> exempt = {}) const;

  [[noreturn]] void fail(const std::string& message) const;
  [[noreturn]] void fail_option(const std::string& message) const;

 private:
  struct Binding {
    const char* variable;
    int64_t value;
    const char* argument;
  };
  const Binding* find(const std::vector<Binding>& bindings, const char* variable) const;
  void bind_shape(const TensorView& view, std::initializer_list<const char*> dims);
  void bind_dtype(const TensorView& view, const DtypeRule& rule, py::handle tensor);
  void check_layout(const TensorView& view) const;

  const char* op_;
  std::deque<TensorView> views_;
  std::vector<Binding> dims_, dtypes_;
};

}  // namespace dsa_rt
