#include "tensor.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>

#include "overlap.h"
#include "scratch.h"

namespace dsa_rt {

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float16: return "float16";
    case Dtype::float8_e4m3fn: return "float8_e4m3fn";
    case Dtype::int64: return "int64";
    case Dtype::boolean: return "bool";
    case Dtype::uint8: return "uint8";
    case Dtype::other: break;
  }
  return "other";
}

namespace {

std::string text(py::handle object) { return py::str(object); }

std::string name_of(py::handle dtype) {
  const std::string name = text(dtype);
  return name.rfind("torch.", 0) == 0 ? name.substr(6) : name;
}

template <class T>
std::string bracketed(const std::vector<T>& values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}
std::string bracketed(const int64_t* values, size_t count) {
  return bracketed(std::vector<int64_t>(values, values + count));
}
std::string bracketed(const std::array<int64_t, max_dims>& values, int count) {
  return bracketed(values.data(), static_cast<size_t>(count));
}

// Equality of names, most of which are one letter.
bool same(std::string_view a, std::string_view b) {
  return a.size() == b.size() && a[0] == b[0] && (a.size() == 1 || a == b);
}

bool is_rest(std::string_view dim) { return same(dim, "..."); }
bool is_number(std::string_view dim) { return dim[0] >= '0' && dim[0] <= '9'; }

// "B" and whether it may be 1 as well, of "B or 1".
std::pair<std::string_view, bool> variable_of(std::string_view dim) {
  constexpr std::string_view or_one = " or 1";
  const bool may_be_one =
      dim.size() > or_one.size() && dim.substr(dim.size() - or_one.size()) == or_one;
  if (may_be_one) dim.remove_suffix(or_one.size());
  return {dim, may_be_one};
}

// Python's classes for the errors of this module; made once and never destroyed.
struct Errors {
  py::object shape, option, unserved;
};
py::gil_safe_call_once_and_store<Errors> errors;

// What is none of them goes on.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Unserved& error) {
    PyErr_SetString(errors.get_stored().unserved.ptr(), error.what());
  } catch (const ShapeError& error) {
    PyErr_SetString(errors.get_stored().shape.ptr(), error.what());
  } catch (const OptionError& error) {
    PyErr_SetString(errors.get_stored().option.ptr(), error.what());
  }
}

}  // namespace

void register_errors(py::module_& m) {
  errors.call_once_and_store_result([&] {
    const auto module = py::module_::import("dsa_rt.errors");
    const py::object option = module.attr("OptionError");
    return Errors{module.attr("ShapeError"), option, py::exception<Unserved>(m, "Unserved", option)};
  });
  py::register_exception_translator(translate);
}

