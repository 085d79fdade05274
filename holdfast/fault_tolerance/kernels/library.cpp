// The exported functions. They never throw.
#include <algorithm>
#include <cstring>

#include "abi.h"
#include "dispatch.h"
#include "steering.h"
#include "xxh3.h"

namespace {

// What remains of a row after its whole blocks: at least a byte, at most a block. It lies in the target already.
xxh3::Digest finish(const Kernels& kernels, const uint8_t* row, int64_t whole, int64_t length, uint64_t* state) {
  const uint8_t* last = row + length - xxh3::STRIPE;
  kernels.hash_stripes(row + whole, (length - 1 - whole) / xxh3::STRIPE, xxh3::SECRET, state);
  kernels.hash_stripes(last, 1, xxh3::LAST_STRIPE_SECRET, state);
  return xxh3::of_state(state, static_cast<uint64_t>(length));
}

bool stage_short(const Row& row, uint8_t* target, Course& course, uint8_t digest[16]) {
  if (!course.admit(row.length)) return false;
  if (row.length) std::memcpy(target, row.source, static_cast<size_t>(row.length));
  xxh3::write(xxh3::of_short(target, static_cast<uint64_t>(row.length)), digest);
  course.advance(row.length);
  return true;
}

bool stage_long(const Kernels& kernels, const Row& row, uint8_t* target, int64_t chunk, Course& course,
                uint8_t digest[16]) {
  alignas(64) uint64_t state[8];
  std::copy_n(xxh3::START, 8, state);
  const int64_t whole = (row.length - 1) / xxh3::BLOCK * xxh3::BLOCK;
  for (int64_t from = 0; from < row.length; from += chunk) {
    const int64_t to = std::min(from + chunk, row.length), in_blocks = std::min(to, whole) - from;
    if (!course.admit(to - from)) return false;
    kernels.copy_blocks(target + from, row.source + from, in_blocks / xxh3::BLOCK, state);
    if (to == row.length) {
      std::memcpy(target + whole, row.source + whole, static_cast<size_t>(to - whole));
      xxh3::write(finish(kernels, target, whole, row.length, state), digest);
    }
    course.advance(to - from);
  }
  return true;
}

bool stage(const Kernels& kernels, const Row* rows, int64_t count, uint8_t* target, const Steering& steering,
           uint8_t* digests) {
  const int64_t chunk = std::max(steering.chunk_bytes / xxh3::BLOCK, int64_t{1}) * xxh3::BLOCK;
  Course course(steering);
  for (const Row* row = rows; row != rows + count; row++, digests += 16) {
    uint8_t* const at = target + row->offset;
    const bool is_done = row->length > xxh3::LONGEST_SHORT ? stage_long(kernels, *row, at, chunk, course, digests)
                                                            : stage_short(*row, at, course, digests);
    if (!is_done) return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Returns 1 when every row has been staged, 0 when the call was stopped, -1 for an unknown instruction set.
EXPORT int32_t holdfast_stage(int32_t isa, const Row* rows, int64_t count, uint8_t* target, const Steering* steering,
                              uint8_t* digests) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) return -1;
  const bool is_done = stage(*kernels, rows, count, target, *steering, digests);
#ifdef __x86_64__
  __builtin_ia32_sfence();  // what went past the caches is seen by others before whatever the caller writes next
#endif
  return is_done;
}
}
