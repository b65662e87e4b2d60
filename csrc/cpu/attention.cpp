// Attention operations: checks and outputs. See rows_attention.cpp.

#include <cmath>

#include "ops.h"

namespace unite {
namespace {

// (B, H, T, E), whose rows may be slices of wider ones.
Heads heads_of(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_cpu(op, name, x);
  UNITE_CHECK(is_float(x), op, ": ", name, " must be float32");
  check_shape(op, name, x, shape);
  UNITE_CHECK(x.stride(3) == 1 || x.size(3) == 1, op, ": ", name, " must have adjacent elements in its heads");
  return {static_cast<const float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

Attention inputs_of(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  UNITE_CHECK(q.dim() == 4 && k.dim() == 4, op, ": q and k must have shape (batch, heads, tokens, size), not ",
              shape_text(q), " and ", shape_text(k));
  const int64_t b = q.size(0), h = q.size(1), t = q.size(2), e = q.size(3), s = k.size(2);
  UNITE_CHECK(s > 0 && e > 0, op, ": there must be a key, and a size");
  Attention args{};
  args.samples = b;
  args.heads = h;
  args.queries = t;
  args.keys = s;
  args.size = e;
  args.scale = float(1.0 / std::sqrt(double(e)));
  args.q = heads_of(op, "q", q, {b, h, t, e});
  args.k = heads_of(op, "k", k, {b, h, s, e});
  args.v = heads_of(op, "v", v, {b, h, s, e});
  return args;
}

}  // namespace

// The outputs are (B, T, H, E): what the next linear layer reads.
Tensor attention_fwd(Tensor q, Tensor k, Tensor v) {
  Attention args = inputs_of("attention_fwd", q, k, v);
  Tensor out = empty_float(q, {args.samples, args.queries, args.heads, args.size});
  args.out = floats(out);
  run(kernels().attention_forward, args, args.samples * args.heads);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v) {
  const char* op = "attention_bwd";
  Attention args = inputs_of(op, q, k, v);
  const int64_t b = args.samples, h = args.heads, t = args.queries, s = args.keys, e = args.size;
  args.dout = heads_of(op, "dout", dout, {b, h, t, e});
  Tensor dq = empty_float(q, {b, t, h, e}), dk = empty_float(q, {b, s, h, e}), dv = empty_float(q, {b, s, h, e});
  args.dq = floats(dq);
  args.dk = floats(dk);
  args.dv = floats(dv);
  run(kernels().attention_backward, args, b * h);
  return {dq, dk, dv};
}

void attention_scores_bwd_(Tensor scores, Tensor gradients, double scale) {
  const char* op = "attention_scores_bwd_";
  const bool bf16 = check_large(op, "scores", scores);
  UNITE_CHECK(check_large(op, "gradients", gradients) == bf16, op, ": gradients must have the dtype of scores");
  check_same_shape(op, "gradients", gradients, "scores", scores);
  UNITE_CHECK(scores.dim() >= 1 && scores.size(scores.dim() - 1) > 0, op, ": scores must have keys");
  const int64_t keys = scores.size(scores.dim() - 1), rows = scores.numel() / keys;
  const AttentionScores args{rows, keys, bf16, float(scale), scores.data_ptr(), gradients.data_ptr()};
  run(kernels().attention_scores_backward, args, (rows + kRowsPerTask - 1) / kRowsPerTask);
}

}  // namespace unite
