// Kernels of norm, clip, AdamW, Muon and EMA over lists of tensors. Semantics: kernels/unite_kernels/multi_tensor.py.
//
// A launch takes up to kTensors tensors: their addresses travel as a kernel parameter (at most 32,764 bytes; CUDA 12.1
// and later), so nothing is copied to the device first and a captured graph holds all it needs. Each block serves one
// chunk of kChunk elements; which one it finds by bisecting the running count of chunks. 128-bit accesses where every
// pointer of the tensor allows them. Sums go in two stages, without atomics: runs repeat bit for bit.
//
// lr, step, coef and skip are read on the device: the host never waits.

#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace unite {
namespace {

constexpr int kTensors = 512;
constexpr int kThreads = 256;
constexpr int kChunk = 8192;  // elements of a block: 8 float4 per thread

template <int N>
struct Table {
  int count;
  void* pointer[N][kTensors];
  int64_t elements[kTensors];
  int first_chunk[kTensors + 1];
  float scale[kTensors];
};
static_assert(sizeof(Table<5>) + 128 <= 32764, "kernel parameters are limited to 32,764 bytes");

struct Span {
  int tensor;
  int64_t begin;
  int count;
};

template <int N>
__device__ Span span_of(const Table<N>& table, int chunk) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = int64_t(chunk - table.first_chunk[low]) * kChunk;
  return {low, begin, int(min(int64_t(kChunk), table.elements[low] - begin))};
}

__device__ bool aligned(const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

struct alignas(8) Bf16x4 {
  __nv_bfloat162 low, high;
};

__device__ void load4(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ void load4(const __nv_bfloat16* p, float (&x)[4]) {
  const Bf16x4 v = *reinterpret_cast<const Bf16x4*>(p);
  const float2 low = __bfloat1622float2(v.low), high = __bfloat1622float2(v.high);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}
__device__ void store4(float* p, const float (&x)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ void store4(__nv_bfloat16* p, const float (&x)[4]) {
  *reinterpret_cast<Bf16x4*>(p) = {__floats2bfloat162_rn(x[0], x[1]), __floats2bfloat162_rn(x[2], x[3])};
}
__device__ float load1(const float* p) { return *p; }
__device__ float load1(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ void store1(float* p, float x) { *p = x; }
__device__ void store1(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Adds over the block; every thread must call it and thread 0 gets the sum. The order is fixed.
__device__ double block_sum(double value) {
  __shared__ double warps[32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  value = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  return value;
}

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Table<1> table, double* partial) {
  const Span span = span_of(table, blockIdx.x);
  const float* x = static_cast<const float*>(table.pointer[0][span.tensor]) + span.begin;
  float sum = 0.0f;
  const int vectors = aligned(x, 16) ? span.count / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float v[4];
    load4(x + 4 * i, v);
    sum += v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
  }
  for (int i = 4 * vectors + threadIdx.x; i < span.count; i += kThreads) sum += x[i] * x[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void clip_kernel(const double* partial, int64_t count, float max_norm, float* norm, float* coef,
                            bool* skip) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x != 0) return;
  const float value = float(sqrt(total)), ratio = max_norm / (value + 1e-6f);
  *norm = value;
  *coef = ratio > 1.0f ? 1.0f : ratio;
  *skip = !isfinite(value);
}

__device__ float or_one(const float* pointer) { return pointer == nullptr ? 1.0f : *pointer; }

struct Adamw {
  const float *step, *lr, *coef;
  const bool* skip;
  double beta1, beta2;
  float eps, weight_decay, ema_weight;
};

// rest1 = 1 - beta1 and the like are taken in float64: 1.0f - 0.999f is wrong in its fifth digit.
struct AdamwFactors {
  float coef, rest1, beta2, rest2, eps, decay, rate, inverse_correction2, ema_weight;
};

__device__ void adamw_element(const AdamwFactors& f, float& p, float g, float& m, float& v) {
  g *= f.coef;
  m += f.rest1 * (g - m);
  v = v * f.beta2 + f.rest2 * g * g;
  p = p * f.decay - f.rate * m / (sqrtf(v) * f.inverse_correction2 + f.eps);
}

template <bool kEma>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Table<kEma ? 5 : 4> table, const __grid_constant__ Adamw a) {
  if (a.skip != nullptr && *a.skip) return;
  __shared__ AdamwFactors shared;
  if (threadIdx.x == 0) {
    const double count = double(*a.step) + 1.0, lr = *a.lr;
    shared = {or_one(a.coef),
              float(1.0 - a.beta1),
              float(a.beta2),
              float(1.0 - a.beta2),
              a.eps,
              float(1.0 - lr * a.weight_decay),
              float(lr / (1.0 - pow(a.beta1, count))),
              float(1.0 / sqrt(1.0 - pow(a.beta2, count))),
              a.ema_weight};
  }
  __syncthreads();
  const AdamwFactors f = shared;
  const Span span = span_of(table, blockIdx.x);
  float* list[5];
  bool wide = true;
  for (int i = 0; i < (kEma ? 5 : 4); ++i) {
    list[i] = static_cast<float*>(table.pointer[i][span.tensor]) + span.begin;
    wide = wide && aligned(list[i], 16);
  }
  const int vectors = wide ? span.count / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float p[4], g[4], m[4], v[4], e[4];
    load4(list[0] + 4 * i, p);
    load4(list[1] + 4 * i, g);
    load4(list[2] + 4 * i, m);
    load4(list[3] + 4 * i, v);
    if (kEma) load4(list[4] + 4 * i, e);
    for (int j = 0; j < 4; ++j) {
      adamw_element(f, p[j], g[j], m[j], v[j]);
      if (kEma) e[j] += f.ema_weight * (p[j] - e[j]);
    }
    store4(list[0] + 4 * i, p);
    store4(list[2] + 4 * i, m);
    store4(list[3] + 4 * i, v);
    if (kEma) store4(list[4] + 4 * i, e);
  }
  for (int i = 4 * vectors + threadIdx.x; i < span.count; i += kThreads) {
    adamw_element(f, list[0][i], list[1][i], list[2][i], list[3][i]);
    if (kEma) list[4][i] += f.ema_weight * (list[0][i] - list[4][i]);
  }
}

__global__ void advance_kernel(float* step, const bool* skip) {
  if (skip == nullptr || !*skip) *step += 1.0f;
}

// nesterov is the momentum, or 1 for the plain buffer; rest = 1 - momentum.
struct Muon {
  const float *lr, *coef;
  const bool* skip;
  float rest, nesterov, weight_decay, ema_weight;
};

template <typename U>
__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const __grid_constant__ Table<3> table, const __grid_constant__ Muon a) {
  if (a.skip != nullptr && *a.skip) return;
  const float coef = or_one(a.coef);
  const Span span = span_of(table, blockIdx.x);
  const float* g = static_cast<const float*>(table.pointer[0][span.tensor]) + span.begin;
  float* buffer = static_cast<float*>(table.pointer[1][span.tensor]) + span.begin;
  U* out = static_cast<U*>(table.pointer[2][span.tensor]) + span.begin;
  const int vectors = aligned(g, 16) && aligned(buffer, 16) && aligned(out, 4 * sizeof(U)) ? span.count / 4 : 0;
  const auto element = [&](float x, float& b) {
    x *= coef;
    b += a.rest * (x - b);
    return x + a.nesterov * (b - x);
  };
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float x[4], b[4], u[4];
    load4(g + 4 * i, x);
    load4(buffer + 4 * i, b);
    for (int j = 0; j < 4; ++j) u[j] = element(x[j], b[j]);
    store4(buffer + 4 * i, b);
    store4(out + 4 * i, u);
  }
  for (int i = 4 * vectors + threadIdx.x; i < span.count; i += kThreads) store1(out + i, element(g[i], buffer[i]));
}

