#include "tensor.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace dsa_rt {
namespace {

// Python objects the checks compare with; made once and never destroyed, as the interpreter may be gone by then.
struct TorchObjects {
  py::object tensor;
  std::vector<std::pair<py::object, Dtype>> dtypes;

  static const TorchObjects& get() {
    static py::gil_safe_call_once_and_store<TorchObjects> storage;
    return storage
        .call_once_and_store_result([] {
          const auto torch = py::module_::import("torch");
          TorchObjects objects{torch.attr("Tensor"), {}};
          for (const auto& [name, dtype] : {std::pair{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16},
                                            {"int64", Dtype::int64}, {"uint8", Dtype::uint8}, {"bool", Dtype::boolean}})
            objects.dtypes.emplace_back(torch.attr(name), dtype);
          return objects;
        })
        .get_stored();
  }

  Dtype dtype_of(py::handle dtype) const {
    for (const auto& [object, value] : dtypes)
      if (object.is(dtype)) return value;
    return Dtype::other;
  }
};

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return "float32";
    case Dtype::bfloat16: return "bfloat16";
    case Dtype::int64: return "int64";
    case Dtype::uint8: return "uint8";
    case Dtype::boolean: return "bool";
    case Dtype::other: break;
  }
  return "other";
}

Device device_of(py::handle tensor) {
  if (tensor.attr("is_cpu").cast<bool>()) return {DeviceKind::cpu, 0};
  const auto kind = tensor.attr("is_cuda").cast<bool>() ? DeviceKind::cuda : DeviceKind::other;
  return {kind, tensor.attr("get_device")().cast<int>()};
}

template <class Range>
std::string bracketed(const Range& values, int count) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < count; ++i) text << (i ? ", " : "") << values[static_cast<size_t>(i)];
  text << ']';
  return text.str();
}

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
  const int64_t bytes = element_size(view.dtype);
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
    return std::pair{first, first + (last + 1) * element_size(view.dtype)};
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

int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::bfloat16: return 2;
    case Dtype::int64: return 8;
    default: return 1;
  }
}

void register_errors() {
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
}

void Signature::fail(const std::string& message) const { throw ShapeError(std::string(op_) + ": " + message); }
void Signature::fail_option(const std::string& message) const { throw OptionError(std::string(op_) + ": " + message); }

const TensorView& Signature::tensor(const char* name, py::handle tensor, std::initializer_list<const char*> dims,
                                    DtypeRule dtypes, Access access) {
  const auto& torch = TorchObjects::get();
  if (!py::isinstance(tensor, torch.tensor))
    fail(std::string(name) + " is a " + Py_TYPE(tensor.ptr())->tp_name + ", expected a torch.Tensor");

  TensorView view;
  view.name = name;
  view.access = access;
  const auto shape = py::reinterpret_borrow<py::tuple>(tensor.attr("shape"));
  if (shape.size() != dims.size()) {
    std::string expected;
    for (const char* dim : dims) expected += (expected.empty() ? "" : ", ") + std::string(dim);
    fail(std::string(name) + " has shape " + std::string(py::str(py::list(shape))) + ", expected " +
         std::to_string(dims.size()) + (dims.size() == 1 ? " dimension [" : " dimensions [") + expected + "]");
  }
  const auto stride = py::reinterpret_steal<py::tuple>(tensor.attr("stride")().release());
  view.dims = static_cast<int>(shape.size());
  for (size_t d = 0; d < shape.size(); ++d) {
    view.shape[d] = shape[d].cast<int64_t>();
    view.stride[d] = stride[d].cast<int64_t>();
  }
  view.device = device_of(tensor);
  if (!views_.empty() && !(view.device == views_.front().device))
    fail(std::string(name) + " is on " + std::string(py::str(tensor.attr("device"))) + ", expected " +
         views_.front().name + "'s device" + (views_.front().device.kind == DeviceKind::cpu ? ", cpu" : ""));
  view.dtype = torch.dtype_of(tensor.attr("dtype"));
  bind_dtype(view, dtypes, tensor);
  bind_shape(view, dims);
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<intptr_t>());
  check_layout(view);
  return views_.emplace_back(view);
}

const Signature::Binding* Signature::find(const std::vector<Binding>& bindings, const char* variable) const {
  for (const Binding& binding : bindings)
    if (!std::strcmp(binding.variable, variable)) return &binding;
  return nullptr;
}

int64_t Signature::size(const char* dim) const { return find(dims_, dim)->value; }

void Signature::bind_dtype(const TensorView& view, const DtypeRule& rule, py::handle tensor) {
  const auto has = [&] { return std::string(view.name) + " has dtype " + std::string(py::str(tensor.attr("dtype"))); };
  if (std::find(rule.allowed.begin(), rule.allowed.end(), view.dtype) == rule.allowed.end()) {
    std::string expected;
    for (Dtype dtype : rule.allowed) expected += (expected.empty() ? "" : " or ") + std::string(name_of(dtype));
    fail(has() + ", expected " + expected);
  }
  if (!rule.variable) return;
  if (const Binding* bound = find(dtypes_, rule.variable)) {
    if (bound->value != static_cast<int64_t>(view.dtype))
      fail(has() + ", expected " + name_of(static_cast<Dtype>(bound->value)) + " as " + bound->argument);
  } else {
    dtypes_.push_back({rule.variable, static_cast<int64_t>(view.dtype), view.name});
  }
}

void Signature::bind_shape(const TensorView& view, std::initializer_list<const char*> dims) {
  std::vector<std::string> expected;
  bool agrees = true;
  size_t d = 0;
  for (const char* dim : dims) {
    const Binding* bound = find(dims_, dim);
    if (bound && bound->value != view.shape[d]) agrees = false;
    std::string text = dim;
    if (bound) text += "=" + std::to_string(bound->value) + " as in " + bound->argument;
    expected.push_back(text);
    if (!bound) dims_.push_back({dim, view.shape[d], view.name});
    ++d;
  }
  if (!agrees)
    fail(std::string(view.name) + " has shape " + bracketed(view.shape, view.dims) + ", expected " +
         bracketed(expected, view.dims));
}

void Signature::check_layout(const TensorView& view) const {
  const auto strides = [&] { return std::string(view.name) + " has strides " + bracketed(view.stride, view.dims); };
  const int last = view.dims - 1;
  if (empty(view)) return;
  if (last >= 0 && view.shape[last] > 1 && view.stride[last] != 1)
    fail(strides() + ", expected 1 in the last dimension; call .contiguous()");
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(element_size(view.dtype)))
    fail(std::string(view.name) + " starts at an address that is no multiple of its element size, " +
         std::to_string(element_size(view.dtype)) + " bytes");
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
