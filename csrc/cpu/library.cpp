// Registers the CPU operations as torch.ops.unite_kernels_cpu.<name>.

#include "ops.h"

namespace unite {

using List = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

std::tuple<Tensor, Tensor> adaln_fwd(Tensor, Tensor, Tensor, Tensor, double);
std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_bwd(Tensor, Tensor, Tensor, Tensor, Tensor);
std::tuple<Tensor, Tensor, Tensor> adaln_mid_fwd(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, double);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_mid_bwd(Tensor, Tensor, Tensor, Tensor, Tensor,
                                                                                 Tensor, Tensor, Maybe, Tensor);
std::tuple<Tensor, Tensor, Tensor, Tensor> adaln_tail_fwd(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Maybe,
                                                          double);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adaln_tail_bwd(Tensor, Tensor, Tensor,
                                                                                          Tensor, Tensor, Tensor,
                                                                                          Tensor, Tensor, Maybe, Tensor,
                                                                                          Tensor);
std::tuple<Tensor, Tensor> qk_norm_rope_fwd(Tensor, List, Tensor, Tensor, int64_t, int64_t, double);
std::tuple<Tensor, Tensor, Tensor> qk_norm_rope_bwd(List, Tensor, List, Tensor, Tensor, Tensor, int64_t, int64_t, bool);
Tensor swiglu_fwd(Tensor, Maybe);
std::tuple<Tensor, Tensor> swiglu_bwd(Tensor, Tensor, Maybe);
void attention_scores_bwd_(Tensor, Tensor, double);
Tensor lpips_head_fwd(Tensor, Tensor, Tensor);
std::tuple<Tensor, Tensor> lpips_head_bwd(Tensor, Tensor, Tensor, Tensor, bool, bool);
Tensor philox_uniform(int64_t, int64_t, Tensor, int64_t);
Tensor philox_normal(int64_t, int64_t, Tensor, int64_t);
std::tuple<Tensor, Tensor> noise_injection(Tensor, Tensor, int64_t, double, double, double);
std::tuple<Tensor, Tensor, Tensor> flow_corruption(Tensor, Tensor, Tensor, int64_t, int64_t, bool, double,
                                                   double, double, double, int64_t);
std::tuple<Tensor, Tensor, Tensor> clip(List, double);
void adamw_(List, List, List, List, Tensor, Tensor, double, double, double, double, Maybe, Maybe, List, double);
void muon_momentum_(List, List, double, bool, Maybe, Maybe, List);
void muon_apply_(List, List, Tensor, std::vector<double>, double, Maybe, List, double);
void ema_(List, List, Tensor, Maybe);
void gather_rows(List, Tensor, Tensor, Tensor, int64_t);

// An operation without tensors has no device to dispatch on; instruction_set takes one and ignores it.
std::string instruction_set_of(Tensor) { return instruction_set(); }

}  // namespace unite

STABLE_TORCH_LIBRARY(unite_kernels_cpu, m) {
  m.def("instruction_set(Tensor any) -> str");
  m.def("adaln_fwd(Tensor x, Tensor weight, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)");
  m.def("adaln_bwd(Tensor dy, Tensor x, Tensor weight, Tensor scale, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_mid_fwd(Tensor x, Tensor branch, Tensor gate, Tensor weight, Tensor shift, Tensor scale, Tensor? bias,"
      " float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "adaln_mid_bwd(Tensor dx1, Tensor dy, Tensor x1, Tensor branch, Tensor gate, Tensor weight, Tensor scale,"
      " Tensor? bias, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_tail_fwd(Tensor x, Tensor branch, Tensor gate, Tensor weight3, Tensor weight1, Tensor shift, Tensor scale,"
      " Tensor? bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "adaln_tail_bwd(Tensor dx2, Tensor dy, Tensor x, Tensor branch, Tensor gate, Tensor weight3, Tensor weight1,"
      " Tensor scale, Tensor? bias, Tensor rstd3, Tensor rstd1)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "qk_norm_rope_fwd(Tensor x, Tensor[] weights, Tensor cos, Tensor sin, int heads, int prefix, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope_bwd(Tensor[] grads, Tensor x, Tensor[] weights, Tensor cos, Tensor sin, Tensor rstd, int heads,"
      " int prefix, bool biased) -> (Tensor, Tensor, Tensor)");
  m.def("swiglu_fwd(Tensor x, Tensor? bias) -> Tensor");
  m.def("swiglu_bwd(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)");
  m.def("attention_scores_bwd_(Tensor(a!) scores, Tensor(b!) gradients, float scale) -> ()");
  m.def("lpips_head_fwd(Tensor f0, Tensor f1, Tensor weight) -> Tensor");
  m.def(
      "lpips_head_bwd(Tensor dout, Tensor f0, Tensor f1, Tensor weight, bool first, bool second) -> (Tensor, Tensor)");
  m.def("philox_uniform(int seed, int stream, Tensor samples, int count) -> Tensor");
  m.def("philox_normal(int seed, int stream, Tensor samples, int count) -> Tensor");
  m.def("noise_injection(Tensor z, Tensor samples, int seed, float p, float t_low, float t_high) -> (Tensor, Tensor)");
  m.def(
      "flow_corruption(Tensor z, Tensor labels, Tensor samples, int seed, int steps, bool uniform_law,"
      " float mu, float sigma, float shift, float label_drop, int null_label) -> (Tensor, Tensor, Tensor)");
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
  m.def("gather_rows(Tensor[] parts, Tensor part, Tensor row, Tensor(a!) out, int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unite_kernels_cpu, CPU, m) {
  m.impl("instruction_set", TORCH_BOX(&unite::instruction_set_of));
  m.impl("adaln_fwd", TORCH_BOX(&unite::adaln_fwd));
  m.impl("adaln_bwd", TORCH_BOX(&unite::adaln_bwd));
  m.impl("adaln_mid_fwd", TORCH_BOX(&unite::adaln_mid_fwd));
  m.impl("adaln_mid_bwd", TORCH_BOX(&unite::adaln_mid_bwd));
  m.impl("adaln_tail_fwd", TORCH_BOX(&unite::adaln_tail_fwd));
  m.impl("adaln_tail_bwd", TORCH_BOX(&unite::adaln_tail_bwd));
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&unite::qk_norm_rope_fwd));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&unite::qk_norm_rope_bwd));
  m.impl("swiglu_fwd", TORCH_BOX(&unite::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&unite::swiglu_bwd));
  m.impl("attention_scores_bwd_", TORCH_BOX(&unite::attention_scores_bwd_));
  m.impl("lpips_head_fwd", TORCH_BOX(&unite::lpips_head_fwd));
  m.impl("lpips_head_bwd", TORCH_BOX(&unite::lpips_head_bwd));
  m.impl("philox_uniform", TORCH_BOX(&unite::philox_uniform));
  m.impl("philox_normal", TORCH_BOX(&unite::philox_normal));
  m.impl("noise_injection", TORCH_BOX(&unite::noise_injection));
  m.impl("flow_corruption", TORCH_BOX(&unite::flow_corruption));
  m.impl("clip", TORCH_BOX(&unite::clip));
  m.impl("adamw_", TORCH_BOX(&unite::adamw_));
  m.impl("muon_momentum_", TORCH_BOX(&unite::muon_momentum_));
  m.impl("muon_apply_", TORCH_BOX(&unite::muon_apply_));
  m.impl("ema_", TORCH_BOX(&unite::ema_));
  m.impl("gather_rows", TORCH_BOX(&unite::gather_rows));
}
