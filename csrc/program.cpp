#include "program.h"

#include <pybind11/stl.h>

#include <utility>

#include "tensor.h"

namespace dsa_rt {
namespace {

thread_local Program* recording_here = nullptr;

}  // namespace

// One recording or replay at a time.
class Program::Use {
 public:
  explicit Use(Program& program) : program_(program) {
    if (program.in_use_.exchange(true))
      throw OptionError("program: another thread records or replays it; give each thread a program of its own");
  }
  ~Use() { program_.in_use_ = false; }
  Use(const Use&) = delete;

 private:
  Program& program_;
};

Program* Program::recording() { return recording_here; }

void Program::record(const py::function& function) {
  if (recording_here) throw OptionError("program: another one records on this thread; end that one first");
  const Use use(*this);
  if (!steps_.empty())
    throw OptionError("program: it holds " + std::to_string(steps_.size()) + " ops already; make a new one");
  struct Recording {
    explicit Recording(Program* program) { recording_here = program; }
    ~Recording() { recording_here = nullptr; }
  } const recording(this);
  try {
    function();
  } catch (...) {
    steps_.clear();
    storages_.clear();
    throw;
  }
}

void Program::append(const std::string& op, const std::vector<py::object>& tensors, std::unique_ptr<Call> call,
                     const Launch& launch) {
  for (const py::object& tensor : tensors) {
    if (!tensor.attr("is_cpu").cast<bool>())
      throw OptionError(op + ": a program takes tensors on the CPU, this one is on " +
                        std::string(py::str(tensor.attr("device"))) + "; record a CUDA graph instead");
  }
  {
    py::gil_scoped_release release;
    call->run(launch);
  }
  for (const py::object& tensor : tensors) {
    const py::object storage = tensor.attr("untyped_storage")();
    storages_[py::make_tuple(storage.attr("data_ptr")(), storage.attr("nbytes")())] = storage;
  }
  steps_.push_back({op, std::move(call), launch});
}

void Program::replay(int threads) {
  if (recording_here) throw OptionError("program: a replay cannot be recorded; call the function it was recorded from");
  const Use use(*this);
  py::gil_scoped_release release;
  for (Step& step : steps_) {
    step.launch.threads = threads;
    step.call->read_host();
    step.call->run(step.launch);
  }
}

std::vector<std::string> Program::ops() const {
  std::vector<std::string> names;
  for (const Step& step : steps_) names.push_back(step.op);
  return names;
}

int64_t Program::bytes() const {
  int64_t total = 0;
  for (const auto& [key, storage] : storages_) total += key.cast<std::pair<int64_t, int64_t>>().second;
  return total;
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init<>())
      .def("record", &Program::record, py::arg("function"))
      .def("replay", &Program::replay, py::arg("threads") = 1)
      .def_property_readonly("ops", &Program::ops)
      .def_property_readonly("bytes", &Program::bytes);
}

}  // namespace dsa_rt
