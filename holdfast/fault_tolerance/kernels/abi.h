// The C interface between Python (staging.py, by ctypes) and the kernels. Plain integers, floats and pointers only.
#pragma once
#include <cstdint>

// One row of a staging table. All 8 bytes so that Python fills it from one array.
struct Row {
  const uint8_t* source;
  int64_t offset;  // in the target
  int64_t length;
};

// What a call looks at before every chunk. Other threads, or other processes, write the words meanwhile.
struct Steering {
  int64_t* words;        // stop, hurry, bytes done; the call adds to the last
  const int64_t* fence;  // may be null
  int64_t fence_limit;   // a larger fence ends the call
  int64_t chunk_bytes;
  double max_bytes_per_s;  // 0 is unbounded
  double burst_s;          // what a paced call may catch up with
  double nap_s;            // between two looks while it waits
};

// What one instruction set offers: the accumulators of XXH3, moved over bytes that are copied or that lie there.
struct Kernels {
  void (*copy_blocks)(uint8_t* target, const uint8_t* source, int64_t blocks, uint64_t* state);
  void (*hash_stripes)(const uint8_t* bytes, int64_t stripes, const uint8_t* secret, uint64_t* state);
};