void set_error() {
  try {
    translate(std::current_exception());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

void Signature::fail(const std::string& message) const { throw ShapeError(std::string(op_) + ": " + message); }
void Signature::fail_option(const std::string& message) const { throw OptionError(std::string(op_) + ": " + message); }
void Signature::fail_unserved(const std::string& why) const {
  throw Unserved(std::string(op_) + ": backend 'native' has no kernel for this: " + why);
}

const TensorView& Signature::tensor(const char* name, py::handle tensor, Names dims,
                                    const DtypeRule& dtypes, Access access) {
  return add(name, tensor, dims, dtypes, access, false);
}

const TensorView& Signature::host_tensor(const char* name, py::handle tensor, Names dims) {
  return add(name, tensor, dims, Dtype::int64, Access::read, true);
}

const TensorView& Signature::add(const char* name, py::handle tensor, Names dims,
                                 const DtypeRule& dtypes, Access access, bool host) {
  if (!is_tensor(tensor))
    fail(std::string(name) + " is a " + Py_TYPE(tensor.ptr())->tp_name + ", expected a torch.Tensor");

  if (view_count_ == most_views) throw std::logic_error(std::string(op_) + ": more tensors than a Signature holds");
  TensorView& view = views_[view_count_];
  view.name = name;
  view.access = access;
  const Facts facts(tensor);
  const bool rest = is_rest(*(dims.end() - 1));
  if (rest ? facts.dims < dims.size() - 1 : facts.dims != dims.size()) {
    std::string expected;
    for (std::string_view dim : dims) expected += (expected.empty() ? "" : ", ") + std::string(dim);
    fail(std::string(name) + " has shape " + bracketed(facts.shape, facts.dims) + ", expected " +
         std::to_string(dims.size() - rest) + (rest ? " or more" : "") +
         (dims.size() == 1 ? " dimension [" : " dimensions [") + expected + "]");
  }
  view.device = facts.device;
  const auto is_on = [&] { return std::string(name) + " is on " + text(tensor.attr("device")) + ", expected "; };
  if (host && view.device.kind != DeviceKind::cpu) fail(is_on() + "cpu, where it is read");
  if (!host && view_count_ && !(view.device == views_[0].device))
    fail(is_on() + views_[0].name + "'s device" + (views_[0].device.kind == DeviceKind::cpu ? ", cpu" : ""));
  view.dtype = facts.dtype;
  view.itemsize = facts.itemsize;
  bind_dtype(view, dtypes, facts, tensor);
  bind_shape(view, facts, dims);
  view.dims = static_cast<int>(dims.size());
  for (size_t d = 0; d < dims.size() - rest; ++d) {
    view.shape[d] = facts.shape[d];
    view.stride[d] = facts.stride[d];
  }
  if (rest) flatten(view, facts);
  view.data = facts.data();
  check_memory(view, facts);
  check_layout(view);
  ++view_count_;
  return view;
}

// The last dimension of the view becomes all dimensions from there on.
void Signature::flatten(TensorView& view, const Facts& facts) const {
  const size_t last = view.dims - 1;
  int64_t dense = 1;
  bool contiguous = true;
  for (size_t d = facts.dims; d-- > last;) {
    if (facts.shape[d] > 1 && facts.stride[d] != dense) contiguous = false;
    dense *= facts.shape[d];
  }
  if (!contiguous && std::find(facts.shape, facts.shape + facts.dims, 0) == facts.shape + facts.dims)
    fail(std::string(view.name) + " has strides " + bracketed(facts.stride, facts.dims) + " for shape " +
         bracketed(facts.shape, facts.dims) + ", expected rows without gaps from dimension " + std::to_string(last) +
         " on; call .contiguous()");
  view.shape[last] = dense;
  view.stride[last] = 1;
}

void Signature::bind(std::string_view dim, int64_t value, const char* argument) {
  if (dim_count_ == most_dims) throw std::logic_error(std::string(op_) + ": more dimensions than a Signature holds");
  dims_[dim_count_++] = {dim, value, argument};
}

const Signature::Dim* Signature::find(std::string_view variable) const {
  for (size_t i = 0; i < dim_count_; ++i)
    if (same(dims_[i].variable, variable)) return &dims_[i];
  return nullptr;
}

int64_t Signature::size(std::string_view dim) const { return find(dim)->value; }

int64_t Signature::size(std::string_view dim, int64_t unbound) const {
  const Dim* bound = find(dim);
  return bound ? bound->value : unbound;
}

void Signature::bind_dtype(const TensorView& view, const DtypeRule& rule, const Facts& facts, py::handle tensor) {
  const auto has = [&] { return std::string(view.name) + " has dtype " + text(tensor.attr("dtype")); };
  if (rule.allowed && !(rule.allowed & DtypeRule::bit(view.dtype))) {
    std::string expected;
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float8_e4m3fn, Dtype::int64, Dtype::boolean,
                        Dtype::uint8})
      if (rule.allowed & DtypeRule::bit(dtype)) expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
    fail(has() + ", expected " + expected);
  }
  if (!rule.variable) return;
  for (size_t i = 0; i < dtype_count_; ++i)
    if (const BoundDtype& bound = dtypes_[i]; (bound.variable == rule.variable || !std::strcmp(bound.variable, rule.variable))) {
      if (bound.dtype != view.dtype || (view.dtype == Dtype::other && !bound.object.is(facts.dtype_object)))
        fail(has() + ", expected " + (bound.dtype == Dtype::other ? name_of(bound.object) : name_of(bound.dtype)) +
             " as " + bound.argument);
      return;
    }
  if (dtype_count_ == most_dtypes) throw std::logic_error(std::string(op_) + ": more dtypes than a Signature holds");
  dtypes_[dtype_count_++] = {rule.variable, view.dtype, facts.dtype_object, view.name};
}

