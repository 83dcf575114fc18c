// Copies of rows, while the next one is fetched and past the caches where that pays. Internal linkage: see philox.h.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace dsa_rt::cpu {
namespace {

// The processor's prefetchers begin anew with each row, so the row `next`, unless it is null, is asked for while this one
// moves. The C library's memcpy knows the processor, but sees one row and knows nothing of what the caches will hold.
inline void move_row(void* to, const void* from, const void* next, int64_t bytes, bool streams) {
  constexpr int64_t line = 64;
  auto* out = static_cast<char*>(to);
  const auto *in = static_cast<const char*>(from), *ahead = static_cast<const char*>(next);
  int64_t done = 0;
#if defined(__SSE2__)
  if (streams && (uintptr_t)out % line == 0)
    for (; done + line <= bytes; done += line) {
      if (ahead) __builtin_prefetch(ahead + done);
      __m128i part[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) part[i] = _mm_loadu_si128((const __m128i*)(in + done) + i);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) _mm_stream_si128((__m128i*)(out + done) + i, part[i]);
    }
#endif
  if (ahead)
    for (int64_t at = done; at < bytes; at += line) __builtin_prefetch(ahead + at, 0, 2);
  memcpy(out + done, in + done, static_cast<size_t>(bytes - done));
}

// Once a thread has moved its rows, for other threads to see them.
inline void moves_end() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace dsa_rt::cpu