template <typename U, bool kEma>
__global__ void __launch_bounds__(kThreads)
    apply_kernel(const __grid_constant__ Table<kEma ? 3 : 2> table, const __grid_constant__ Muon a) {
  if (a.skip != nullptr && *a.skip) return;
  const Span span = span_of(table, blockIdx.x);
  const float lr = *a.lr, rate = lr * table.scale[span.tensor], decay = 1.0f - lr * a.weight_decay;
  float* p = static_cast<float*>(table.pointer[0][span.tensor]) + span.begin;
  const U* u = static_cast<const U*>(table.pointer[1][span.tensor]) + span.begin;
  float* e = kEma ? static_cast<float*>(table.pointer[kEma ? 2 : 0][span.tensor]) + span.begin : p;
  const int vectors = aligned(p, 16) && aligned(u, 4 * sizeof(U)) && aligned(e, 16) ? span.count / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float x[4], d[4], average[4];
    load4(p + 4 * i, x);
    load4(u + 4 * i, d);
    if (kEma) load4(e + 4 * i, average);
    for (int j = 0; j < 4; ++j) {
      x[j] = x[j] * decay - rate * d[j];
      if (kEma) average[j] += a.ema_weight * (x[j] - average[j]);
    }
    store4(p + 4 * i, x);
    if (kEma) store4(e + 4 * i, average);
  }
  for (int i = 4 * vectors + threadIdx.x; i < span.count; i += kThreads) {
    p[i] = p[i] * decay - rate * load1(u + i);
    if (kEma) e[i] += a.ema_weight * (p[i] - e[i]);
  }
}

__global__ void __launch_bounds__(kThreads)
    ema_kernel(const __grid_constant__ Table<2> table, const bool* skip, const float* p_weight) {
  if (skip != nullptr && *skip) return;
  const float weight = *p_weight;
  const Span span = span_of(table, blockIdx.x);
  float* e = static_cast<float*>(table.pointer[0][span.tensor]) + span.begin;
  const float* p = static_cast<const float*>(table.pointer[1][span.tensor]) + span.begin;
  const int vectors = aligned(e, 16) && aligned(p, 16) ? span.count / 4 : 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    float x[4], average[4];
    load4(p + 4 * i, x);
    load4(e + 4 * i, average);
    for (int j = 0; j < 4; ++j) average[j] += weight * (x[j] - average[j]);
    store4(e + 4 * i, average);
  }
  for (int i = 4 * vectors + threadIdx.x; i < span.count; i += kThreads) e[i] += weight * (p[i] - e[i]);
}

}  // namespace
}  // namespace unite
