#include "team.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace {

// OpenMP is not used: a process that has used it cannot fork() and go on, and its runtime may not be there.
class Team {
 public:
  void run(int64_t threads, int64_t chunks, const std::function<void(int64_t)>& work) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (threads < 2 || chunks < 2 || !turn) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) work(chunk);
      return;
    }
    open(threads - 1, chunks, work);
    take_chunks();
    close();
  }

 private:
  void open(int64_t helpers, int64_t chunks, const std::function<void(int64_t)>& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      chunks_ = chunks;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers < chunks - 1 ? helpers : chunks - 1;
      is_open_ = true;
      hire(wanted_);
    }
    if (wanted_ == 1) start_.notify_one();
    else start_.notify_all();
  }

  void hire(int64_t helpers) {
    try {
      for (; hired_ < helpers; hired_++) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
    }
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    is_open_ = false;  // who wakes up late finds nothing to do
    end_.wait(lock, [this] { return active_ == 0; });
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [this] { return is_open_ && wanted_ > 0; });
      wanted_--;
      active_++;
      lock.unlock();
      take_chunks();
      lock.lock();
      if (--active_ == 0) end_.notify_all();
    }
  }

  void take_chunks() {
    for (int64_t chunk; (chunk = next_.fetch_add(1, std::memory_order_relaxed)) < chunks_;) (*work_)(chunk);
  }

  std::mutex turn_;  // one region at a time
  std::mutex mutex_;
  std::condition_variable start_, end_;
  const std::function<void(int64_t)>* work_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t chunks_ = 0, wanted_ = 0, active_ = 0, hired_ = 0;
  bool is_open_ = false;
};

alignas(Team) unsigned char place[sizeof(Team)];

// Never destroyed: the threads live as long as the process.
Team& the_team() {
  static Team* team = [] {
    pthread_atfork(nullptr, nullptr, [] { new (place) Team; });  // a child has none of the threads
    return new (place) Team;
  }();
  return *team;
}

}  // namespace

namespace team {

void run(int64_t threads, int64_t chunks, const std::function<void(int64_t)>& work) {
  the_team().run(threads, chunks, work);
}

}  // namespace team
