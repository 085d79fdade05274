// The hot loops, compiled once for each instruction set; KERNELS is the name of what this object offers.
#include "abi.h"
#include "xxh3.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using namespace xxh3;

// The eight accumulators of XXH3. load, store: one stripe of 64 bytes; stream: past the caches, to an aligned place.
#if defined(__AVX512DQ__)

class Lanes {
 public:
  using Stripe = __m512i;
  static Stripe load(const void* at) { return _mm512_loadu_si512(at); }
  static void store(void* at, Stripe x) { _mm512_storeu_si512(at, x); }
  static void stream(void* at, Stripe x) { _mm512_stream_si512(static_cast<__m512i*>(at), x); }

  explicit Lanes(const uint64_t* state) : sums_(load(state)) {}
  void save(uint64_t* state) const { store(state, sums_); }

  void add(Stripe x, const uint8_t* secret) {
    const __m512i key = _mm512_xor_si512(x, load(secret));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    const __m512i swapped = _mm512_shuffle_epi32(x, _MM_PERM_BADC);
    sums_ = _mm512_add_epi64(sums_, _mm512_add_epi64(product, swapped));
  }

  void scramble() {
    const __m512i prime = _mm512_set1_epi64(PRIME32_1);
    const __m512i x = _mm512_xor_si512(_mm512_xor_si512(sums_, _mm512_srli_epi64(sums_, 47)), load(SCRAMBLE_SECRET));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
    sums_ = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
  }

 private:
  __m512i sums_;
};

#elif defined(__AVX2__)

class Lanes {
 public:
  struct Stripe {
    __m256i half[2];
  };
  static Stripe load(const void* at) {
    const __m256i* halves = static_cast<const __m256i*>(at);
    return {{_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
  }
  static void store(void* at, const Stripe& x) {
    for (int i = 0; i < 2; i++) _mm256_storeu_si256(static_cast<__m256i*>(at) + i, x.half[i]);
  }
  static void stream(void* at, const Stripe& x) {
    for (int i = 0; i < 2; i++) _mm256_stream_si256(static_cast<__m256i*>(at) + i, x.half[i]);
  }

  explicit Lanes(const uint64_t* state) : sums_(load(state)) {}
  void save(uint64_t* state) const { store(state, sums_); }

  void add(const Stripe& x, const uint8_t* secret) {
    const Stripe masks = load(secret);
    for (int i = 0; i < 2; i++) {
      const __m256i key = _mm256_xor_si256(x.half[i], masks.half[i]);
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      const __m256i swapped = _mm256_shuffle_epi32(x.half[i], _MM_SHUFFLE(1, 0, 3, 2));
      sums_.half[i] = _mm256_add_epi64(sums_.half[i], _mm256_add_epi64(product, swapped));
    }
  }

  void scramble() {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    const Stripe masks = load(SCRAMBLE_SECRET);
    for (int i = 0; i < 2; i++) {
      const __m256i sums = sums_.half[i], mixed = _mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47));
      const __m256i x = _mm256_xor_si256(mixed, masks.half[i]);
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
      sums_.half[i] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
    }
  }

 private:
  Stripe sums_;
};

#else

class Lanes {
 public:
  struct Stripe {
    uint64_t lane[8];
  };
  static Stripe load(const void* at) {
    Stripe x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
  static void store(void* at, const Stripe& x) { std::memcpy(at, &x, sizeof x); }
  static void stream(void* at, const Stripe& x) { store(at, x); }

  explicit Lanes(const uint64_t* state) : sums_(load(state)) {}
  void save(uint64_t* state) const { store(state, sums_); }

  void add(const Stripe& x, const uint8_t* secret) {
    for (int i = 0; i < 8; i++) {
      const uint64_t key = x.lane[i] ^ read64(secret + 8 * i);
      sums_.lane[i] += x.lane[i ^ 1] + (key & 0xFFFFFFFF) * (key >> 32);
    }
  }

  void scramble() {
    for (int i = 0; i < 8; i++)
      sums_.lane[i] = (shifted(sums_.lane[i], 47) ^ read64(SCRAMBLE_SECRET + 8 * i)) * PRIME32_1;
  }

 private:
  Stripe sums_;
};

#endif

// The same registers are stored and hashed, so that the digest is of what was staged whatever happens to the source.
template <bool past_caches>
void copy_blocks_to(uint8_t* target, const uint8_t* source, int64_t blocks, uint64_t* state) {
  Lanes lanes(state);
  for (const uint8_t* end = source + blocks * BLOCK; source != end; lanes.scramble()) {
    for (int64_t i = 0; i < STRIPES_PER_BLOCK; i++, source += STRIPE, target += STRIPE) {
      const Lanes::Stripe x = Lanes::load(source);
      past_caches ? Lanes::stream(target, x) : Lanes::store(target, x);
      lanes.add(x, SECRET + 8 * i);
    }
  }
  lanes.save(state);
}

// Past the caches is twice as fast: the target's lines are not fetched before they are overwritten. What others have in
// the caches stays there, too.
void copy_blocks(uint8_t* target, const uint8_t* source, int64_t blocks, uint64_t* state) {
  const bool is_aligned = reinterpret_cast<uintptr_t>(target) % STRIPE == 0;
  (is_aligned ? copy_blocks_to<true> : copy_blocks_to<false>)(target, source, blocks, state);
}

void hash_stripes(const uint8_t* bytes, int64_t stripes, const uint8_t* secret, uint64_t* state) {
  Lanes lanes(state);
  for (int64_t i = 0; i < stripes; i++) lanes.add(Lanes::load(bytes + STRIPE * i), secret + 8 * i);
  lanes.save(state);
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {copy_blocks, hash_stripes};
