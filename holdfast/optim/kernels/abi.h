// The C interface between Python (native.py, by ctypes) and the kernels. Plain integers, floats and pointers only.
#pragma once
#include <cstdint>

// The scalars of one update of one tensor, computed in double precision by Python and rounded once. A rule reads those
// it needs; the others are neutral.
struct Coefficients {
  float grad_scale;    // -1 to maximise, times a clipping factor
  float l2;            // weight decay that is added to the gradient
  float decay;         // factor of the parameter before the update
  float step_size;
  float beta1, blend1;  // decay of the first moment or momentum, and the share of the new gradient
  float beta2, blend2;  // of the second moment
  float beta3, blend3;  // of the slow first moment
  float eps;
  float root_scale;  // bias correction of the root of the second moment
  float correction;  // bias correction of the first moment
  float mix;         // weight of the slow first moment
  float trust;       // factor of the gradient
  float weight_decay;  // weight decay that is added to the direction
};

enum : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

// One tensor, or a part of one that starts on a block. All int64 so that Python fills it from one array.
struct Row {
  void* param;
  const void* grad;
  void* moment[3];  // uint8 codes, or fp32 values where absmax is null
  float* absmax[3];
  int64_t elements;
  int64_t param_type, grad_type;
  int64_t is_8bit;
  int64_t coefficients;  // index
  int64_t first;         // index of the first element in the whole tensor: counter of stochastic rounding
  int64_t key;           // of stochastic rounding
};

struct Options {
  int32_t block_size;
  int32_t nonzero_second_moment;
  int32_t stochastic_rounding;
};

// Every rule, in the order of rules.py.
enum : int32_t {
  ADAM, SGD, NESTEROV, PLAIN_SGD, LION, RMSPROP, RMSPROP_MOMENTUM, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM,
  ADAGRAD, LAMB, ADEMAMIX, RULES
};

// What holdfast_norms sums per tensor: two numbers, over the elements with a usable gradient but for |parameter|.
enum : int32_t { GRADIENT_NORM, PARAM_AND_GRADIENT, PARAM_AND_LAMB_DIRECTION };

// What one instruction set offers. Both work on blocks [from, to) of a row.
struct Kernels {
  void (*update)(int32_t rule, const Row&, const Coefficients&, const Options&, int64_t from, int64_t to);
  void (*norms)(int32_t kind, const Row&, const Coefficients&, const Options&, int64_t from, int64_t to, double* out);
  void (*encode)(const float*, int64_t n, float absmax, bool is_signed, bool nonzero, uint8_t*);
  void (*decode)(const uint8_t*, int64_t n, float absmax, bool is_signed, float*);
};
