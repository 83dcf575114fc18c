// Matrix products with weights that were packed once; see step.cpp for how a class becomes an op.
#include "../../kernels/cpu/linear.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <new>

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "launch.h"
#include "ops.h"

namespace dsa_rt {
namespace {

const cpu::LinearKernel& cpu_kernel(const std::string& instruction_set, Element weight) {
  const auto of = [&](const cpu::LinearKernels& kernels) -> const cpu::LinearKernel& {
    switch (weight) {
      case Element::bfloat16: return kernels.bfloat16;
      case Element::float16: return kernels.float16;
      default: return kernels.float32;
    }
  };
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
#if defined(DSA_RT_AVX512_BF16)
      if (weight == Element::bfloat16) return cpu::linear_avx512_bf16;
#endif
      [[fallthrough]];
    case InstructionSet::avx512: return of(cpu::linear_avx512);
    case InstructionSet::avx2: return of(cpu::linear_avx2);
#endif
    default: return of(cpu::linear_generic);
  }
}

// Multiply-adds for each thread, about 4 µs; to wake one took 3 µs.
constexpr int64_t thread_work = 1 << 20;
// Rows of a tile; 4-byte units of weights that stay in L2 for them, 384 KB; rows that are in registers at once.
constexpr int64_t tile_rows = 96, tile_units = 256 * cpu::linear_most_steps, least_rows = 6;

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The largest tiles that caches hold, halved until every thread gets some: one may lose its core for a while.
cpu::LinearTile tile_for(int64_t rows, int64_t columns, int64_t steps, int64_t panel, int threads) {
  const int64_t held = tile_units / std::max<int64_t>(std::min(steps, cpu::linear_most_steps), 1);
  cpu::LinearTile tile = {std::min(tile_rows, up(rows, least_rows)),
                          std::min(std::max(held / panel, int64_t{1}) * panel, up(columns, panel))};
  const auto tiles = [&] { return up(rows, tile.rows) / tile.rows * (up(columns, tile.columns) / tile.columns); };
  while (threads > 1 && tiles() < 4 * threads) {
    if (tile.rows > least_rows && (tile.rows * 4 >= tile.columns || tile.columns == panel))
      tile.rows = up(tile.rows / 2, least_rows);
    else if (tile.columns > panel)
      tile.columns = up(tile.columns / 2, panel);
    else
      break;
  }
  return tile;
}

class Linear {
 public:
  Linear(py::handle out, py::handle x, py::handle weight, py::handle bias, std::string activation, std::string layout)
      : op_("linear"), layout_(std::move(layout)) {
    const auto& o = op_.tensor("out", out, {"B", "A", "N"}, float_dtypes, Access::write);
    const auto& from = op_.tensor("x", x, {"B", "A", "K"}, float_dtypes);
    const auto& packed = op_.tensor("weight", weight, {"packed"}, float_dtypes);
    const TensorView* added = bias.is_none() ? nullptr : &op_.tensor("bias", bias, {"N"}, Dtype::float32);
    for (const TensorView* view : {&o, &from})
      if (view->dtype != Dtype::float32 && view->dtype != packed.dtype)
        op_.fail(std::string(view->name) + " has dtype torch." + name_of(view->dtype) + ", expected float32" +
                 (packed.dtype == Dtype::float32 ? "" : std::string(" or ") + name_of(packed.dtype)) + " as weight");
    const char* const activations[] = {"none", "gelu", "gelu_erf", "silu"};
    const auto known = std::find(std::begin(activations), std::end(activations), activation);
    if (known == std::end(activations))
      op_.fail_option("activation is '" + activation + "', expected 'none', 'gelu', 'gelu_erf' or 'silu'");
    op_.check_overlap();
    element_ = element_of(packed);
    check_elements(packed.shape[0], op_.size("N"), op_.size("K"));
    params_ = {{o.data, o.stride[0], o.stride[1], element_of(o)},
               {from.data, from.stride[0], from.stride[1], element_of(from)},
               packed.data,
               added ? added->as<float>() : nullptr,
               static_cast<cpu::Activation>(known - activations),
               op_.size("B"),
               op_.size("A"),
               op_.size("N"),
               op_.size("K")};
  }

  void run(const Launch& launch) {
    if (op_.device().kind != DeviceKind::cpu) no_kernel(op_);
    const auto& p = params_;
    const cpu::LinearKernel& kernel = cpu_kernel(launch.instruction_set, element_);
    if (layout_ != kernel.layout.name)
      op_.fail_option("weight is packed for '" + layout_ + "', expected '" + kernel.layout.name +
                      "', the kernel that runs here; pack it with pack_linear on this machine");
    const int64_t rows = p.batch * p.active;
    if (!rows || !p.n) return;
    const int64_t most = std::max<int64_t>(rows * p.n * std::max<int64_t>(p.k, 1) / thread_work, 1);
    const int threads = static_cast<int>(std::min<int64_t>(std::max(launch.threads, 1), most));
    const cpu::LinearTile tile = tile_for(rows, p.n, kernel.layout.steps(p.k), kernel.layout.panel, threads);
    const int64_t tiles = up(rows, tile.rows) / tile.rows * (up(p.n, tile.columns) / tile.columns);
    const size_t bytes = kernel.scratch_bytes(p, tile);
    std::atomic<bool> starved{false};
    parallel_for(tiles, 1, threads, [&](int64_t begin, int64_t end) {
      if (void* scratch = thread_scratch(bytes))
        kernel.run(p, tile, scratch, begin, end);
      else
        starved = true;
    });
    if (starved) throw std::bad_alloc();
  }

 private:
  void check_elements(int64_t elements, int64_t n, int64_t k) const {
    int64_t expected = n * k;
    if (layout_ != "rows") {  // those as they are, which no kernel here takes
      const cpu::LinearLayout& layout = cpu_kernel(layout_, element_).layout;
      if (layout_ != layout.name)
        op_.fail_option("weight is packed for '" + layout_ + "', expected '" + layout.name + "' for its dtype");
      expected = layout.elements(n, k);
    }
    if (elements != expected)
      op_.fail("weight holds " + std::to_string(elements) + " elements, expected " + std::to_string(expected) +
               " for N=" + std::to_string(n) + " as in out and K=" + std::to_string(k) + " as in x");
  }

  Signature op_;
  std::string layout_;
  Element element_;
  cpu::LinearParams params_;
};

// weights: the name of their dtype.
py::tuple layout_of(const std::string& weights, const std::string& instruction_set) {
  const Element element = weights == "bfloat16" ? Element::bfloat16 : weights == "float16" ? Element::float16 : Element::float32;
  const auto& layout = cpu_kernel(instruction_set, element).layout;
  return py::make_tuple(layout.name, layout.panel, layout.lanes, layout.group);
}

}  // namespace

void bind_linear(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<Linear, Tensor, Tensor, Tensor, Tensor, std::string, std::string>(
      m, "linear", arg("out"), arg("x"), arg("weight"), arg("bias"), arg("activation"), arg("layout"));
  m.def("linear_layout", layout_of, arg("weights"), arg("instruction_set") = "");
}

}  // namespace dsa_rt
