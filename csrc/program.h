// A pass that was recorded once and is replayed by one call: native ops in order, with their parameters.
//
// Recording runs every op as always and keeps what its constructor made of the arguments. A replay makes none of the
// checks of shapes again, takes no interpreter and allocates nothing; only what an op reads on the host (see
// ops/launch.h) is read and checked anew, since it may have changed. Scalars stay as they were recorded.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dsa_rt {

namespace py = pybind11;

// Where and how to run: threads and instruction set for CPU tensors, the stream for CUDA tensors.
struct Launch {
  int threads;
  std::string instruction_set;
  uintptr_t stream;
};

// A call of an op whose arguments were checked.
class Call {
 public:
  virtual ~Call() = default;
  virtual void read_host() = 0;
  virtual void run(const Launch& launch) = 0;
};

class Program {
 public:
  // The program that records on this thread, or null.
  static Program* recording();

  // Calls function(); the ops that it calls on this thread become the program. An exception leaves the program empty.
  void record(const py::function& function);

  // Runs a call that was just made, and appends it. The memory of its tensors lives as long as the program.
  void append(const std::string& op, const std::vector<py::object>& tensors, std::unique_ptr<Call> call,
              const Launch& launch);

  void replay(int threads);

  std::vector<std::string> ops() const;
  int64_t bytes() const;

 private:
  class Use;
  struct Step {
    std::string op;
    std::unique_ptr<Call> call;
    Launch launch;
  };
  std::vector<Step> steps_;
  py::dict storages_;  // (address, bytes) -> torch's storage
  std::atomic<bool> in_use_{false};
};

void bind_program(py::module_& m);

}  // namespace dsa_rt
