// QK-norm + RoPE, attention and SwiGLU operations: checks, outputs, second stage of the shared gradients.

#include "ops.h"

namespace unite {
namespace {

// Fills what forward and backward share: shapes, weights and tables.
struct QkInputs {
  QkNormRope args{};
  Small q_weight, k_weight, cos, sin;
  Bias bias;

  QkInputs(const char* op, const Tensor& qk, const Tensor& q, const Tensor& k, const Tensor& c, const Tensor& s,
           const std::optional<Tensor>& b, int64_t heads, int64_t prefix) {
    const bool bf16 = check_large(op, "qk", qk);
    UNITE_CHECK(qk.dim() == 3, op, ": qk must have shape (batch, tokens, 2 width), not ", shape_text(qk));
    UNITE_CHECK(heads > 0 && qk.size(2) > 0 && qk.size(2) % (2 * heads) == 0, op, ": the last dimension of qk, ",
                qk.size(2), ", is not 2 * heads * head_dim with ", heads, " heads");
    const int64_t tokens = qk.size(1), head_dim = qk.size(2) / (2 * heads);
    UNITE_CHECK(head_dim % 2 == 0, op, ": head_dim ", head_dim, " is odd, so it has no pairs to rotate");
    UNITE_CHECK(prefix >= 0, op, ": prefix is negative: ", prefix);
    q_weight = Small(op, "q_weight", q, {head_dim});
    k_weight = Small(op, "k_weight", k, {head_dim});
    UNITE_CHECK(c.dim() == 2, op, ": cos must have shape (positions, head_dim / 2), not ", shape_text(c));
    const int64_t positions = c.size(0);
    UNITE_CHECK(positions >= tokens - prefix, op, ": cos has ", positions, " positions for ", tokens - prefix,
                " tokens");
    cos = Small(op, "cos", torch::stable::contiguous(c), {positions, head_dim / 2});
    sin = Small(op, "sin", torch::stable::contiguous(s), {positions, head_dim / 2});
    bias = Bias(op, b, qk.size(2));
    args.shape = {qk.size(0), tokens, qk.size(2)};
    args.types = {bf16, bf16};
    args.heads = heads;
    args.head_dim = head_dim;
    args.prefix = prefix;
    args.qk = qk.data_ptr();
    args.q_weight = q_weight.data();
    args.k_weight = k_weight.data();
    args.cos = cos.data();
    args.sin = sin.data();
    args.bias = bias.data();
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

std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor qk, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                                            std::optional<Tensor> bias, int64_t heads, int64_t prefix, double eps) {
  QkInputs in("qk_norm_rope_fwd", qk, q_weight, k_weight, cos, sin, bias, heads, prefix);
  Tensor out = torch::stable::empty_like(qk);
  Tensor rstd = empty_float(qk, {in.args.shape.samples, in.args.shape.rows, 2, heads});
  in.args.eps = float(eps);
  in.args.out = out.data_ptr();
  in.args.rstd = floats(rstd);
  run(kernels().qk_norm_rope_forward, in.args, in.args.shape.tasks());
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(Tensor dout, Tensor qk, Tensor q_weight, Tensor k_weight,
                                                            Tensor cos, Tensor sin, std::optional<Tensor> bias,
                                                            Tensor rstd, int64_t heads, int64_t prefix) {
  const char* op = "qk_norm_rope_bwd";
  QkInputs in(op, qk, q_weight, k_weight, cos, sin, bias, heads, prefix);
  check_large(op, "dout", dout);
  check_same_shape(op, "dout", dout, "qk", qk);
  UNITE_CHECK(dout.scalar_type() == qk.scalar_type(), op, ": dout must have the dtype of qk");
  check_float32(op, "rstd", rstd);
  check_shape(op, "rstd", rstd, {in.args.shape.samples, in.args.shape.rows, 2, heads});
  const int64_t hd = in.args.head_dim, tasks = in.args.shape.tasks(), width = in.args.shape.width;
  const int64_t stride = 2 * hd + width;
  Tensor dqk = torch::stable::empty_like(qk);
  Tensor dq = empty_float(qk, {hd}), dk = empty_float(qk, {hd});
  Tensor dbias = empty_float(qk, {bias.has_value() ? width : 0});
  const Scratch partial = scratch(tasks * stride);
  in.args.dout = dout.data_ptr();
  in.args.out = dqk.data_ptr();
  in.args.rstd = floats(rstd);
  in.args.partial = partial.get();
  run(kernels().qk_norm_rope_backward, in.args, tasks);
  kernels().sum_rows(partial.get(), tasks, stride, hd, floats(dq));
  kernels().sum_rows(partial.get() + hd, tasks, stride, hd, floats(dk));
  if (bias.has_value()) {
    kernels().sum_rows(partial.get() + 2 * hd, tasks, stride, width, floats(dbias));
    dbias = as_type_of(dbias, *bias);
  }
  return {dqk, as_type_of(dq, q_weight), as_type_of(dk, k_weight), dbias};
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
