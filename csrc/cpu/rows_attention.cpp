// Between the matrix products of attention's backward, on rows of scores: P = softmax(scale S), and
// dS = scale P (dP - sum_j P dP).

#include <cmath>
#include <cstdlib>

#include "row_functions.h"
#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

template <typename X>
void row_backward(X* __restrict scores, X* __restrict gradients, int64_t count, float scale, float* __restrict p,
                  float* __restrict dp) {
  float largest = load(scores, 0), sum = 0.0f, dot = 0.0f;
  UNITE_SIMD_MAX(largest)
  for (int64_t j = 0; j < count; ++j) largest = load(scores, j) > largest ? load(scores, j) : largest;
  UNITE_SIMD_SUM(sum)
  for (int64_t j = 0; j < count; ++j) {
    const float e = fast_exp(scale * (load(scores, j) - largest));
    p[j] = e;
    sum += e;
  }
  const float inverse = 1.0f / sum;
  UNITE_SIMD_SUM(dot)
  for (int64_t j = 0; j < count; ++j) {
    const float probability = p[j] * inverse, g = load(gradients, j);
    p[j] = probability;
    dp[j] = g;
    dot += probability * g;
    store(scores, j, probability);
  }
  UNITE_SIMD
  for (int64_t j = 0; j < count; ++j) store(gradients, j, scale * p[j] * (dp[j] - dot));
}

template <typename X>
void backward(const AttentionScores& a, int64_t begin, int64_t end) {
  const int64_t last = end * kRowsPerTask < a.rows ? end * kRowsPerTask : a.rows;
  float* scratch = static_cast<float*>(std::malloc(2 * a.keys * sizeof(float)));
  for (int64_t row = begin * kRowsPerTask; row < last; ++row) {
    row_backward(static_cast<X*>(a.scores) + row * a.keys, static_cast<X*>(a.gradients) + row * a.keys, a.keys, a.scale,
                 scratch, scratch + a.keys);
  }
  std::free(scratch);
}

}  // namespace

void attention_scores_backward(const AttentionScores& a, int64_t begin, int64_t end) {
  a.bf16 ? backward<Bf16>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace UNITE_ISA
}  // namespace unite
