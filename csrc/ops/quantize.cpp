// Rows into a cache in FP8.
#include "../../kernels/cpu/quantize.h"

#include <algorithm>

#include "../cpu_features.h"
#include "../parallel.h"
#include "launch.h"
#include "ops.h"

#if defined(DSA_RT_CUDA)
#include "../../kernels/cuda/quantize.h"
#endif

namespace dsa_rt {
namespace {

cpu::QuantizeRows cpu_kernel(const std::string& instruction_set) {
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return cpu::quantize_rows_avx512;
    case InstructionSet::avx2: return cpu::quantize_rows_avx2;
#endif
    default: return cpu::quantize_rows_generic;
  }
}

constexpr int64_t row_work = 1 << 15;  // elements below which waking a thread costs more than it saves

Heads heads_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], view.stride[2]}; }

class QuantizeRows {
 public:
  QuantizeRows(py::handle out, py::handle scale, py::handle rows, py::handle slots) : op_("quantize_rows") {
    const auto& o = op_.tensor("out", out, {"B", "N", "H", "D"}, Dtype::float8_e4m3fn, Access::write);
    const auto& s = op_.tensor("scale", scale, {"B", "N", "H"}, Dtype::float32, Access::write);
    const auto& r = op_.tensor("rows", rows, {"B", "A", "H", "D"}, float_dtypes);
    if (!slots.is_none()) slots_ = &op_.tensor("slots", slots, {"A"}, Dtype::int64);
    const int64_t active = op_.size("A"), total = op_.size("N");
    if (op_.size("D") == 0) op_.fail("out has D = 0 channels, expected at least one");
    if (!slots_ && active > total)
      op_.fail("out has N = " + std::to_string(total) + " rows, expected at least A = " + std::to_string(active) +
               " where slots is None");
    op_.check_overlap();
    read_host();
    params_ = {heads_of(o),
               s.as<float>(),
               s.stride[0],
               s.stride[1],
               heads_of(r),
               element_of(r),
               slots_ ? slots_->as<int64_t>() : nullptr,
               op_.size("B"),
               active,
               op_.size("H"),
               op_.size("D"),
               total};
  }

  void run(const Launch& launch) {
    const auto& p = params_;
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::quantize_rows(p, launch.stream);
#endif
    if (op_.device().kind != DeviceKind::cpu) no_kernel(op_);
    const auto kernel = cpu_kernel(launch.instruction_set);
    parallel_for(p.batch * p.active, row_work / std::max<int64_t>(p.heads * p.dim, 1), launch.threads,
                 [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }

  void read_host() {
    if (slots_ && op_.device().kind == DeviceKind::cpu) op_.check_rows(*slots_, op_.size("N"), true);
  }

 private:
  Signature op_;
  const TensorView* slots_ = nullptr;
  QuantizeRowsParams params_;
};

}  // namespace

void bind_quantize(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<QuantizeRows, Tensor, Tensor, Tensor, Tensor>(m, "quantize_rows", arg("out"), arg("scale"), arg("rows"),
                                                     arg("slots") = py::none());
}

}  // namespace dsa_rt
