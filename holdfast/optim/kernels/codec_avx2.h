// The exact table with one gather per eight elements.
#pragma once
#include "codec_portable.h"

namespace {

constexpr int64_t GROUP = WIDTH;  // elements that are encoded or decoded at a time

template <bool is_signed>
class Encoder : public PortableEncoder {
 public:
  Encoder(float absmax, bool nonzero) : PortableEncoder(is_signed, absmax, nonzero) {}

  inline void group(const float* x, uint8_t* codes) const {
    const __m256 value = _mm256_loadu_ps(x);
    const __m256i bits = _mm256_castps_si256(_mm256_div_ps(value, _mm256_set1_ps(divisor_)));
    const __m256i code = is_signed ? with_sign(lookup(bits), bits) : lifted(lookup(bits), value);
    const __m256i words = _mm256_packus_epi32(code, code);
    const __m256i bytes = _mm256_packus_epi16(words, words);
    const int32_t lower = _mm256_extract_epi32(bytes, 0), upper = _mm256_extract_epi32(bytes, 4);
    std::memcpy(codes, &lower, 4);
    std::memcpy(codes + 4, &upper, 4);
  }

 private:
  inline __m256i lookup(__m256i bits) const {
    const __m256i positive = _mm256_set1_epi32(0x7fffffff), first = _mm256_set1_epi32(Codebook::FIRST << 16);
    const __m256i magnitude = _mm256_max_epi32(_mm256_and_si256(bits, positive), first);
    const __m256i found = _mm256_sub_epi32(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(Codebook::FIRST));
    const __m256i bucket = _mm256_min_epi32(found, _mm256_set1_epi32(Codebook::ENTRIES - 1));
    const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(book_.buckets), bucket, 4);
    const __m256i low = _mm256_and_si256(magnitude, _mm256_set1_epi32(0xffff));
    return _mm256_srli_epi32(_mm256_add_epi32(entry, low), 16);
  }

  static inline __m256i with_sign(__m256i code, __m256i bits) {
    const __m256i c127 = _mm256_set1_epi32(127);
    const __m256i negative = _mm256_sub_epi32(c127, _mm256_min_epi32(code, c127));
    return _mm256_blendv_epi8(_mm256_add_epi32(c127, code), negative, _mm256_srai_epi32(bits, 31));
  }

  inline __m256i lifted(__m256i code, __m256 value) const {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_GT_OQ));
    return _mm256_max_epi32(code, _mm256_and_si256(above, _mm256_set1_epi32(nonzero_)));
  }
};

template <bool is_signed>
class Decoder {
 public:
  explicit Decoder(float absmax) : values_(codebooks::of(is_signed).values), scale_(_mm256_set1_ps(absmax)) {}
  inline void group(const uint8_t* codes, V (&x)[1]) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    x[0] = (V)_mm256_mul_ps(_mm256_i32gather_ps(values_, _mm256_cvtepu8_epi32(bytes), 4), scale_);
  }

 private:
  const float* values_;
  __m256 scale_;
};

}  // namespace
