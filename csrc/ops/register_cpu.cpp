// Schemas of every op, and their CPU kernels. The fake and autograd registrations are in Python,
// beside each op's public function.
#include "cpu_kernels.h"
#include "head_glue.h"
#include "torch_glue.h"

namespace m2k {
namespace {

struct Cpu {
  static void policy_loss(const Tensor&, const PolicyLossArgs& a) { policy_loss_cpu(a); }

  static void policy_loss_bwd(const Tensor& grad, const float* logp, int64_t m, float* logp_out,
                              const float* entropy, int64_t e, float* entropy_out) {
    const float g = *static_cast<const float*>(grad.const_data_ptr());
    policy_loss_bwd_cpu(g, logp, m, logp_out);
    policy_loss_bwd_cpu(g, entropy, e, entropy_out);
  }

  static void group_advantage(const Tensor&, const GroupAdvantageArgs& a) {
    group_advantage_cpu(a);
  }
};

// 0 baseline, 1 avx2, 2 avx512; `of` is any tensor, so that the dispatcher finds the CPU kernel.
int64_t cpu_isa(const Tensor&) {
  const char name = cpu_kernels().name[3];
  return name == '2' ? 1 : name == '5' ? 2 : 0;
}

bool cpu_bf16_dot(const Tensor&) { return bf16_kernels() != nullptr; }

}  // namespace
}  // namespace m2k

STABLE_TORCH_LIBRARY(m2kernels, m) {
  m.def(
      "policy_loss_fwd(Tensor logp, Tensor? old_logp, Tensor advantage, Tensor seq, Tensor? mask, "
      "Tensor? entropy, Tensor? rollout_logp, Tensor? ref_logp, int kind, int kl, float clip_low, "
      "float clip_high, float dual_clip, float kl_coef, float entropy_coef, float tis_cap, "
      "bool tis_sequence, bool per_token, float denom) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "policy_loss_bwd(Tensor grad, Tensor grad_logp, Tensor grad_entropy) -> (Tensor, Tensor)");
  m.def(
      "group_advantage(Tensor reward, Tensor group, Tensor? valid, bool leave_one_out, "
      "bool divide_by_std, float eps) -> Tensor");
  m.def(
      "head_stats(Tensor logits, Tensor target, Tensor? bias, Tensor? inv_temperatures, "
      "float inv_temperature, float softcap, int num_valid, Tensor(a!) z_target, Tensor(b!) top, "
      "Tensor(c!) total, Tensor(d!)? moment) -> ()");
  m.def(
      "head_tiles(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? inv_temperatures, float inv_temperature, float softcap, int num_valid, "
      "Tensor(a!)? z_target, Tensor(b!)? stats, Tensor(c!)? kept) -> ()");
  m.def(
      "head_lanes(Tensor(a!) kept, bool bf16, Tensor target, Tensor? bias, "
      "Tensor? inv_temperatures, float inv_temperature, float softcap, int num_valid, "
      "Tensor log_norm, Tensor log_norm_low, Tensor logp, Tensor? entropy, Tensor grad_logp, "
      "Tensor? grad_entropy, Tensor? live) -> ()");
  m.def("head_dx(Tensor dz, Tensor weight, Tensor(a!) out) -> ()");
  m.def("head_dw(Tensor dz, Tensor hidden, Tensor(a!) out, bool add) -> ()");
  m.def("head_merge(Tensor z_target, Tensor top, Tensor total, Tensor? moment) -> Tensor");
  m.def(
      "head_grad(Tensor logits, Tensor(a!) out, Tensor target, Tensor? bias, "
      "Tensor? inv_temperatures, float inv_temperature, float softcap, int num_valid, "
      "Tensor log_norm, Tensor log_norm_low, Tensor logp, Tensor? entropy, Tensor grad_logp, "
      "Tensor? grad_entropy) -> ()");
  m.def("cpu_isa(Tensor of) -> int");
  m.def("cpu_bf16_dot(Tensor of) -> bool");
  m.def("cuda_runtime(Tensor of) -> int");  // of _ops_cuda.so
}

STABLE_TORCH_LIBRARY_IMPL(m2kernels, CPU, m) {
  m2k::register_ops<m2k::Cpu>(m);
  m.impl("head_stats", TORCH_BOX(&m2k::head_stats_op));
  m.impl("head_tiles", TORCH_BOX(&m2k::head_tiles_op));
  m.impl("head_lanes", TORCH_BOX(&m2k::head_lanes_op));
  m.impl("head_dx", TORCH_BOX(&m2k::head_dx_op));
  m.impl("head_dw", TORCH_BOX(&m2k::head_dw_op));
  m.impl("head_merge", TORCH_BOX(&m2k::head_merge_op));
  m.impl("head_grad", TORCH_BOX(&m2k::head_grad_op));
  m.impl("cpu_isa", TORCH_BOX(&m2k::cpu_isa));
  m.impl("cpu_bf16_dot", TORCH_BOX(&m2k::cpu_bf16_dot));
}
