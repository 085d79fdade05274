// Encoding by the closed form of the codebook: no table, no division. About one element in four thousand lies too close
// to a threshold for the form to decide; it is divided and looked up, so that the codes are those of every other path.
// Decoding looks the four bytes of an entry up within registers where the processor can (VBMI), else gathers.
#pragma once
#include "codec_portable.h"

namespace {

constexpr int64_t GROUP = 64;  // elements whose codes fill a register

template <bool is_signed>
class Encoder : public PortableEncoder {
 public:
  Encoder(float absmax, bool nonzero)
      : PortableEncoder(is_signed, absmax, nonzero),
        reciprocal_(_mm512_set1_ps(1.0f / absmax)),
        lift_(_mm512_set1_epi32(nonzero_ ? 1 : 0)),
        borders_low_(_mm512_loadu_si512(book_.borders)),
        borders_high_(_mm512_loadu_si512(book_.borders + 16)),
        highest_(_mm512_loadu_si512(book_.highest)),
        slope_(_mm512_loadu_ps(book_.slope)),
        offset_(_mm512_loadu_ps(book_.offset)),
        // Outside of 2^-100 .. 2^100 the reciprocal may not be normal: everything is in doubt.
        certain_(_mm512_set1_ps(absmax > 7.8886091e-31f && absmax < 1.2676506e30f ? book_.certain : -1.0f)) {}

  inline void group(const float* x, uint8_t* codes) const {
    __m512i code[4], above[4];
    __m512 fraction[4];
    closed_form(x, code, above, fraction);
    finish(x, code);
    const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi32(transpose, packed(code)));
    // One test for all four, of numbers that may come from different vectors: masks are scarce in the processor.
    const __m512i nearest = _mm512_min_epu32(_mm512_min_epu32(above[0], above[1]), _mm512_min_epu32(above[2], above[3]));
    const __m512 largest = larger(larger(fraction[0], fraction[1]), larger(fraction[2], fraction[3]));
    if (__builtin_expect(in_doubt(nearest, largest) != 0, 0)) look_up(*this, x, codes);
  }

 private:
  static inline __m512 larger(__m512 x, __m512 y) {  // of numbers >= 0
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(x), _mm512_castps_si512(y)));
  }

  inline __mmask16 in_doubt(__m512i above, __m512 fraction) const {
    return _kor_mask16(_mm512_cmple_epu32_mask(above, _mm512_set1_epi32(SLACK)),
                       _mm512_cmp_ps_mask(fraction, certain_, _CMP_NLE_UQ));
  }

  // Magnitude codes of four vectors, and two measures of doubt: how far each is above the lower edge of its border, in
  // ulps, and the fraction of a code that was cut off. Stage by stage for all four, so that they fit the processor's
  // window; integer maxima and the odd multiply-add where a plain operation would do run where conversions do not.
  inline void closed_form(const float* x, __m512i (&code)[4], __m512i (&above)[4], __m512 (&fraction)[4]) const {
    __m512 ratio[4], position[4];
    __m512i segment[4];
    for (int k = 0; k < 4; k++) {
      const __m512 value = _mm512_loadu_ps(x + 16 * k);
      ratio[k] = _mm512_fmadd_ps(is_signed ? _mm512_abs_ps(value) : value, reciprocal_, _mm512_set1_ps(FLOOR));
    }
    for (int k = 0; k < 4; k++) {
      const __m512i octave = _mm512_srli_epi32(_mm512_castps_si512(ratio[k]), 23);
      segment[k] = _mm512_permutex2var_epi32(borders_low_, octave, borders_high_);
    }
    for (int k = 0; k < 4; k++) {
      above[k] = _mm512_sub_epi32(_mm512_castps_si512(ratio[k]), segment[k]);
      segment[k] = _mm512_add_epi32(segment[k], _mm512_srai_epi32(above[k], 31));
    }
    for (int k = 0; k < 4; k++)
      position[k] = _mm512_fmadd_ps(ratio[k], _mm512_permutexvar_ps(segment[k], slope_),
                                    _mm512_permutexvar_ps(segment[k], offset_));
    for (int k = 0; k < 4; k++) code[k] = _mm512_cvttps_epi32(position[k]);
    for (int k = 0; k < 4; k++)
      fraction[k] = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code[k]), _mm512_set1_ps(1.0f), position[k]);
    for (int k = 0; k < 4; k++) code[k] = _mm512_min_epi32(code[k], _mm512_permutexvar_epi32(segment[k], highest_));
  }

  // Signed: code - 1, or -code - 1 for a negative number, so that saturation clamps -1.0. Unsigned: lifted from 0.
  inline void finish(const float* x, __m512i (&code)[4]) const {
    const __m512i minus_one = _mm512_set1_epi32(-1);
    for (int k = 0; k < 4; k++) {
      const __m512i bits = _mm512_loadu_si512(x + 16 * k);
      if (is_signed)
        code[k] = _mm512_mask_xor_epi32(
            _mm512_add_epi32(code[k], minus_one), _mm512_movepi32_mask(bits), code[k], minus_one);
      else
        code[k] = _mm512_max_epi32(code[k], _mm512_min_epu32(bits, lift_));
    }
  }

  // The bytes, dword k of lane L for lane L of vector k.
  static inline __m512i packed(const __m512i (&c)[4]) {
    if (!is_signed) return _mm512_packus_epi16(_mm512_packus_epi32(c[0], c[1]), _mm512_packus_epi32(c[2], c[3]));
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80)));
  }

  // Takes the encoder by value: if the address of one escaped, its vectors could not stay in registers.
  __attribute__((noinline)) static void look_up(Encoder encoder, const float* x, uint8_t* codes) {
    __m512i code[4], above[4];
    __m512 fraction[4];
    encoder.closed_form(x, code, above, fraction);
    for (int64_t k = 0; k < 4; k++)
      for (uint32_t left = encoder.in_doubt(above[k], fraction[k]); left; left &= left - 1) {
        const int64_t at = 16 * k + __builtin_ctz(left);
        encoder.some(x + at, 1, codes + at);
      }
  }

  __m512 reciprocal_;
  __m512i lift_, borders_low_, borders_high_, highest_;
  __m512 slope_, offset_, certain_;
};

