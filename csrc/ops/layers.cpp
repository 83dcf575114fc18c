// The transformer ops beside attention; see step.cpp for how a class becomes an op.
#include "../../kernels/cpu/layers.h"

#include <algorithm>
#include <new>

#include "../cpu_features.h"
#include "../parallel.h"
#include "../scratch.h"
#include "launch.h"
#include "ops.h"

#if defined(DSA_RT_CUDA)
#include "../../kernels/cuda/layers.h"
#endif

namespace dsa_rt {
namespace {

const cpu::LayerKernels& cpu_kernels(const std::string& instruction_set) {
  switch (choose_instruction_set(instruction_set)) {
#if defined(DSA_RT_X86)
    case InstructionSet::avx512_bf16:
#if defined(DSA_RT_AVX512_BF16)
      return cpu::layers_avx512_bf16;
#endif
    case InstructionSet::avx512: return cpu::layers_avx512;
    case InstructionSet::avx2: return cpu::layers_avx2;
#endif
    default: return cpu::layers_generic;
  }
}

// Below these, waking a thread costs more than it saves.
constexpr int64_t row_work = 1 << 15;     // elements
constexpr int64_t weight_work = 1 << 13;  // elements that take an exponential
constexpr int64_t copy_work = 1 << 20;    // bytes, some 10 µs
constexpr int64_t brief_copy = 1 << 15;   // bytes, less than 1 µs

int64_t grain_of(int64_t work, int64_t of_one) { return work / std::max<int64_t>(of_one, 1); }

int64_t size_of(Element element) { return element == Element::float32 ? 4 : 2; }
Rows rows_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], element_of(view)}; }
Heads heads_of(const TensorView& view) { return {view.data, view.stride[0], view.stride[1], view.stride[2]}; }

// A table of one batch serves all, and one of a single row all rows: their strides are 0.
Modulation modulation_of(const TensorView& view) {
  return {view.as<float>(), view.shape[0] == 1 ? 0 : view.stride[0], view.shape[1] == 1 ? 0 : view.stride[1]};
}

#if defined(DSA_RT_CUDA)
void check_width(const Signature& op, int64_t width) {
  if (width > cuda::max_row_width)
    op.fail_unserved("C is " + std::to_string(width) + ", on CUDA at most " + std::to_string(cuda::max_row_width));
}
#endif

// What norm_modulate and residual_norm_modulate share: both fill the same parameters.
class Norm {
 public:
  void run(const Launch& launch) {
    auto& p = params_;
    if (op_.device().kind == DeviceKind::cpu) {
      p.streams = streams(p.batch * p.active * p.width * size_of(p.out.element) * (p.sum.data ? 2 : 1));
      const auto kernel = cpu_kernels(launch.instruction_set).norm_modulate;
      return parallel_for(p.batch * p.active, grain_of(row_work, p.width), launch.threads,
                          [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    }
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) {
      check_width(op_, p.width);
      return cuda::norm_modulate(p, launch.stream);
    }
#endif
    no_kernel(op_);
  }

  void read_host() {
    if (rows_ && op_.device().kind == DeviceKind::cpu) op_.check_rows(*rows_, params_.table_length, false);
  }

 protected:
  explicit Norm(const char* op) : op_(op), dtype_("T", float_dtypes) {}

  TensorView row(const char* name, py::handle tensor, Access access = Access::read) {
    return op_.tensor(name, tensor, {"B", "A", "C"}, dtype_, access);
  }
  Modulation table(const char* name, py::handle tensor) {
    return modulation_of(op_.tensor(name, tensor, {"B or 1", "R or 1", "C"}, Dtype::float32));
  }

  void finish(py::handle rows, double eps, std::initializer_list<std::pair<const char*, const char*>> exempt = {}) {
    const int64_t table_rows = op_.size("R", 1);
    const TensorView* view = rows.is_none() ? nullptr : &op_.tensor("rows", rows, {"A"}, Dtype::int64);
    if (table_rows != 1 && !view)
      op_.fail("rows is None, expected a row for each token, as the tables have R = " + std::to_string(table_rows));
    op_.check_overlap(exempt);
    params_.table_length = table_rows;
    if (table_rows != 1) {
      rows_ = view;
      read_host();
      params_.table_rows = view->as<int64_t>();
    }
    params_.batch = op_.size("B");
    params_.active = op_.size("A");
    params_.width = op_.size("C");
    params_.eps = static_cast<float>(eps);
  }

  Signature op_;
  DtypeRule dtype_;
  const TensorView* rows_ = nullptr;  // where they are read
  NormModulateParams params_{};
};

class NormModulate : public Norm {
 public:
  NormModulate(py::handle out, py::handle x, py::handle shift, py::handle scale, py::handle rows, double eps)
      : Norm("norm_modulate") {
    params_.out = rows_of(row("out", out, Access::write));
    params_.x = rows_of(row("x", x));
    params_.shift = table("shift", shift);
    params_.scale = table("scale", scale);
    finish(rows, eps);
  }
};

class ResidualNormModulate : public Norm {
 public:
  ResidualNormModulate(py::handle sum, py::handle out, py::handle x, py::handle y, py::handle gate, py::handle shift,
                       py::handle scale, py::handle rows, double eps)
      : Norm("residual_norm_modulate") {
    params_.sum = rows_of(row("sum", sum, Access::write));
    params_.out = rows_of(row("out", out, Access::write));
    params_.x = rows_of(row("x", x));
    params_.y = rows_of(row("y", y));
    if (!gate.is_none()) params_.gate = table("gate", gate);
    params_.shift = table("shift", shift);
    params_.scale = table("scale", scale);
    finish(rows, eps, {{"sum", "x"}});
  }
};

class RmsNorm {
 public:
  RmsNorm(py::handle out, py::handle x, py::handle weight, double eps) : op_("rms_norm") {
    const DtypeRule dtype("T", float_dtypes);
    const auto& o = op_.tensor("out", out, {"B", "A", "C"}, dtype, Access::write);
    const auto& from = op_.tensor("x", x, {"B", "A", "C"}, dtype);
    const auto& w = op_.tensor("weight", weight, {"C"}, float_dtypes);
    op_.check_overlap({{"out", "x"}});
    params_ = {rows_of(o),    rows_of(from), w.data, element_of(w), op_.size("B"), op_.size("A"),
               op_.size("C"), static_cast<float>(eps)};
  }

