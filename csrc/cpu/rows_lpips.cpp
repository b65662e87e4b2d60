// The head of LPIPS on positions of channels_last feature maps: u = f / (|f| + 1e-10) over the channels, and the sum of
// w (u0 - u1)^2. Backward, with du = 2 w (u0 - u1) dout / positions for u0 and its negative for u1:
//
//     df = du / (|f| + 1e-10) - f (sum du f) / ((|f| + 1e-10)^2 |f|)

#include <cmath>
#include <cstdlib>

#include "row_functions.h"
#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

constexpr float kEps = 1e-10f;

template <typename X>
float norm(const X* __restrict f, int64_t channels) {
  float square = 0.0f;
  UNITE_SIMD_SUM(square)
  for (int64_t i = 0; i < channels; ++i) square += load(f, i) * load(f, i);
  return std::sqrt(square);
}

template <typename X>
float distance(const X* __restrict f0, const X* __restrict f1, const float* __restrict weight, int64_t channels) {
  const float inverse0 = 1.0f / (norm(f0, channels) + kEps), inverse1 = 1.0f / (norm(f1, channels) + kEps);
  float sum = 0.0f;
  UNITE_SIMD_SUM(sum)
  for (int64_t i = 0; i < channels; ++i) {
    const float d = load(f0, i) * inverse0 - load(f1, i) * inverse1;
    sum += weight[i] * d * d;
  }
  return sum;
}

// The gradient of the map f from sign * du.
template <typename X>
void gradient(const X* __restrict f, const float* __restrict du, float sign, float size, int64_t channels,
              X* __restrict df) {
  const float inverse = 1.0f / (size + kEps);
  float dot = 0.0f;
  UNITE_SIMD_SUM(dot)
  for (int64_t i = 0; i < channels; ++i) dot += du[i] * load(f, i);
  const float factor = size > 0.0f ? sign * dot * inverse * inverse / size : 0.0f, scale = sign * inverse;
  UNITE_SIMD
  for (int64_t i = 0; i < channels; ++i) store(df, i, scale * du[i] - factor * load(f, i));
}

template <typename X>
void forward(const LpipsHead& a, int64_t begin, int64_t end) {
  const int64_t c = a.shape.width;
  const X *f0 = static_cast<const X*>(a.f0), *f1 = static_cast<const X*>(a.f1);
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(a.shape, task);
    const int64_t first = block.sample * a.shape.rows + block.row;
    float sum = 0.0f;
    for (int64_t row = first; row < first + block.rows; ++row) sum += distance(f0 + row * c, f1 + row * c, a.weight, c);
    a.partial[task] = sum;
  }
}

template <typename X>
void backward(const LpipsHead& a, int64_t begin, int64_t end) {
  const int64_t c = a.shape.width;
  const X *f0 = static_cast<const X*>(a.f0), *f1 = static_cast<const X*>(a.f1);
  X *df0 = static_cast<X*>(a.df0), *df1 = static_cast<X*>(a.df1);
  const float* __restrict weight = a.weight;
  float* __restrict du = static_cast<float*>(std::malloc(c * sizeof(float)));
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(a.shape, task);
    const int64_t first = block.sample * a.shape.rows + block.row;
    const float scale = 2.0f * a.dout[block.sample] / float(a.shape.rows);
    for (int64_t row = first; row < first + block.rows; ++row) {
      const X *__restrict x0 = f0 + row * c, *__restrict x1 = f1 + row * c;
      const float norm0 = norm(x0, c), norm1 = norm(x1, c);
      const float inverse0 = 1.0f / (norm0 + kEps), inverse1 = 1.0f / (norm1 + kEps);
      UNITE_SIMD
      for (int64_t i = 0; i < c; ++i) du[i] = scale * weight[i] * (load(x0, i) * inverse0 - load(x1, i) * inverse1);
      if (df0 != nullptr) gradient(x0, du, 1.0f, norm0, c, df0 + row * c);
      if (df1 != nullptr) gradient(x1, du, -1.0f, norm1, c, df1 + row * c);
    }
  }
  std::free(du);
}

}  // namespace

void lpips_head_forward(const LpipsHead& a, int64_t begin, int64_t end) {
  a.bf16 ? forward<Bf16>(a, begin, end) : forward<float>(a, begin, end);
}

void lpips_head_backward(const LpipsHead& a, int64_t begin, int64_t end) {
  a.bf16 ? backward<Bf16>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace UNITE_ISA
}  // namespace unite
