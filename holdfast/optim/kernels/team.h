// A team of threads for one parallel region at a time.
#pragma once
#include <cstdint>
#include <functional>

namespace team {

// Calls work(0) .. work(chunks - 1), each once, on the calling thread and up to threads - 1 others, and returns when all
// are done. Which thread gets which chunk is not fixed: chunks must not depend on each other. A call from a second
// thread while one is under way, or when no thread can be made, does its work alone. Safe after fork().
void run(int64_t threads, int64_t chunks, const std::function<void(int64_t)>& work);

}  // namespace team
