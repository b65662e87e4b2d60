// adaLN on blocks of rows: plain (RMSNorm + modulate), mid (gate + residual before it) and tail (gate + residual +
// norm3 before it). D = width; r = 1 / sqrt(mean x^2 + eps).
//
//     forward    h = x + gate (branch + bias);  tail: x2 = h r3 w3, else x2 = h;   y = x2 r w (1 + scale) + shift
//     backward   n = x2 r,  g = dy w (1 + scale):   dx2 += r (g - n mean(g n));   tail: the same through norm3
//                sums over rows: dy (dshift), dy n (dscale and dw), (branch + bias) dh (dgate), gate dh (dbias),
//                dx2 h r3 (dw3)

#include <cmath>
#include <cstdlib>

#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

template <typename X, typename B>
void forward_row(const AdalnForward& a, int64_t sample, int64_t row, const float* __restrict modulation,
                 float* __restrict h) {
  const int64_t d = a.shape.width;
  const X* __restrict x = static_cast<const X*>(a.x) + row * d;
  const B* __restrict branch = static_cast<const B*>(a.branch) + row * d;
  const float* __restrict gate = a.gate.data + sample * a.gate.stride;
  const float* __restrict shift = a.shift.data + sample * a.shift.stride;
  const float* __restrict bias = a.bias;
  X* __restrict residual = static_cast<X*>(a.residual) + row * d;
  B* __restrict y = static_cast<B*>(a.y) + row * d;
  float square = 0.0f;
  if (a.branch == nullptr) {
    UNITE_SIMD_SUM(square)
    for (int64_t i = 0; i < d; ++i) {
      const float value = load(x, i);
      h[i] = value;
      square += value * value;
    }
  } else if (a.weight3 == nullptr) {
    UNITE_SIMD_SUM(square)
    for (int64_t i = 0; i < d; ++i) {
      const float value = load(x, i) + gate[i] * (load(branch, i) + bias[i]);
      store(residual, i, value);
      h[i] = value;
      square += value * value;
    }
  } else {
    UNITE_SIMD_SUM(square)
    for (int64_t i = 0; i < d; ++i) {
      const float value = load(x, i) + gate[i] * (load(branch, i) + bias[i]);
      h[i] = value;
      square += value * value;
    }
    const float rstd3 = 1.0f / std::sqrt(square / float(d) + a.eps);
    a.rstd3[row] = rstd3;
    const float* __restrict weight3 = a.weight3;
    square = 0.0f;
    UNITE_SIMD_SUM(square)
    for (int64_t i = 0; i < d; ++i) {
      const float value = h[i] * rstd3 * weight3[i];
      store(residual, i, value);
      h[i] = value;
      square += value * value;
    }
  }
  const float rstd = 1.0f / std::sqrt(square / float(d) + a.eps);
  a.rstd[row] = rstd;
  UNITE_SIMD
  for (int64_t i = 0; i < d; ++i) store(y, i, h[i] * rstd * modulation[i] + shift[i]);
}

void modulation_of(const float* __restrict weight, const float* __restrict scale, int64_t d, float* __restrict out) {
  UNITE_SIMD
  for (int64_t i = 0; i < d; ++i) out[i] = weight[i] * (1.0f + scale[i]);
}

template <typename X, typename B>
void forward(const AdalnForward& a, int64_t begin, int64_t end) {
  const int64_t d = a.shape.width;
  float* scratch = static_cast<float*>(std::malloc(2 * d * sizeof(float)));
  int64_t current = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(a.shape, task);
    if (block.sample != current) {
      current = block.sample;
      modulation_of(a.weight, a.scale.data + current * a.scale.stride, d, scratch + d);
    }
    const int64_t first = block.sample * a.shape.rows + block.row;
    for (int64_t row = first; row < first + block.rows; ++row) {
      forward_row<X, B>(a, block.sample, row, scratch + d, scratch);
    }
  }
  std::free(scratch);
}

// Plain and mid. Two passes over the row: the sums that need no mean, then the gradient.
template <typename X, typename B>
void backward_row(const AdalnBackward& a, int64_t sample, int64_t row, const float* __restrict modulation,
                  float* __restrict sums) {
  const int64_t d = a.shape.width;
  const X* __restrict x = static_cast<const X*>(a.x) + row * d;
  const B* __restrict dy = static_cast<const B*>(a.dy) + row * d;
  X* __restrict dx = static_cast<X*>(a.dx) + row * d;
  float* __restrict sum_dy = sums;
  float* __restrict sum_dyn = sums + d;
  const float rstd = a.rstd[row];
  float dot = 0.0f;
  UNITE_SIMD_SUM(dot)
  for (int64_t i = 0; i < d; ++i) {
    const float g = load(dy, i), gn = g * (load(x, i) * rstd);
    sum_dy[i] += g;
    sum_dyn[i] += gn;
    dot += gn * modulation[i];
  }
  const float factor = rstd * rstd * (dot / float(d));
  if (a.branch == nullptr) {
    UNITE_SIMD
    for (int64_t i = 0; i < d; ++i) store(dx, i, rstd * (load(dy, i) * modulation[i]) - factor * load(x, i));
    return;
  }
  const X* __restrict dresidual = static_cast<const X*>(a.dresidual) + row * d;
  const B* __restrict branch = static_cast<const B*>(a.branch) + row * d;
  const float* __restrict gate = a.gate.data + sample * a.gate.stride;
  B* __restrict dbranch = static_cast<B*>(a.dbranch) + row * d;
  const float* __restrict bias = a.bias;
  float* __restrict sum_gate = sums + 2 * d;
  float* __restrict sum_bias = sums + 3 * d;
  UNITE_SIMD
  for (int64_t i = 0; i < d; ++i) {
    const float g = load(dresidual, i) + (rstd * (load(dy, i) * modulation[i]) - factor * load(x, i));
    store(dx, i, g);
    store(dbranch, i, g * gate[i]);
    sum_gate[i] += g * (load(branch, i) + bias[i]);
    sum_bias[i] += g * gate[i];
  }
}