  void run(const Launch& launch) {
    auto& p = params_;
    if (op_.device().kind == DeviceKind::cpu) {
      p.streams = p.out.data != p.x.data && streams(p.batch * p.active * p.width * size_of(p.out.element));
      const auto kernel = cpu_kernels(launch.instruction_set).rms_norm;
      return parallel_for(p.batch * p.active, grain_of(row_work, p.width), launch.threads,
                          [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    }
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) {
      check_width(op_, p.width);
      return cuda::rms_norm(p, launch.stream);
    }
#endif
    no_kernel(op_);
  }

 private:
  Signature op_;
  RmsNormParams params_;
};

class QkNormRopeStore {
 public:
  QkNormRopeStore(py::handle q_out, py::handle k_cache, py::handle v_cache, py::handle q, py::handle k, py::handle v,
                  py::handle q_weight, py::handle k_weight, py::handle cos, py::handle sin, py::handle slots,
                  double eps)
      : op_("qk_norm_rope_store") {
    const DtypeRule dtype("T", float_dtypes), weight_dtype("W", float_dtypes);
    const auto& qo = op_.tensor("q_out", q_out, {"B", "A", "H", "D"}, dtype, Access::write);
    const auto& kc = op_.tensor("k_cache", k_cache, {"B", "N", "H", "D"}, dtype, Access::write);
    const auto& vc = op_.tensor("v_cache", v_cache, {"B", "N", "H", "D"}, dtype, Access::write);
    const int64_t heads = op_.size("H"), dim = op_.size("D"), active = op_.size("A"), cached = op_.size("N");
    if (dim % 2) op_.fail("q_out has D = " + std::to_string(dim) + ", expected an even number: channels turn in pairs");
    op_.derive("C", heads * dim, "q_out");
    op_.derive("D/2", dim / 2, "q_out");
    const auto& qv = op_.tensor("q", q, {"B", "A", "C"}, dtype);
    const auto& kv = op_.tensor("k", k, {"B", "A", "C"}, dtype);
    const auto& vv = op_.tensor("v", v, {"B", "A", "C"}, dtype);
    const auto& qw = op_.tensor("q_weight", q_weight, {"C"}, weight_dtype);
    const auto& kw = op_.tensor("k_weight", k_weight, {"C"}, weight_dtype);
    const auto& c = op_.tensor("cos", cos, {"A", "D/2"}, Dtype::float32);
    const auto& s = op_.tensor("sin", sin, {"A", "D/2"}, Dtype::float32);
    op_.check_contiguous(c);
    op_.check_contiguous(s);
    if (!slots.is_none()) slots_ = &op_.tensor("slots", slots, {"A"}, Dtype::int64);
    if (!slots_ && active > cached)
      op_.fail("k_cache has N = " + std::to_string(cached) + " rows, expected at least A = " + std::to_string(active) +
               " where slots is None");
    op_.check_overlap();
    read_host();
    params_ = {rows_of(qv),
               rows_of(kv),
               rows_of(vv),
               heads_of(qo),
               heads_of(kc),
               heads_of(vc),
               qw.data,
               kw.data,
               element_of(qw),
               c.as<float>(),
               s.as<float>(),
               slots_ ? slots_->as<int64_t>() : nullptr,
               op_.size("B"),
               active,
               heads,
               dim,
               cached,
               static_cast<float>(eps)};
  }

