// XXH3, 128 bits, seed 0, default secret, as in the specification of xxHash 0.8 (doc/xxhash_spec.md): all of it but the
// loop over the stripes of long inputs, which engine.cpp has for each instruction set. Little-endian processors only.
#pragma once
#include <cstdint>
#include <cstring>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "XXH3 here reads little-endian words as they lie in memory"
#endif

namespace xxh3 {

constexpr int64_t STRIPE = 64;
constexpr int64_t SECRET_BYTES = 192;
constexpr int64_t STRIPES_PER_BLOCK = (SECRET_BYTES - STRIPE) / 8;
constexpr int64_t BLOCK = STRIPE * STRIPES_PER_BLOCK;
constexpr int64_t LONGEST_SHORT = 240;

constexpr uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9,
                   PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t PRIME_MX1 = 0x165667919E3779F9, PRIME_MX2 = 0x9FB21C651E98DF25;

constexpr uint64_t START[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

alignas(64) constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
constexpr const uint8_t* SCRAMBLE_SECRET = SECRET + SECRET_BYTES - STRIPE;
constexpr const uint8_t* LAST_STRIPE_SECRET = SCRAMBLE_SECRET - 7;

struct Digest {
  uint64_t low, high;
};

static inline uint64_t read64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

static inline uint32_t read32(const uint8_t* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

static inline uint64_t shifted(uint64_t x, int by) { return x ^ (x >> by); }

static inline uint64_t avalanche(uint64_t x) { return shifted(shifted(x, 37) * PRIME_MX1, 32); }

static inline uint64_t avalanche_xxh64(uint64_t x) {
  return shifted(shifted(shifted(x, 33) * PRIME64_2, 29) * PRIME64_3, 32);
}

static inline Digest multiply(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<uint64_t>(product), static_cast<uint64_t>(product >> 64)};
}

static inline uint64_t fold(uint64_t a, uint64_t b) {
  const Digest product = multiply(a, b);
  return product.low ^ product.high;
}

static inline Digest of_1_to_3(const uint8_t* in, uint64_t n) {
  const uint32_t low = uint32_t(in[0]) << 16 | uint32_t(in[n >> 1]) << 24 | uint32_t(in[n - 1]) | uint32_t(n) << 8;
  const uint32_t swapped = __builtin_bswap32(low), high = swapped << 13 | swapped >> 19;
  return {avalanche_xxh64(low ^ uint64_t(read32(SECRET) ^ read32(SECRET + 4))),
          avalanche_xxh64(high ^ uint64_t(read32(SECRET + 8) ^ read32(SECRET + 12)))};
}

static inline Digest of_4_to_8(const uint8_t* in, uint64_t n) {
  const uint64_t both = read32(in) + (uint64_t(read32(in + n - 4)) << 32);
  Digest m = multiply(both ^ read64(SECRET + 16) ^ read64(SECRET + 24), PRIME64_1 + (n << 2));
  m.high += m.low << 1;
  m.low ^= m.high >> 3;
  return {shifted(shifted(m.low, 35) * PRIME_MX2, 28), avalanche(m.high)};
}

static inline Digest of_9_to_16(const uint8_t* in, uint64_t n) {
  const uint64_t first = read64(in), last = read64(in + n - 8);
  const uint64_t high = last ^ read64(SECRET + 48) ^ read64(SECRET + 56);
  Digest m = multiply(first ^ last ^ read64(SECRET + 32) ^ read64(SECRET + 40), PRIME64_1);
  m.low += (n - 1) << 54;
  m.high += high + (high & 0xFFFFFFFF) * (PRIME32_2 - 1);
  m.low ^= __builtin_bswap64(m.high);
  const Digest h = multiply(m.low, PRIME64_2);
  return {avalanche(h.low), avalanche(h.high + m.high * PRIME64_2)};
}

static inline uint64_t mix16(const uint8_t* in, const uint8_t* secret) {
  return fold(read64(in) ^ read64(secret), read64(in + 8) ^ read64(secret + 8));
}

static inline void mix32(Digest& sums, const uint8_t* a, const uint8_t* b, const uint8_t* secret) {
  sums.low = (sums.low + mix16(a, secret)) ^ (read64(b) + read64(b + 8));
  sums.high = (sums.high + mix16(b, secret + 16)) ^ (read64(a) + read64(a + 8));
}

static inline Digest finished(const Digest& sums, uint64_t n) {
  return {avalanche(sums.low + sums.high),
          0 - avalanche(sums.low * PRIME64_1 + sums.high * PRIME64_4 + n * PRIME64_2)};
}

static inline Digest of_17_to_128(const uint8_t* in, uint64_t n) {
  Digest sums = {n * PRIME64_1, 0};
  for (uint64_t i = (n - 1) / 32 + 1; i-- > 0;) mix32(sums, in + 16 * i, in + n - 16 * (i + 1), SECRET + 32 * i);
  return finished(sums, n);
}

static inline Digest of_129_to_240(const uint8_t* in, uint64_t n) {
  Digest sums = {n * PRIME64_1, 0};
  for (uint64_t i = 0; i < 128; i += 32) mix32(sums, in + i, in + i + 16, SECRET + i);
  sums = {avalanche(sums.low), avalanche(sums.high)};
  for (uint64_t i = 128; i + 32 <= n; i += 32) mix32(sums, in + i, in + i + 16, SECRET + 3 + i - 128);
  mix32(sums, in + n - 16, in + n - 32, SECRET + 136 - 17 - 16);
  return finished(sums, n);
}

// Of at most LONGEST_SHORT bytes.
static inline Digest of_short(const uint8_t* in, uint64_t n) {
  if (n > 128) return of_129_to_240(in, n);
  if (n > 16) return of_17_to_128(in, n);
  if (n > 8) return of_9_to_16(in, n);
  if (n > 3) return of_4_to_8(in, n);
  if (n > 0) return of_1_to_3(in, n);
  return {avalanche_xxh64(read64(SECRET + 64) ^ read64(SECRET + 72)),
          avalanche_xxh64(read64(SECRET + 80) ^ read64(SECRET + 88))};
}

static inline uint64_t merged(const uint64_t* state, const uint8_t* secret, uint64_t start) {
  for (int i = 0; i < 8; i += 2)
    start += fold(state[i] ^ read64(secret + 8 * i), state[i + 1] ^ read64(secret + 8 * i + 8));
  return avalanche(start);
}

// Of more than LONGEST_SHORT bytes, from the accumulators after the last stripe.
static inline Digest of_state(const uint64_t* state, uint64_t n) {
  return {merged(state, SECRET + 11, n * PRIME64_1),
          merged(state, SECRET + SECRET_BYTES - 64 - 11, ~(n * PRIME64_2))};
}

// As xxhash.xxh3_128_digest has it: the most significant byte first.
static inline void write(const Digest& digest, uint8_t out[16]) {
  const uint64_t high = __builtin_bswap64(digest.high), low = __builtin_bswap64(digest.low);
  std::memcpy(out, &high, 8);
  std::memcpy(out + 8, &low, 8);
}

}  // namespace xxh3
