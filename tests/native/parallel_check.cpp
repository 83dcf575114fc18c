// csrc/parallel.cpp in a process without an OpenMP runtime: every item once, whatever the split; threads of its own.
// Prints the backend and returns 0, or says what went wrong and returns 1.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "../../csrc/parallel.h"

int main() {
  if (std::strcmp(dsa_rt::parallel_backend(), "threads") != 0) return std::puts("an OpenMP runtime was found"), 1;
  for (int64_t total : {0, 1, 2, 7, 64, 1000, 4099})
    for (int64_t grain : {0, 1, 3, 64, 5000})
      for (int threads : {-1, 0, 1, 2, 3, 16}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(total));
        std::atomic<bool> small{false};
        dsa_rt::parallel_for(total, grain, threads, [&](int64_t begin, int64_t end) {
          if (begin >= end || (end < total && 2 * (end - begin) < grain)) small = true;
          for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        for (auto& count : visits)
          if (count != 1) return std::printf("total %ld grain %ld threads %d: an item ran %d times\n", long(total), long(grain), threads, int(count)), 1;
        if (small) return std::puts("a piece was empty or smaller than half of the grain"), 1;
      }
  std::atomic<int64_t> largest{0};  // 4.6 grains for two threads: 4 pieces alike, not 5 of which one thread gets 3
  dsa_rt::parallel_for(4680, 1024, 2, [&](int64_t begin, int64_t end) {
    for (int64_t before = largest; before < end - begin && !largest.compare_exchange_weak(before, end - begin);) {
    }
  });
  if (largest != 1170) return std::printf("the largest piece has %ld items, expected 1170\n", long(largest)), 1;
  std::mutex lock;
  std::set<std::thread::id> seen;
  dsa_rt::parallel_for(8, 1, 4, [&](int64_t, int64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::lock_guard<std::mutex> guard(lock);
    seen.insert(std::this_thread::get_id());
  });
  if (seen.size() < 2) return std::puts("all pieces ran on one thread"), 1;
  std::puts(dsa_rt::parallel_backend());
  return 0;
}
