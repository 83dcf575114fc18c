// A model of kernels/cuda/hopper/barrier.cuh, from the PTX ISA's mbarrier and bar instructions.
#pragma once

#include "device.h"

namespace dsa_rt::cuda::hopper {

extern unsigned char memory[];  // the block's dynamic shared memory

inline uint32_t shared_address(const void* pointer) {
  return (uint32_t)(static_cast<const unsigned char*>(pointer) - memory) + ::emulated::shared_start;
}

struct Barrier {
  int arrivals, pending;  // of a phase; still to come in this one
  int64_t bytes;          // expected less those that came
  uint32_t phase;

  void settle() {
    if (pending || bytes) return;
    ++phase;
    pending = arrivals;
  }
};

inline void init(Barrier& barrier, uint32_t arrivals) { barrier = {(int)arrivals, (int)arrivals, 0, 0}; }
inline void fence_init() {}

inline void arrive_and_expect(Barrier& barrier, uint32_t bytes) {
  if (barrier.pending == 0) ::emulated::block->fail("more arrivals at a barrier than it waits for");
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.settle();
}

inline void arrive(Barrier& barrier) { arrive_and_expect(barrier, 0); }

inline void wait(Barrier& barrier, uint32_t parity) {
  ::emulated::block->wait([&barrier, parity] { return barrier.phase % 2 != parity; });
}

struct NamedBarriers {
  struct {
    int arrived = 0, threads = 0;
    uint64_t rounds = 0;
  } barriers[16];
};

inline uint64_t named_arrive(int id, int threads) {
  auto& b = ::emulated::model<NamedBarriers>().barriers[id];
  if (b.arrived && b.threads != threads) ::emulated::block->fail("a named barrier with two counts");
  b.threads = threads;
  const uint64_t mine = b.rounds;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.rounds;
  }
  return mine;
}

inline void named_sync(int id, int threads) {
  const uint64_t mine = named_arrive(id, threads);
  auto& b = ::emulated::model<NamedBarriers>().barriers[id];
  ::emulated::block->wait([&b, mine] { return b.rounds != mine; });
}

inline void __syncthreads() { named_sync(0, ::emulated::block->threads()); }

template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

}  // namespace dsa_rt::cuda::hopper
