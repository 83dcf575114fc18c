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
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "facts.h"

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
// In a catch block: what was thrown becomes Python's error, for functions that pybind11 does not call.
void set_error();

enum class Access { read, write };
using Names = std::initializer_list<std::string_view>;  // of dimensions

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

const char* name_of(Dtype dtype);  // as torch's, without "torch."

// Dtypes an argument may have, or any. With a variable, all arguments that name it have the same one.
struct DtypeRule {
  DtypeRule(Dtype only) : DtypeRule(nullptr, {only}) {}
  DtypeRule(std::initializer_list<Dtype> any_of) : DtypeRule(nullptr, any_of) {}
  DtypeRule(const char* name, std::initializer_list<Dtype> any_of) : variable(name) {
    for (Dtype dtype : any_of) allowed |= bit(dtype);
  }
  explicit DtypeRule(const char* name) : variable(name) {}  // any at all
  static constexpr unsigned bit(Dtype dtype) { return 1u << static_cast<int>(dtype); }
  const char* variable = nullptr;
  unsigned allowed = 0;  // 0: any
};

// Whether `count` numbers are rows of `total` in ascending order, so each once.
bool increasing(const int64_t* rows, int64_t count, int64_t total);

class Signature {
 public:
  explicit Signature(const char* op) : op_(op) {}

  // The view of `tensor` once its type, device, dtype, shape, strides and alignment are as stated. The last dimension
  // must be contiguous; elements of an output must not share memory with each other. The view lives as long as *this.
  const TensorView& tensor(const char* name, py::handle tensor, Names dims,
                           const DtypeRule& dtypes, Access access = Access::read);

  // The same for integers that are read on the host and lie there, wherever the other arguments are.
  const TensorView& host_tensor(const char* name, py::handle tensor, Names dims);

  // Binds a size that follows from others, for arguments to come; `argument` has those others.
  void derive(std::string_view dim, int64_t value, const char* argument) { bind(dim, value, argument); }

  int64_t size(std::string_view dim) const;
  int64_t size(std::string_view dim, int64_t unbound) const;
  Device device() const { return views_[0].device; }

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
    std::string_view variable;
    int64_t value;
    const char* argument;
  };
  struct BoundDtype {
    const char* variable;
    Dtype dtype;
    py::handle object;  // of `other` ones; torch's dtypes live as long as it does
    const char* argument;
  };
  struct Trailing {
    std::vector<int64_t> shape;
    const char* argument = nullptr;
  };
  // Made in place, as an op refers to its views; no op has more. Nothing here is allocated while a call is good.
  static constexpr size_t most_views = 12, most_dims = 12, most_dtypes = 3;

  const TensorView& add(const char* name, py::handle tensor, Names dims,
                        const DtypeRule& dtypes, Access access, bool host);
  void bind(std::string_view dim, int64_t value, const char* argument);
  const Dim* find(std::string_view variable) const;
  void bind_shape(const TensorView& view, const Facts& facts, Names dims);
  std::string expected_shape(Names dims) const;
  void bind_dtype(const TensorView& view, const DtypeRule& rule, const Facts& facts, py::handle tensor);
  void flatten(TensorView& view, const Facts& facts) const;
  void check_memory(const TensorView& view, const Facts& facts) const;
  void check_layout(const TensorView& view) const;

  const char* op_;
  size_t view_count_ = 0, dim_count_ = 0, dtype_count_ = 0;
  std::array<TensorView, most_views> views_;
  std::array<Dim, most_dims> dims_;
  std::array<BoundDtype, most_dtypes> dtypes_;
  Trailing trailing_;
};

}  // namespace dsa_rt
