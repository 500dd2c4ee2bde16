#include "pool.h"

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#endif

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace lt {
namespace {

struct Pool {
  std::mutex lock;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> round{0};  // which piece of work is on
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};
  int64_t count = 0;
  Work work = nullptr;
  void* given = nullptr;
  bool ending = false;
  std::atomic<bool> failed{false};

  void take(int worker) {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(given, i, worker);
    } catch (...) {  // out of memory, in a thread that nobody waits for
      failed.store(true);
    }
  }

  void wait_for_work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 2000 && round.load(std::memory_order_acquire) == seen; spin++) std::this_thread::yield();
      {
        std::unique_lock<std::mutex> hold(lock);
        wake.wait(hold, [&] { return ending || round.load(std::memory_order_relaxed) != seen; });
        if (ending) return;
        seen = round.load(std::memory_order_relaxed);
      }
      take(worker);
      busy.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void go(int64_t pieces, Work what, void* with) {
    {
      std::lock_guard<std::mutex> hold(lock);
      count = pieces, work = what, given = with;
      next.store(0, std::memory_order_relaxed);
      busy.store(static_cast<int>(workers.size()), std::memory_order_relaxed);
      round.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    take(0);
    while (busy.load(std::memory_order_acquire)) std::this_thread::yield();
    if (failed.exchange(false)) throw std::bad_alloc();
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> hold(lock);
      ending = true;
    }
    wake.notify_all();
    for (auto& worker : workers) worker.join();
  }
};

Pool* pool = nullptr;  // never freed at exit: threads of an interpreter that ends may still hold it
std::mutex turn;       // one piece of work at a time; who comes second works alone
std::atomic<int> wanted{1};

#if !defined(_WIN32)
void forget_pool() {  // a forked child has none of the threads
  pool = nullptr;
  new (&turn) std::mutex();
}
#endif

void make_pool() {
  if (pool && static_cast<int>(pool->workers.size()) == wanted - 1) return;
#if !defined(_WIN32)
  static bool once = (pthread_atfork(nullptr, nullptr, forget_pool), true);
  (void)once;
#endif
  delete pool;
  pool = new Pool();
  for (int i = 1; i < wanted; i++) pool->workers.emplace_back([made = pool, i] { made->wait_for_work(i); });
}

#if defined(_WIN32)
void* new_pages(int64_t size) { return _aligned_malloc(size, 4096); }
void free_pages(void* at) { _aligned_free(at); }
#else
void* new_pages(int64_t size) { return aligned_alloc(4096, size); }
void free_pages(void* at) { free(at); }
#endif

struct Slots {
  void* at[8] = {};
  int64_t size[8] = {};
  ~Slots() {
    for (void* each : at) free_pages(each);
  }
};

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> hold(turn);
  wanted = count < 1 ? 1 : count;
}

int threads() { return wanted; }

void run(int64_t count, Work work, void* given) {
  std::unique_lock<std::mutex> mine(turn, std::try_to_lock);
  if (mine.owns_lock() && count > 1 && wanted > 1) {
    make_pool();
    pool->go(count, work, given);
    return;
  }
  for (int64_t i = 0; i < count; i++) work(given, i, 0);
}

void* scratch(int slot, int64_t bytes) {
  static thread_local Slots slots;
  if (slots.size[slot] < bytes) {
    free_pages(slots.at[slot]);
    slots.size[slot] = 0;  // should there be no more memory
    int64_t size = (bytes + 4095) / 4096 * 4096;
    slots.at[slot] = new_pages(size);
    if (!slots.at[slot]) throw std::bad_alloc();
    slots.size[slot] = size;
  }
  return slots.at[slot];
}

}  // namespace lt
