#include "tensor.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>

#include "scratch.h"

namespace dsa_rt {
namespace {

// Python objects the checks compare with; made once and never destroyed, as the interpreter may be gone by then.
struct TorchObjects {
  py::object tensor;
  struct Known {
    py::object dtype;
    Dtype value;
    int64_t itemsize;
  };
  std::vector<Known> dtypes;

  static const TorchObjects& get() {
    static py::gil_safe_call_once_and_store<TorchObjects> storage;
    return storage
        .call_once_and_store_result([] {
          const auto torch = py::module_::import("torch");
          TorchObjects objects{torch.attr("Tensor"), {}};
          for (const auto& [name, value] :
               {std::pair{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16},
                {"float8_e4m3fn", Dtype::float8_e4m3fn}, {"int64", Dtype::int64}, {"uint8", Dtype::uint8},
                {"bool", Dtype::boolean}}) {
            const py::object dtype = torch.attr(name);
            objects.dtypes.push_back({dtype, value, dtype.attr("itemsize").cast<int64_t>()});
          }
          return objects;
        })
        .get_stored();
  }

  void set_dtype(TensorView& view, py::handle dtype) const {
    for (const Known& known : dtypes)
      if (known.dtype.is(dtype)) {
        view.dtype = known.value;
        view.itemsize = known.itemsize;
        return;
      }
    view.dtype = Dtype::other;
    view.itemsize = dtype.attr("itemsize").cast<int64_t>();
  }
};

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::float8_e4m3fn: return "float8_e4m3fn";
    case Dtype::int64: return "int64";
    case Dtype::uint8: return "uint8";
    case Dtype::boolean: return "bool";
    case Dtype::other: break;
  }
  return "other";
}

std::string text(py::handle object) { return py::str(object); }

std::string name_of(py::handle dtype) {
  const std::string name = text(dtype);
  return name.rfind("torch.", 0) == 0 ? name.substr(6) : name;
}

Device device_of(py::handle tensor) {
  if (tensor.attr("is_cpu").cast<bool>()) return {DeviceKind::cpu, 0};
  const auto kind = tensor.attr("is_cuda").cast<bool>() ? DeviceKind::cuda : DeviceKind::other;
  return {kind, tensor.attr("get_device")().cast<int>()};
}

template <class T>
std::string bracketed(const std::vector<T>& values) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << ']';
  return text.str();
}
std::string bracketed(const std::array<int64_t, max_dims>& values, int count) {
  return bracketed(std::vector<int64_t>(values.begin(), values.begin() + count));
}

std::vector<int64_t> integers(const py::object& sequence) {
  const auto tuple = py::reinterpret_borrow<py::tuple>(sequence);
  std::vector<int64_t> values(tuple.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = tuple[i].cast<int64_t>();
  return values;
}

bool is_rest(const char* dim) { return !std::strcmp(dim, "..."); }

bool empty(const TensorView& view) {
  return std::any_of(view.shape.begin(), view.shape.begin() + view.dims, [](int64_t size) { return size == 0; });
}

// Bytes [first, last) that hold elements, as runs without holes.
struct Run {
  intptr_t first, last;
  int owner;
};

void append_runs(const TensorView& view, int owner, std::vector<Run>& runs) {
  if (empty(view)) return;
  const int64_t bytes = view.itemsize;
  int64_t run = 1;
  int inner = view.dims;  // dimensions from here on are dense
  while (inner > 0 && (view.shape[inner - 1] == 1 || view.stride[inner - 1] == run)) run *= view.shape[--inner];
  std::array<int64_t, max_dims> index{};
  for (;;) {
    int64_t offset = 0;
    for (int d = 0; d < inner; ++d) offset += index[d] * view.stride[d];
    const auto first = reinterpret_cast<intptr_t>(view.data) + offset * bytes;
    runs.push_back({first, first + run * bytes, owner});
    int d = inner - 1;
    while (d >= 0 && ++index[d] == view.shape[d]) index[d--] = 0;
    if (d < 0) return;
  }
}

bool runs_overlap(std::vector<Run>& runs, bool different_owners) {
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.first < b.first; });
  intptr_t reached[2] = {INTPTR_MIN, INTPTR_MIN};
  for (const Run& run : runs) {
    if (run.first < reached[different_owners ? 1 - run.owner : run.owner]) return true;
    reached[run.owner] = std::max(reached[run.owner], run.last);
  }
  return false;
}

