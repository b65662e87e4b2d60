// Loads, stores and the exponential that the row functions share. Everything is static: see rows.h for why.

#pragma once

#include "rows.h"

#define UNITE_SIMD _Pragma("omp simd")
#define UNITE_SIMD_SUM(x) _Pragma(UNITE_TEXT(omp simd reduction(+ : x)))
#define UNITE_SIMD_MAX(x) _Pragma(UNITE_TEXT(omp simd reduction(max : x)))
#define UNITE_TEXT(x) #x

namespace unite {
namespace {

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const Bf16* p, int64_t i) { return __builtin_bit_cast(float, uint32_t(p[i].bits) << 16); }

inline void store(float* p, int64_t i, float x) { p[i] = x; }
inline void store(Bf16* p, int64_t i, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const uint32_t quiet = (bits >> 16) | 0x40;                           // rounding could turn a NaN into infinity
  p[i].bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// condition ? a : b without a branch. From the plain expression gcc makes paths of their own for clamped arguments and
// computes all of them for every vector; the saturated one divides into subnormal numbers, at a hundred times the cost.
inline float choose(bool condition, float a, float b) {
  const uint32_t mask = -uint32_t(condition);
  return __builtin_bit_cast(float,
                            (__builtin_bit_cast(uint32_t, a) & mask) | (__builtin_bit_cast(uint32_t, b) & ~mask));
}

// Relative error below 3e-7 on [-87, 87]; the argument is clamped to it, so the logistic function saturates.
inline float fast_exp(float x) {
  x = choose(x < -87.0f, -87.0f, x);
  x = choose(x > 87.0f, 87.0f, x);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the rounded integer
  const int32_t k = __builtin_bit_cast(int32_t, shifted) - 0x4B400000;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  return p * __builtin_bit_cast(float, (k + 127) << 23);
}

// The block of rows a task number stands for.
struct Block {
  int64_t sample, row, rows;
};

inline Block block_of(const Shape& shape, int64_t task) {
  const int64_t blocks = shape.blocks(), sample = task / blocks, row = task % blocks * kRowsPerTask;
  const int64_t left = shape.rows - row;
  return {sample, row, left < kRowsPerTask ? left : kRowsPerTask};
}

}  // namespace
}  // namespace unite
