#include "codebook.h"

#include <cmath>
#include <cstring>

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

void make_thresholds(Codebook& book) {
  for (int32_t code = 0; code < book.largest; code++)
    book.thresholds[code] = (book.values[book.zero + code] + book.values[book.zero + code + 1]) / 2;
  book.thresholds[book.largest] = INFINITY;
}

void make_buckets(Codebook& book) {
  int32_t code = 0;
  for (int32_t i = 0; i < Codebook::ENTRIES; i++) {
    const uint32_t low = static_cast<uint32_t>(Codebook::FIRST + i) << 16, high = low + 0xffff;
    while (code < book.largest && bits_of(book.thresholds[code]) < low) code++;
    const bool inside = code < book.largest && bits_of(book.thresholds[code]) <= high;
    const uint32_t carry = inside ? 0xffff - (bits_of(book.thresholds[code]) & 0xffff) : 0;
    book.buckets[i] = (static_cast<uint32_t>(code) << 16) + carry;
  }
}

// The last magnitude code before a segment: 0 is zero, 1..7 are the decades, 8 is 1.0.
int32_t below_segment(const Codebook& book, int32_t segment) {
  int32_t code = 0;
  for (int32_t decade = 0; decade + 1 < segment; decade++) code += book.is_signed ? 1 << decade : 2 << decade;
  return code;
}

void make_borders(Codebook& book) {
  for (int32_t octave = 0; octave < 32; octave++) {
    const uint32_t low = static_cast<uint32_t>(96 + octave) << 23;  // exponents 96..127: their low five bits count them
    uint32_t border_bits = 0x7f000000;
    int32_t segment = 0;
    for (int32_t s = 0; s < 8; s++) {
      const uint32_t at = bits_of(book.thresholds[below_segment(book, s + 1)] + FLOOR);
      if (at < low) segment = s + 1;
      else if (at < low + (1u << 23)) border_bits = at - 20;
    }
    book.borders[octave] = static_cast<int32_t>(border_bits & ~15u) | (segment + 1);
  }
}

void make_lines(Codebook& book) {
  double worst = 0;
  for (int32_t decade = 0; decade < 7; decade++) {
    const int32_t first = below_segment(book, decade + 1) + 1, cells = below_segment(book, decade + 2) - first + 1;
    const double slope = std::pow(10.0, 6 - decade) * cells / 0.9, offset = first - cells / 9.0 - slope * FLOOR;
    book.slope[decade + 1] = static_cast<float>(slope);
    book.offset[decade + 1] = static_cast<float>(offset);
    book.highest[decade + 1] = first + cells - 1;
    for (int32_t k = 1; k < cells; k++)  // thresholds inside the decade are at whole numbers
      worst = std::fmax(worst, std::fabs(slope * (double(book.thresholds[first + k - 1]) + FLOOR) + offset - (first + k)));
  }
  // Beside the codebook's own rounding: that of 1 / absmax, of the product with it, of the coefficients and of the sum.
  const double tolerance = worst + 1.3 * book.largest * std::ldexp(1.0, -21);
  book.certain = static_cast<float>(1 - 2 * tolerance);
  for (int32_t s = 1; s < 8; s++) book.offset[s] -= static_cast<float>(tolerance);
}

void make_closed_form(Codebook& book) {
  for (int32_t s = 0; s < 16; s++) {
    book.slope[s] = 0;
    book.highest[s] = s < 8 ? 0 : book.largest;
    book.offset[s] = static_cast<float>(book.highest[s]) + 0.5f;
  }
  make_borders(book);
  make_lines(book);
}

void make_planes(Codebook& book) {
  for (int32_t plane = 0; plane < 4; plane++)
    for (int32_t code = 0; code < 256; code++)
      book.planes[plane][code] = static_cast<uint8_t>(bits_of(book.values[code]) >> (8 * plane));
}

void make_one(Codebook& book, bool is_signed, const float* values) {
  book.is_signed = is_signed;
  book.zero = is_signed ? 127 : 0;
  book.largest = 255 - book.zero;
  std::memcpy(book.values, values, sizeof(book.values));
  make_thresholds(book);
  make_buckets(book);
  make_closed_form(book);
  make_planes(book);
}

}  // namespace

namespace codebooks {
Codebook signed_book, unsigned_book;
void make(const float* signed_values, const float* unsigned_values) {
  make_one(signed_book, true, signed_values);
  make_one(unsigned_book, false, unsigned_values);
}
}  // namespace codebooks
