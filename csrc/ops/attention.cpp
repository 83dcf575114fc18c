// Attention of the active queries to the rows of a cache.
#include "../../kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <new>

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "launch.h"
#include "ops.h"

#if defined(DSA_RT_CUDA)
#include "../../kernels/cuda/attention.h"
#endif

namespace dsa_rt {
namespace {

const cpu::AttentionKernel& cpu_kernel(const std::string& instruction_set, Element element, bool fp8) {
  const auto of = [&](const cpu::AttentionKernels& kernels) -> const cpu::AttentionKernel& {
    switch (element) {
      case Element::bfloat16: return fp8 ? kernels.bfloat16_fp8 : kernels.bfloat16;
      case Element::float16: return fp8 ? kernels.float16_fp8 : kernels.float16;
      default: return fp8 ? kernels.float32_fp8 : kernels.float32;
    }
  };
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
#if defined(DSA_RT_AVX512_BF16)
      if (element == Element::bfloat16) return fp8 ? cpu::attention_avx512_bf16_fp8 : cpu::attention_avx512_bf16;
#endif
      [[fallthrough]];
    case InstructionSet::avx512: return of(cpu::attention_avx512);
    case InstructionSet::avx2: return of(cpu::attention_avx2);
#endif
    default: return of(cpu::attention_generic);
  }
}

Heads heads_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], view.stride[2]}; }
Scales scales_of(const TensorView& view) { return {view.as<float>(), view.stride[0], view.stride[1]}; }

constexpr int64_t tile_work = 1 << 22;  // multiply-adds below which a tile alone is not worth a thread's attention

class ActiveAttention {
 public:
  ActiveAttention(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v, py::handle segments,
                  py::handle scratch = py::none())
      : op_("active_attention"), fp8_(false) {
    check(out, lse, q, k, v, py::none(), py::none(), segments, scratch);
  }

  // The segments, checked.
  void read_host() {
    if (segments_view_) read_segments(*segments_view_);
  }

  void run(const Launch& launch) {
    if (op_.device().kind == DeviceKind::cpu) return run_cpu(launch);
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) {
      std::string why;
      if (!(fp8_ ? cuda::attention_fp8_supported(params_, &why) : cuda::attention_supported(params_, &why)))
        op_.fail_unserved(why);
      float* scratch = checked_scratch();
      return fp8_ ? cuda::active_attention_fp8(params_, scratch, launch.stream)
                  : cuda::active_attention(params_, scratch, launch.stream);
    }
#endif
    no_kernel(op_);
  }

  // How many fp32 numbers of scratch let the kernel split keys; 0 where it does not.
  int64_t scratch_floats() const {
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda)
      return fp8_ ? cuda::attention_fp8_scratch(params_) : cuda::attention_scratch(params_);
#endif
    return 0;
  }

 protected:
  // With K and V in FP8; check() has to be called.
  explicit ActiveAttention(const char* op) : op_(op), fp8_(true) {}

  void check(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v, py::handle k_scale,
             py::handle v_scale, py::handle segments, py::handle scratch) {
    const DtypeRule dtype("T", float_dtypes), cached = fp8_ ? DtypeRule(Dtype::float8_e4m3fn) : dtype;
    const auto& o = op_.tensor("out", out, {"B", "A", "H", "D"}, dtype, Access::write);
    const TensorView* l =
        lse.is_none() ? nullptr : &op_.tensor("lse", lse, {"B", "H", "A"}, Dtype::float32, Access::write);
    const auto& queries = op_.tensor("q", q, {"B", "A", "H", "D"}, dtype);
    const auto& keys = op_.tensor("k", k, {"B", "N", "H", "D"}, cached);
    const auto& values = op_.tensor("v", v, {"B", "N", "H", "D"}, cached);
    if (fp8_) {
      params_.k_scale = scales_of(op_.tensor("k_scale", k_scale, {"B", "N", "H"}, Dtype::float32));
      params_.v_scale = scales_of(op_.tensor("v_scale", v_scale, {"B", "N", "H"}, Dtype::float32));
    }
    const TensorView* parts = segments.is_none() ? nullptr : &op_.host_tensor("segments", segments, {"S", "5"});
    scratch_ = scratch.is_none() ? nullptr : &op_.tensor("scratch", scratch, {"L"}, Dtype::float32, Access::write);
    op_.check_overlap();
    if (scratch_ && op_.device().kind == DeviceKind::cpu)
      op_.fail("scratch is a tensor, expected None: it is for CUDA, where keys are split");
    if (op_.size("N") == 0 || op_.size("D") == 0)
      op_.fail("k holds N = " + std::to_string(op_.size("N")) + " rows of D = " + std::to_string(op_.size("D")) +
               " channels, expected at least one of each");
    static_cast<AttentionParams&>(params_) = {heads_of(o),
                                              heads_of(queries),
                                              heads_of(keys),
                                              heads_of(values),
                                              element_of(o),
                                              l ? l->as<float>() : nullptr,
                                              l ? l->stride[0] : 0,
                                              l ? l->stride[1] : 0,
                                              op_.size("B"),
                                              op_.size("H"),
                                              op_.size("A"),
                                              op_.size("N"),
                                              op_.size("D"),
                                              nullptr,
                                              0};
    segments_view_ = parts;
    read_host();
  }

 private:
