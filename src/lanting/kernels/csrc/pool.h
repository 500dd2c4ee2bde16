// Threads of our own: torch's OpenMP may not be there, and two runtimes would fight over the cores.
#pragma once
#include <cstdint>

namespace lt {

using Work = void (*)(void* given, int64_t index, int worker);

void set_threads(int count);
int threads();
// Runs work(given, 0..count - 1), in any order, on all threads; returns when all of it is done.
void run(int64_t count, Work work, void* given);
// Memory of the calling thread that lives as long as it does, at least `bytes`, aligned to 4096; `slot` below 8.
void* scratch(int slot, int64_t bytes);

template <class F> void parallel(int64_t count, F body) {
  run(count, [](void* given, int64_t index, int) { (*static_cast<F*>(given))(index); }, &body);
}

}  // namespace lt