bool share_memory(const TensorView& a, const TensorView& b) {
  if (a.device.kind != b.device.kind || empty(a) || empty(b)) return false;
  const auto extent = [](const TensorView& view) {
    int64_t last = 0;
    for (int d = 0; d < view.dims; ++d) last += (view.shape[d] - 1) * view.stride[d];
    const auto first = reinterpret_cast<intptr_t>(view.data);
    return std::pair{first, first + (last + 1) * view.itemsize};
  };
  const auto [a_first, a_last] = extent(a);
  const auto [b_first, b_last] = extent(b);
  if (a_last <= b_first || b_last <= a_first) return false;
  std::vector<Run> runs;  // the extents meet, but rows of one may lie between rows of the other
  append_runs(a, 0, runs);
  append_runs(b, 1, runs);
  return runs_overlap(runs, true);
}

bool same_view(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d)
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.stride[d] != b.stride[d])) return false;
  return true;
}

}  // namespace

void register_errors(py::module_& m) {
  static py::gil_safe_call_once_and_store<std::pair<py::object, py::object>> errors;
  errors.call_once_and_store_result([] {
    const auto module = py::module_::import("dsa_rt.errors");
    return std::pair<py::object, py::object>{module.attr("ShapeError"), module.attr("OptionError")};
  });
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ShapeError& error) {
      PyErr_SetString(errors.get_stored().first.ptr(), error.what());
    } catch (const OptionError& error) {
      PyErr_SetString(errors.get_stored().second.ptr(), error.what());
    }
  });
  py::register_exception<Unserved>(m, "Unserved", errors.get_stored().second);  // after, as the last one is tried first
}

void Signature::fail(const std::string& message) const { throw ShapeError(std::string(op_) + ": " + message); }
void Signature::fail_option(const std::string& message) const { throw OptionError(std::string(op_) + ": " + message); }
void Signature::fail_unserved(const std::string& why) const {
  throw Unserved(std::string(op_) + ": backend 'native' has no kernel for this: " + why);
}

const TensorView& Signature::tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims,
                                    DtypeRule dtypes, Access access) {
  return views_.emplace_back(view_of(name, tensor, dims, dtypes, access, false));
}

const TensorView& Signature::host_tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims) {
  return views_.emplace_back(view_of(name, tensor, dims, Dtype::int64, Access::read, true));
}

TensorView Signature::view_of(const char* name, py::handle tensor, std::initializer_list<const char*> dims,
                              DtypeRule dtypes, Access access, bool host) {
  const auto& torch = TorchObjects::get();
  if (!py::isinstance(tensor, torch.tensor))
    fail(std::string(name) + " is a " + Py_TYPE(tensor.ptr())->tp_name + ", expected a torch.Tensor");

  TensorView view;
  view.name = name;
  view.access = access;
  const auto shape = integers(tensor.attr("shape")), stride = integers(tensor.attr("stride")());
  const bool rest = is_rest(*(dims.end() - 1));
  if (rest ? shape.size() < dims.size() - 1 : shape.size() != dims.size()) {
    std::string expected;
    for (const char* dim : dims) expected += (expected.empty() ? "" : ", ") + std::string(dim);
    fail(std::string(name) + " has shape " + bracketed(shape) + ", expected " +
         std::to_string(dims.size() - rest) + (rest ? " or more" : "") +
         (dims.size() == 1 ? " dimension [" : " dimensions [") + expected + "]");
  }
  view.device = device_of(tensor);
  const auto is_on = [&] { return std::string(name) + " is on " + text(tensor.attr("device")) + ", expected "; };
  if (host && view.device.kind != DeviceKind::cpu) fail(is_on() + "cpu, where it is read");
  if (!host && !views_.empty() && !(view.device == views_.front().device))
    fail(is_on() + views_.front().name + "'s device" +
         (views_.front().device.kind == DeviceKind::cpu ? ", cpu" : ""));
  torch.set_dtype(view, tensor.attr("dtype"));
  bind_dtype(view, dtypes, tensor);
  bind_shape(view, shape, dims);
  view.dims = static_cast<int>(dims.size());
  for (size_t d = 0; d < dims.size() - rest; ++d) {
    view.shape[d] = shape[d];
    view.stride[d] = stride[d];
  }
  if (rest) flatten(view, shape, stride);
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<intptr_t>());
  check_layout(view);
  return view;
}