  void run(const Launch& launch) {
    auto& p = params_;
    if (op_.device().kind == DeviceKind::cpu) {
      p.streams = streams(3 * p.batch * p.active * p.heads * p.dim * size_of(p.q.element));
      const auto kernel = cpu_kernels(launch.instruction_set).qk_norm_rope_store;
      return parallel_for(p.batch * p.active, grain_of(row_work, 3 * p.heads * p.dim), launch.threads,
                          [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
    }
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) {
      check_width(op_, p.heads * p.dim);
      return cuda::qk_norm_rope_store(p, launch.stream);
    }
#endif
    no_kernel(op_);
  }

  void read_host() {
    if (slots_ && op_.device().kind == DeviceKind::cpu) op_.check_rows(*slots_, op_.size("N"), true);
  }

 private:
  Signature op_;
  const TensorView* slots_ = nullptr;
  QkNormRopeStoreParams params_;
};

// Rows of any dtype: only bytes move.
class MoveRows {
 public:
  void run(const Launch& launch) {
    auto& p = params_;
    if (op_.device().kind == DeviceKind::cpu) {
      p.streams = streams(2 * p.batch * p.active * p.row_bytes);  // reads and writes: nothing else takes time
      return parallel_for(p.batch * p.active, grain_of(copy_work, p.row_bytes), launch.threads,
                          [&](int64_t begin, int64_t end) { cpu::move_rows(p, scatter_, begin, end); });
    }
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) return cuda::move_rows(p, scatter_, launch.stream);
#endif
    static_cast<void>(launch);
    no_kernel(op_);
  }

  bool brief() const {
    return op_.device().kind == DeviceKind::cpu && params_.batch * params_.active * params_.row_bytes <= brief_copy;
  }

  void read_host() {
    if (op_.device().kind == DeviceKind::cpu) op_.check_rows(*rows_, op_.size("N"), scatter_);
  }

 protected:
  MoveRows(const char* op, bool scatter) : op_(op), dtype_("T"), scatter_(scatter) {}

  void finish(const TensorView& out, const TensorView& rows, const TensorView& from) {
    op_.check_overlap();
    rows_ = &rows;
    read_host();
    const int64_t bytes = out.itemsize;
    params_ = {out.data,
               from.data,
               out.stride[0] * bytes,
               out.stride[1] * bytes,
               from.stride[0] * bytes,
               from.stride[1] * bytes,
               rows.as<int64_t>(),
               op_.size("B"),
               op_.size("A"),
               op_.size("N"),
               out.shape[2] * bytes};
  }

  Signature op_;
  DtypeRule dtype_;

 private:
  bool scatter_;
  const TensorView* rows_ = nullptr;
  MoveRowsParams params_{};
};

class GatherRows : public MoveRows {
 public:
  GatherRows(py::handle out, py::handle x, py::handle rows) : MoveRows("gather_rows", false) {
    const auto& o = op_.tensor("out", out, {"B", "A", "..."}, dtype_, Access::write);
    const auto& from = op_.tensor("x", x, {"B", "N", "..."}, dtype_);
    finish(o, op_.tensor("rows", rows, {"A"}, Dtype::int64), from);
  }
};

class ScatterRows : public MoveRows {
 public:
  ScatterRows(py::handle x, py::handle rows, py::handle src) : MoveRows("scatter_rows", true) {
    const auto& to = op_.tensor("x", x, {"B", "N", "..."}, dtype_, Access::write);
    const auto& r = op_.tensor("rows", rows, {"A"}, Dtype::int64);
    finish(to, r, op_.tensor("src", src, {"B", "A", "..."}, dtype_));
  }
};

class ConfidencePool {
 public:
  ConfidencePool(py::handle out, py::handle query, py::handle keys, py::handle key_weight, py::handle tokens,
                 double eps)
      : op_("confidence_pool") {
    const DtypeRule dtype("T", float_dtypes);
    const auto& o = op_.tensor("out", out, {"B", "H", "C"}, Dtype::float32, Access::write);
    const int64_t heads = op_.size("H"), width = op_.size("C");
    if (heads == 0 || width % heads || width == 0)
      op_.fail("out has C = " + std::to_string(width) + ", expected a multiple of H = " + std::to_string(heads));
    op_.derive("D", width / heads, "out");
    const auto& q = op_.tensor("query", query, {"H", "D"}, Dtype::float32);
    const auto& k = op_.tensor("keys", keys, {"B", "A", "C"}, dtype);
    const auto& w = op_.tensor("key_weight", key_weight, {"C"}, float_dtypes);
    const auto& t = op_.tensor("tokens", tokens, {"B", "A", "C"}, dtype);
    op_.check_contiguous(o);
    op_.check_contiguous(q);
    op_.check_overlap();
    if (op_.size("A") == 0) op_.fail("keys and tokens hold A = 0 rows, expected at least one");
    params_ = {o.as<float>(), q.as<float>(), rows_of(k), rows_of(t),    w.data,
               element_of(w), op_.size("B"), op_.size("A"), heads,       width / heads,
               static_cast<float>(eps)};
  }

