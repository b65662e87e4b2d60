// CUDA operations over lists of tensors: checks, tables of addresses, launches. Kernels: multi_tensor_kernels.cuh.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../checks.h"
#include "multi_tensor_kernels.cuh"

namespace unite {
namespace {

using List = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

void check_cuda(const char* op, const char* name, const Tensor& tensor, const Tensor& model) {
  UNITE_CHECK(tensor.is_cuda() && tensor.get_device_index() == model.get_device_index(), op, ": ", name,
              " must be on the same CUDA device as the first tensor");
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

void check_list(const char* op, const char* name, const List& list, const List& model, bool updates = false) {
  UNITE_CHECK(!model.empty(), op, ": no tensors");
  UNITE_CHECK(list.size() == model.size(), op, ": ", name, " has ", list.size(), " tensors, expected ", model.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_cuda(op, name, list[i], model[0]);
    UNITE_CHECK(is_float(list[i]) || (updates && is_bf16(list[i])), op, ": ", name, " must be float32",
                updates ? " or bfloat16" : "");
    UNITE_CHECK(list[i].scalar_type() == list[0].scalar_type(), op, ": ", name, " must have one dtype");
    check_same_shape(op, name, list[i], "its counterpart", model[i]);
  }
}

template <typename T>
T* scalar(const char* op, const char* name, const Maybe& tensor, const Tensor& model) {
  if (!tensor.has_value()) return nullptr;
  check_cuda(op, name, *tensor, model);
  constexpr bool flag = std::is_same_v<std::remove_const_t<T>, bool>;
  const bool right = flag ? tensor->scalar_type() == ScalarType::Bool : is_float(*tensor);
  UNITE_CHECK(right && tensor->numel() == 1, op, ": ", name, " must hold one value of the right dtype");
  return static_cast<T*>(tensor->data_ptr());
}

int64_t chunks_of(const Tensor& tensor) { return (tensor.numel() + kChunk - 1) / kChunk; }

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// launch(table, blocks, chunks before these) for every group of at most kTensors tensors.
template <int N, typename F>
void for_tables(const List* const (&lists)[N], const std::vector<double>* scales, const F& launch) {
  Table<N> table;
  int64_t before = 0;
  const size_t total = lists[0]->size();
  for (size_t begin = 0; begin < total; begin += kTensors) {
    table.count = int(std::min(size_t(kTensors), total - begin));
    int64_t chunks = 0;
    for (int i = 0; i < table.count; ++i) {
      const Tensor& first = (*lists[0])[begin + i];
      for (int n = 0; n < N; ++n) table.pointer[n][i] = (*lists[n])[begin + i].data_ptr();
      table.elements[i] = first.numel();
      table.first_chunk[i] = int(chunks);
      table.scale[i] = scales == nullptr ? 1.0f : float((*scales)[begin + i]);
      chunks += chunks_of(first);
    }
    table.first_chunk[table.count] = int(chunks);
    UNITE_CHECK(chunks < (int64_t(1) << 31), "more than 2^31 chunks in one multi-tensor launch");
    if (chunks > 0) {
      launch(table, unsigned(chunks), before);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    before += chunks;
  }
}

using Guard = torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor, Tensor> clip(List tensors, double max_norm) {
  check_list("clip", "tensors", tensors, tensors);
  const Guard guard(tensors[0].get_device_index());
  const cudaStream_t stream = stream_of(tensors[0]);
  int64_t chunks = 0;
  for (const Tensor& tensor : tensors) chunks += chunks_of(tensor);
  const int64_t none[1] = {chunks};
  Tensor partial = torch::stable::new_empty(tensors[0], {none, 1}, ScalarType::Double);
  Tensor norm = torch::stable::new_empty(tensors[0], {none, size_t(0)}, ScalarType::Float);
  Tensor coef = torch::stable::new_empty(tensors[0], {none, size_t(0)}, ScalarType::Float);
  Tensor skip = torch::stable::new_empty(tensors[0], {none, size_t(0)}, ScalarType::Bool);
  double* sums = static_cast<double*>(partial.data_ptr());
  for_tables<1>({&tensors}, nullptr, [&](const Table<1>& table, unsigned blocks, int64_t before) {
    norm_kernel<<<blocks, kThreads, 0, stream>>>(table, sums + before);
  });
  clip_kernel<<<1, 1024, 0, stream>>>(sums, chunks, float(max_norm), static_cast<float*>(norm.data_ptr()),
                                      static_cast<float*>(coef.data_ptr()), static_cast<bool*>(skip.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {norm, coef, skip};
}

void adamw_(List params, List grads, List exp_avg, List exp_avg_sq, Tensor step, Tensor lr, double beta1, double beta2,
            double eps, double weight_decay, Maybe coef, Maybe skip, List ema, double ema_decay) {
  const char* op = "adamw_";
  check_list(op, "params", params, params);
  check_list(op, "grads", grads, params);
  check_list(op, "exp_avg", exp_avg, params);
  check_list(op, "exp_avg_sq", exp_avg_sq, params);
  if (!ema.empty()) check_list(op, "ema", ema, params);
  const Tensor& model = params[0];
  float* count = scalar<float>(op, "step", step, model);
  const bool* flag = scalar<const bool>(op, "skip", skip, model);
  const Adamw args{count,
                   scalar<const float>(op, "lr", lr, model),
                   scalar<const float>(op, "clip_coef", coef, model),
                   flag,
                   beta1,
                   beta2,
                   float(eps),
                   float(weight_decay),
                   float(1.0 - ema_decay)};
  const Guard guard(model.get_device_index());
  const cudaStream_t stream = stream_of(model);
  if (ema.empty()) {
    for_tables<4>({&params, &grads, &exp_avg, &exp_avg_sq}, nullptr,
                  [&](const Table<4>& table, unsigned blocks, int64_t) {
                    adamw_kernel<false><<<blocks, kThreads, 0, stream>>>(table, args);
                  });
  } else {
    for_tables<5>({&params, &grads, &exp_avg, &exp_avg_sq, &ema}, nullptr,
                  [&](const Table<5>& table, unsigned blocks, int64_t) {
                    adamw_kernel<true><<<blocks, kThreads, 0, stream>>>(table, args);
                  });
  }
  advance_kernel<<<1, 1, 0, stream>>>(count, flag);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void muon_momentum_(List grads, List buffers, double momentum, bool nesterov, Maybe coef, Maybe skip, List out) {
  const char* op = "muon_momentum_";
  check_list(op, "grads", grads, grads);
  check_list(op, "buffers", buffers, grads);
  check_list(op, "updates", out, grads, true);
  const Muon args{nullptr,
                  scalar<const float>(op, "clip_coef", coef, grads[0]),
                  scalar<const bool>(op, "skip", skip, grads[0]),
                  float(1.0 - momentum),
                  nesterov ? float(momentum) : 1.0f,
                  0.0f,
                  0.0f};
  const Guard guard(grads[0].get_device_index());
  const cudaStream_t stream = stream_of(grads[0]);
  for_tables<3>({&grads, &buffers, &out}, nullptr, [&](const Table<3>& table, unsigned blocks, int64_t) {
    if (is_bf16(out[0])) {
      momentum_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(table, args);
    } else {
      momentum_kernel<float><<<blocks, kThreads, 0, stream>>>(table, args);
    }
  });
}

template <typename U>
void launch_apply(const List& params, const List& updates, const List& ema, const std::vector<double>& scales,
                  const Muon& args, cudaStream_t stream) {
  if (ema.empty()) {
    for_tables<2>({&params, &updates}, &scales, [&](const Table<2>& table, unsigned blocks, int64_t) {
      apply_kernel<U, false><<<blocks, kThreads, 0, stream>>>(table, args);
    });
  } else {
    for_tables<3>({&params, &updates, &ema}, &scales, [&](const Table<3>& table, unsigned blocks, int64_t) {
      apply_kernel<U, true><<<blocks, kThreads, 0, stream>>>(table, args);
    });
  }
}

void muon_apply_(List params, List updates, Tensor lr, std::vector<double> scales, double weight_decay, Maybe skip,
                 List ema, double ema_decay) {
  const char* op = "muon_apply_";
  check_list(op, "params", params, params);
  check_list(op, "updates", updates, params, true);
  if (!ema.empty()) check_list(op, "ema", ema, params);
  UNITE_CHECK(scales.size() == params.size(), op, ": ", params.size(), " params but ", scales.size(), " scales");
  const Muon args{scalar<const float>(op, "lr", lr, params[0]),
                  nullptr,
                  scalar<const bool>(op, "skip", skip, params[0]),
                  0.0f,
                  0.0f,
                  float(weight_decay),
                  float(1.0 - ema_decay)};
  const Guard guard(params[0].get_device_index());
  const cudaStream_t stream = stream_of(params[0]);
  if (is_bf16(updates[0])) {
    launch_apply<__nv_bfloat16>(params, updates, ema, scales, args, stream);
  } else {
    launch_apply<float>(params, updates, ema, scales, args, stream);
  }
}

void ema_(List ema, List params, Tensor weight, Maybe skip) {
  check_list("ema_", "ema", ema, ema);
  check_list("ema_", "params", params, ema);
  const float* w = scalar<const float>("ema_", "weight", weight, ema[0]);
  const bool* flag = scalar<const bool>("ema_", "skip", skip, ema[0]);
  const Guard guard(ema[0].get_device_index());
  const cudaStream_t stream = stream_of(ema[0]);
  for_tables<2>({&ema, &params}, nullptr, [&](const Table<2>& table, unsigned blocks, int64_t) {
    ema_kernel<<<blocks, kThreads, 0, stream>>>(table, flag, w);
  });
}

}  // namespace
}  // namespace unite

STABLE_TORCH_LIBRARY(unite_kernels_cuda, m) {
  m.def("clip(Tensor[] tensors, float max_norm) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!) step,"
      " Tensor lr, float beta1, float beta2, float eps, float weight_decay, Tensor? clip_coef, Tensor? skip,"
      " Tensor(e!)[] ema, float ema_decay) -> ()");
  m.def(
      "muon_momentum_(Tensor[] grads, Tensor(a!)[] buffers, float momentum, bool nesterov, Tensor? clip_coef,"
      " Tensor? skip, Tensor(b!)[] out) -> ()");
  m.def(
      "muon_apply_(Tensor(a!)[] params, Tensor[] updates, Tensor lr, float[] scales, float weight_decay, Tensor? skip,"
      " Tensor(b!)[] ema, float ema_decay) -> ()");
  m.def("ema_(Tensor(a!)[] ema, Tensor[] params, Tensor weight, Tensor? skip) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unite_kernels_cuda, CUDA, m) {
  m.impl("clip", TORCH_BOX(&unite::clip));
  m.impl("adamw_", TORCH_BOX(&unite::adamw_));
  m.impl("muon_momentum_", TORCH_BOX(&unite::muon_momentum_));
  m.impl("muon_apply_", TORCH_BOX(&unite::muon_apply_));
  m.impl("ema_", TORCH_BOX(&unite::ema_));
}
