// Codes to numbers and back, exact by table. The other codecs call nearest_code for the elements that their closed form
// cannot decide. A codec has a GROUP size, an Encoder and a Decoder.
#pragma once
#include "codebook.h"
#include "vector.h"

namespace {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// The byte of the entry nearest to ratio, by comparison with the fp32 midpoints; a tie goes to the lower magnitude.
// Safe for any bits: damaged state gives wrong numbers, never a wrong address.
inline uint8_t nearest_code(float ratio, const Codebook& book) {
  const uint32_t bits = bits_of(ratio), magnitude = bits & 0x7fffffffu;
  const int32_t found = static_cast<int32_t>(magnitude >> 16) - Codebook::FIRST;
  const uint32_t low = found < 0 ? 0 : magnitude & 0xffffu;
  const int32_t last = Codebook::ENTRIES - 1, from = found < 0 ? 0 : found, bucket = from > last ? last : from;
  const int32_t code = static_cast<int32_t>((book.buckets[bucket] + low) >> 16);
  if (!book.is_signed) return static_cast<uint8_t>(code);
  return static_cast<uint8_t>(bits >> 31 ? 127 - (code > 127 ? 127 : code) : 127 + code);
}

inline void encode_some(
    const float* x, int64_t n, const Codebook& book, float divisor, bool nonzero, uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) {
    const uint8_t code = nearest_code(x[i] / divisor, book);
    codes[i] = nonzero && code == 0 && x[i] > 0 ? 1 : code;
  }
}

// Encodes the values of one block.
class PortableEncoder {
 public:
  PortableEncoder(bool is_signed, float absmax, bool nonzero)
      : book_(codebooks::of(is_signed)), divisor_(absmax > 0 ? absmax : 1.0f), nonzero_(nonzero && !is_signed) {}

  inline void some(const float* x, int64_t n, uint8_t* codes) const {
    encode_some(x, n, book_, divisor_, nonzero_, codes);
  }

 protected:
  const Codebook& book_;
  float divisor_;
  bool nonzero_;
};

#if !defined(__AVX2__)

constexpr int64_t GROUP = WIDTH;  // elements that are encoded or decoded at a time

template <bool is_signed>
class Encoder : public PortableEncoder {
 public:
  Encoder(float absmax, bool nonzero) : PortableEncoder(is_signed, absmax, nonzero) {}
  inline void group(const float* x, uint8_t* codes) const { some(x, GROUP, codes); }
};

// Decodes one group; reads nothing beyond it.
template <bool is_signed>
class Decoder {
 public:
  explicit Decoder(float absmax) : book_(codebooks::of(is_signed)), absmax_(absmax) {}
  inline void group(const uint8_t* codes, V (&x)[1]) const {
    for (int64_t i = 0; i < GROUP; i++) x[0][i] = book_.values[codes[i]] * absmax_;
  }

 private:
  const Codebook& book_;
  float absmax_;
};

#endif

}  // namespace
