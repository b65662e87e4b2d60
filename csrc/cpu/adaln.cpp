// adaLN operations: checks, outputs, and the second stage of the gradients shared over rows. See rows_adaln.cpp.

#include "ops.h"

namespace unite {
namespace {

Shape shape_of(const char* op, const Tensor& x) {
  UNITE_CHECK(x.dim() == 3, op, ": x must have shape (batch, tokens, width), not ", shape_text(x));
  UNITE_CHECK(x.size(2) > 0, op, ": x has width 0");
  return {x.size(0), x.size(1), x.size(2)};
}

// dy and branch have the branch type; x, residual and their gradients the residual type.
Types types_of(const char* op, const Tensor& x, const char* branch_name, const Tensor& branch) {
  const Types types{check_large(op, "x", x), check_large(op, branch_name, branch)};
  check_same_shape(op, branch_name, branch, "x", x);
  UNITE_CHECK(!types.residual_bf16 || types.branch_bf16, op, ": ", branch_name, " is float32 and x bfloat16; ",
              "supported are float32 and float32, float32 x and bfloat16 ", branch_name, ", bfloat16 and bfloat16");
  return types;
}

void check_residual_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_large(op, name, tensor);
  check_same_shape(op, name, tensor, "x", x);
  UNITE_CHECK(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
}

// Sums over the samples of weight(b) * sums(b): the gradient of a width-sized weight. `scale` adds the factor 1 +
// scale.
Tensor weight_gradient(const Tensor& weight, const Shape& shape, const float* sums, const Rows* scale) {
  const int64_t d = shape.width;
  Tensor gradient = empty_float(weight, {d});
  float* out = floats(gradient);
  torch::stable::parallel_for(0, d, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = 0.0f;
    for (int64_t b = 0; b < shape.samples; ++b) {
      const float* sum = sums + b * d;
      const float* factor = scale == nullptr ? nullptr : scale->data + b * scale->stride;
      for (int64_t i = begin; i < end; ++i) out[i] += factor == nullptr ? sum[i] : sum[i] * (1.0f + factor[i]);
    }
  });
  return as_type_of(gradient, weight);
}

struct Gradients {
  Tensor dweight, dweight3, dshift, dscale, dgate, dbias;
};

// First stage: the row functions. Second stage: blocks to samples, samples to weights, always in the same order.
Gradients backward(AdalnBackward& args, const Tensor& weight, const Tensor* weight3, const Tensor& scale,
                   const Tensor* gate, const std::optional<Tensor>& bias) {
  const Shape shape = args.shape;
  const int64_t d = shape.width, blocks = shape.blocks(), b = shape.samples;
  args.sums = weight3 != nullptr ? 5 : gate != nullptr ? 4 : 2;
  const Scratch partial = scratch(shape.tasks() * args.sums * d);
  args.partial = partial.get();
  run(kernels().adaln_backward, args, shape.tasks());

  Gradients out;
  Tensor dshift = empty_float(scale, {b, d}), dscale = empty_float(scale, {b, d});
  Tensor dgate = gate != nullptr ? empty_float(scale, {b, d}) : dshift;
  const Scratch normalised = scratch(b * d), normalised3 = scratch(weight3 != nullptr ? b * d : 0);
  const Scratch dbranch = scratch(gate != nullptr ? b * d : 0);
  float* targets[5] = {floats(dshift), normalised.get(), floats(dgate), dbranch.get(), normalised3.get()};
  torch::stable::parallel_for(0, b, 1, [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const float* source = args.partial + sample * blocks * args.sums * d;
      for (int64_t sum = 0; sum < args.sums; ++sum) {
        kernels().sum_rows(source + sum * d, blocks, args.sums * d, d, targets[sum] + sample * d);
      }
      float* out_scale = floats(dscale) + sample * d;
      for (int64_t i = 0; i < d; ++i) out_scale[i] = args.weight[i] * normalised[sample * d + i];
    }
  });
  out.dweight = weight_gradient(weight, shape, normalised.get(), &args.scale);
  if (weight3 != nullptr) out.dweight3 = weight_gradient(*weight3, shape, normalised3.get(), nullptr);
  out.dshift = as_type_of(dshift, scale);
  out.dscale = as_type_of(dscale, scale);
  if (gate != nullptr) out.dgate = as_type_of(dgate, *gate);
  out.dbias = bias.has_value() ? weight_gradient(*bias, shape, dbranch.get(), nullptr) : empty_float(weight, {0});
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> adaln_fwd(Tensor x, Tensor weight, Tensor shift, Tensor scale, double eps) {
  const char* op = "adaln_fwd";
  const bool bf16 = check_large(op, "x", x);
  const Shape shape = shape_of(op, x);
  const int64_t b = shape.samples, d = shape.width;
  const Small w(op, "weight", weight, {d}), sh(op, "shift", shift, {b, d}), sc(op, "scale", scale, {b, d});
  Tensor y = torch::stable::empty_like(x), rstd = empty_float(x, {b, shape.rows});
  AdalnForward args{};
  args.shape = shape;
  args.types = {bf16, bf16};
  args.x = x.data_ptr();
  args.shift = sh.rows();
  args.scale = sc.rows();
  args.weight = w.data();
  args.eps = float(eps);
  args.y = y.data_ptr();
  args.rstd = floats(rstd);
  run(kernels().adaln_forward, args, shape.tasks());
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_bwd(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor rstd) {
  const char* op = "adaln_bwd";
  const bool bf16 = check_large(op, "x", x);
  const Shape shape = shape_of(op, x);
  const int64_t b = shape.samples, d = shape.width;
  check_residual_like(op, "dy", dy, x);
  const Small w(op, "weight", weight, {d}), sc(op, "scale", scale, {b, d});
  check_float32(op, "rstd", rstd);
  check_shape(op, "rstd", rstd, {b, shape.rows});
  Tensor dx = torch::stable::empty_like(x);
  AdalnBackward args{};
  args.shape = shape;
  args.types = {bf16, bf16};
  args.dy = dy.data_ptr();
  args.x = x.data_ptr();
  args.scale = sc.rows();
  args.weight = w.data();
  args.rstd = floats(rstd);
  args.dx = dx.data_ptr();
  const Gradients g = backward(args, weight, nullptr, scale, nullptr, std::nullopt);
  return {dx, g.dweight, g.dshift, g.dscale};
}

std::tuple<Tensor, Tensor, Tensor> adaln_mid_fwd(Tensor x, Tensor branch, Tensor gate, Tensor weight, Tensor shift,
                                                 Tensor scale, std::optional<Tensor> bias, double eps) {
  const char* op = "adaln_mid_fwd";
  const Types types = types_of(op, x, "branch", branch);
  const Shape shape = shape_of(op, x);
  const int64_t b = shape.samples, d = shape.width;
  const Small w(op, "weight", weight, {d}), ga(op, "gate", gate, {b, d});
  const Small sh(op, "shift", shift, {b, d}), sc(op, "scale", scale, {b, d});
  const Bias bi(op, bias, d);
  Tensor x1 = torch::stable::empty_like(x), y = torch::stable::empty_like(branch);
  Tensor rstd = empty_float(x, {b, shape.rows});
  AdalnForward args{shape,    types,   x.data_ptr(), branch.data_ptr(), ga.rows(),    sc.rows(),    sh.rows(),
                    w.data(), nullptr, float(eps),   x1.data_ptr(),     y.data_ptr(), floats(rstd), nullptr};
  args.bias = bi.data();
  run(kernels().adaln_forward, args, shape.tasks());
  return {x1, y, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_mid_bwd(Tensor dx1, Tensor dy, Tensor x1,
                                                                                 Tensor branch, Tensor gate,
                                                                                 Tensor weight, Tensor scale,
                                                                                 std::optional<Tensor> bias,
                                                                                 Tensor rstd) {
  const char* op = "adaln_mid_bwd";
  const Types types = types_of(op, x1, "branch", branch);
  const Shape shape = shape_of(op, x1);
  const int64_t b = shape.samples, d = shape.width;
  check_residual_like(op, "dx1", dx1, x1);
  check_residual_like(op, "dy", dy, branch);
  const Small w(op, "weight", weight, {d}), ga(op, "gate", gate, {b, d}), sc(op, "scale", scale, {b, d});
  const Bias bi(op, bias, d);
  check_float32(op, "rstd", rstd);
  check_shape(op, "rstd", rstd, {b, shape.rows});
  Tensor dx = torch::stable::empty_like(x1), dbranch = torch::stable::empty_like(branch);
  AdalnBackward args{
      shape,    types,   dx1.data_ptr(), dy.data_ptr(), x1.data_ptr(), branch.data_ptr(),  ga.rows(), sc.rows(),
      w.data(), nullptr, floats(rstd),   nullptr,       dx.data_ptr(), dbranch.data_ptr(), nullptr,   0};
  args.bias = bi.data();
  const Gradients g = backward(args, weight, nullptr, scale, &gate, bias);
  return {dx, dbranch, g.dgate, g.dweight, g.dshift, g.dscale, g.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_tail_fwd(Tensor x, Tensor branch, Tensor gate, Tensor weight3,
                                                          Tensor weight1, Tensor shift, Tensor scale,
                                                          std::optional<Tensor> bias, double eps) {
  const char* op = "adaln_tail_fwd";
  const Types types = types_of(op, x, "branch", branch);
  const Shape shape = shape_of(op, x);
  const int64_t b = shape.samples, d = shape.width;
  const Small w3(op, "weight3", weight3, {d}), w1(op, "weight1", weight1, {d}), ga(op, "gate", gate, {b, d});
  const Small sh(op, "shift", shift, {b, d}), sc(op, "scale", scale, {b, d});
  const Bias bi(op, bias, d);
  Tensor x2 = torch::stable::empty_like(x), y = torch::stable::empty_like(branch);
  Tensor rstd3 = empty_float(x, {b, shape.rows}), rstd1 = empty_float(x, {b, shape.rows});
  AdalnForward args{shape,     types,     x.data_ptr(), branch.data_ptr(), ga.rows(),    sc.rows(),     sh.rows(),
                    w1.data(), w3.data(), float(eps),   x2.data_ptr(),     y.data_ptr(), floats(rstd1), floats(rstd3)};
  args.bias = bi.data();
  run(kernels().adaln_forward, args, shape.tasks());
  return {x2, y, rstd3, rstd1};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_tail_bwd(
    Tensor dx2, Tensor dy, Tensor x, Tensor branch, Tensor gate, Tensor weight3, Tensor weight1, Tensor scale,
    std::optional<Tensor> bias, Tensor rstd3, Tensor rstd1) {
  const char* op = "adaln_tail_bwd";
  const Types types = types_of(op, x, "branch", branch);
  const Shape shape = shape_of(op, x);
  const int64_t b = shape.samples, d = shape.width;
  check_residual_like(op, "dx2", dx2, x);
  check_residual_like(op, "dy", dy, branch);
  const Small w3(op, "weight3", weight3, {d}), w1(op, "weight1", weight1, {d});
  const Small ga(op, "gate", gate, {b, d}), sc(op, "scale", scale, {b, d});
  const Bias bi(op, bias, d);
  for (const auto& [name, rstd] : {std::pair{"rstd3", rstd3}, std::pair{"rstd1", rstd1}}) {
    check_float32(op, name, rstd);
    check_shape(op, name, rstd, {b, shape.rows});
  }
  Tensor dx = torch::stable::empty_like(x), dbranch = torch::stable::empty_like(branch);
  AdalnBackward args{
      shape,     types,     dx2.data_ptr(), dy.data_ptr(), x.data_ptr(),  branch.data_ptr(),  ga.rows(), sc.rows(),
      w1.data(), w3.data(), floats(rstd1),  floats(rstd3), dx.data_ptr(), dbranch.data_ptr(), nullptr,   0};
  args.bias = bi.data();
  const Gradients g = backward(args, weight1, &weight3, scale, &gate, bias);
  return {dx, dbranch, g.dgate, g.dweight3, g.dweight, g.dshift, g.dscale, g.dbias};
}

}  // namespace unite
