// One team of threads for all kernels: between two calls its members spin for a moment, then sleep.
#pragma once

#include <cstdint>
#include <functional>

namespace penstock {

// Threads that take part in a call, the caller's included. Takes effect with the next call.
void set_threads(int count);
int threads();

// Calls work(item, thread) once for each item < items, on whichever thread is free. Which thread computes an item must
// not matter to its bits. Calls from several threads take turns. A thread begins with items of its own: neighbours, or with
// ``dealt`` every so manieth, so that the first of all are begun first.
void parallel(int64_t items, const std::function<void(int64_t item, int thread)>& work, bool dealt = false);

}  // namespace penstock
