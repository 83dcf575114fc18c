// Working memory of a thread.
#pragma once

#include <cstddef>

namespace dsa_rt {

// Memory of the calling thread, aligned to 64 bytes, that grows to its largest request and stays; null where there is
// none. The contents are those of the last use.
void* thread_scratch(size_t bytes);

}  // namespace dsa_rt