template <typename X, typename B>
void backward_tail_row(const AdalnBackward& a, int64_t sample, int64_t row, const float* __restrict modulation,
                       float* __restrict sums, float* __restrict n3, float* __restrict g3) {
  const int64_t d = a.shape.width;
  const X* __restrict x = static_cast<const X*>(a.x) + row * d;
  const X* __restrict dresidual = static_cast<const X*>(a.dresidual) + row * d;
  const B* __restrict branch = static_cast<const B*>(a.branch) + row * d;
  const B* __restrict dy = static_cast<const B*>(a.dy) + row * d;
  X* __restrict dx = static_cast<X*>(a.dx) + row * d;
  B* __restrict dbranch = static_cast<B*>(a.dbranch) + row * d;
  const float* __restrict bias = a.bias;
  const float* __restrict gate = a.gate.data + sample * a.gate.stride;
  const float* __restrict weight3 = a.weight3;
  float* __restrict sum_dy = sums;
  float* __restrict sum_dyn = sums + d;
  float* __restrict sum_gate = sums + 2 * d;
  float* __restrict sum_bias = sums + 3 * d;
  float* __restrict sum_w3 = sums + 4 * d;
  const float rstd = a.rstd[row], rstd3 = a.rstd3[row];
  float dot = 0.0f;
  UNITE_SIMD_SUM(dot)
  for (int64_t i = 0; i < d; ++i) {
    const float normalised = (load(x, i) + gate[i] * (load(branch, i) + bias[i])) * rstd3;
    const float g = load(dy, i), gn = g * (normalised * weight3[i] * rstd);
    n3[i] = normalised;
    sum_dy[i] += g;
    sum_dyn[i] += gn;
    dot += gn * modulation[i];
  }
  const float factor = rstd * rstd * (dot / float(d));
  float dot3 = 0.0f;
  UNITE_SIMD_SUM(dot3)
  for (int64_t i = 0; i < d; ++i) {
    const float w = weight3[i], n = n3[i];
    const float dx2 = load(dresidual, i) + (rstd * (load(dy, i) * modulation[i]) - factor * (n * w));
    sum_w3[i] += dx2 * n;
    g3[i] = dx2 * w;
    dot3 += dx2 * w * n;
  }
  const float mean3 = dot3 / float(d);
  UNITE_SIMD
  for (int64_t i = 0; i < d; ++i) {
    const float g = rstd3 * (g3[i] - n3[i] * mean3);
    store(dx, i, g);
    store(dbranch, i, g * gate[i]);
    sum_gate[i] += g * (load(branch, i) + bias[i]);
    sum_bias[i] += g * gate[i];
  }
}

template <typename X, typename B>
void backward(const AdalnBackward& a, int64_t begin, int64_t end) {
  const int64_t d = a.shape.width;
  float* scratch = static_cast<float*>(std::malloc(3 * d * sizeof(float)));
  int64_t current = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(a.shape, task);
    if (block.sample != current) {
      current = block.sample;
      modulation_of(a.weight, a.scale.data + current * a.scale.stride, d, scratch);
    }
    float* sums = a.partial + task * a.sums * d;
    for (int64_t i = 0; i < a.sums * d; ++i) sums[i] = 0.0f;
    const int64_t first = block.sample * a.shape.rows + block.row;
    for (int64_t row = first; row < first + block.rows; ++row) {
      if (a.weight3 == nullptr) {
        backward_row<X, B>(a, block.sample, row, scratch, sums);
      } else {
        backward_tail_row<X, B>(a, block.sample, row, scratch, sums, scratch + d, scratch + 2 * d);
      }
    }
  }
  std::free(scratch);
}

}  // namespace

void adaln_forward(const AdalnForward& a, int64_t begin, int64_t end) {
  if (!a.types.residual_bf16 && !a.types.branch_bf16) return forward<float, float>(a, begin, end);
  if (!a.types.residual_bf16) return forward<float, Bf16>(a, begin, end);
  forward<Bf16, Bf16>(a, begin, end);
}

void adaln_backward(const AdalnBackward& a, int64_t begin, int64_t end) {
  if (!a.types.residual_bf16 && !a.types.branch_bf16) return backward<float, float>(a, begin, end);
  if (!a.types.residual_bf16) return backward<float, Bf16>(a, begin, end);
  backward<Bf16, Bf16>(a, begin, end);
}

}  // namespace UNITE_ISA
}  // namespace unite
