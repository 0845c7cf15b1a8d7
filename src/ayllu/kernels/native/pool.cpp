#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ayllu {
namespace {

// How long a thread spins for the next region: longer than the caller's work between two steps, because waking up
// takes up to half a millisecond on a virtual machine; far shorter than a person notices.
constexpr auto SPIN = std::chrono::microseconds(1000);
// Turns of a meeting's wait (some 2 ms) after which a thread sleeps: whoever is missing may need this
// very processor. Threads are not pinned: beside one other busy process a pinned one made every step 30 times slower.
constexpr int PATIENCE = 100000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

#if defined(__linux__)
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}
#else
std::mutex sleep_lock;
std::condition_variable sleep_over;
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
  std::unique_lock<std::mutex> held(sleep_lock);
  sleep_over.wait(held, [&] { return word.load() != value; });
}
void wake_all(std::atomic<uint32_t>&) {
  std::lock_guard<std::mutex> held(sleep_lock);
  sleep_over.notify_all();
}
#endif

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads), turn_(static_cast<size_t>(threads_)) {
  for (int thread = 1; thread < threads_; thread++) workers_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
  ending_.store(true);
  started_.fetch_add(1);
  wake_all(started_);
  for (std::thread& worker : workers_) worker.join();
}

void Pool::run_erased(void (*work)(void*, int), void* self) {
  if (threads_ == 1) {
    work(self, 0);
    return;
  }
  work_ = work;
  self_ = self;
  for (int i = 0; i < 2; i++) next_[i].store(0, std::memory_order_relaxed);
  for (Turn& turn : turn_) turn.value = 0;
  started_.fetch_add(1, std::memory_order_seq_cst);
  if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_all(started_);
  work(self, 0);
  meet();
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  while (true) {
    const auto until = std::chrono::steady_clock::now() + SPIN;
    for (int turn = 1; started_.load(std::memory_order_acquire) == seen; turn++) {
      pause();
      if (turn % 64 == 0 && std::chrono::steady_clock::now() > until) {
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        while (started_.load(std::memory_order_seq_cst) == seen) sleep_while(started_, seen);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    seen = started_.load(std::memory_order_acquire);
    if (ending_.load()) return;
    work_(self_, thread);
    meet();
  }
}

void Pool::meet() {
  if (threads_ == 1) return;
  const uint32_t meeting = meetings_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    meetings_.fetch_add(1, std::memory_order_seq_cst);
    if (waiting_.load(std::memory_order_seq_cst) > 0) wake_all(meetings_);
    return;
  }
  for (int turn = 0; meetings_.load(std::memory_order_acquire) == meeting; turn++) {
    pause();
    if (turn < PATIENCE) continue;
    waiting_.fetch_add(1, std::memory_order_seq_cst);
    while (meetings_.load(std::memory_order_seq_cst) == meeting) sleep_while(meetings_, meeting);
    waiting_.fetch_sub(1, std::memory_order_seq_cst);
    return;
  }
}

}  // namespace ayllu
