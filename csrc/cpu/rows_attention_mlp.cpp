// QK-norm + RoPE and SwiGLU on blocks of rows.
//
//     QK-norm    x = qk + bias, n = x r w per head
//     RoPE       (o0, o1) = (n0 c - n1 s, n1 c + n0 s) for each pair of neighbours
//     SwiGLU     y = silu(a) b,  a and b the halves of x + bias

#include <cmath>
#include <cstdlib>

#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

template <typename X>
void qk_forward(const QkNormRope& p, int64_t begin, int64_t end) {
  const int64_t hd = p.head_dim, d = p.heads * hd;
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(p.shape, task);
    for (int64_t t = block.row; t < block.row + block.rows; ++t) {
      const int64_t row = block.sample * p.shape.rows + t, position = t - p.prefix;
      const float* __restrict cos = p.cos + position * (hd / 2);
      const float* __restrict sin = p.sin + position * (hd / 2);
      for (int64_t part = 0; part < 2; ++part) {
        const float* __restrict weight = part == 0 ? p.q_weight : p.k_weight;
        for (int64_t head = 0; head < p.heads; ++head) {
          const X* __restrict x = static_cast<const X*>(p.qk) + row * 2 * d + part * d + head * hd;
          X* __restrict out = static_cast<X*>(p.out) + row * 2 * d + part * d + head * hd;
          const float* __restrict bias = p.bias + part * d + head * hd;
          float square = 0.0f;
          UNITE_SIMD_SUM(square)
          for (int64_t i = 0; i < hd; ++i) square += (load(x, i) + bias[i]) * (load(x, i) + bias[i]);
          const float rstd = 1.0f / std::sqrt(square / float(hd) + p.eps);
          p.rstd[(row * 2 + part) * p.heads + head] = rstd;
          if (position < 0) {
            UNITE_SIMD
            for (int64_t i = 0; i < hd; ++i) store(out, i, (load(x, i) + bias[i]) * rstd * weight[i]);
            continue;
          }
          UNITE_SIMD
          for (int64_t i = 0; i < hd / 2; ++i) {
            const float even = (load(x, 2 * i) + bias[2 * i]) * rstd * weight[2 * i];
            const float odd = (load(x, 2 * i + 1) + bias[2 * i + 1]) * rstd * weight[2 * i + 1];
            store(out, 2 * i, even * cos[i] - odd * sin[i]);
            store(out, 2 * i + 1, odd * cos[i] + even * sin[i]);
          }
        }
      }
    }
  }
}

template <typename X>
void qk_backward_head(const X* __restrict x, const X* __restrict dout, const float* __restrict weight,
                      const float* __restrict bias, const float* __restrict cos, const float* __restrict sin,
                      float rstd, int64_t hd, bool rotate, float* __restrict dn, float* __restrict dweight,
                      float* __restrict dbias, X* __restrict dx) {
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
    const float product = dn[i] * ((load(x, i) + bias[i]) * rstd);
    dweight[i] += product;
    dot += product * weight[i];
  }
  const float factor = rstd * rstd * (dot / float(hd));
  UNITE_SIMD
  for (int64_t i = 0; i < hd; ++i) {
    const float g = rstd * (dn[i] * weight[i]) - factor * (load(x, i) + bias[i]);
    store(dx, i, g);
    dbias[i] += g;
  }
}

template <typename X>
void qk_backward(const QkNormRope& p, int64_t begin, int64_t end) {
  const int64_t hd = p.head_dim, d = p.heads * hd;
  float* scratch = static_cast<float*>(std::malloc(hd * sizeof(float)));
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(p.shape, task);
    float* sums = p.partial + task * 2 * (hd + d);
    for (int64_t i = 0; i < 2 * (hd + d); ++i) sums[i] = 0.0f;
    for (int64_t t = block.row; t < block.row + block.rows; ++t) {
      const int64_t row = block.sample * p.shape.rows + t, position = t - p.prefix;
      const float* cos = p.cos + position * (hd / 2);
      const float* sin = p.sin + position * (hd / 2);
      const X* x = static_cast<const X*>(p.qk) + row * 2 * d;
      const X* dout = static_cast<const X*>(p.dout) + row * 2 * d;
      X* dx = static_cast<X*>(p.out) + row * 2 * d;
      for (int64_t part = 0; part < 2; ++part) {
        const float* weight = part == 0 ? p.q_weight : p.k_weight;
        for (int64_t head = 0; head < p.heads; ++head) {
          const int64_t o = part * d + head * hd;
          qk_backward_head(x + o, dout + o, weight, p.bias + o, cos, sin, p.rstd[(row * 2 + part) * p.heads + head], hd,
                           position >= 0, scratch, sums + part * hd, sums + 2 * hd + o, dx + o);
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
