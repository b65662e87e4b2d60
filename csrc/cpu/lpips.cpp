// The head of LPIPS: checks, outputs, sums over positions. See rows_lpips.cpp.

#include "ops.h"

namespace unite {
namespace {

// f0, f1 (B, positions, C).
LpipsHead inputs_of(const char* op, const Tensor& f0, const Tensor& f1, const Small& weight) {
  LpipsHead args{};
  args.bf16 = check_large(op, "f0", f0);
  UNITE_CHECK(check_large(op, "f1", f1) == args.bf16, op, ": f0 and f1 must have one dtype");
  check_same_shape(op, "f1", f1, "f0", f0);
  args.shape = {f0.size(0), f0.size(1), f0.size(2)};
  args.f0 = f0.data_ptr();
  args.f1 = f1.data_ptr();
  args.weight = weight.data();
  return args;
}

Small weight_of(const char* op, const Tensor& f0, const Tensor& weight) {
  UNITE_CHECK(f0.dim() == 3, op, ": f0 must have shape (batch, positions, channels), not ", shape_text(f0));
  return Small(op, "weight", weight, {f0.size(2)});
}

}  // namespace

Tensor lpips_head_fwd(Tensor f0, Tensor f1, Tensor weight) {
  const char* op = "lpips_head_fwd";
  const Small w = weight_of(op, f0, weight);
  LpipsHead args = inputs_of(op, f0, f1, w);
  const int64_t blocks = args.shape.blocks();
  const Scratch partial = scratch(args.shape.tasks());
  args.partial = partial.get();
  run(kernels().lpips_head_forward, args, args.shape.tasks());
  Tensor distance = empty_float(f0, {args.shape.samples});
  for (int64_t b = 0; b < args.shape.samples; ++b) {
    double sum = 0.0;
    for (int64_t i = 0; i < blocks; ++i) sum += args.partial[b * blocks + i];
    floats(distance)[b] = float(sum / double(args.shape.rows));
  }
  return distance;
}

std::tuple<Tensor, Tensor> lpips_head_bwd(Tensor dout, Tensor f0, Tensor f1, Tensor weight, bool first, bool second) {
  const char* op = "lpips_head_bwd";
  const Small w = weight_of(op, f0, weight);
  LpipsHead args = inputs_of(op, f0, f1, w);
  check_float32(op, "dout", dout);
  check_shape(op, "dout", dout, {args.shape.samples});
  const auto gradient_of = [&](bool wanted) {
    const int64_t none = 0;
    return wanted ? torch::stable::empty_like(f0) : torch::stable::new_empty(f0, {&none, size_t(1)});
  };
  Tensor df0 = gradient_of(first), df1 = gradient_of(second);
  args.dout = floats(dout);
  args.df0 = first ? df0.data_ptr() : nullptr;
  args.df1 = second ? df1.data_ptr() : nullptr;
  run(kernels().lpips_head_backward, args, args.shape.tasks());
  return {df0, df1};
}

}  // namespace unite
