// CUDA implementations of the ops that register_cpu.cpp defines: load _ops_cpu.so first.
#include <torch/csrc/stable/accelerator.h>

#include "cuda_kernels.h"
#include "torch_glue.h"

// Lives in libtorch_cuda.so only. Weak, so that this library also loads on a CPU build of torch,
// where no CUDA tensor can reach it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** ret_stream);

namespace m2k {
namespace {

// The device of a tensor and its current stream, for the length of one call.
struct Launch {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit Launch(const Tensor& t) : guard(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this build of torch has no CUDA; install a CUDA build, or use backend='cpu'");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
                    "no current CUDA stream on device ", t.get_device_index());
  }
};

void check(int code, const char* op) {
  STD_TORCH_CHECK(code == 0, op, ": CUDA error ", code, ": ", cuda_error_text(code));
}

struct Cuda {
  static void policy_loss(const Tensor& like, const PolicyLossArgs& a) {
    const Launch launch(like);
    Tensor scratch = new_floats(like, {policy_loss_scratch(a.num_tokens)}, ScalarType::Double);
    check(policy_loss_sm90(a, static_cast<double*>(scratch.mutable_data_ptr()), launch.stream),
          "policy_loss");
  }

  static void policy_loss_bwd(const Tensor& grad, const float* logp, int64_t m, float* logp_out,
                              const float* entropy, int64_t e, float* entropy_out) {
    const Launch launch(grad);
    check(policy_loss_bwd_sm90(static_cast<const float*>(grad.const_data_ptr()), logp, m, logp_out,
                               entropy, e, entropy_out, launch.stream),
          "policy_loss_bwd");
  }

  static void group_advantage(const Tensor& like, const GroupAdvantageArgs& a) {
    const Launch launch(like);
    check(group_advantage_sm90(a, launch.stream), "group_advantage");
  }
};

// Version of the runtime that is linked in, as CUDART_VERSION; asked on a CPU tensor, for a driver
// that is too old for it must be told before any CUDA call.
int64_t cuda_runtime(const Tensor&) { return cuda_runtime_version(); }

}  // namespace
}  // namespace m2k

STABLE_TORCH_LIBRARY_IMPL(m2kernels, CUDA, m) { m2k::register_ops<m2k::Cuda>(m); }
STABLE_TORCH_LIBRARY_IMPL(m2kernels, CPU, m) {
  m.impl("cuda_runtime", TORCH_BOX(&m2k::cuda_runtime));
}
