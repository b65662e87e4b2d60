// Philox draws, noise injection and flow corruption; the formulas and streams of kernels/unite_kernels/corruption.py.

#include <cstring>

#include "ops.h"

namespace unite {
namespace {

constexpr int64_t kNoisingMask = 2, kNoisingTime = 3, kNoisingNoise = 4, kFlowTime = 5, kFlowNoise = 6, kLabelDrop = 7;
constexpr int64_t kStreamsPerStep = 16;
constexpr int64_t kDrawsPerTask = 4096;  // a multiple of 4, so that tasks start on a Philox block

Draw draw_of(int64_t seed, int64_t stream) { return {uint64_t(seed), uint32_t(uint64_t(stream))}; }

float one_uniform(Draw draw, int64_t sample) {
  float value;
  kernels().uniform(draw, sample, 0, 1, &value);
  return value;
}

const int64_t* sample_indices(const char* op, const Tensor& samples, int64_t batch) {
  check_int64(op, "samples", samples, batch);
  return static_cast<const int64_t*>(samples.data_ptr());
}

// f(row, first, count) over the rows of a (rows, size) matrix cut into tasks.
template <typename F>
void for_parts(int64_t rows, int64_t size, const F& f) {
  const int64_t parts = (size + kDrawsPerTask - 1) / kDrawsPerTask;
  torch::stable::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % parts * kDrawsPerTask;
      f(task / parts, first, std::min(kDrawsPerTask, size - first));
    }
  });
}

Tensor draw_matrix(const char* op, int64_t seed, int64_t stream, const Tensor& samples, int64_t count,
                   void (*draw)(Draw, int64_t, int64_t, int64_t, float*)) {
  UNITE_CHECK(samples.dim() == 1, op, ": samples must have shape (batch,), not ", shape_text(samples));
  UNITE_CHECK(count >= 0, op, ": count is negative: ", count);
  const int64_t batch = samples.size(0);
  const int64_t* index = sample_indices(op, samples, batch);
  Tensor out = empty_float(samples, {batch, count});
  float* data = floats(out);
  for_parts(batch, count, [&](int64_t row, int64_t first, int64_t n) {
    draw(draw_of(seed, stream), index[row], first, n, data + row * count + first);
  });
  return out;
}

struct Latents {
  int64_t batch, size, bytes;
  bool bf16;
  const char* data;
};

Latents latents_of(const char* op, const Tensor& z) {
  const bool bf16 = check_large(op, "z", z);
  UNITE_CHECK(z.dim() >= 1, op, ": z must have a batch dimension");
  const int64_t batch = z.size(0);
  return {batch, batch > 0 ? z.numel() / batch : 0, bf16 ? 2 : 4, bf16, static_cast<const char*>(z.data_ptr())};
}

}  // namespace

Tensor philox_uniform(int64_t seed, int64_t stream, Tensor samples, int64_t count) {
  return draw_matrix("philox_uniform", seed, stream, samples, count, kernels().uniform);
}

Tensor philox_normal(int64_t seed, int64_t stream, Tensor samples, int64_t count) {
  return draw_matrix("philox_normal", seed, stream, samples, count, kernels().normal);
}

std::tuple<Tensor, Tensor> noise_injection(Tensor z, Tensor samples, int64_t seed, double p, double t_low,
                                           double t_high) {
  const Latents in = latents_of("noise_injection", z);
  const int64_t* index = sample_indices("noise_injection", samples, in.batch);
  Tensor out = torch::stable::empty_like(z), scale = empty_float(z, {in.batch});
  char* target = static_cast<char*>(out.data_ptr());
  std::vector<float> time(in.batch);
  std::vector<char> masked(in.batch);
  for (int64_t b = 0; b < in.batch; ++b) {
    masked[b] = one_uniform(draw_of(seed, kNoisingMask), index[b]) < float(p);
    const float spread = one_uniform(draw_of(seed, kNoisingTime), index[b]) * float(t_high - t_low);
    time[b] = spread + float(t_low);
    floats(scale)[b] = masked[b] ? time[b] : 1.0f;
  }
  for_parts(in.batch, in.size, [&](int64_t b, int64_t first, int64_t n) {
    const int64_t offset = (b * in.size + first) * in.bytes;
    if (masked[b]) {
      kernels().corrupt(draw_of(seed, kNoisingNoise), index[b], first, n, time[b], in.data + offset, in.bf16,
                        target + offset);
    } else {
      std::memcpy(target + offset, in.data + offset, n * in.bytes);
    }
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor, Tensor> flow_corruption(Tensor z, Tensor labels, Tensor samples, int64_t seed, int64_t steps,
                                                   bool uniform_law, double mu, double sigma,
                                                   double shift, double label_drop, int64_t null_label) {
  const char* op = "flow_corruption";
  const Latents in = latents_of(op, z);
  UNITE_CHECK(steps >= 0, op, ": steps is negative: ", steps);
  const int64_t* index = sample_indices(op, samples, in.batch);
  check_int64(op, "labels", labels, in.batch);
  const int64_t* label = static_cast<const int64_t*>(labels.data_ptr());
  std::vector<int64_t> sizes(z.sizes().begin(), z.sizes().end());
  sizes.insert(sizes.begin(), steps);
  Tensor out = torch::stable::new_empty(z, {sizes.data(), sizes.size()});
  Tensor time = empty_float(z, {steps, in.batch});
  Tensor kept = torch::stable::new_empty(labels, {sizes.data(), 2});
  for (int64_t row = 0; row < steps * in.batch; ++row) {
    const int64_t base = kStreamsPerStep * (row / in.batch), b = row % in.batch;
    float s;
    if (uniform_law) {
      s = one_uniform(draw_of(seed, base + kFlowTime), index[b]);
    } else {
      kernels().normal(draw_of(seed, base + kFlowTime), index[b], 0, 1, &s);
      s = s * float(sigma);
      s = kernels().logistic(s + float(mu));
    }
    const float numerator = s * float(shift), product = s * float(shift - 1.0);
    floats(time)[row] = numerator / (product + 1.0f);
    const bool dropped = one_uniform(draw_of(seed, base + kLabelDrop), index[b]) < float(label_drop);
    static_cast<int64_t*>(kept.data_ptr())[row] = dropped ? null_label : label[b];
  }
  char* target = static_cast<char*>(out.data_ptr());
  for_parts(steps * in.batch, in.size, [&](int64_t row, int64_t first, int64_t n) {
    const int64_t b = row % in.batch, stream = kStreamsPerStep * (row / in.batch) + kFlowNoise;
    kernels().corrupt(draw_of(seed, stream), index[b], first, n, floats(time)[row],
                      in.data + (b * in.size + first) * in.bytes, in.bf16, target + (row * in.size + first) * in.bytes);
  });
  return {out, time, kept};
}

}  // namespace unite
