// Torch side of the ops, shared by the CPU and the CUDA library: checks, allocation, and the call
// into a Backend (static functions over the plain structs of op_args.h). Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <tuple>

#include "op_args.h"

namespace m2k {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

void check_vector(const char* name, const Tensor& t, ScalarType dtype, int64_t length) {
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == length, name, ": got a tensor of dimension ",
                  t.dim(), " with ", t.numel(), " elements; expected a vector of ", length);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": unexpected dtype code ",
                  static_cast<int>(t.scalar_type()), "; expected ", static_cast<int>(dtype));
  STD_TORCH_CHECK(t.is_contiguous(), name, ": not contiguous; call .contiguous()");
}

const float* floats(const char* name, const Tensor& t, int64_t length) {
  check_vector(name, t, ScalarType::Float, length);
  return static_cast<const float*>(t.const_data_ptr());
}

const float* floats(const char* name, const MaybeTensor& t, int64_t length) {
  return t.has_value() ? floats(name, *t, length) : nullptr;
}

const uint8_t* flags(const char* name, const MaybeTensor& t, int64_t length) {
  if (!t.has_value()) return nullptr;
  check_vector(name, *t, ScalarType::Bool, length);
  return static_cast<const uint8_t*>(t->const_data_ptr());
}

IndexVector indices(const char* name, const Tensor& t, int64_t length) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  check_vector(name, t, wide ? ScalarType::Long : ScalarType::Int, length);
  return {t.const_data_ptr(), wide};
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes,
                  ScalarType dtype = ScalarType::Float) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logp, const MaybeTensor& old_logp, const Tensor& advantage, const Tensor& seq,
    const MaybeTensor& mask, const MaybeTensor& entropy, const MaybeTensor& rollout_logp,
    const MaybeTensor& ref_logp, int64_t kind, int64_t kl, double clip_low, double clip_high,
    double dual_clip, double kl_coef, double entropy_coef, double tis_cap, bool tis_sequence,
    bool per_token, double denom) {
  const int64_t m = logp.numel();
  const int64_t num_advantages = per_token ? m : advantage.numel();
  const bool entropy_grad = entropy.has_value() && entropy_coef != 0.0;
  Tensor loss = new_floats(logp, {});
  Tensor stats = new_floats(logp, {kNumStats});
  Tensor grad_logp = new_floats(logp, {m});
  Tensor grad_entropy = new_floats(logp, {entropy_grad ? m : 0});
  PolicyLossArgs a;
  a.num_tokens = m;
  a.num_advantages = num_advantages;
  a.logp = floats("logp", logp, m);
  a.old_logp = old_logp.has_value() ? floats("old_logp", old_logp, m) : a.logp;
  a.advantage = floats("advantage", advantage, num_advantages);
  a.seq = indices("seq", seq, m);
  a.mask = flags("mask", mask, m);
  a.entropy = floats("entropy", entropy, m);
  a.rollout_logp = floats("rollout_logp", rollout_logp, m);
  a.ref_logp = floats("ref_logp", ref_logp, m);
  a.kind = static_cast<int>(kind);
  a.kl = static_cast<int>(kl);
  a.clip_low = clip_low;
  a.clip_high = clip_high;
  a.dual_clip = dual_clip;
  a.kl_coef = kl_coef;
  a.entropy_coef = entropy_coef;
  a.tis_cap = tis_cap;
  a.tis_sequence = tis_sequence;
  a.per_token = per_token;
  a.denom = denom;
  a.loss = static_cast<float*>(loss.mutable_data_ptr());
  a.stats = static_cast<float*>(stats.mutable_data_ptr());
  a.grad_logp = static_cast<float*>(grad_logp.mutable_data_ptr());
  a.grad_entropy = entropy_grad ? static_cast<float*>(grad_entropy.mutable_data_ptr()) : nullptr;
  Backend::policy_loss(logp, a);
  return {loss, stats, grad_logp, grad_entropy};
}

template <class Backend>
std::tuple<Tensor, Tensor> policy_loss_bwd(const Tensor& grad, const Tensor& grad_logp,
                                           const Tensor& grad_entropy) {
  STD_TORCH_CHECK(grad.numel() == 1 && grad.scalar_type() == ScalarType::Float,
                  "grad: got ", grad.numel(), " elements; expected one float32");
  const int64_t m = grad_logp.numel();
  const int64_t e = grad_entropy.numel();
  Tensor logp_out = new_floats(grad_logp, {m});
  Tensor entropy_out = new_floats(grad_logp, {e});
  const float* saved_logp = floats("grad_logp", grad_logp, m);
  const float* saved_entropy = floats("grad_entropy", grad_entropy, e);
  Backend::policy_loss_bwd(grad, saved_logp, m, static_cast<float*>(logp_out.mutable_data_ptr()),
                           saved_entropy, e, static_cast<float*>(entropy_out.mutable_data_ptr()));
  return {logp_out, entropy_out};
}

template <class Backend>
Tensor group_advantage(const Tensor& reward, const Tensor& group, const MaybeTensor& valid,
                       bool leave_one_out, bool divide_by_std, double eps) {
  const int64_t rows = reward.numel();
  Tensor advantage = new_floats(reward, {rows});
  GroupAdvantageArgs a;
  a.num_rows = rows;
  a.reward = floats("reward", reward, rows);
  a.group = indices("group", group, rows);
  a.valid = flags("valid", valid, rows);
  a.leave_one_out = leave_one_out;
  a.divide_by_std = divide_by_std;
  a.eps = eps;
  a.advantage = static_cast<float*>(advantage.mutable_data_ptr());
  Backend::group_advantage(reward, a);
  return advantage;
}

// Registers every op of Backend in an implementation block.
template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&policy_loss_fwd<Backend>));
  m.impl("policy_loss_bwd", TORCH_BOX(&policy_loss_bwd<Backend>));
  m.impl("group_advantage", TORCH_BOX(&group_advantage<Backend>));
}

}  // namespace
}  // namespace m2k
