// Argument checks with readable messages, shared by the CPU and the CUDA library.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace unite {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the text is made only where the check fails: these checks run for every tensor of every list.
#define UNITE_CHECK(condition, ...)               \
  do {                                            \
    if (!(condition)) ::unite::fail(__VA_ARGS__); \
  } while (false)

inline std::string shape_text(const int64_t* sizes, int64_t count) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << sizes[i];
  text << ")";
  return text.str();
}

inline std::string shape_text(const Tensor& tensor) { return shape_text(tensor.sizes().data(), tensor.dim()); }

inline bool is_float(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }
inline bool is_bf16(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool equal = tensor.dim() == int64_t(shape.size());
  for (int64_t i = 0; equal && i < tensor.dim(); ++i) equal = tensor.size(i) == shape.begin()[i];
  UNITE_CHECK(equal, op, ": ", name, " must have shape ", shape_text(shape.begin(), shape.size()), ", not ",
              shape_text(tensor));
}

inline void check_same_shape(const char* op, const char* name, const Tensor& tensor, const char* model_name,
                             const Tensor& model) {
  const auto sizes = tensor.sizes(), expected = model.sizes();  // each size(i) would be a call into libtorch
  UNITE_CHECK(std::ranges::equal(sizes, expected), op, ": ", name, " has shape ", shape_text(tensor), " and ",
              model_name, " ", shape_text(model));
}

}  // namespace unite
