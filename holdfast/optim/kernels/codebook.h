// The two codebooks as the codecs want them, made once from the 256 fp32 entries that Python passes in, so that
// quantize.py stays the only place that knows the numbers.
#pragma once
#include <cstdint>

// A magnitude code counts the non-negative entries: signed 0..128 (128 is 1.0), unsigned 0..255.
struct Codebook {
  bool is_signed;
  int32_t zero;            // byte of 0: 127 or 0
  int32_t largest;         // largest magnitude code
  float values[256];       // by byte, ascending
  float thresholds[256];   // the largest magnitude that still gets this magnitude code
  // Exact lookup: at most one threshold shares its upper 16 bits with a number, so an entry holds the code of the
  // smallest such number << 16 plus what carries into the code when the lower bits exceed the threshold's.
  static constexpr int32_t FIRST = 104 << 7, ENTRIES = (127 << 7) + 2 - FIRST;
  uint32_t buckets[ENTRIES];
  // Closed form (AVX-512). A number's exponent names the one segment border in its octave;
  // segment 0 is zero, 1..7 are decades, 8 is 1.0. In a segment, code = floor(slope x + offset), at most the highest.
  // A border's lowest four bits, which do not matter within SLACK, hold the number of the segment above it.
  int32_t borders[32];  // bits of a number a little below the border, or a large one where an octave has none
  float slope[16], offset[16];
  int32_t highest[16];
  float certain;  // the largest fraction of a code that leaves no doubt; offset is lower by half of what is missing to 1
  uint8_t planes[4][256];  // the bytes of values, for lookups within registers
};

// Added to every ratio that the closed form sees, so that it spans 32 octaves and five bits of its exponent name one.
constexpr float FLOOR = 4.656612873077392578125e-10f;  // 2^-31

// Width in ulps of the doubt around a border: |x| * (1 / absmax) may be 4 away from |x| / absmax, a border's own bits 16.
constexpr int32_t SLACK = 48;

namespace codebooks {
extern Codebook signed_book, unsigned_book;
inline const Codebook& of(bool is_signed) { return is_signed ? signed_book : unsigned_book; }
void make(const float* signed_values, const float* unsigned_values);
}  // namespace codebooks
