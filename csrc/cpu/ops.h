// What the CPU operations share: checks of CPU tensors, float32 views of small tensors, outputs.

#pragma once

#include <memory>

#include "../checks.h"
#include "rows.h"

namespace unite {

inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  UNITE_CHECK(tensor.is_cpu(), op, ": ", name, " must be a CPU tensor");
}

// A large tensor: float32 or bfloat16, contiguous, on the CPU. Returns whether it is bfloat16.
inline bool check_large(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  UNITE_CHECK(is_float(tensor) || is_bf16(tensor), op, ": ", name, " must be float32 or bfloat16");
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  return is_bf16(tensor);
}

inline void check_float32(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  UNITE_CHECK(is_float(tensor), op, ": ", name, " must be float32");
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_int64(const char* op, const char* name, const Tensor& tensor, int64_t count) {
  check_cpu(op, name, tensor);
  UNITE_CHECK(tensor.scalar_type() == ScalarType::Long, op, ": ", name, " must be int64");
  check_shape(op, name, tensor, {count});
  UNITE_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

// A weight or a modulation, (D) or (B, D), read as float32: in place where its rows are float32 and dense (they may be
// a slice of a wider matrix), else converted, which costs 1 / T of the rows it is applied to.
class Small {
 public:
  Small() = default;
  Small(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape)
      : tensor_(tensor) {
    check_cpu(op, name, tensor);
    UNITE_CHECK(is_float(tensor) || is_bf16(tensor), op, ": ", name, " must be float32 or bfloat16");
    check_shape(op, name, tensor, shape);
    const int64_t dim = tensor.dim(), width = tensor.size(dim - 1);
    if (!is_float(tensor)) tensor_ = torch::stable::to(tensor, ScalarType::Float);
    if (width > 1 && tensor_.stride(dim - 1) != 1) tensor_ = torch::stable::contiguous(tensor_);
    rows_ = {static_cast<const float*>(tensor_.data_ptr()), dim == 2 ? tensor_.stride(0) : 0};
  }
  const float* data() const { return rows_.data; }
  Rows rows() const { return rows_; }

 private:
  Tensor tensor_;
  Rows rows_;
};

// A bias that may be absent, (D), read as float32: then zeros, so that the row functions have one form.
class Bias {
 public:
  Bias() = default;
  Bias(const char* op, const std::optional<Tensor>& bias, int64_t width) {
    if (bias.has_value()) {
      given_ = Small(op, "bias", *bias, {width});
    } else {
      zeros_.assign(width, 0.0f);
    }
  }
  const float* data() const { return zeros_.empty() ? given_.data() : zeros_.data(); }

 private:
  Small given_;
  std::vector<float> zeros_;
};

inline Tensor empty_float(const Tensor& like, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, ScalarType::Float);
}

inline Tensor as_type_of(const Tensor& value, const Tensor& like) {
  return is_float(like) ? value : torch::stable::to(value, like.scalar_type());
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

using Scratch = std::unique_ptr<float[]>;
inline Scratch scratch(int64_t count) { return Scratch(new float[count > 0 ? count : 1]); }

// One parallel loop over tasks; the library's own thread pool, so torch.set_num_threads holds here too.
template <typename Args>
void run(void (*function)(const Args&, int64_t, int64_t), const Args& args, int64_t tasks) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { function(args, begin, end); });
}

}  // namespace unite
