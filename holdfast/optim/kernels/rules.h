// Every update rule, written once for a vector of elements of any width. Each operation is rounded once
// (-ffp-contract=off), in the order of the functions of the same names in rules.py, so both give the same bits.
#pragma once
#include "abi.h"
#include "vector.h"

namespace {

struct Moments {
  V a, b, s;  // in the order in which the rule lists its moments
};

// moments: how many; is_signed: by which codebook each is kept.
struct Adam {
  static constexpr int moments = 2;
  static constexpr bool is_signed[3] = {true, false, false};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    m.a = m.a * c.beta1 + g * c.blend1;
    m.b = m.b * c.beta2 + (g * c.blend2) * g;
    return p * c.decay - (m.a * c.step_size) / (root(m.b) * c.root_scale + c.eps);
  }
};

template <bool nesterov, bool momentum>
struct Sgd {
  static constexpr int moments = momentum ? 1 : 0;
  static constexpr bool is_signed[3] = {true, false, false};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    g = g * c.trust;
    if (momentum) {
      m.a = m.a * c.beta1 + g * c.blend1;
      g = nesterov ? g + m.a * c.beta1 : m.a;
    }
    return p - g * c.step_size;
  }
};

struct Lion {
  static constexpr int moments = 1;
  static constexpr bool is_signed[3] = {true, false, false};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    const V u = m.a * c.beta1 + g * c.blend1, zero = {};
    m.a = m.a * c.beta2 + g * c.blend2;
    const V way = u > zero ? all(1.0f) : (u < zero ? all(-1.0f) : zero);
    return p * c.decay - way * c.step_size;
  }
};

// Moments: square_avg, then grad_avg if centered, then momentum_buffer.
template <bool centered, bool momentum>
struct RmsProp {
  static constexpr int moments = 1 + centered + momentum;
  static constexpr bool is_signed[3] = {false, true, true};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    m.a = m.a * c.beta2 + (g * c.blend2) * g;
    V square = m.a;
    if (centered) {
      m.b = m.b * c.beta2 + g * c.blend2;
      square = larger(square - m.b * m.b, V{});
    }
    const V mean = root(square) + c.eps;
    if (!momentum) return p - (g * c.step_size) / mean;
    V& buffer = centered ? m.s : m.b;
    buffer = buffer * c.beta1 + g / mean;
    return p - buffer * c.step_size;
  }
};

struct Adagrad {
  static constexpr int moments = 1;
  static constexpr bool is_signed[3] = {false, false, false};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    m.a = m.a + g * g;
    return p - (g * c.step_size) / (root(m.a) + c.eps);
  }
};

struct Lamb {
  static constexpr int moments = 2;
  static constexpr bool is_signed[3] = {true, false, false};
  static inline V direction(V p, V g, Moments& m, const Coefficients& c) {
    m.a = m.a * c.beta1 + g * c.blend1;
    m.b = m.b * c.beta2 + (g * c.blend2) * g;
    return (m.a * c.correction) / (root(m.b) * c.root_scale + c.eps) + p * c.weight_decay;
  }
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    return p - direction(p, g, m, c) * c.step_size;
  }
};

// Moments: exp_avg, exp_avg_slow, exp_avg_sq.
struct AdEmaMix {
  static constexpr int moments = 3;
  static constexpr bool is_signed[3] = {true, true, false};
  static inline V step(V p, V g, Moments& m, const Coefficients& c) {
    m.a = m.a * c.beta1 + g * c.blend1;
    m.b = m.b * c.beta3 + g * c.blend3;
    m.s = m.s * c.beta2 + (g * c.blend2) * g;
    const V mixed = m.a * c.correction + m.b * c.mix;
    return p * c.decay - (mixed * c.step_size) / (root(m.s) * c.root_scale + c.eps);
  }
};

}  // namespace
