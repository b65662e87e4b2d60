// Norm, AdamW, Muon and EMA over lists of tensors. Semantics: kernels/unite_kernels/multi_tensor.py.
//
// The lists are cut into chunks of kElementsPerTask elements; one parallel loop runs over all chunks of all tensors, so
// many small tensors cost one start of the threads. Lengths, shapes and dtypes are checked again here: these functions
// are reachable without the Python door and must never write out of bounds.

#include <cmath>

#include "ops.h"

namespace unite {
namespace {

using List = std::vector<Tensor>;

std::vector<Chunk> chunks_of(const List& list) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < list.size(); ++i) {
    const int64_t count = list[i].numel();
    for (int64_t begin = 0; begin < count; begin += kElementsPerTask) {
      chunks.push_back({int32_t(i), int32_t(std::min(kElementsPerTask, count - begin)), begin});
    }
  }
  return chunks;
}

std::vector<float*> pointers_of(const char* op, const char* name, const List& list, const List& model) {
  UNITE_CHECK(list.size() == model.size(), op, ": ", name, " has ", list.size(), " tensors, expected ", model.size());
  std::vector<float*> pointers;
  for (size_t i = 0; i < list.size(); ++i) {
    check_float32(op, name, list[i]);
    check_same_shape(op, name, list[i], "its counterpart", model[i]);
    pointers.push_back(floats(list[i]));
  }
  return pointers;
}

// Updates of Muon: float32 or bfloat16, one dtype for the list.
std::vector<char*> updates_of(const char* op, const List& list, const List& model, bool& bf16) {
  UNITE_CHECK(list.size() == model.size(), op, ": updates has ", list.size(), " tensors, expected ", model.size());
  std::vector<char*> pointers;
  for (size_t i = 0; i < list.size(); ++i) {
    const bool this_bf16 = check_large(op, "updates", list[i]);
    UNITE_CHECK(i == 0 || this_bf16 == bf16, op, ": updates must have one dtype");
    bf16 = this_bf16;
    check_same_shape(op, "updates", list[i], "its counterpart", model[i]);
    pointers.push_back(static_cast<char*>(list[i].data_ptr()));
  }
  return pointers;
}

float scalar(const char* op, const char* name, const std::optional<Tensor>& tensor, float otherwise) {
  if (!tensor.has_value()) return otherwise;
  check_float32(op, name, *tensor);
  UNITE_CHECK(tensor->numel() == 1, op, ": ", name, " must hold one value");
  return *floats(*tensor);
}

bool skipped(const char* op, const std::optional<Tensor>& skip) {
  if (!skip.has_value()) return false;
  check_cpu(op, "skip", *skip);
  UNITE_CHECK(skip->scalar_type() == ScalarType::Bool && skip->numel() == 1, op, ": skip must hold one bool");
  return *static_cast<const bool*>(skip->data_ptr());
}

template <typename F>
void for_chunks(const List& list, const F& f) {
  const std::vector<Chunk> chunks = chunks_of(list);
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(chunks[c]);
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> clip(List tensors, double max_norm) {
  UNITE_CHECK(!tensors.empty(), "clip: no tensors");
  const std::vector<float*> x = pointers_of("clip", "tensors", tensors, tensors);
  const std::vector<Chunk> chunks = chunks_of(tensors);
  std::vector<double> partial(chunks.size());
  torch::stable::parallel_for(0, int64_t(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      partial[c] = kernels().square_sum(x[chunks[c].tensor] + chunks[c].begin, chunks[c].count);
    }
  });
  double total = 0.0;
  for (const double value : partial) total += value;
  Tensor norm = empty_float(tensors[0], {}), coef = empty_float(tensors[0], {});
  Tensor skip = torch::stable::new_empty(tensors[0], {nullptr, size_t(0)}, ScalarType::Bool);
  const float value = float(std::sqrt(total)), ratio = float(max_norm) / (value + 1e-6f);
  *floats(norm) = value;
  *floats(coef) = ratio > 1.0f ? 1.0f : ratio;  // a NaN stays a NaN
  *static_cast<bool*>(skip.data_ptr()) = !std::isfinite(value);
  return {norm, coef, skip};
}