  void run(const Launch& launch) {
    if (op_.device().kind == DeviceKind::cpu) return run_cpu(launch);
#if defined(DSA_RT_CUDA)
    if (op_.device().kind == DeviceKind::cuda) {
      if (params_.heads > cuda::max_pool_heads)
        op_.fail_unserved("H is " + std::to_string(params_.heads) + ", on CUDA at most " +
                          std::to_string(cuda::max_pool_heads));
      return cuda::confidence_pool(params_, launch.stream);
    }
#endif
    no_kernel(op_);
  }

 private:
  void run_cpu(const Launch& launch) {
    const auto& p = params_;
    const auto& kernels = cpu_kernels(launch.instruction_set);
    const int64_t width = p.heads * p.dim;
    const int64_t count = p.batch * p.heads * p.active;
    auto* scores = static_cast<float*>(thread_scratch(static_cast<size_t>(count + width) * sizeof(float)));
    if (!scores) throw std::bad_alloc();
    float* query = scores + count;
    kernels.pool_query(p, query);
    const auto split = [&](int64_t total, int64_t grain, auto&& work) {
      parallel_for(total, grain, launch.threads, work);
    };
    split(p.batch * p.active, grain_of(row_work, width),
          [&](int64_t begin, int64_t end) { kernels.pool_scores(p, query, scores, begin, end); });
    split(p.batch * p.heads, grain_of(weight_work, p.active),
          [&](int64_t begin, int64_t end) { kernels.pool_weights(p, scores, begin, end); });
    split(p.batch * cpu::pool_pieces(width), grain_of(row_work, p.active * p.heads * cpu::pool_channels / 4),
          [&](int64_t begin, int64_t end) { kernels.pool_tokens(p, scores, begin, end); });
  }

  Signature op_;
  ConfidencePoolParams params_;
};

}  // namespace

void bind_layers(py::module_& m) {
  using Tensor = py::object;
  using py::arg;
  bind<NormModulate, Tensor, Tensor, Tensor, Tensor, Tensor, double>(
      m, "norm_modulate", arg("out"), arg("x"), arg("shift"), arg("scale"), arg("rows"), arg("eps"));
  bind<ResidualNormModulate, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double>(
      m, "residual_norm_modulate", arg("sum"), arg("out"), arg("x"), arg("y"), arg("gate"), arg("shift"), arg("scale"),
      arg("rows"), arg("eps"));
  bind<RmsNorm, Tensor, Tensor, Tensor, double>(m, "rms_norm", arg("out"), arg("x"), arg("weight"), arg("eps"));
  bind<QkNormRopeStore, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, double>(
      m, "qk_norm_rope_store", arg("q_out"), arg("k_cache"), arg("v_cache"), arg("q"), arg("k"), arg("v"),
      arg("q_weight"), arg("k_weight"), arg("cos"), arg("sin"), arg("slots"), arg("eps"));
  bind<GatherRows, Tensor, Tensor, Tensor>(m, "gather_rows", arg("out"), arg("x"), arg("rows"));
  bind<ScatterRows, Tensor, Tensor, Tensor>(m, "scatter_rows", arg("x"), arg("rows"), arg("src"));
  bind<ConfidencePool, Tensor, Tensor, Tensor, Tensor, Tensor, double>(
      m, "confidence_pool", arg("out"), arg("query"), arg("keys"), arg("key_weight"), arg("tokens"), arg("eps"));
}

}  // namespace dsa_rt
