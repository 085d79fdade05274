// Whether a call goes on, and when: looked at before every chunk.
#pragma once
#include <algorithm>
#include <ctime>

#include "abi.h"

class Course {
 public:
  explicit Course(const Steering& steering) : steering_(steering), due_s_(now_s()), done_(get(steering.words + DONE)) {}

  // Waits until the rate allows so many more bytes. False when the call has been stopped.
  bool admit(int64_t bytes) {
    while (!is_stopped()) {
      if (steering_.max_bytes_per_s <= 0) return true;
      const double now = now_s();
      if (now >= due_s_ || get(steering_.words + HURRY)) {
        due_s_ = std::max(due_s_, now - steering_.burst_s) + static_cast<double>(bytes) / steering_.max_bytes_per_s;
        return true;
      }
      nap(std::min(due_s_ - now, steering_.nap_s));
    }
    return false;
  }

  void advance(int64_t bytes) { set(DONE, done_ += bytes); }

 private:
  enum Word { STOP, HURRY, DONE };

  static int64_t get(const int64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
  void set(Word word, int64_t value) { __atomic_store_n(steering_.words + word, value, __ATOMIC_RELEASE); }

  bool is_stopped() const {
    return get(steering_.words + STOP) || (steering_.fence && get(steering_.fence) > steering_.fence_limit);
  }

  static double now_s() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  }

  static void nap(double seconds) {
    const timespec time = {0, static_cast<long>(1e9 * seconds)};
    nanosleep(&time, nullptr);
  }

  const Steering& steering_;
  double due_s_;
  int64_t done_;
};
