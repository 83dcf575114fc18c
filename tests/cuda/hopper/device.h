// A thread block on the CPU: enough of CUDA to run the Hopper kernels' own source, with the instructions in barrier,
// tma, wgmma and registers.cuh of kernels/cuda/hopper replaced by the models of them beside this file.
//
// Threads are fibers that give way where a thread would wait. What the hardware does by itself (copies, matrix
// products) are events. Fibers and events run in random order, but events of one kind may be late: then one of them
// happens only when nothing else can, so that whatever does not wait for it is too early.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulated::block->fiber().index)
#define blockIdx (::emulated::block->block_index)
#define gridDim (::emulated::block->grid_size)

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

namespace emulated {

struct Index {
  unsigned x;
};

enum class Kind { none, copy, product };

struct Fiber {
  Index index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> ready;  // empty: it runs
  bool ended = false;
};

class Block {
 public:
  static constexpr size_t stack_bytes = 256 << 10;

  Block(int threads, unsigned index, unsigned blocks, uint64_t seed, Kind late)
      : block_index{index}, grid_size{blocks}, random_(seed), late_(late), fibers_(threads) {}

  const Index block_index, grid_size;
  std::map<const void*, std::shared_ptr<void>> models;  // state of the instructions' models, by kind

  Fiber& fiber() { return fibers_[current_]; }
  int threads() const { return (int)fibers_.size(); }

  // Runs `body` in all threads; what went wrong, or nothing.
  std::string run(const std::function<void()>& body) {
    body_ = body;
    for (unsigned i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      f.index.x = i;
      f.stack.reset(new char[stack_bytes]);
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = stack_bytes;
      f.context.uc_link = &main_;
      makecontext(&f.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
    }
    std::vector<int> order(fibers_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
    for (size_t alive = order.size(); alive && error_.empty();) {
      bool moved = false;
      std::shuffle(order.begin(), order.end(), random_);
      for (const int i : order) {
        Fiber& f = fibers_[i];
        if (f.ended || (f.ready && !f.ready())) continue;
        moved = true;
        if (random_() % 8 == 0) continue;  // threads of a warp do not go on together
        f.ready = nullptr;
        current_ = i;
        swapcontext(&main_, &f.context);
        alive -= f.ended;
        if (!error_.empty()) break;
      }
      moved |= run_events(moved);
      if (!moved && alive && error_.empty()) error_ = "deadlock: " + std::to_string(alive) + " threads wait for ever";
    }
    if (error_.empty() && !events_.empty()) error_ = "the block ended before its asynchronous work";
    return error_;
  }

  // The running thread waits here until `ready`.
  void wait(std::function<bool()> ready) {
    if (ready()) return;
    Fiber& f = fiber();
    f.ready = std::move(ready);
    swapcontext(&f.context, &main_);
  }

  // Ends the run; the running thread never goes on.
  void fail(const std::string& what) {
    if (error_.empty()) error_ = "thread " + std::to_string(fiber().index.x) + ": " + what;
    wait([] { return false; });
  }

  // Something that happens by itself, at any time from now on at which it says true, which ends it.
  void event(Kind kind, std::function<bool()> happen) { events_.push_back({kind, std::move(happen)}); }

  // Makes known that something is wrong, from an event.
  void fail_event(const std::string& what) {
    if (error_.empty()) error_ = what;
  }

 private:
  static void enter();

  struct Event {
    Kind kind;
    std::function<bool()> happen;
  };

  // Lets about half of what can happen happen, all of it where nothing else moved, one of the late ones where nothing
  // at all moves otherwise.
  bool run_events(bool moved) {
    std::shuffle(events_.begin(), events_.end(), random_);
    const bool some = moved;
    const auto happens = [&](size_t i) {
      const auto happen = events_[i].happen;  // it may add events
      if (!happen()) return false;
      events_.erase(events_.begin() + i);
      return true;
    };
    for (size_t i = 0; i < events_.size();)
      if (events_[i].kind == late_ || (some && random_() % 2) || !happens(i))
        ++i;
      else
        moved = true;
    for (size_t i = 0; i < events_.size() && !moved; ++i)
      if (events_[i].kind == late_) moved = happens(i);
    return moved;
  }

  std::mt19937_64 random_;
  Kind late_;
  std::vector<Fiber> fibers_;
  std::vector<Event> events_;
  std::function<void()> body_;
  std::string error_;
  ucontext_t main_;
  int current_ = 0;
};

inline Block* block = nullptr;

inline void Block::enter() {
  block->body_();
  block->fiber().ended = true;
}

// The block's one model of type T.
template <class T>
T& model() {
  static char kind;
  std::shared_ptr<void>& found = block->models[&kind];
  if (!found) found = std::make_shared<T>();
  return *static_cast<T*>(found.get());
}

// All `lanes` threads of an aligned group hand in a value; each gets all of them.
template <class T, int lanes>
struct Collective {
  struct Group {
    T values[2][lanes];
    int arrived = 0;
    uint64_t rounds = 0;
  };
  Group groups[1024 / lanes];

  const T* all(const T& value) {
    const int thread = block->fiber().index.x;
    Group& g = groups[thread / lanes];
    const uint64_t mine = g.rounds;
    g.values[mine % 2][thread % lanes] = value;
    if (++g.arrived == lanes) {
      g.arrived = 0;
      ++g.rounds;
    }
    block->wait([&g, mine] { return g.rounds != mine; });
    return g.values[mine % 2];
  }
};

constexpr uint32_t shared_start = 1024;  // where a block's dynamic shared memory begins

}  // namespace emulated
