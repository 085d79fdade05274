// Vectors of floats that the compiler knows how to add, multiply and compare on any processor (GCC and Clang vector
// extensions), as wide as the instruction set's registers. Only the root needs the instruction's name.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float V __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));  // also the result of comparing two V: -1 or 0
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));

inline V load(const float* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

inline void store(float* to, V x) { std::memcpy(to, &x, sizeof(V)); }

inline V all(float x) { return x - V{}; }  // x - 0 is x, also for -0

inline V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int64_t i = 0; i < WIDTH; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

inline I magnitude(V x) { return (I)x & 0x7fffffff; }  // its order is that of |x|, NaN above all

inline I larger(I x, I y) { return x > y ? x : y; }
inline V larger(V x, V y) { return x > y ? x : y; }

inline float largest(I bits) {
  int32_t most = 0;
  for (int64_t i = 0; i < WIDTH; i++) most = bits[i] > most ? bits[i] : most;
  float x;
  std::memcpy(&x, &most, 4);
  return x;
}

}  // namespace
