// QK-norm + RoPE, attention and SwiGLU operations: checks, outputs, second stage of the shared gradients.

#include "ops.h"

namespace unite {
namespace {

// Fills what forward and backward share: shapes, weights and tables.
struct QkInputs {
  QkNormRope args{};
  std::vector<Small> weights;
  Small cos, sin;

  QkInputs(const char* op, const Tensor& x, const std::vector<Tensor>& given, const Tensor& c, const Tensor& s,
           int64_t heads, int64_t prefix) {
    const bool bf16 = check_large(op, "x", x);
    UNITE_CHECK(given.size() == 1 || given.size() == 2, op, ": one or two weights are needed, not ", given.size());
    UNITE_CHECK(heads > 0 && given[0].dim() == 1, op, ": heads must be positive and a weight have shape (head_dim)");
    const int64_t tokens = x.dim() == 3 ? x.size(1) : 0, head_dim = given[0].size(0), width = heads * head_dim;
    const int64_t normed = int64_t(given.size());
    UNITE_CHECK(x.dim() == 3 && (x.size(2) == normed * width || x.size(2) == (normed + 1) * width), op,
                ": x must have shape (batch, tokens, ", normed * width, " or ", (normed + 1) * width, "), not ",
                shape_text(x));
    UNITE_CHECK(head_dim % 2 == 0, op, ": head_dim ", head_dim, " is odd, so it has no pairs to rotate");
    UNITE_CHECK(prefix >= 0, op, ": prefix is negative: ", prefix);
    UNITE_CHECK(c.dim() == 2, op, ": cos must have shape (positions, head_dim / 2), not ", shape_text(c));
    const int64_t positions = c.size(0);
    UNITE_CHECK(positions >= tokens - prefix, op, ": cos has ", positions, " positions for ", tokens - prefix,
                " tokens");
    cos = Small(op, "cos", torch::stable::contiguous(c), {positions, head_dim / 2});
    sin = Small(op, "sin", torch::stable::contiguous(s), {positions, head_dim / 2});
    for (const Tensor& weight : given) weights.emplace_back(op, "weight", weight, std::initializer_list{head_dim});
    for (int64_t i = 0; i < normed; ++i) args.weights[i] = weights[i].data();
    args.shape = {x.size(0), tokens, x.size(2)};
    args.types = {bf16, bf16};
    args.parts = x.size(2) / width;
    args.normed = normed;
    args.heads = heads;
    args.head_dim = head_dim;
    args.prefix = prefix;
    args.x = x.data_ptr();
    args.cos = cos.data();
    args.sin = sin.data();
  }
};

struct SwigluInputs {
  Swiglu args{};
  Small bias;
  std::vector<int64_t> y_sizes;