void adamw_(List params, List grads, List exp_avg, List exp_avg_sq, Tensor step, Tensor lr, double beta1, double beta2,
            double eps, double weight_decay, std::optional<Tensor> coef, std::optional<Tensor> skip, List ema,
            double ema_decay) {
  const char* op = "adamw_";
  const auto p = pointers_of(op, "params", params, params), g = pointers_of(op, "grads", grads, params);
  const auto m = pointers_of(op, "exp_avg", exp_avg, params), v = pointers_of(op, "exp_avg_sq", exp_avg_sq, params);
  const bool with_ema = !ema.empty();
  const auto e = with_ema ? pointers_of(op, "ema", ema, params) : std::vector<float*>(params.size());
  const double rate = scalar(op, "lr", lr, 0.0f), count = scalar(op, "step", step, 0.0f) + 1.0;
  const float c = scalar(op, "clip_coef", coef, 1.0f);
  if (skipped(op, skip)) return;
  const AdamwFactors factors{c,
                             float(1.0 - beta1),
                             float(beta2),
                             float(1.0 - beta2),
                             float(eps),
                             float(1.0 - rate * weight_decay),
                             float(rate / (1.0 - std::pow(beta1, count))),
                             float(1.0 / std::sqrt(1.0 - std::pow(beta2, count))),
                             float(1.0 - ema_decay)};
  for_chunks(params, [&](const Chunk& k) {
    kernels().adamw(factors, p[k.tensor] + k.begin, g[k.tensor] + k.begin, m[k.tensor] + k.begin, v[k.tensor] + k.begin,
                    with_ema ? e[k.tensor] + k.begin : nullptr, k.count);
  });
  *floats(step) = float(count);
}

void muon_momentum_(List grads, List buffers, double momentum, bool nesterov, std::optional<Tensor> coef,
                    std::optional<Tensor> skip, List out) {
  const char* op = "muon_momentum_";
  bool bf16 = false;
  const auto g = pointers_of(op, "grads", grads, grads), b = pointers_of(op, "buffers", buffers, grads);
  const auto u = updates_of(op, out, grads, bf16);
  const MuonFactors factors{
      scalar(op, "clip_coef", coef, 1.0f), float(1.0 - momentum), nesterov ? float(momentum) : 1.0f, 0.0f, 0.0f, 0.0f};
  if (skipped(op, skip)) return;
  for_chunks(grads, [&](const Chunk& k) {
    kernels().muon_momentum(factors, g[k.tensor] + k.begin, b[k.tensor] + k.begin,
                            u[k.tensor] + k.begin * (bf16 ? 2 : 4), bf16, k.count);
  });
}

void muon_apply_(List params, List updates, Tensor lr, std::vector<double> scales, double weight_decay,
                 std::optional<Tensor> skip, List ema, double ema_decay) {
  const char* op = "muon_apply_";
  bool bf16 = false;
  const auto p = pointers_of(op, "params", params, params);
  const auto u = updates_of(op, updates, params, bf16);
  const bool with_ema = !ema.empty();
  const auto e = with_ema ? pointers_of(op, "ema", ema, params) : std::vector<float*>(params.size());
  UNITE_CHECK(scales.size() == params.size(), op, ": ", params.size(), " params but ", scales.size(), " scales");
  const double rate = scalar(op, "lr", lr, 0.0f);
  const MuonFactors factors{1.0f, 0.0f, 0.0f, float(1.0 - rate * weight_decay), float(rate), float(1.0 - ema_decay)};
  if (skipped(op, skip)) return;
  for_chunks(params, [&](const Chunk& k) {
    kernels().muon_apply(factors, float(scales[k.tensor]), p[k.tensor] + k.begin,
                         u[k.tensor] + k.begin * (bf16 ? 2 : 4), bf16, with_ema ? e[k.tensor] + k.begin : nullptr,
                         k.count);
  });
}

void ema_(List ema, List params, Tensor weight, std::optional<Tensor> skip) {
  const auto e = pointers_of("ema_", "ema", ema, ema), p = pointers_of("ema_", "params", params, ema);
  const float w = scalar("ema_", "weight", weight, 0.0f);
  if (skipped("ema_", skip)) return;
  for_chunks(ema, [&](const Chunk& k) { kernels().ema(w, e[k.tensor] + k.begin, p[k.tensor] + k.begin, k.count); });
}

}  // namespace unite
