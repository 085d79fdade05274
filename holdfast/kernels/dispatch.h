// Which instruction sets a library has, and which of them this processor can run. For library.cpp, which alone is told
// HOLDFAST_SOURCES and HOLDFAST_HAS_*.
#pragma once
#include <cstdint>

struct Kernels;  // what one instruction set offers; see abi.h of the library

// KERNELS of each engine object, renamed by the build.
extern const Kernels kernels_portable;
#ifdef HOLDFAST_HAS_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef HOLDFAST_HAS_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef HOLDFAST_HAS_AVX512VBMI
extern const Kernels kernels_avx512vbmi;
#endif

namespace {

enum Isa : int32_t { PORTABLE, AVX2, AVX512, AVX512VBMI };

const Kernels* kernels_of(int32_t isa) {
#ifdef HOLDFAST_HAS_AVX2
  if (isa == AVX2) return &kernels_avx2;
#endif
#ifdef HOLDFAST_HAS_AVX512
  if (isa == AVX512) return &kernels_avx512;
#endif
#ifdef HOLDFAST_HAS_AVX512VBMI
  if (isa == AVX512VBMI) return &kernels_avx512vbmi;
#endif
  return isa == PORTABLE ? &kernels_portable : nullptr;
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

EXPORT const char* holdfast_sources() { return HOLDFAST_SOURCES; }  // digest, see native_build.py

EXPORT int32_t holdfast_is_supported(int32_t isa) {
  if (!kernels_of(isa)) return 0;
#ifdef __x86_64__
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == AVX2) return __builtin_cpu_supports("avx2") != 0;
  if (isa == AVX512) return avx512;
  if (isa == AVX512VBMI) return avx512 && __builtin_cpu_supports("avx512vbmi");
#endif
  return isa == PORTABLE;
}
}
