// The update of a range of blocks of one tensor. Compiled once per instruction set, each time as one object whose only
// symbol is KERNELS: everything else is internal, so that the linker can never mix two sets.
#include "abi.h"
#include "rules.h"

#if defined(__AVX512F__)
#include "codec_avx512.h"
#elif defined(__AVX2__)
#include "codec_avx2.h"
#else
#include "codec_portable.h"
#endif

namespace {

constexpr int64_t LARGEST_BLOCK = 4096, ROOM = LARGEST_BLOCK + 64;
constexpr float LARGEST_GRADIENT = 9223372036854775808.0f;  // 2^63: a larger one, squared, comes close to the end of fp32

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float widen(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t narrow(float x) {  // to the nearest, ties to even
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint32_t mixed(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 random bits of one element: a hash of its index, keyed by seed, step and tensor, hence the same on every path.
inline uint32_t random16(uint64_t element, uint64_t key) {
  const uint32_t low = static_cast<uint32_t>(element), high = static_cast<uint32_t>(element >> 32);
  const uint32_t once = mixed(low ^ static_cast<uint32_t>(key));
  return mixed(once ^ (static_cast<uint32_t>(key >> 32) + high * 0x9e3779b9u)) >> 16;
}

inline uint16_t narrow_stochastically(float x, uint32_t random) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t rounded = (magnitude >= 0x7f800000u ? bits : bits + random) >> 16;
  return static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fc0u : rounded);
}

// fp32 working copies of one block, for codes, for bf16 and for a last block that does not fill its vectors.
struct Scratch {
  alignas(64) float param[ROOM];
  alignas(64) float grad[ROOM];
  alignas(64) float moment[3][ROOM];
};

inline int64_t padded(int64_t n) { return (n + GROUP - 1) / GROUP * GROUP; }

// Fills up to a whole group. A gradient is padded with NaN: it is not usable, so what is beyond the end never counts.
inline void pad(float* x, int64_t n, float with) {
  for (int64_t i = n; i < padded(n); i++) x[i] = with;
}

inline bool is_in_place(int64_t type, int64_t n) { return type == FLOAT32 && n % GROUP == 0; }

// The processor's own prefetcher stops at the end of a page and rests between the passes over a block, so every group of
// every stream asks for the one AHEAD of it. Addresses beyond a tensor do no harm.
constexpr int64_t AHEAD = 256, LINE = 64;

template <class T>
inline void prefetch(const T* block, int64_t i, bool is_written) {
  constexpr int64_t BYTES = GROUP * static_cast<int64_t>(sizeof(T));
  if (BYTES < LINE && i * static_cast<int64_t>(sizeof(T)) % LINE != 0) return;  // of several groups in one line, the first
  const char* bytes = reinterpret_cast<const char*>(block + i + AHEAD);
  for (int64_t at = 0; at < BYTES; at += LINE) {
    if (is_written) __builtin_prefetch(bytes + at, 1);
    else __builtin_prefetch(bytes + at, 0);
  }
}

inline void widen_all(const uint16_t* halves, int64_t n, float* floats) {
  int64_t i = 0;
  for (; i + GROUP <= n; i += GROUP) {
    prefetch(halves, i, true);
    for (int64_t k = i; k < i + GROUP; k++) floats[k] = widen(halves[k]);
  }
  for (; i < n; i++) floats[i] = widen(halves[i]);
}

// The elements themselves, or an fp32 copy of them in room.
inline float* as_floats(const void* tensor, int64_t type, int64_t at, int64_t n, float* room, float padding = 0) {
  float* floats = const_cast<float*>(static_cast<const float*>(tensor)) + at;
  if (is_in_place(type, n)) return floats;
  const uint16_t* halves = static_cast<const uint16_t*>(tensor) + at;
  if (type == FLOAT32) std::memcpy(room, floats, static_cast<size_t>(n) * 4);
  else widen_all(halves, n, room);
  pad(room, n, padding);
  return room;
}

inline void store_param(const Row& row, int64_t at, int64_t n, const float* values, const Options& options) {
  if (row.param_type == FLOAT32) {
    std::memcpy(static_cast<float*>(row.param) + at, values, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(row.param) + at;
  if (!options.stochastic_rounding) {
    for (int64_t i = 0; i < n; i++) halves[i] = narrow(values[i]);
    return;
  }
  const uint64_t first = static_cast<uint64_t>(row.first + at), key = static_cast<uint64_t>(row.key);
  for (int64_t i = 0; i < n; i++) halves[i] = narrow_stochastically(values[i], random16(first + i, key));
}

struct Seen {
  bool usable;      // whether any gradient was
  float absmax[3];  // of the new moments
};

inline V effective(V p, V g, const Coefficients& c, bool has_l2) {
  g = g * c.grad_scale;
  return has_l2 ? g + p * c.l2 : g;
}

inline I is_usable(V g) { return magnitude(g) <= 0x5f000000; }  // 2^63

// Updates one vector of elements; now holds their old moments and then the new ones.
template <class Rule, bool careful, bool has_l2>
inline void update_vector(float* p, const float* g, Moments& now, const Coefficients& c, I (&most)[3], I& usable) {
  const V old_p = load(p), gradient = effective(old_p, load(g), c, careful ? c.l2 != 0 : has_l2);
  const Moments old = now;
  V new_p = Rule::step(old_p, gradient, now, c);
  if (careful) {
    const I use = is_usable(gradient);
    usable |= use;
    new_p = use ? new_p : old_p;
    now = {use ? now.a : old.a, use ? now.b : old.b, use ? now.s : old.s};
  }
  store(p, new_p);
  if (Rule::moments > 0) most[0] = larger(most[0], magnitude(now.a));
  if (Rule::moments > 1) most[1] = larger(most[1], magnitude(now.b));
  if (Rule::moments > 2) most[2] = larger(most[2], magnitude(now.s));
}

inline bool all_usable(const float* p, const float* g, int64_t n, const Coefficients& c) {
  I most = {};
  if (c.l2 != 0) {
    for (int64_t i = 0; i < n; i += WIDTH) most = larger(most, magnitude(effective(load(p + i), load(g + i), c, true)));
    return largest(most) <= LARGEST_GRADIENT;  // false for NaN
  }
  for (int64_t i = 0; i < n; i += WIDTH) most = larger(most, magnitude(load(g + i)));
  return largest(most) * std::fabs(c.grad_scale) <= LARGEST_GRADIENT;
}

// The moments of one block where they are fp32, or an fp32 copy of them.
template <class Rule>
class Values {
 public:
  explicit Values(float* const (&m)[3]) : a_(m[0]), b_(m[1]), s_(m[2]) {}

  inline void load_group(int64_t i, Moments (&now)[GROUP / WIDTH]) const {
    for (int64_t k = 0; k < GROUP / WIDTH; k++) {
      if (Rule::moments > 0) now[k].a = load(a_ + i + WIDTH * k);
      if (Rule::moments > 1) now[k].b = load(b_ + i + WIDTH * k);
      if (Rule::moments > 2) now[k].s = load(s_ + i + WIDTH * k);
    }
  }

 private:
  const float *a_, *b_, *s_;
};

// The moments of one block where they are codes.
template <class Rule>
class Codes {
 public:
  Codes(const Row& row, int64_t at, int64_t block)
      : a_(codes_of(row, 0, at)), b_(codes_of(row, 1, at)), s_(codes_of(row, 2, at)),
        decode_a_(absmax_of(row, 0, block)), decode_b_(absmax_of(row, 1, block)), decode_s_(absmax_of(row, 2, block)) {}

  inline void load_group(int64_t i, Moments (&now)[GROUP / WIDTH]) const {
    V a[GROUP / WIDTH], b[GROUP / WIDTH], s[GROUP / WIDTH];
    if (Rule::moments > 0) prefetch(a_, i, true);
    if (Rule::moments > 1) prefetch(b_, i, true);
    if (Rule::moments > 2) prefetch(s_, i, true);
    if (Rule::moments > 0) decode_a_.group(a_ + i, a);
    if (Rule::moments > 1) decode_b_.group(b_ + i, b);
    if (Rule::moments > 2) decode_s_.group(s_ + i, s);
    for (int64_t k = 0; k < GROUP / WIDTH; k++) {
      if (Rule::moments > 0) now[k].a = a[k];
      if (Rule::moments > 1) now[k].b = b[k];
      if (Rule::moments > 2) now[k].s = s[k];
    }
  }

 private:
  static const uint8_t* codes_of(const Row& row, int k, int64_t at) {
    return Rule::moments > k ? static_cast<const uint8_t*>(row.moment[k]) + at : nullptr;
  }
  static float absmax_of(const Row& row, int k, int64_t block) { return Rule::moments > k ? row.absmax[k][block] : 0; }

  const uint8_t *a_, *b_, *s_;
  Decoder<Rule::is_signed[0]> decode_a_;
  Decoder<Rule::is_signed[1]> decode_b_;
  Decoder<Rule::is_signed[2]> decode_s_;
};

// n is a multiple of GROUP. The new moments go to m.
template <class Rule, bool careful, bool has_l2, class Source>
Seen update_groups(float* p, const float* g, const Source source, float* const (&m)[3], int64_t n,
                   const Coefficients& coefficients) {
  const Coefficients c = coefficients;  // a copy, which no store can change, so that it stays in registers
  float *const a = m[0], *const b = m[1], *const s = m[2];
  I most[3] = {}, usable = {};
  for (int64_t i = 0; i < n; i += GROUP) {
    Moments now[GROUP / WIDTH] = {};
    prefetch(p, i, true);
    prefetch(g, i, false);
    source.load_group(i, now);
    for (int64_t k = 0, at = i; k < GROUP / WIDTH; k++, at += WIDTH) {
      update_vector<Rule, careful, has_l2>(p + at, g + at, now[k], c, most, usable);
      if (Rule::moments > 0) store(a + at, now[k].a);
      if (Rule::moments > 1) store(b + at, now[k].b);
      if (Rule::moments > 2) store(s + at, now[k].s);
    }
  }
  int32_t any = !careful;
  for (int64_t i = 0; i < WIDTH; i++) any |= usable[i];
  return {any != 0, {largest(most[0]), largest(most[1]), largest(most[2])}};
}

template <class Rule, class Source>
Seen update_block(float* p, const float* g, const Source& source, float* const (&m)[3], int64_t n,
                  const Coefficients& c) {
  if (!all_usable(p, g, n, c)) return update_groups<Rule, true, true>(p, g, source, m, n, c);
  if (c.l2 != 0) return update_groups<Rule, false, true>(p, g, source, m, n, c);
  return update_groups<Rule, false, false>(p, g, source, m, n, c);
}

template <bool is_signed>
void encode_as(const float* x, int64_t n, float absmax, bool nonzero, uint8_t* codes) {
  const Encoder<is_signed> encoder(absmax, nonzero);
  int64_t i = 0;
  for (; i + GROUP <= n; i += GROUP) encoder.group(x + i, codes + i);
  encoder.some(x + i, n - i, codes + i);
}

void encode_block(const float* x, int64_t n, float absmax, bool is_signed, bool nonzero, uint8_t* codes) {
  if (is_signed) encode_as<true>(x, n, absmax, nonzero, codes);
  else encode_as<false>(x, n, absmax, nonzero, codes);
}

template <bool is_signed>
void decode_as(const uint8_t* codes, int64_t n, float absmax, float* x) {
  const Decoder<is_signed> decoder(absmax);
  V group[GROUP / WIDTH];
  int64_t i = 0;
  for (; i + GROUP <= n; i += GROUP) {
    decoder.group(codes + i, group);
    std::memcpy(x + i, group, sizeof(group));
  }
  for (const Codebook& book = codebooks::of(is_signed); i < n; i++) x[i] = book.values[codes[i]] * absmax;
}

void decode_block(const uint8_t* codes, int64_t n, float absmax, bool is_signed, float* x) {
  if (is_signed) decode_as<true>(codes, n, absmax, x);
  else decode_as<false>(codes, n, absmax, x);
}

// Makes m point to fp32 moments: their own memory, or a padded copy in room.
template <class Rule>
void as_floats(const Row& row, int64_t at, int64_t n, int64_t block, float (&room)[3][ROOM], float* (&m)[3]) {
  for (int k = 0; k < Rule::moments; k++) {
    if (row.is_8bit) {
      m[k] = room[k];
      const uint8_t* codes = static_cast<const uint8_t*>(row.moment[k]) + at;
      decode_block(codes, n, row.absmax[k][block], Rule::is_signed[k], m[k]);
      pad(m[k], n, 0);
    } else {
      m[k] = as_floats(row.moment[k], FLOAT32, at, n, room[k]);
    }
  }
}

template <class Rule>
void store_moments(const Row& row, int64_t at, int64_t n, int64_t block, const Seen& seen, float* const (&m)[3],
                   bool nonzero) {
  for (int k = 0; k < Rule::moments; k++) {
    if (row.is_8bit) {
      encode_block(m[k], n, seen.absmax[k], Rule::is_signed[k], nonzero, static_cast<uint8_t*>(row.moment[k]) + at);
      row.absmax[k][block] = seen.absmax[k];
    } else if (!is_in_place(FLOAT32, n)) {
      std::memcpy(static_cast<float*>(row.moment[k]) + at, m[k], static_cast<size_t>(n) * 4);
    }
  }
}

template <class Rule>
void update_row(const Row& row, const Coefficients& c, const Options& options, int64_t from, int64_t to) {
  Scratch scratch;
  const int64_t size = options.block_size;
  for (int64_t block = from; block < to; block++) {
    const int64_t at = block * size, rest = row.elements - at, n = rest < size ? rest : size;
    const float* g = as_floats(row.grad, row.grad_type, at, n, scratch.grad, NAN);
    float* p = as_floats(row.param, row.param_type, at, n, scratch.param);
    float* m[3] = {scratch.moment[0], scratch.moment[1], scratch.moment[2]};
    Seen seen;
    if (row.is_8bit && n == size) {
      seen = update_block<Rule>(p, g, Codes<Rule>(row, at, block), m, n, c);
    } else {
      as_floats<Rule>(row, at, n, block, scratch.moment, m);
      seen = update_block<Rule>(p, g, Values<Rule>(m), m, padded(n), c);
    }
    if (!seen.usable) continue;  // not a bit of the block has changed
    store_moments<Rule>(row, at, n, block, seen, m, options.nonzero_second_moment);
    if (!is_in_place(row.param_type, n)) store_param(row, at, n, p, options);
  }
}

void update(int32_t rule, const Row& row, const Coefficients& c, const Options& options, int64_t from, int64_t to) {
  switch (rule) {
    case ADAM: return update_row<Adam>(row, c, options, from, to);
    case SGD: return update_row<Sgd<false, true>>(row, c, options, from, to);
    case NESTEROV: return update_row<Sgd<true, true>>(row, c, options, from, to);
    case PLAIN_SGD: return update_row<Sgd<false, false>>(row, c, options, from, to);
    case LION: return update_row<Lion>(row, c, options, from, to);
    case RMSPROP: return update_row<RmsProp<false, false>>(row, c, options, from, to);
    case RMSPROP_MOMENTUM: return update_row<RmsProp<false, true>>(row, c, options, from, to);
    case RMSPROP_CENTERED: return update_row<RmsProp<true, false>>(row, c, options, from, to);
    case RMSPROP_CENTERED_MOMENTUM: return update_row<RmsProp<true, true>>(row, c, options, from, to);
    case ADAGRAD: return update_row<Adagrad>(row, c, options, from, to);
    case LAMB: return update_row<Lamb>(row, c, options, from, to);
    case ADEMAMIX: return update_row<AdEmaMix>(row, c, options, from, to);
  }
}

// Sums in double precision by halving, so that the order is the same everywhere.
double sum_by_halving(double* x, int64_t n) {
  for (int64_t half = n / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
  return x[0];
}

inline double squared(float x) { return static_cast<double>(x) * static_cast<double>(x); }

void norms_of_block(int32_t kind, const Coefficients& c, const float* p, const float* g, float* const (&m)[3],
                    int64_t n, double* first, double* second) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const V param = load(p + i), gradient = load(g + i) * c.grad_scale, zero = {};
    const I use = is_usable(effective(param, load(g + i), c, c.l2 != 0));
    V of = gradient;
    if (kind == PARAM_AND_LAMB_DIRECTION) {
      Moments moments = {load(m[0] + i), load(m[1] + i), zero};
      of = Lamb::direction(param, gradient, moments, c);
    }
    of = use ? of : zero;
    for (int64_t k = 0; k < WIDTH; k++) first[i + k] = squared(kind == GRADIENT_NORM ? of[k] : param[k]);
    if (kind == GRADIENT_NORM) continue;
    for (int64_t k = 0; k < WIDTH; k++) second[i + k] = squared(of[k]);
  }
}

void norms(int32_t kind, const Row& row, const Coefficients& c, const Options& options, int64_t from, int64_t to,
           double* out) {
  Scratch scratch;
  double first[LARGEST_BLOCK], second[LARGEST_BLOCK];
  const int64_t size = options.block_size;
  for (int64_t block = from; block < to; block++) {
    const int64_t at = block * size, rest = row.elements - at, n = rest < size ? rest : size;
    const float* g = as_floats(row.grad, row.grad_type, at, n, scratch.grad, NAN);
    const float* p = as_floats(row.param, row.param_type, at, n, scratch.param);
    float* m[3] = {nullptr, nullptr, nullptr};
    if (kind == PARAM_AND_LAMB_DIRECTION) as_floats<Lamb>(row, at, n, block, scratch.moment, m);
    std::memset(first, 0, static_cast<size_t>(size) * sizeof(double));
    std::memset(second, 0, static_cast<size_t>(size) * sizeof(double));
    norms_of_block(kind, c, p, g, m, padded(n), first, second);
    out[2 * block] = sum_by_halving(first, size);
    out[2 * block + 1] = sum_by_halving(second, size);
  }
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {update, norms, encode_block, decode_block};
