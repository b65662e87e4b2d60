// QK-norm + RoPE and SwiGLU on blocks of rows.
//
//     QK-norm    n = x r w per head
//     RoPE       (o0, o1) = (n0 c - n1 s, n1 c + n0 s) for each pair of neighbours
//     SwiGLU     y = silu(a) b,  a and b the halves of x + bias

#include <cmath>
#include <cstdlib>

#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

template <typename X>
void qk_forward_head(const X* __restrict x, const float* __restrict weight, const float* __restrict cos,
                     const float* __restrict sin, float eps, int64_t hd, bool rotate, float* __restrict rstd_out,
                     X* __restrict out) {
  float square = 0.0f;
  UNITE_SIMD_SUM(square)
  for (int64_t i = 0; i < hd; ++i) square += load(x, i) * load(x, i);
  const float rstd = 1.0f / std::sqrt(square / float(hd) + eps);
  *rstd_out = rstd;
  if (!rotate) {
    UNITE_SIMD
    for (int64_t i = 0; i < hd; ++i) store(out, i, load(x, i) * rstd * weight[i]);
    return;
  }
  UNITE_SIMD
  for (int64_t i = 0; i < hd / 2; ++i) {
    const float even = load(x, 2 * i) * rstd * weight[2 * i];
    const float odd = load(x, 2 * i + 1) * rstd * weight[2 * i + 1];
    store(out, 2 * i, even * cos[i] - odd * sin[i]);
    store(out, 2 * i + 1, odd * cos[i] + even * sin[i]);
  }
}

template <typename X>
void qk_forward(const QkNormRope& p, int64_t begin, int64_t end) {
  const int64_t hd = p.head_dim, d = p.heads * hd, all = p.shape.samples * p.shape.rows;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(p.shape, task);
    for (int64_t t = block.row; t < block.row + block.rows; ++t) {
      const int64_t row = block.sample * p.shape.rows + t, position = t - p.prefix;
      const float* cos = p.cos + position * (hd / 2);
      const float* sin = p.sin + position * (hd / 2);
      for (int64_t part = 0; part < p.normed; ++part) {
        const X* x = static_cast<const X*>(p.x) + (row * p.parts + part) * d;
        X* out = static_cast<X*>(p.out) + (part * all + row) * d;
        float* rstd = p.rstd + (part * all + row) * p.heads;
        for (int64_t head = 0; head < p.heads; ++head) {
          qk_forward_head(x + head * hd, p.weights[part], cos, sin, p.eps, hd, position >= 0, rstd + head,
                          out + head * hd);
        }
      }
    }
  }
}

template <typename X>
void qk_backward_head(const X* __restrict x, const X* __restrict dout, const float* __restrict weight,
                      const float* __restrict cos, const float* __restrict sin, float rstd, int64_t hd, bool rotate,
                      float* __restrict dn, float* __restrict dweight, float* __restrict dbias, X* __restrict dx) {
  if (rotate) {
    UNITE_SIMD
    for (int64_t i = 0; i < hd / 2; ++i) {
      const float even = load(dout, 2 * i), odd = load(dout, 2 * i + 1);
      dn[2 * i] = even * cos[i] + odd * sin[i];
      dn[2 * i + 1] = odd * cos[i] - even * sin[i];
    }
  } else {
    UNITE_SIMD
    for (int64_t i = 0; i < hd; ++i) dn[i] = load(dout, i);
  }
  float dot = 0.0f;
  UNITE_SIMD_SUM(dot)
  for (int64_t i = 0; i < hd; ++i) {
    const float product = dn[i] * (load(x, i) * rstd);
    dweight[i] += product;
    dot += product * weight[i];
  }
  const float factor = rstd * rstd * (dot / float(hd));
  UNITE_SIMD
  for (int64_t i = 0; i < hd; ++i) {
    const float g = rstd * (dn[i] * weight[i]) - factor * load(x, i);
    store(dx, i, g);
    dbias[i] += g;
  }
}

// Of a part that is neither normalised nor rotated: into its place in dx, and summed.
template <typename X>
void place_row(const X* __restrict grad, int64_t d, float* __restrict dbias, X* __restrict dx) {
  UNITE_SIMD
  for (int64_t i = 0; i < d; ++i) {
    store(dx, i, load(grad, i));
    dbias[i] += load(grad, i);
  }
}

