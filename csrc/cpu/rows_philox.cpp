// Philox4x32-10 uniforms and normals, bit for bit those of kernels/unite_kernels/philox.py, and the blend with noise.
//
// Every float32 operation stands in the order of philox.py and this file is compiled with -ffp-contract=off: a fused
// multiply-add would change the last bit. Loops run over kLanes Philox blocks at once, each giving four values.

#include <cmath>

#include "row_functions.h"
#include "vector_math.h"

namespace unite {
namespace UNITE_ISA {
namespace {

constexpr int64_t kLanes = 64;
constexpr float kHalfTurn = 1.5707963267948966 / 4194304.0;

constexpr float kLog[] = {0.3333333f,  -0.2499999f, 0.20000708f,  -0.1666848f, 0.14249937f,
                          -0.1241105f, 0.11661511f, -0.11571201f, 0.07149754f};
constexpr float kCos[] = {4.1666668e-02f, -1.3888888e-03f, 2.4800602e-05f, -2.7301070e-07f};
constexpr float kSin[] = {-1.6666667e-01f, 8.3333319e-03f, -1.9840087e-04f, 2.7249964e-06f};
constexpr float kExp[] = {0.5f, 0.16666667f, 0.041666467f, 0.0083332984f, 0.0013933644f, 0.00019899276f};
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;

struct Words {
  uint32_t word[4][kLanes];
};

// The words of blocks [block, block + kLanes) of one sample.
inline void philox(Draw draw, int64_t sample, uint32_t block, Words& words) {
  uint32_t* __restrict w0 = words.word[0];
  uint32_t* __restrict w1 = words.word[1];
  uint32_t* __restrict w2 = words.word[2];
  uint32_t* __restrict w3 = words.word[3];
  UNITE_SIMD
  for (int64_t i = 0; i < kLanes; ++i) {
    uint32_t c0 = block + uint32_t(i), c1 = draw.stream;
    uint32_t c2 = uint32_t(uint64_t(sample)), c3 = uint32_t(uint64_t(sample) >> 32);
    uint32_t k0 = uint32_t(draw.seed), k1 = uint32_t(draw.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    w0[i] = c0;
    w1[i] = c1;
    w2[i] = c2;
    w3[i] = c3;
  }
}

template <int N>
inline float polynomial(float x, const float (&coefficients)[N]) {
  float y = coefficients[N - 1];
  for (int i = N - 2; i >= 0; --i) y = y * x + coefficients[i];
  return y;
}

inline float log_of(float u) {
  const int32_t bits = __builtin_bit_cast(int32_t, u) - 0x3F3504F3;
  const float f = __builtin_bit_cast(float, (bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
  const float e = float(bits >> 23);
  const float square = f * f;
  const float tail = (square * f) * polynomial(f, kLog) + e * kLn2Low;
  return (f + (tail - square * 0.5f)) + e * kLn2High;
}

inline void box_muller(uint32_t w0, uint32_t w1, float& first, float& second) {
  const float u = (float(w0) + 1.0f) * 2.3283064365386963e-10f;
  const float radius = std::sqrt(log_of(u) * -2.0f);
  const float a = float(int32_t((w1 >> 8) & 0x3FFFFF) - 0x200000) * kHalfTurn;
  const float z = a * a;
  const float cos = (z * z * polynomial(z, kCos) - z * 0.5f) + 1.0f;
  const float sin = a * z * polynomial(z, kSin) + a;
  const float c = (cos - sin) * 0.70710678f, s = (cos + sin) * 0.70710678f;
  const bool swap = (w1 >> 30) & 1, flip = w1 >> 31;
  const float x = swap ? -s : c, y = swap ? c : s;
  first = radius * (flip ? -x : x);
  second = radius * (flip ? -y : y);
}

template <typename Fill>
inline void draw_row(Draw draw, int64_t sample, int64_t first, int64_t count, float* __restrict out, Fill fill) {
  Words words;
  alignas(64) float values[4 * kLanes];
  for (int64_t begin = 0; begin < count; begin += 4 * kLanes) {
    philox(draw, sample, uint32_t((first + begin) / 4), words);
    fill(words, values);
    const int64_t left = count - begin, n = left < 4 * kLanes ? left : 4 * kLanes;
    for (int64_t i = 0; i < n; ++i) out[begin + i] = values[i];
  }
}

inline void fill_uniform(const Words& words, float* __restrict values) {
  for (int lane = 0; lane < 4; ++lane) {
    UNITE_SIMD
    for (int64_t i = 0; i < kLanes; ++i)
      values[4 * i + lane] = float(int32_t(words.word[lane][i] >> 8)) * 5.9604644775390625e-08f;
  }
}

inline void fill_normal(const Words& words, float* __restrict values) {
  alignas(64) float lanes[4][kLanes];
  for (int pair = 0; pair < 4; pair += 2) {
    float* __restrict a = lanes[pair];
    float* __restrict b = lanes[pair + 1];
    const uint32_t* __restrict w0 = words.word[pair];
    const uint32_t* __restrict w1 = words.word[pair + 1];
    UNITE_SIMD
    for (int64_t i = 0; i < kLanes; ++i) {
      float x, y;
      box_muller(w0[i], w1[i], x, y);
      a[i] = x;
      b[i] = y;
    }
  }
  UNITE_SIMD
  for (int64_t i = 0; i < kLanes; ++i) {
    for (int lane = 0; lane < 4; ++lane) values[4 * i + lane] = lanes[lane][i];
  }
}

template <typename Z>
void blend(const float* __restrict noise, float t, const Z* __restrict z, Z* __restrict out, int64_t count) {
  const float rest = 1.0f - t;
  UNITE_SIMD
  for (int64_t i = 0; i < count; ++i) store(out, i, load(z, i) * t + noise[i] * rest);
}

}  // namespace

void uniform(Draw draw, int64_t sample, int64_t first, int64_t count, float* out) {
  draw_row(draw, sample, first, count, out, fill_uniform);
}

void normal(Draw draw, int64_t sample, int64_t first, int64_t count, float* out) {
  draw_row(draw, sample, first, count, out, fill_normal);
}

void corrupt(Draw draw, int64_t sample, int64_t first, int64_t count, float t, const void* z, bool bf16, void* out) {
  alignas(64) float noise[4 * kLanes];
  for (int64_t begin = 0; begin < count; begin += 4 * kLanes) {
    const int64_t left = count - begin, n = left < 4 * kLanes ? left : 4 * kLanes;
    normal(draw, sample, first + begin, n, noise);
    if (bf16) {
      blend(noise, t, static_cast<const Bf16*>(z) + begin, static_cast<Bf16*>(out) + begin, n);
    } else {
      blend(noise, t, static_cast<const float*>(z) + begin, static_cast<float*>(out) + begin, n);
    }
  }
}

float logistic(float x) {
  float v = -x;
  v = v < -80.0f ? -80.0f : v;
  v = v > 80.0f ? 80.0f : v;
  const float k = std::floor(v * 1.4426950408889634f + 0.5f);
  const float r = (v - k * kLn2High) - k * kLn2Low;
  const float mantissa = (r * r * polynomial(r, kExp) + r) + 1.0f;
  return 1.0f / (mantissa * __builtin_bit_cast(float, (int32_t(k) + 127) << 23) + 1.0f);
}

}  // namespace UNITE_ISA
}  // namespace unite
