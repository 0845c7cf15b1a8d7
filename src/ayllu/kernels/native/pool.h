// Threads that work in step: each parallel region runs on all of them, and ends when all have ended.
//
// Between regions that follow each other within microseconds (a decode step has ten per layer) a thread spins;
// after that it sleeps until it is woken, so an idle engine costs nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace ayllu {

class Pool {
 public:
  // threads: the caller included, at least 1.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Runs work(thread) on every thread, the caller being thread 0. Not reentrant.
  template <class Work> void run(Work&& work) {
    run_erased([](void* self, int thread) { (*static_cast<std::remove_reference_t<Work>*>(self))(thread); }, &work);
  }

  // Inside run: waits until all threads are here.
  void meet();

  // Inside run: tasks 0..count-1, each to whoever is free. Ends with a meeting.
  template <class Task> void share(int thread, int count, Task&& task) {
    if (threads_ == 1) {
      for (int i = 0; i < count; i++) task(i);
      return;
    }
    // Two counters in turn: the one for the next share is reset while nobody uses it.
    std::atomic<int>& next = next_[turn_[thread].value & 1];
    std::atomic<int>& after = next_[(turn_[thread].value + 1) & 1];
    turn_[thread].value++;
    if (thread == 0) after.store(0, std::memory_order_relaxed);
    for (int i = next.fetch_add(1, std::memory_order_relaxed); i < count; i = next.fetch_add(1, std::memory_order_relaxed)) task(i);
    meet();
  }

  // The part of `count` that is this thread's when all are to get the same.
  int first_of(int thread, int count) const { return static_cast<int>(static_cast<int64_t>(count) * thread / threads_); }

 private:
  struct alignas(64) Turn { unsigned value = 0; };
  void run_erased(void (*work)(void*, int), void* self);
  void serve(int thread);

  int threads_;
  std::vector<std::thread> workers_;
  std::vector<Turn> turn_;
  void (*work_)(void*, int) = nullptr;
  void* self_ = nullptr;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> meetings_{0};
  std::atomic<int> waiting_{0};
  alignas(64) std::atomic<int> next_[2] = {};
  std::atomic<bool> ending_{false};
};

}  // namespace ayllu
