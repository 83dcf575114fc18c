// Attention of the active queries to the rows of a cache.
#include "../../kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../cpu_features.h"
#include "../parallel.h"
#include "launch.h"
#include "ops.h"

namespace dsa_rt {
namespace {

const cpu::AttentionKernel& cpu_kernel(const std::string& instruction_set, Element element) {
  const auto of = [&](const cpu::AttentionKernels& kernels) -> const cpu::AttentionKernel& {
    return element == Element::bfloat16 ? kernels.bfloat16 : kernels.float32;
  };
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
#if defined(DSA_RT_AVX512_BF16)
      if (element == Element::bfloat16) return cpu::attention_avx512_bf16;
#endif
      [[fallthrough]];
    case InstructionSet::avx512: return of(cpu::attention_avx512);
    case InstructionSet::avx2: return of(cpu::attention_avx2);
#endif
    default: return of(cpu::attention_generic);
  }
}

// Memory of the calling thread that grows to the largest request and stays; null where there is none.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (bytes > held) {
    memory.reset();
    held = 0;
    memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    if (memory) held = bytes;
  }
  return memory.get();
}

Heads heads_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], view.stride[2]}; }

constexpr int64_t tile_work = 1 << 22;  // multiply-adds below which a tile alone is not worth a thread's attention

class ActiveAttention {
 public:
  ActiveAttention(py::handle out, py::handle lse, py::handle q, py::handle k, py::handle v) : op_("active_attention") {
    const DtypeRule dtype("T", float_dtypes);
    const auto& o = op_.tensor("out", out, {"B", "A", "H", "D"}, dtype, Access::write);
    const TensorView* l =
        lse.is_none() ? nullptr : &op_.tensor("lse", lse, {"B", "H", "A"}, Dtype::float32, Access::write);
    const auto& queries = op_.tensor("q", q, {"B", "A", "H", "D"}, dtype);
    const auto& keys = op_.tensor("k", k, {"B", "N", "H", "D"}, dtype);
    const auto& values = op_.tensor("v", v, {"B", "N", "H", "D"}, dtype);
    op_.check_overlap();
    if (op_.size("N") == 0 || op_.size("D") == 0)
      op_.fail("k holds N = " + std::to_string(op_.size("N")) + " rows of D = " + std::to_string(op_.size("D")) +
               " channels, expected at least one of each");
    params_ = {heads_of(o),
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
               op_.size("D")};
  }

  void run(const Launch& launch) {
    if (op_.device().kind != DeviceKind::cpu) no_kernel(op_);
    const cpu::AttentionKernel& kernel = cpu_kernel(launch.instruction_set, params_.element);
    const size_t bytes = kernel.scratch_bytes(params_.dim);
    const int64_t tiles = (params_.active + cpu::attention_tile_rows - 1) / cpu::attention_tile_rows;
    const int64_t grain = tile_work / (cpu::attention_tile_rows * params_.rows * params_.dim);
    std::atomic<bool> starved{false};
    parallel_for(params_.batch * params_.heads * tiles, grain, launch.threads, [&](int64_t begin, int64_t end) {
      if (void* scratch = thread_scratch(bytes))
        kernel.run(params_, scratch, begin, end);
      else
        starved = true;
    });
    if (starved) throw std::bad_alloc();
  }

 private:
  Signature op_;
  AttentionParams params_;
};

}  // namespace

void bind_attention(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<ActiveAttention, Tensor, Tensor, Tensor, Tensor, Tensor>(m, "active_attention", arg("out"), arg("lse"), arg("q"),
                                                                arg("k"), arg("v"));
}

}  // namespace dsa_rt
