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
// the device. "B or 1" takes a size of 1 beside that of B, a number stands for itself, and "..." as the last name for
// any number of dimensions, the same in every argument that has it, which lie densely and become one in the view. A
// mismatch throws ShapeError, which Python sees as dsa_rt.errors.ShapeError.
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
// The arguments are good, but no kernel here takes them: another backend may.
struct Unserved : OptionError {
  using OptionError::OptionError;
};
void register_errors(py::module_& m);

enum class Dtype { float32, bfloat16, float8_e4m3fn, int64, uint8, boolean, other };

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
  int64_t itemsize = 0;  // bytes of an element
  int dims = 0;
  std::array<int64_t, max_dims> shape{}, stride{};  // stride in elements

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Dtypes an argument may have, or any. With a variable, all arguments that name it have the same one.
struct DtypeRule {
  DtypeRule(Dtype only) : allowed{only} {}
  DtypeRule(std::initializer_list<Dtype> any_of) : allowed(any_of) {}
  DtypeRule(const char* name, std::initializer_list<Dtype> any_of) : variable(name), allowed(any_of) {}
  explicit DtypeRule(const char* name) : variable(name) {}  // any at all
  const char* variable = nullptr;
  std::vector<Dtype> allowed;
};

// Whether `count` numbers are rows of `total` in ascending order, so each once.
bool increasing(const int64_t* rows, int64_t count, int64_t total);

class Signature {
 public:
  explicit Signature(const char* op) : op_(op) {}

  // The view of `tensor` once its type, device, dtype, shape, strides and alignment are as stated. The last dimension
  // must be contiguous; elements of an output must not share memory with each other. The view lives as long as *this.
  const TensorView& tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims,
                           DtypeRule dtypes, Access access = Access::read);

  // The same for integers that are read on the host and lie there, wherever the other arguments are.
  const TensorView& host_tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims);

  // Binds a size that follows from others, for arguments to come; `argument` has those others.
  void derive(const char* dim, int64_t value, const char* argument) { dims_.push_back({dim, value, argument}); }

  int64_t size(const char* dim) const;
  int64_t size(const char* dim, int64_t unbound) const;
  Device device() const { return views_.front().device; }

  void check_contiguous(const TensorView& view) const;

  // Throws where one of `count` numbers is no row of `total` or, if they are to be distinct, comes twice. Reads memory:
  // for the CPU alone.
  void check_rows(const TensorView& rows, int64_t total, bool distinct) const;

  // Throws where an output shares memory with another argument; `exempt` lists pairs that may be one and the same
  // tensor, and they may only be that.
  void check_overlap(std::initializer_list<std::pair<const char*, const char*>> exempt = {}) const;

  [[noreturn]] void fail(const std::string& message) const;
  [[noreturn]] void fail_option(const std::string& message) const;
  [[noreturn]] void fail_unserved(const std::string& why) const;

 private:
  struct Dim {
    std::string variable;
    int64_t value;
    const char* argument;
  };
  struct BoundDtype {
    const char* variable;
    py::handle dtype;  // torch's dtypes live as long as it does
    const char* argument;
  };
  struct Trailing {
    std::vector<int64_t> shape;
    const char* argument = nullptr;
  };
  TensorView view_of(const char* name, py::handle tensor, std::initializer_list<const char*> dims, DtypeRule dtypes,
                     Access access, bool host);
  const Dim* find(const std::string& variable) const;
  void bind_shape(const TensorView& view, const std::vector<int64_t>& shape, std::initializer_list<const char*> dims);
  void bind_dtype(const TensorView& view, const DtypeRule& rule, py::handle tensor);
  void flatten(TensorView& view, const std::vector<int64_t>& shape, const std::vector<int64_t>& stride) const;
  void check_layout(const TensorView& view) const;

  const char* op_;
  std::deque<TensorView> views_;
  std::vector<Dim> dims_;
  std::vector<BoundDtype> dtypes_;
  Trailing trailing_;
};

}  // namespace dsa_rt
