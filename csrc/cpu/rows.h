// The arithmetic of the CPU operations on raw pointers: arguments and the table of functions.
//
// Each rows_*.cpp is compiled once per instruction set (UNITE_ISA names the namespace) and dispatch.cpp picks one
// table at run time, so a library built on one machine runs on any machine of its family. These files therefore
// include nothing whose inline functions the linker could merge across instruction sets: no standard containers.
//
// Work is cut into tasks of fixed size, never by the number of threads, and every task writes its own partial sums:
// results do not depend on the thread count.

#pragma once

#include <cstdint>

namespace unite {

constexpr int64_t kRowsPerTask = 32;         // rows of one sample that one task reads and sums
constexpr int64_t kElementsPerTask = 16384;  // elements of one tensor in a multi-tensor task

struct Bf16 {
  uint16_t bits;
};

// Which of the float pointers below are bfloat16: the residual stream (x, x1, x2 and their gradients), and the
// branch side (branch, y and their gradients). Operations with one kind of tensor use `residual_bf16` alone.
struct Types {
  bool residual_bf16 = false;
  bool branch_bf16 = false;
};

// Rows of a (batch, width) matrix that may be a slice of a wider one; always float32.
struct Rows {
  const float* data = nullptr;
  int64_t stride = 0;
};

// B samples of T rows of D elements. A task is a block of at most kRowsPerTask rows of one sample.
struct Shape {
  int64_t samples = 0, rows = 0, width = 0;
  int64_t blocks() const { return (rows + kRowsPerTask - 1) / kRowsPerTask; }
  int64_t tasks() const { return samples * blocks(); }
};

struct AdalnForward {
  Shape shape;
  Types types;
  const void *x, *branch;  // branch is null without the preceding gate and residual
  Rows gate, scale, shift;
  const float *weight, *weight3;  // weight3 is null without the preceding norm
  float eps;
  void *residual, *y;  // residual: x1 or x2
  float *rstd, *rstd3;
  const float* bias = nullptr;  // (D), of the branch
};

struct AdalnBackward {
  Shape shape;
  Types types;
  const void *dresidual, *dy, *x, *branch;  // mid: x is x1; dresidual is null for plain adaLN
  Rows gate, scale;
  const float *weight, *weight3, *rstd, *rstd3;
  void *dx, *dbranch;
  // (tasks, sums, D): sum of dy, of dy * normalised, of (branch + bias) * dx, of dbranch, of dx2 * normalised3
  float* partial;
  int64_t sums;
  const float* bias = nullptr;  // (D), of the branch
};

struct QkNormRope {
  Shape shape;  // samples B, rows T, width P D: P parts
  Types types;
  int64_t parts, normed, heads, head_dim, prefix;
  const void* x;
  const void* grads[3];  // of the parts, (B, T, D) each
  const float *weights[2], *cos, *sin;
  float eps;
  void* out;  // forward: (normed, B, T, D); backward: the gradient of x
  float* rstd;  // (normed, B, T, heads)
  float* partial;  // (tasks, normed head_dim + P D): sums for the weights, and of the gradient of x
};

struct Swiglu {
  int64_t rows, width;  // x is (rows, 2 width)
  Types types;
  const void *x, *dy;
  const float* bias;  // (2 width) or null
  void* out;
  float* partial;  // (tasks, 2 width), null without bias
};

struct AttentionScores {
  int64_t rows, keys;
  bool bf16;
  float scale;
  void *scores, *gradients;  // S and dP, replaced by P and dS
};

struct LpipsHead {
  Shape shape;  // samples B, rows H W, width C
  bool bf16;
  const void *f0, *f1;
  const float *weight, *dout;
  void *df0, *df1;  // null where not wanted
  float* partial;   // (tasks)
};

struct Draw {
  uint64_t seed;
  uint32_t stream;
};

// One list of chunks over many tensors: chunk c covers elements [begin, begin + count) of tensor `tensor`.
struct Chunk {
  int32_t tensor;
  int32_t count;
  int64_t begin;
};

// rest1 = 1 - beta1 and the like are taken in float64: 1.0f - 0.999f is wrong in its fifth digit.
struct AdamwFactors {
  float coef, rest1, beta2, rest2, eps, decay, rate, inverse_correction2, ema_weight;
};

// nesterov is the momentum, or 1 for the plain buffer; rest = 1 - momentum.
struct MuonFactors {
  float coef, rest, nesterov, decay, lr, ema_weight;
};

struct Kernels {
  void (*adaln_forward)(const AdalnForward&, int64_t begin, int64_t end);
  void (*adaln_backward)(const AdalnBackward&, int64_t begin, int64_t end);
  void (*qk_norm_rope_forward)(const QkNormRope&, int64_t begin, int64_t end);
  void (*qk_norm_rope_backward)(const QkNormRope&, int64_t begin, int64_t end);
  void (*swiglu_forward)(const Swiglu&, int64_t begin, int64_t end);
  void (*swiglu_backward)(const Swiglu&, int64_t begin, int64_t end);
  void (*attention_scores_backward)(const AttentionScores&, int64_t begin, int64_t end);
  void (*lpips_head_forward)(const LpipsHead&, int64_t begin, int64_t end);
  void (*lpips_head_backward)(const LpipsHead&, int64_t begin, int64_t end);
  // out[j] = sum over i of source[i * stride + j], in the order of i
  void (*sum_rows)(const float* source, int64_t count, int64_t stride, int64_t width, float* out);
  double (*square_sum)(const float* x, int64_t count);
  void (*adamw)(const AdamwFactors&, float* p, const float* g, float* m, float* v, float* ema, int64_t count);
  void (*muon_momentum)(const MuonFactors&, const float* g, float* buffer, void* out, bool bf16, int64_t count);
  void (*muon_apply)(const MuonFactors&, float scale, float* p, const void* u, bool bf16, float* ema, int64_t count);
  void (*ema)(float weight, float* ema, const float* p, int64_t count);
  void (*uniform)(Draw, int64_t sample, int64_t first, int64_t count, float* out);  // first is a multiple of 4
  void (*normal)(Draw, int64_t sample, int64_t first, int64_t count, float* out);
  // out = t z + (1 - t) noise; z and out point at element `first` of the sample's row
  void (*corrupt)(Draw, int64_t sample, int64_t first, int64_t count, float t, const void* z, bool bf16, void* out);
  float (*logistic)(float);
};

// The table of the widest instruction set this processor has, chosen once.
const Kernels& kernels();

// The name of that instruction set, for reports.
const char* instruction_set();

}  // namespace unite