  SwigluInputs(const char* op, const Tensor& x, const std::optional<Tensor>& b) {
    const bool bf16 = check_large(op, "x", x);
    UNITE_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) > 0 && x.size(x.dim() - 1) % 2 == 0, op,
                ": the last dimension of x must be even (two halves), but its shape is ", shape_text(x));
    y_sizes.assign(x.sizes().begin(), x.sizes().end());
    y_sizes.back() /= 2;
    args.width = y_sizes.back();
    args.rows = x.numel() / (2 * args.width);
    args.types = {bf16, bf16};
    args.x = x.data_ptr();
    if (b.has_value()) {
      bias = Small(op, "bias", *b, {2 * args.width});
      args.bias = bias.data();
    }
  }
  int64_t tasks() const { return (args.rows + kRowsPerTask - 1) / kRowsPerTask; }
};

}  // namespace

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor x, std::vector<Tensor> weights, Tensor cos, Tensor sin,
                                            int64_t heads, int64_t prefix, double eps) {
  QkInputs in("qk_norm_rope_fwd", x, weights, cos, sin, heads, prefix);
  const int64_t sizes[] = {in.args.normed, in.args.shape.samples, in.args.shape.rows, heads * in.args.head_dim};
  Tensor out = torch::stable::new_empty(x, {sizes, 4});
  Tensor rstd = empty_float(x, {sizes[0], sizes[1], sizes[2], heads});
  in.args.eps = float(eps);
  in.args.out = out.data_ptr();
  in.args.rstd = floats(rstd);
  run(kernels().qk_norm_rope_forward, in.args, in.args.shape.tasks());
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(std::vector<Tensor> grads, Tensor x, std::vector<Tensor> weights,
                                                    Tensor cos, Tensor sin, Tensor rstd, int64_t heads, int64_t prefix,
                                                    bool biased) {
  const char* op = "qk_norm_rope_bwd";
  QkInputs in(op, x, weights, cos, sin, heads, prefix);
  const int64_t hd = in.args.head_dim, width = in.args.shape.width, normed = in.args.normed;
  UNITE_CHECK(int64_t(grads.size()) == in.args.parts, op, ": x has ", in.args.parts, " parts, and ", grads.size(),
              " gradients are given");
  for (size_t i = 0; i < grads.size(); ++i) {
    check_large(op, "grad", grads[i]);
    check_shape(op, "grad", grads[i], {in.args.shape.samples, in.args.shape.rows, heads * hd});
    UNITE_CHECK(grads[i].scalar_type() == x.scalar_type(), op, ": grad must have the dtype of x");
    in.args.grads[i] = grads[i].data_ptr();
  }
  check_float32(op, "rstd", rstd);
  check_shape(op, "rstd", rstd, {normed, in.args.shape.samples, in.args.shape.rows, heads});
  const int64_t tasks = in.args.shape.tasks(), stride = normed * hd + width;
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweights = empty_float(x, {normed, hd}), dbias = empty_float(x, {biased ? width : 0});
  const Scratch partial = scratch(tasks * stride);
  in.args.out = dx.data_ptr();
  in.args.rstd = floats(rstd);
  in.args.partial = partial.get();
  run(kernels().qk_norm_rope_backward, in.args, tasks);
  kernels().sum_rows(partial.get(), tasks, stride, normed * hd, floats(dweights));
  if (biased) kernels().sum_rows(partial.get() + normed * hd, tasks, stride, width, floats(dbias));
  return {dx, dweights, dbias};
}

void attention_scores_bwd_(Tensor scores, Tensor gradients, double scale) {
  const char* op = "attention_scores_bwd_";
  const bool bf16 = check_large(op, "scores", scores);
  UNITE_CHECK(check_large(op, "gradients", gradients) == bf16, op, ": gradients must have the dtype of scores");
  check_same_shape(op, "gradients", gradients, "scores", scores);
  UNITE_CHECK(scores.dim() >= 1 && scores.size(scores.dim() - 1) > 0, op, ": scores must have shape (..., keys), not ",
              shape_text(scores));
  const int64_t keys = scores.size(scores.dim() - 1), rows = scores.numel() / keys;
  const AttentionScores args{rows, keys, bf16, float(scale), scores.data_ptr(), gradients.data_ptr()};
  run(kernels().attention_scores_backward, args, (rows + kRowsPerTask - 1) / kRowsPerTask);
}

Tensor swiglu_fwd(Tensor x, std::optional<Tensor> bias) {
  SwigluInputs in("swiglu_fwd", x, bias);
  Tensor y = torch::stable::new_empty(x, {in.y_sizes.data(), in.y_sizes.size()});
  in.args.out = y.data_ptr();
  run(kernels().swiglu_forward, in.args, in.tasks());
  return y;
}

std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dy, Tensor x, std::optional<Tensor> bias) {
  const char* op = "swiglu_bwd";
  SwigluInputs in(op, x, bias);
  check_large(op, "dy", dy);
  UNITE_CHECK(dy.scalar_type() == x.scalar_type(), op, ": dy must have the dtype of x");
  bool equal = dy.dim() == x.dim();
  for (int64_t i = 0; equal && i < dy.dim(); ++i) equal = dy.size(i) == in.y_sizes[i];
  UNITE_CHECK(equal, op, ": dy must have shape ", shape_text(in.y_sizes.data(), x.dim()), ", not ", shape_text(dy));
  const int64_t columns = 2 * in.args.width, tasks = in.tasks();
  Tensor dx = torch::stable::empty_like(x), dbias = empty_float(x, {bias.has_value() ? columns : 0});
  const Scratch partial = scratch(bias.has_value() ? tasks * columns : 0);
  in.args.dy = dy.data_ptr();
  in.args.out = dx.data_ptr();
  in.args.partial = bias.has_value() ? partial.get() : nullptr;
  run(kernels().swiglu_backward, in.args, tasks);
  if (!bias.has_value()) return {dx, dbias};
  torch::stable::parallel_for(0, columns, 1024, [&](int64_t begin, int64_t end) {
    kernels().sum_rows(partial.get() + begin, tasks, columns, end - begin, floats(dbias) + begin);
  });
  return {dx, as_type_of(dbias, *bias)};
}

}  // namespace unite
