// Splits independent work over threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dsa_rt {

using RangeFunction = void (*)(void* context, int64_t begin, int64_t end);

// Calls function(context, begin, end) for pieces that cover [0, total), on at most `threads` threads including this
// one. Pieces have at least `grain` items, or half as many where each thread gets one; work of a single grain runs here,
// without any thread.
void parallel_ranges(int64_t total, int64_t grain, int threads, RangeFunction function, void* context);

template <class Function>
void parallel_for(int64_t total, int64_t grain, int threads, Function&& function) {
  parallel_ranges(
      total, grain, threads,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(begin, end);
      },
      &function);
}

// "openmp" where the process has an OpenMP runtime to borrow, else "threads".
const char* parallel_backend();

}  // namespace dsa_rt
