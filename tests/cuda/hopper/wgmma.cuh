// A model of kernels/cuda/hopper/wgmma.cuh, from the PTX ISA: descriptors, canonical layouts, fragments, groups.
//
// Each warp's quarter of a product is an event of its own, any time after all four warps issued it and after the
// warp's earlier ones. Until then the accumulators hold NaN and what is written to them is lost; operands are read when
// it happens.
#pragma once

#include <map>

#include "barrier.cuh"
#include "device.h"
#include "registers.cuh"

namespace dsa_rt::cuda::hopper {

inline float shared_value(Element element, uint32_t address) {
  uint16_t bits;
  memcpy(&bits, memory + (address - ::emulated::shared_start), 2);
  return value_of(element, bits);
}

// A matrix in shared memory, read through a descriptor: element (i of M or N, k of 16).
struct SharedMatrix {
  Element element;
  uint32_t start, leading, stride;
  bool mn_major;

  SharedMatrix(Element element, uint64_t descriptor, bool mn_major)
      : element(element),
        start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4),
        mn_major(mn_major) {
    if (descriptor >> 62 != 1) ::emulated::block->fail_event("a descriptor without 128-byte swizzle");
    if (descriptor >> 49 & 7) ::emulated::block->fail_event("a descriptor with a base offset");
    if (start & 0x380) ::emulated::block->fail_event("a matrix that starts inside a swizzle atom needs a base offset");
  }

  float operator()(int i, int k) const {
    const uint32_t address = mn_major ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                      : start + i / 8 * stride + i % 8 * 128 + k * 2;
    return shared_value(element, address ^ (address >> 7 & 7) << 4);
  }
};

struct Product {
  Element element;
  float* d;
  int columns;
  const uint32_t* operand;  // A in registers, or null:
  uint64_t a, b;
  bool accumulate;
  // Of operands other than bf16, words of A by lane: (row, column, what is there) -> what will be, for a warp's quarter.
  std::function<float(int, int, float)> (*adds)(const Product&, const uint32_t* const (&operands)[32]) = nullptr;
};

struct InFlight {
  std::vector<float> values;
  int products = 0;
};

struct Products {
  struct Thread {
    std::vector<Product> issued;
    std::vector<size_t> groups;  // how many products were issued when each was closed
    std::map<float*, InFlight> accumulators;
  };
  Thread threads[1024];
  size_t done[32] = {};  // of each warp

  void issue(const Product& product) {
    const int thread = ::emulated::block->fiber().index.x, warp = thread / 32;
    Thread& t = threads[thread];
    InFlight& f = t.accumulators[product.d];
    if (!f.products++) {
      f.values.assign(product.d, product.d + product.columns / 2);
      std::fill(product.d, product.d + product.columns / 2, NAN);
    }
    t.issued.push_back(product);
    if (thread % 32 == 0)
      ::emulated::block->event(::emulated::Kind::product,
                               [this, warp, number = t.issued.size() - 1] { return run(warp, number); });
  }

  bool run(int warp, size_t number) {
    if (done[warp] != number) return false;
    const int first = warp / 4 * 128;
    for (int i = first; i < first + 128; ++i)
      if (threads[i].issued.size() <= number) return false;
    const Product& p = threads[32 * warp].issued[number];
    for (int i = first; i < first + 128; ++i) {
      const Product& other = threads[i].issued[number];
      if (other.element != p.element || other.columns != p.columns || other.a != p.a || other.b != p.b ||
          other.accumulate != p.accumulate)
        ::emulated::block->fail_event("threads of a warpgroup issue different products");
    }
    if (p.adds) return run_other(p, warp, number);
    float a[16][16];
    if (!p.operand) {
      const SharedMatrix matrix(p.element, p.a, false);
      for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k) a[m][k] = matrix(warp % 4 * 16 + m, k);
    } else {
      for (int lane = 0; lane < 32; ++lane)
        for (int r = 0; r < 4; ++r)
          for (int half = 0; half < 2; ++half)
            a[lane / 4 + r % 2 * 8][r / 2 * 8 + lane % 4 * 2 + half] =
                value_of(p.element, threads[32 * warp + lane].issued[number].operand[r] >> 16 * half & 0xFFFF);
    }
    const SharedMatrix matrix(p.element, p.b, p.operand != nullptr);
    std::vector<float> b(p.columns * 16);
    for (int n = 0; n < p.columns; ++n)
      for (int k = 0; k < 16; ++k) b[16 * n + k] = matrix(n, k);
    return end(warp, number, [&](int m, int n, float sum) {
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[16 * n + k];
      return sum;
    });
  }

  // `add`: (row, column, what is there) -> what will be.
  template <class Add>
  bool end(int warp, size_t number, const Add& add) {
    const Product& p = threads[32 * warp].issued[number];
    for (int lane = 0; lane < 32; ++lane) {
      Thread& t = threads[32 * warp + lane];
      float* to = t.issued[number].d;
      InFlight& f = t.accumulators[to];
      for (int i = 0; i < p.columns / 2; ++i) {
        const int m = lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
        f.values[i] = add(m, n, p.accumulate ? f.values[i] : 0);
      }
      if (!--f.products) std::copy(f.values.begin(), f.values.end(), to);
    }
    ++done[warp];
    return true;
  }

  bool run_other(const Product& p, int warp, size_t number) {
    const uint32_t* operands[32];
    for (int lane = 0; lane < 32; ++lane) operands[lane] = threads[32 * warp + lane].issued[number].operand;
    return end(warp, number, p.adds(p, operands));
  }
};

template <class... Arrays>
void pin(Arrays&...) {}
template <class... Arrays>
void start(Arrays&...) {}

inline void commit() {
  auto& t = ::emulated::model<Products>().threads[::emulated::block->fiber().index.x];
  t.groups.push_back(t.issued.size());
}

template <int pending, class... Arrays>
void finish(Arrays&...) {
  auto& products = ::emulated::model<Products>();
  const int thread = ::emulated::block->fiber().index.x;
  const auto& groups = products.threads[thread].groups;
  if (groups.size() <= pending) return;
  const size_t number = groups[groups.size() - 1 - pending];
  ::emulated::block->wait([&products, thread, number] { return products.done[thread / 32] >= number; });
}

template <Element element, bool accumulate>
void multiply(float (&d)[64], uint64_t a, uint64_t b) {
  ::emulated::model<Products>().issue({element, d, 128, nullptr, a, b, accumulate});
}

template <Element element, int n>
void multiply(float (&d)[n], const uint32_t* a, uint64_t b) {
  ::emulated::model<Products>().issue({element, d, 2 * n, a, 0, b, true});
}

}  // namespace dsa_rt::cuda::hopper
