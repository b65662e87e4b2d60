// The elementwise work of the optimizers on one chunk, and the table of this instruction set.

#include <cmath>

#include "row_functions.h"
#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

template <typename U>
void momentum_chunk(const MuonFactors& f, const float* __restrict g, float* __restrict buffer, U* __restrict out,
                    int64_t count) {
  UNITE_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const float clipped = g[i] * f.coef, next = buffer[i] + f.rest * (clipped - buffer[i]);
    buffer[i] = next;
    store(out, i, clipped + f.nesterov * (next - clipped));
  }
}

template <typename U>
void apply_chunk(const MuonFactors& f, float scale, float* __restrict p, const U* __restrict u, float* __restrict e,
                 int64_t count) {
  const float rate = f.lr * scale;
  if (e == nullptr) {
    UNITE_SIMD
    for (int64_t i = 0; i < count; ++i) p[i] = p[i] * f.decay - rate * load(u, i);
    return;
  }
  UNITE_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const float next = p[i] * f.decay - rate * load(u, i);
    p[i] = next;
    e[i] += f.ema_weight * (next - e[i]);
  }
}

}  // namespace

void sum_rows(const float* __restrict source, int64_t count, int64_t stride, int64_t width, float* __restrict out) {
  for (int64_t j = 0; j < width; ++j) out[j] = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float* __restrict row = source + i * stride;
    UNITE_SIMD
    for (int64_t j = 0; j < width; ++j) out[j] += row[j];
  }
}

double square_sum(const float* __restrict x, int64_t count) {
  double total = 0.0;
  // Short float32 runs added in float64: exact enough for any chunk, and twice as wide as float64 throughout.
  for (int64_t begin = 0; begin < count; begin += 512) {
    const int64_t end = begin + 512 < count ? begin + 512 : count;
    float sum = 0.0f;
    UNITE_SIMD_SUM(sum)
    for (int64_t i = begin; i < end; ++i) sum += x[i] * x[i];
    total += double(sum);
  }
  return total;
}

void adamw(const AdamwFactors& f, float* __restrict p, const float* __restrict g, float* __restrict m,
           float* __restrict v, float* __restrict e, int64_t count) {
  const AdamwFactors k = f;
  if (e == nullptr) {
    UNITE_SIMD
    for (int64_t i = 0; i < count; ++i) {
      const float clipped = g[i] * k.coef;
      m[i] += k.rest1 * (clipped - m[i]);
      v[i] = v[i] * k.beta2 + k.rest2 * clipped * clipped;
      p[i] = p[i] * k.decay - k.rate * m[i] / (std::sqrt(v[i]) * k.inverse_correction2 + k.eps);
    }
    return;
  }
  UNITE_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const float clipped = g[i] * k.coef;
    m[i] += k.rest1 * (clipped - m[i]);
    v[i] = v[i] * k.beta2 + k.rest2 * clipped * clipped;
    const float next = p[i] * k.decay - k.rate * m[i] / (std::sqrt(v[i]) * k.inverse_correction2 + k.eps);
    p[i] = next;
    e[i] += k.ema_weight * (next - e[i]);
  }
}

void muon_momentum(const MuonFactors& f, const float* g, float* buffer, void* out, bool bf16, int64_t count) {
  const MuonFactors k = f;
  bf16 ? momentum_chunk(k, g, buffer, static_cast<Bf16*>(out), count)
       : momentum_chunk(k, g, buffer, static_cast<float*>(out), count);
}

void muon_apply(const MuonFactors& f, float scale, float* p, const void* u, bool bf16, float* e, int64_t count) {
  const MuonFactors k = f;
  bf16 ? apply_chunk(k, scale, p, static_cast<const Bf16*>(u), e, count)
       : apply_chunk(k, scale, p, static_cast<const float*>(u), e, count);
}

void ema(float weight, float* __restrict e, const float* __restrict p, int64_t count) {
  UNITE_SIMD
  for (int64_t i = 0; i < count; ++i) e[i] += weight * (p[i] - e[i]);
}

extern const Kernels table;
const Kernels table = {adaln_forward,
                       adaln_backward,
                       qk_norm_rope_forward,
                       qk_norm_rope_backward,
                       swiglu_forward,
                       swiglu_backward,
                       attention_scores_backward,
                       lpips_head_forward,
                       lpips_head_backward,
                       sum_rows,
                       square_sum,
                       adamw,
                       muon_momentum,
                       muon_apply,
                       ema,
                       uniform,
                       normal,
                       corrupt,
                       logistic};

}  // namespace UNITE_ISA
}  // namespace unite