#if defined(DSA_RT_CUDA)
  float* checked_scratch() const {
    if (!scratch_) return nullptr;
    if (const int64_t least = scratch_floats(); scratch_->shape[0] < least)
      op_.fail("scratch holds " + std::to_string(scratch_->shape[0]) + " numbers, expected at least " +
               std::to_string(least) + ", as " + (fp8_ ? "active_attention_fp8_scratch" : "active_attention_scratch") +
               " says");
    if (reinterpret_cast<uintptr_t>(scratch_->data) % 16)
      op_.fail("scratch begins at an address that is no multiple of 16 bytes; pass the tensor as it was allocated");
    return scratch_->as<float>();
  }
#endif

  void run_cpu(const Launch& launch) {
    const cpu::AttentionKernel& kernel = cpu_kernel(launch.instruction_set, params_.element, fp8_);
    const size_t bytes = kernel.scratch_bytes(params_.dim);
    int64_t rows = params_.rows;  // of the longest segment
    if (params_.segments) {
      rows = 1;
      for (const auto& s : segments_) rows = std::max(rows, s.end[0] - s.begin[0] + s.end[1] - s.begin[1]);
    }
    const int64_t grain = tile_work / (cpu::attention_tile_rows * rows * params_.dim);
    const int64_t tiles = params_.batch * params_.heads * cpu::attention_tiles(params_);
    std::atomic<bool> starved{false};
    parallel_for(tiles, grain, launch.threads, [&](int64_t begin, int64_t end) {
      if (void* scratch = thread_scratch(bytes))
        kernel.run(params_, scratch, begin, end);
      else
        starved = true;
    });
    if (starved) throw std::bad_alloc();
  }

  void read_segments(const TensorView& view) {
    int64_t queries = 0;
    segments_.clear();
    for (int64_t i = 0; i < view.shape[0]; ++i) {
      const int64_t* row = view.as<int64_t>() + i * view.stride[0];
      const AttentionSegment s = {row[0], {row[1], row[3]}, {row[2], row[4]}};
      const auto fail = [&](const std::string& expected) {
        std::string values;
        for (int j = 0; j < 5; ++j) values += (j ? ", " : "") + std::to_string(row[j]);
        op_.fail("segments[" + std::to_string(i) + "] is [" + values + "], expected " + expected);
      };
      if (s.queries < 0 || s.queries > params_.active)
        fail("0 to A = " + std::to_string(params_.active) + " queries first");
      for (int r = 0; r < 2; ++r)
        if (s.begin[r] < 0 || s.end[r] < s.begin[r] || s.end[r] > params_.rows)
          fail("ranges inside [0, " + std::to_string(params_.rows) + "), the rows of k");
      const bool empty[2] = {s.begin[0] == s.end[0], s.begin[1] == s.end[1]};
      if (empty[0] && empty[1]) fail("at least one row in its ranges");
      if (!empty[0] && !empty[1] && s.begin[0] < s.end[1] && s.begin[1] < s.end[0]) fail("ranges that do not overlap");
      queries += s.queries;
      segments_.push_back(s);
    }
    if (queries != params_.active)
      op_.fail("segments hold " + std::to_string(queries) + " queries, expected A = " + std::to_string(params_.active));
    params_.segments = segments_.data();
    params_.segment_count = static_cast<int64_t>(segments_.size());
  }

  Signature op_;
  const bool fp8_;
  const TensorView *segments_view_ = nullptr, *scratch_ = nullptr;
  std::vector<AttentionSegment> segments_;
  ScaledAttentionParams params_{};
};

class ActiveAttentionFp8 : public ActiveAttention {
 public:
  ActiveAttentionFp8(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v, py::handle k_scale,
                     py::handle v_scale, py::handle segments, py::handle scratch = py::none())
      : ActiveAttention("active_attention_fp8") {
    check(out, lse, q, k, v, k_scale, v_scale, segments, scratch);
  }
};

}  // namespace

void bind_attention(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<ActiveAttention, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      m, "active_attention", arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("segments") = py::none());
  m.def(
      "active_attention",
      [](Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor segments, Tensor scratch, int threads,
         std::string instruction_set, uintptr_t stream) {
        const Launch launch{threads, std::move(instruction_set), stream};
        call<ActiveAttention>("active_attention", launch, out, lse, q, k, v, segments, scratch);
      },
      arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("segments") = py::none(), arg("scratch"), arg("threads") = 1,
      arg("instruction_set") = "", arg("stream") = 0);
  m.def(
      "active_attention_scratch",
      [](Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor segments) {
        return ActiveAttention(out, lse, q, k, v, segments).scratch_floats();
      },
      arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("segments") = py::none());
  bind<ActiveAttentionFp8, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      m, "active_attention_fp8", arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("k_scale"), arg("v_scale"),
      arg("segments") = py::none());
  m.def(
      "active_attention_fp8",
      [](Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, Tensor segments,
         Tensor scratch, int threads, std::string instruction_set, uintptr_t stream) {
        const Launch launch{threads, std::move(instruction_set), stream};
        call<ActiveAttentionFp8>("active_attention_fp8", launch, out, lse, q, k, v, k_scale, v_scale, segments,
                                 scratch);
      },
      arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("k_scale"), arg("v_scale"), arg("segments") = py::none(),
      arg("scratch"), arg("threads") = 1, arg("instruction_set") = "", arg("stream") = 0);
  m.def(
      "active_attention_fp8_scratch",
      [](Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, Tensor segments) {
        return ActiveAttentionFp8(out, lse, q, k, v, k_scale, v_scale, segments).scratch_floats();
      },
      arg("out"), arg("lse"), arg("q"), arg("k"), arg("v"), arg("k_scale"), arg("v_scale"), arg("segments") = py::none());
}

}  // namespace dsa_rt
