// The step family. Each op is a small class: the constructor checks the arguments, run() launches. Python can ask for
// the check alone (check_…), for backends that are not in this module.
#include "../../kernels/cpu/step.h"

#include <algorithm>

#include "../cpu_features.h"
#include "../parallel.h"
#include "launch.h"
#include "ops.h"

#if defined(DSA_RT_CUDA)
#include "../../kernels/cuda/step.h"
#endif

namespace dsa_rt {
namespace {

const cpu::StepKernels& cpu_kernels(const std::string& instruction_set) {
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
#if defined(DSA_RT_AVX512_BF16)
      return cpu::step_avx512_bf16;
#endif
    case InstructionSet::avx512: return cpu::step_avx512;
    case InstructionSet::avx2: return cpu::step_avx2;
#endif
    default: return cpu::step_generic;
  }
}

Rows rows_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], element_of(view)}; }

// Runs rows in pieces of at least `elements` elements: below that, waking a thread costs more than it saves.
template <class Params>
void run_rows(void (*kernel)(const Params&, int64_t, int64_t), const Params& params, int64_t elements, int threads) {
  const int64_t grain = elements / std::max<int64_t>(params.width, 1);
  parallel_for(params.batch * params.rows, grain, threads,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

constexpr int64_t copy_grain = 1 << 16, noise_grain = 1 << 13;  // elements; roughly 20 µs of work each

uint32_t draw_of(const Signature& op, int64_t draw) {
  if (draw < 0 || draw > 0xFFFFFFFF) op.fail_option("draw is " + std::to_string(draw) + ", expected 0 to 2^32 - 1");
  return static_cast<uint32_t>(draw);
}

class PhiloxNormal {
 public:
  PhiloxNormal(py::handle out, py::handle seeds, py::handle tokens, int64_t draw) : op_("philox_normal") {
    const auto& o = op_.tensor("out", out, {"B", "A", "P"}, float_dtypes, Access::write);
    const auto& s = op_.tensor("seeds", seeds, {"B"}, Dtype::int64);
    const auto& t = op_.tensor("tokens", tokens, {"A"}, Dtype::int64);
    op_.check_overlap();
    params_ = {rows_of(o),     s.as<int64_t>(), t.as<int64_t>(),    op_.size("B"),
               op_.size("A"), op_.size("P"),   draw_of(op_, draw)};
  }

  void run(const Launch& launch) {
    if (op_.device().kind == DeviceKind::cpu)
      return run_rows(cpu_kernels(launch.instruction_set).philox_normal, params_, noise_grain, launch.threads);
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::philox_normal(params_, launch.stream);
#endif
    no_kernel(op_);
  }

 private:
  Signature op_;
  PhiloxNormalParams params_;
};

class Renoise {
 public:
  Renoise(py::handle out, py::handle x0, py::handle x, py::handle velocity, py::handle seeds,
          py::handle tokens, double sigma, double sigma_next, int64_t draw)
      : op_("renoise") {
    const DtypeRule x_dtype("X", float_dtypes);
    const auto& o = op_.tensor("out", out, {"B", "A", "P"}, x_dtype, Access::write);
    const TensorView* clean = x0.is_none() ? nullptr : &op_.tensor("x0", x0, {"B", "A", "P"}, x_dtype, Access::write);
    const auto& from = op_.tensor("x", x, {"B", "A", "P"}, x_dtype);
    const auto& v = op_.tensor("velocity", velocity, {"B", "A", "P"}, float_dtypes);
    const auto& s = op_.tensor("seeds", seeds, {"B"}, Dtype::int64);
    const auto& t = op_.tensor("tokens", tokens, {"A"}, Dtype::int64);
    op_.check_overlap({{"out", "x"}, {"out", "velocity"}});
    params_ = {rows_of(o),
               clean ? rows_of(*clean) : Rows{},
               rows_of(from),
               rows_of(v),
               s.as<int64_t>(),
               t.as<int64_t>(),
               op_.size("B"),
               op_.size("A"),
               op_.size("P"),
               static_cast<float>(sigma),
               static_cast<float>(1.0 - sigma_next),
               static_cast<float>(sigma_next),
               draw_of(op_, draw)};
  }

  void run(const Launch& launch) {
    const int64_t grain = params_.sigma_next == 0 ? copy_grain : noise_grain;
    if (op_.device().kind == DeviceKind::cpu)
      return run_rows(cpu_kernels(launch.instruction_set).renoise, params_, grain, launch.threads);
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::renoise(params_, launch.stream);
#endif
    no_kernel(op_);
  }

 private:
  Signature op_;
  RenoiseParams params_;
};

class CachedStep {
 public:
  CachedStep(py::handle x, py::handle cache, py::handle score, py::handle rows, py::handle fresh,
             double delta_sigma)
      : op_("cached_step") {
    const DtypeRule velocity_dtype("V", float_dtypes);
    const auto& x_view = op_.tensor("x", x, {"B", "N", "P"}, float_dtypes, Access::write);
    const auto& cache_view = op_.tensor("velocity_cache", cache, {"B", "N", "P"}, velocity_dtype, Access::write);
    const auto& row_view = op_.tensor("rows", rows, {"A"}, Dtype::int64);
    const auto& fresh_view = op_.tensor("fresh", fresh, {"B", "A", "P"}, velocity_dtype);
    const TensorView* score_view =
        score.is_none() ? nullptr : &op_.tensor("score", score, {"B", "A"}, Dtype::float32, Access::write);
    op_.check_overlap();
    rows_ = row_view.as<int64_t>();
    read_host();
    params_ = {rows_of(x_view),
               rows_of(cache_view),
               rows_of(fresh_view),
               score_view ? score_view->as<float>() : nullptr,
               score_view ? score_view->stride[0] : 0,
               rows_,
               nullptr,
               op_.size("B"),
               op_.size("N"),
               op_.size("A"),
               op_.size("P"),
               static_cast<float>(delta_sigma)};
  }

  void run(const Launch& launch) {
    if (op_.device().kind == DeviceKind::cpu) {
      params_.fresh_order = fresh_order_.empty() ? nullptr : fresh_order_.data();
      return run_rows(cpu_kernels(launch.instruction_set).cached_step, params_, copy_grain, launch.threads);
    }
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::cached_step(params_, launch.stream);
#endif
    no_kernel(op_);
  }

  // The order of the rows, made before anything is written: one out of range or twice leaves all as it was.
  void read_host() {
    if (op_.device().kind != DeviceKind::cpu) return;
    const int64_t total = op_.size("N"), active = op_.size("A");
    if (total > INT32_MAX) op_.fail("x has " + std::to_string(total) + " rows, expected fewer than 2^31");
    fresh_order_.clear();
    if (increasing(rows_, active, total)) return;
    fresh_order_.assign(static_cast<size_t>(total), -1);  // first the inverse, -1 where a row is not fresh
    for (int64_t i = 0; i < active; ++i) {
      const auto at = [&] { return "rows[" + std::to_string(i) + "] is " + std::to_string(rows_[i]); };
      if (rows_[i] < 0 || rows_[i] >= total) op_.fail(at() + ", expected 0 to " + std::to_string(total - 1));
      int32_t& index = fresh_order_[static_cast<size_t>(rows_[i])];
      if (index >= 0) op_.fail(at() + " like rows[" + std::to_string(index) + "], expected distinct rows");
      index = static_cast<int32_t>(i);
    }
    fresh_order_.erase(std::remove(fresh_order_.begin(), fresh_order_.end(), -1), fresh_order_.end());
  }

 private:
  Signature op_;
  const int64_t* rows_ = nullptr;
  std::vector<int32_t> fresh_order_;  // empty where the rows are in order
  CachedStepParams params_;
};

class ExitDecision {
 public:
  ExitDecision(py::handle refine, py::handle confidence, py::handle logit, py::handle threshold) : op_("exit_decision") {
    const auto& r = op_.tensor("refine", refine, {"B"}, {Dtype::boolean, Dtype::uint8}, Access::write);
    const auto& c = op_.tensor("confidence", confidence, {"B"}, Dtype::float32, Access::write);
    const auto& l = op_.tensor("logit", logit, {"B"}, float_dtypes);
    const auto& t = op_.tensor("threshold", threshold, {"B"}, Dtype::float32);
    op_.check_overlap();
    params_ = {r.as<uint8_t>(), c.as<float>(), l.data, element_of(l), t.as<float>(), op_.size("B")};
  }

  void run(const Launch& launch) {
    if (op_.device().kind == DeviceKind::cpu) return cpu::exit_decision(params_);
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::exit_decision(params_, launch.stream);
#endif
    static_cast<void>(launch);
    no_kernel(op_);
  }

 private:
  Signature op_;
  ExitDecisionParams params_;
};

}  // namespace

void bind_step(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<PhiloxNormal, Tensor, Tensor, Tensor, int64_t>(m, "philox_normal", arg("out"), arg("seeds"), arg("tokens"), arg("draw"));
  bind<Renoise, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double, double, int64_t>(
      m, "renoise", arg("out"), arg("x0"), arg("x"), arg("velocity"), arg("seeds"), arg("tokens"), arg("sigma"),
      arg("sigma_next"), arg("draw"));
  bind<CachedStep, Tensor, Tensor, Tensor, Tensor, Tensor, double>(
      m, "cached_step", arg("x"), arg("velocity_cache"), arg("score"), arg("rows"), arg("fresh"),
      arg("delta_sigma"));
  bind<ExitDecision, Tensor, Tensor, Tensor, Tensor>(m, "exit_decision", arg("refine"), arg("confidence"), arg("logit"),
                                                      arg("threshold"));
}

}  // namespace dsa_rt