// The last dimension of the view becomes all dimensions from there on.
void Signature::flatten(TensorView& view, const std::vector<int64_t>& shape, const std::vector<int64_t>& stride) const {
  const size_t last = view.dims - 1;
  int64_t dense = 1;
  bool contiguous = true;
  for (size_t d = shape.size(); d-- > last;) {
    if (shape[d] > 1 && stride[d] != dense) contiguous = false;
    dense *= shape[d];
  }
  if (!contiguous && std::find(shape.begin(), shape.end(), 0) == shape.end())
    fail(std::string(view.name) + " has strides " + bracketed(stride) + " for shape " +
         bracketed(shape) + ", expected rows without gaps from dimension " + std::to_string(last) +
         " on; call .contiguous()");
  view.shape[last] = dense;
  view.stride[last] = 1;
}

const Signature::Dim* Signature::find(const std::string& variable) const {
  for (const Dim& dim : dims_)
    if (dim.variable == variable) return &dim;
  return nullptr;
}

int64_t Signature::size(const char* dim) const { return find(dim)->value; }

int64_t Signature::size(const char* dim, int64_t unbound) const {
  const Dim* bound = find(dim);
  return bound ? bound->value : unbound;
}

void Signature::bind_dtype(const TensorView& view, const DtypeRule& rule, py::handle tensor) {
  const py::object dtype = tensor.attr("dtype");
  const auto has = [&] { return std::string(view.name) + " has dtype " + text(dtype); };
  if (!rule.allowed.empty() && std::find(rule.allowed.begin(), rule.allowed.end(), view.dtype) == rule.allowed.end()) {
    std::string expected;
    for (Dtype allowed : rule.allowed) expected += (expected.empty() ? "" : " or ") + std::string(name_of(allowed));
    fail(has() + ", expected " + expected);
  }
  if (!rule.variable) return;
  for (const BoundDtype& bound : dtypes_)
    if (!std::strcmp(bound.variable, rule.variable)) {
      if (!bound.dtype.is(dtype)) fail(has() + ", expected " + name_of(bound.dtype) + " as " + bound.argument);
      return;
    }
  dtypes_.push_back({rule.variable, dtype, view.name});
}

void Signature::bind_shape(const TensorView& view, const std::vector<int64_t>& shape,
                           std::initializer_list<const char*> dims) {
  static const std::string or_one = " or 1";
  std::vector<std::string> expected;
  bool agrees = true;
  size_t d = 0;
  for (const char* dim : dims) {
    if (is_rest(dim)) {
      const std::vector<int64_t> rest(shape.begin() + static_cast<ptrdiff_t>(d), shape.end());
      if (!trailing_.argument) trailing_ = {rest, view.name};
      if (rest != trailing_.shape) agrees = false;
      expected.push_back("..." + bracketed(trailing_.shape) + " as in " + trailing_.argument);
      break;
    }
    if (std::isdigit(static_cast<unsigned char>(*dim))) {
      if (shape[d++] != std::atoll(dim)) agrees = false;
      expected.push_back(dim);
      continue;
    }
    std::string variable = dim;
    const bool may_be_one = variable.size() > or_one.size() &&
                            !variable.compare(variable.size() - or_one.size(), or_one.size(), or_one);
    if (may_be_one) variable.resize(variable.size() - or_one.size());
    const bool free = may_be_one && shape[d] == 1;
    const Dim* bound = find(variable);
    if (bound && bound->value != shape[d] && !free) agrees = false;
    expected.push_back(variable + (bound ? "=" + std::to_string(bound->value) + " as in " + bound->argument : "") +
                       (may_be_one ? or_one : ""));
    if (!bound && !free) dims_.push_back({variable, shape[d], view.name});
    ++d;
  }
  if (!agrees)
    fail(std::string(view.name) + " has shape " + bracketed(shape) + ", expected " +
         bracketed(expected));
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
  for (int64_t i = 1; i < count; ++i)
    if (rows[i] <= rows[i - 1]) return false;
  return !count || (rows[0] >= 0 && rows[count - 1] < total);
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
  std::vector<Run> runs;
  append_runs(view, 0, runs);
  if (runs_overlap(runs, false))
    fail(strides() + " for shape " + bracketed(view.shape, view.dims) +
         ", so that elements share memory; an output needs its own memory for each");
}

void Signature::check_overlap(std::initializer_list<std::pair<const char*, const char*>> exempt) const {
  for (size_t i = 0; i < views_.size(); ++i)
    for (size_t j = i + 1; j < views_.size(); ++j) {
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
