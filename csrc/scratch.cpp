#include "scratch.h"

#include <cstdlib>
#include <memory>

namespace dsa_rt {

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

}  // namespace dsa_rt