void Signature::bind_shape(const TensorView& view, const Facts& facts, Names dims) {
  bool agrees = true;
  const size_t bound_before = dim_count_;
  size_t d = 0;
  for (std::string_view dim : dims) {
    if (is_rest(dim)) {
      const auto *first = facts.shape + d, *last = facts.shape + facts.dims;
      if (!trailing_.argument) trailing_ = {{first, last}, view.name};
      agrees = agrees && std::equal(first, last, trailing_.shape.begin(), trailing_.shape.end());
      break;
    }
    const int64_t size = facts.shape[d++];
    if (is_number(dim)) {
      agrees = agrees && size == std::atoll(dim.data());
      continue;
    }
    const auto [variable, may_be_one] = variable_of(dim);
    if (may_be_one && size == 1) continue;
    if (const Dim* bound = find(variable))
      agrees = agrees && bound->value == size;
    else
      bind(variable, size, view.name);
  }
  if (agrees) return;
  dim_count_ = bound_before;  // what this argument bound is not what was expected of it
  fail(std::string(view.name) + " has shape " + bracketed(facts.shape, facts.dims) + ", expected " + expected_shape(dims));
}

std::string Signature::expected_shape(Names dims) const {
  std::vector<std::string> expected;
  for (std::string_view dim : dims) {
    if (is_rest(dim)) {
      expected.push_back("..." + bracketed(trailing_.shape) + " as in " + trailing_.argument);
    } else if (is_number(dim)) {
      expected.emplace_back(dim);
    } else {
      const auto [variable, may_be_one] = variable_of(dim);
      const Dim* bound = find(variable);
      expected.push_back(std::string(variable) +
                         (bound ? "=" + std::to_string(bound->value) + " as in " + bound->argument : "") +
                         (may_be_one ? " or 1" : ""));
    }
  }
  return bracketed(expected);
}

// What torch's dispatcher sorts out before a kernel sees it, and a direct call does not: tensors whose numbers are not
// those in their memory. Real numbers among them are negated imaginary parts, fp32 or of dtypes that are `other` here,
// and their strides are even, but in a dimension of 1.
void Signature::check_memory(const TensorView& view, const Facts& facts) const {
  if (view.device.kind != DeviceKind::cpu || empty(view)) return;
  const auto refuse = [&](const char* is, const char* call) {
    fail(std::string(view.name) + is + ", expected numbers that lie in memory as they are; call " + call);
  };
  const bool other = view.dtype == Dtype::other;
  if (!view.data) refuse(" has no memory", ".clone()");
  if (other && facts.conjugated()) refuse(" is to be conjugated when it is read", ".resolve_conj()");
  if ((other || (view.dtype == Dtype::float32 && view.shape[view.dims - 1] == 1)) && facts.negated())
    refuse(" is to be negated when it is read", ".resolve_neg()");
}

void Signature::check_contiguous(const TensorView& view) const {
  int64_t dense = 1;
  for (int d = view.dims - 1; d >= 0 && !empty(view); --d) {
    if (view.shape[d] > 1 && view.stride[d] != dense)
      fail(std::string(view.name) + " has strides " + bracketed(view.stride, view.dims) +
           " for shape " + bracketed(view.shape, view.dims) +
           ", expected a contiguous tensor; call .contiguous()");
    dense *= view.shape[d];
  }
}

