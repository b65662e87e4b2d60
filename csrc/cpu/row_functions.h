// Declarations of one instruction set's row functions, so that its table can name those of the other files.

#pragma once

#include "rows.h"

namespace unite {
namespace UNITE_ISA {

void adaln_forward(const AdalnForward&, int64_t begin, int64_t end);
void adaln_backward(const AdalnBackward&, int64_t begin, int64_t end);
void qk_norm_rope_forward(const QkNormRope&, int64_t begin, int64_t end);
void qk_norm_rope_backward(const QkNormRope&, int64_t begin, int64_t end);
void swiglu_forward(const Swiglu&, int64_t begin, int64_t end);
void swiglu_backward(const Swiglu&, int64_t begin, int64_t end);
void attention_scores_backward(const AttentionScores&, int64_t begin, int64_t end);
void lpips_head_forward(const LpipsHead&, int64_t begin, int64_t end);
void lpips_head_backward(const LpipsHead&, int64_t begin, int64_t end);
void uniform(Draw, int64_t sample, int64_t first, int64_t count, float* out);
void normal(Draw, int64_t sample, int64_t first, int64_t count, float* out);
void corrupt(Draw, int64_t sample, int64_t first, int64_t count, float t, const void* z, bool bf16, void* out);
float logistic(float x);

}  // namespace UNITE_ISA
}  // namespace unite
