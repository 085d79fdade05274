// The exported functions. They return 0, or what is wrong as a negative number; they never throw.
#include <algorithm>
#include <exception>
#include <vector>

#include "abi.h"
#include "codebook.h"
#include "dispatch.h"
#include "team.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // elements; a multiple of every block size

// Which part of which row a chunk is.
class Chunks {
 public:
  Chunks(const Row* rows, int64_t count, int64_t block_size) : per_chunk_(CHUNK / block_size) {
    starts_.reserve(static_cast<size_t>(count) + 1);
    for (int64_t row = 0, start = 0; row <= count; row++) {
      starts_.push_back(start);
      if (row < count) start += (rows[row].elements + CHUNK - 1) / CHUNK;
    }
    for (int64_t row = 0; row < count; row++) blocks_.push_back((rows[row].elements + block_size - 1) / block_size);
  }

  int64_t count() const { return starts_.back(); }
  int64_t blocks(int64_t row) const { return blocks_[static_cast<size_t>(row)]; }

  template <class Work>
  void visit(int64_t chunk, Work work) const {
    const int64_t row = std::upper_bound(starts_.begin(), starts_.end(), chunk) - starts_.begin() - 1;
    const int64_t from = (chunk - starts_[static_cast<size_t>(row)]) * per_chunk_;
    work(row, from, std::min(from + per_chunk_, blocks(row)));
  }

 private:
  int64_t per_chunk_;
  std::vector<int64_t> starts_, blocks_;
};

double sum_by_halving(const double* x, int64_t n, int64_t stride) {
  int64_t width = 1;
  while (width < n) width *= 2;
  std::vector<double> sums(static_cast<size_t>(width), 0.0);
  for (int64_t i = 0; i < n; i++) sums[static_cast<size_t>(i)] = x[i * stride];
  for (int64_t half = width / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) sums[static_cast<size_t>(i)] += sums[static_cast<size_t>(i + half)];
  return sums[0];
}

}  // namespace

extern "C" {

EXPORT void holdfast_set_codebooks(const float* signed_values, const float* unsigned_values) {
  codebooks::make(signed_values, unsigned_values);
}

EXPORT int32_t holdfast_update(int32_t isa, int32_t rule, const Row* rows, int64_t count,
                               const Coefficients* coefficients, const Options* options, int64_t threads) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rule < 0 || rule >= RULES) return -1;
  try {
    const Chunks chunks(rows, count, options->block_size);
    team::run(threads, chunks.count(), [&](int64_t chunk) {
      chunks.visit(chunk, [&](int64_t row, int64_t from, int64_t to) {
        kernels->update(rule, rows[row], coefficients[rows[row].coefficients], *options, from, to);
      });
    });
  } catch (const std::exception&) {  // memory for a few integers per tensor; nothing has been touched yet
    return -2;
  }
  return 0;
}

EXPORT int32_t holdfast_norms(int32_t isa, int32_t kind, const Row* rows, int64_t count,
                              const Coefficients* coefficients, const Options* options, int64_t threads,
                              double* out) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) return -1;
  try {
    const Chunks chunks(rows, count, options->block_size);
    std::vector<std::vector<double>> sums;
    for (int64_t row = 0; row < count; row++) sums.emplace_back(static_cast<size_t>(2 * chunks.blocks(row)));
    team::run(threads, chunks.count(), [&](int64_t chunk) {
      chunks.visit(chunk, [&](int64_t row, int64_t from, int64_t to) {
        kernels->norms(kind, rows[row], coefficients[rows[row].coefficients], *options, from, to,
                       sums[static_cast<size_t>(row)].data());
      });
    });
    for (int64_t row = 0; row < count; row++)
      for (int64_t which = 0; which < 2; which++)
        out[2 * row + which] = sum_by_halving(sums[static_cast<size_t>(row)].data() + which, chunks.blocks(row), 2);
  } catch (const std::exception&) {
    return -2;
  }
  return 0;
}

EXPORT int32_t holdfast_encode(int32_t isa, const float* x, int64_t n, float absmax, int32_t is_signed,
                               int32_t nonzero, uint8_t* codes) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) return -1;
  kernels->encode(x, n, absmax, is_signed, nonzero, codes);
  return 0;
}

EXPORT int32_t holdfast_decode(int32_t isa, const uint8_t* codes, int64_t n, float absmax, int32_t is_signed,
                               float* x) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) return -1;
  kernels->decode(codes, n, absmax, is_signed, x);
  return 0;
}
}