#ifdef __AVX512VBMI__

// Looks the four bytes of an entry up one by one, each in a table of 256 that fills four registers.
template <bool is_signed>
class Decoder {
 public:
  explicit Decoder(float absmax) : book_(codebooks::of(is_signed)), scale_(_mm512_set1_ps(absmax)) {}

  inline void group(const uint8_t* codes, V (&x)[4]) const {
    // Unpacking works within 128-bit lanes: lane L, dword k must come from vector k, lane L.
    const __m512i transpose = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i c = _mm512_permutexvar_epi32(transpose, _mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(c);
    const __m512i b0 = plane(0, c, upper), b1 = plane(1, c, upper), b2 = plane(2, c, upper), b3 = plane(3, c, upper);
    const __m512i low_a = _mm512_unpacklo_epi8(b0, b1), low_b = _mm512_unpackhi_epi8(b0, b1);
    const __m512i high_a = _mm512_unpacklo_epi8(b2, b3), high_b = _mm512_unpackhi_epi8(b2, b3);
    x[0] = scaled(_mm512_unpacklo_epi16(low_a, high_a));
    x[1] = scaled(_mm512_unpackhi_epi16(low_a, high_a));
    x[2] = scaled(_mm512_unpacklo_epi16(low_b, high_b));
    x[3] = scaled(_mm512_unpackhi_epi16(low_b, high_b));
  }

 private:
  inline __m512i plane(int number, __m512i codes, __mmask64 upper) const {
    const uint8_t* table = book_.planes[number];
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
    const __m512i high =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
    return _mm512_mask_mov_epi8(low, upper, high);
  }

  inline V scaled(__m512i bits) const { return (V)_mm512_mul_ps(_mm512_castsi512_ps(bits), scale_); }

  const Codebook& book_;
  __m512 scale_;
};

#else

template <bool is_signed>
class Decoder {
 public:
  explicit Decoder(float absmax) : values_(codebooks::of(is_signed).values), scale_(_mm512_set1_ps(absmax)) {}

  inline void group(const uint8_t* codes, V (&x)[4]) const {
    for (int k = 0; k < 4; k++) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * k));
      x[k] = (V)_mm512_mul_ps(_mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), values_, 4), scale_);
    }
  }

 private:
  const float* values_;
  __m512 scale_;
};

#endif

}  // namespace