template <typename X>
void qk_backward(const QkNormRope& p, int64_t begin, int64_t end) {
  const int64_t hd = p.head_dim, d = p.heads * hd, all = p.shape.samples * p.shape.rows;
  const int64_t stride = p.normed * hd + p.parts * d;
  float* scratch = static_cast<float*>(std::malloc(hd * sizeof(float)));
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(p.shape, task);
    float* sums = p.partial + task * stride;
    for (int64_t i = 0; i < stride; ++i) sums[i] = 0.0f;
    for (int64_t t = block.row; t < block.row + block.rows; ++t) {
      const int64_t row = block.sample * p.shape.rows + t, position = t - p.prefix;
      const float* cos = p.cos + position * (hd / 2);
      const float* sin = p.sin + position * (hd / 2);
      for (int64_t part = 0; part < p.parts; ++part) {
        const X* x = static_cast<const X*>(p.x) + (row * p.parts + part) * d;
        const X* grad = static_cast<const X*>(p.grads[part]) + row * d;
        X* dx = static_cast<X*>(p.out) + (row * p.parts + part) * d;
        float* dbias = sums + p.normed * hd + part * d;
        if (part >= p.normed) {
          place_row(grad, d, dbias, dx);
          continue;
        }
        for (int64_t head = 0; head < p.heads; ++head) {
          const int64_t o = head * hd;
          qk_backward_head(x + o, grad + o, p.weights[part], cos, sin, p.rstd[(part * all + row) * p.heads + head], hd,
                           position >= 0, scratch, sums + part * hd, dbias + o, dx + o);
        }
      }
    }
  }
  std::free(scratch);
}

template <typename X>
void swiglu_rows(const Swiglu& p, int64_t begin, int64_t end) {
  const int64_t f = p.width, last = end * kRowsPerTask < p.rows ? end * kRowsPerTask : p.rows;
  for (int64_t row = begin * kRowsPerTask; row < last; ++row) {
    const X* __restrict x = static_cast<const X*>(p.x) + row * 2 * f;
    X* __restrict y = static_cast<X*>(p.out) + row * f;
    const float* __restrict bias = p.bias;
    if (bias == nullptr) {
      UNITE_SIMD
      for (int64_t i = 0; i < f; ++i) {
        const float a = load(x, i);
        store(y, i, a / (1.0f + fast_exp(-a)) * load(x, f + i));
      }
    } else {
      UNITE_SIMD
      for (int64_t i = 0; i < f; ++i) {
        const float a = load(x, i) + bias[i];
        store(y, i, a / (1.0f + fast_exp(-a)) * (load(x, f + i) + bias[f + i]));
      }
    }
  }
}

template <typename X>
void swiglu_backward_row(const X* __restrict x, const X* __restrict dy, const float* __restrict bias, int64_t f,
                         X* __restrict dx, float* __restrict sums) {
  if (bias == nullptr) {
    UNITE_SIMD
    for (int64_t i = 0; i < f; ++i) {
      const float a = load(x, i), b = load(x, f + i), g = load(dy, i);
      const float sigmoid = 1.0f / (1.0f + fast_exp(-a));
      store(dx, i, g * b * sigmoid * (1.0f + a * (1.0f - sigmoid)));
      store(dx, f + i, g * a * sigmoid);
    }
    return;
  }
  UNITE_SIMD
  for (int64_t i = 0; i < f; ++i) {
    const float a = load(x, i) + bias[i], b = load(x, f + i) + bias[f + i], g = load(dy, i);
    const float sigmoid = 1.0f / (1.0f + fast_exp(-a));
    const float da = g * b * sigmoid * (1.0f + a * (1.0f - sigmoid)), db = g * a * sigmoid;
    store(dx, i, da);
    store(dx, f + i, db);
    sums[i] += da;
    sums[f + i] += db;
  }
}

template <typename X>
void swiglu_rows_backward(const Swiglu& p, int64_t begin, int64_t end) {
  const int64_t f = p.width;
  for (int64_t task = begin; task < end; ++task) {
    float* sums = p.partial == nullptr ? nullptr : p.partial + task * 2 * f;
    for (int64_t i = 0; sums != nullptr && i < 2 * f; ++i) sums[i] = 0.0f;
    const int64_t next = (task + 1) * kRowsPerTask, last = next < p.rows ? next : p.rows;
    for (int64_t row = task * kRowsPerTask; row < last; ++row) {
      swiglu_backward_row(static_cast<const X*>(p.x) + row * 2 * f, static_cast<const X*>(p.dy) + row * f, p.bias, f,
                          static_cast<X*>(p.out) + row * 2 * f, sums);
    }
  }
}

}  // namespace

void qk_norm_rope_forward(const QkNormRope& p, int64_t begin, int64_t end) {
  p.types.residual_bf16 ? qk_forward<Bf16>(p, begin, end) : qk_forward<float>(p, begin, end);
}

void qk_norm_rope_backward(const QkNormRope& p, int64_t begin, int64_t end) {
  p.types.residual_bf16 ? qk_backward<Bf16>(p, begin, end) : qk_backward<float>(p, begin, end);
}

void swiglu_forward(const Swiglu& p, int64_t begin, int64_t end) {
  p.types.residual_bf16 ? swiglu_rows<Bf16>(p, begin, end) : swiglu_rows<float>(p, begin, end);
}

void swiglu_backward(const Swiglu& p, int64_t begin, int64_t end) {
  p.types.residual_bf16 ? swiglu_rows_backward<Bf16>(p, begin, end) : swiglu_rows_backward<float>(p, begin, end);
}

}  // namespace UNITE_ISA
}  // namespace unite