bool increasing(const int64_t* rows, int64_t count, int64_t total) {
  if (!count) return true;
  uint64_t signs = static_cast<uint64_t>(rows[0]);  // negative where a row is, or where one is not above the row before
  for (int64_t i = 1; i < count; ++i) {             // without a branch, for compilers to vectorise
    const auto row = static_cast<uint64_t>(rows[i]), before = static_cast<uint64_t>(rows[i - 1]);
    signs |= row | (row - before - 1);
  }
  return !(signs >> 63) && rows[count - 1] < total;
}

void Signature::check_rows(const TensorView& rows, int64_t total, bool distinct) const {
  const auto* row = rows.as<int64_t>();
  const auto at = [&](int64_t i) { return std::string(rows.name) + "[" + std::to_string(i) + "]"; };
  if (increasing(row, rows.shape[0], total)) return;
  unsigned char* taken = nullptr;  // a mark for each row
  if (distinct && rows.shape[0]) {
    taken = static_cast<unsigned char*>(thread_scratch(static_cast<size_t>(total)));
    if (!taken && total) throw std::bad_alloc();
    std::fill_n(taken, total, 0);
  }
  for (int64_t i = 0; i < rows.shape[0]; ++i) {
    if (row[i] < 0 || row[i] >= total)
      fail(at(i) + " is " + std::to_string(row[i]) + ", expected 0 to " + std::to_string(total - 1));
    if (!distinct) continue;
    if (taken[row[i]]) {
      const int64_t before = std::find(row, row + i, row[i]) - row;
      fail(at(i) + " is " + std::to_string(row[i]) + " like " + at(before) + ", expected distinct rows");
    }
    taken[row[i]] = 1;
  }
}

void Signature::check_layout(const TensorView& view) const {
  const auto strides = [&] { return std::string(view.name) + " has strides " + bracketed(view.stride, view.dims); };
  const int last = view.dims - 1;
  if (empty(view)) return;
  if (last >= 0 && view.shape[last] > 1 && view.stride[last] != 1)
    fail(strides() + ", expected 1 in the last dimension; call .contiguous()");
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(view.itemsize))
    fail(std::string(view.name) + " starts at an address that is no multiple of its element size, " +
         std::to_string(view.itemsize) + " bytes");
  if (view.access == Access::read) return;
  int64_t dense = 1;
  bool contiguous = true;
  for (int d = last; d >= 0; --d) {
    if (view.shape[d] > 1 && view.stride[d] != dense) contiguous = false;
    dense *= view.shape[d];
  }
  if (contiguous) return;
  if (elements_share_memory(view))
    fail(strides() + " for shape " + bracketed(view.shape, view.dims) +
         ", so that elements share memory; an output needs its own memory for each");
}

void Signature::check_overlap(std::initializer_list<std::pair<const char*, const char*>> exempt) const {
  for (size_t i = 0; i < view_count_; ++i)
    for (size_t j = i + 1; j < view_count_; ++j) {
      const TensorView &a = views_[i], &b = views_[j];
      if (a.access == Access::read && b.access == Access::read) continue;
      const bool may_be_same = std::any_of(exempt.begin(), exempt.end(), [&](const auto& pair) {
        return (!std::strcmp(pair.first, a.name) && !std::strcmp(pair.second, b.name)) ||
               (!std::strcmp(pair.first, b.name) && !std::strcmp(pair.second, a.name));
      });
      if ((may_be_same && same_view(a, b)) || !share_memory(a, b)) continue;
      fail(std::string(a.name) + " and " + b.name + " overlap in memory; an output needs memory of its own" +
           (may_be_same ? ", or may be the very same tensor" : ""));
    }
}

}  // namespace dsa_rt
