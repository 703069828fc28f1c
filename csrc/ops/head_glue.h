// Torch side of the LM head's row kernels on the CPU: checks, and the call. They write into tensors
// of the caller, who hands them one panel of logits after another.
#pragma once

#include "cpu_kernels.h"
#include "torch_glue.h"

namespace m2k {
namespace {

HeadLogits head_logits(const Tensor& logits, const Tensor& target, const MaybeTensor& bias,
                       const MaybeTensor& inv_temperatures, double inv_temperature,
                       double softcap, int64_t num_valid) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) < 2 || logits.stride(1) == 1),
                  "logits: expected two dimensions, the last one dense");
  const bool bf16 = logits.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16 || logits.scalar_type() == ScalarType::Float,
                  "logits: expected float32 or bfloat16");
  HeadLogits a;
  a.rows = target.numel();
  a.columns = logits.size(1);
  STD_TORCH_CHECK(a.rows <= logits.size(0), "logits: fewer rows than targets");
  STD_TORCH_CHECK(num_valid >= 0 && num_valid <= a.columns, "num_valid: out of range");
  check_vector("target", target, ScalarType::Long, a.rows);
  a.data = logits.const_data_ptr();
  a.stride = logits.stride(0);
  a.bf16 = bf16;
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  a.bias = floats("bias", bias, a.columns);
  a.inv_temperatures = floats("inv_temperatures", inv_temperatures, a.rows);
  a.inv_temperature = static_cast<float>(inv_temperature);
  a.softcap = static_cast<float>(softcap);
  a.num_valid = num_valid;
  return a;
}

// Checks that t is [rows, tiles or more] of float with the stride of its fellows.
float* tile_floats(const char* name, const Tensor& t, const HeadLogits& a, int64_t stride) {
  const int64_t tiles = (a.columns + kHeadTile - 1) / kHeadTile;
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == a.rows && t.size(1) == tiles, name,
                  ": expected [rows, tiles]");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (a.rows < 2 || t.stride(0) == stride) &&
                      (tiles < 2 || t.stride(1) == 1),
                  name, ": expected float32, dense, of one stride");
  return static_cast<float*>(t.mutable_data_ptr());
}

void head_stats_op(const Tensor& logits, const Tensor& target, const MaybeTensor& bias,
                   const MaybeTensor& inv_temperatures, double inv_temperature, double softcap,
                   int64_t num_valid, const Tensor& z_target, const Tensor& top,
                   const Tensor& total, const MaybeTensor& moment) {
  const HeadLogits a = head_logits(logits, target, bias, inv_temperatures, inv_temperature,
                                   softcap, num_valid);
  check_vector("z_target", z_target, ScalarType::Float, a.rows);
  HeadTileOut out;
  out.stride = top.stride(0);
  out.z_target = static_cast<float*>(z_target.mutable_data_ptr());
  out.top = tile_floats("top", top, a, out.stride);
  out.total = tile_floats("total", total, a, out.stride);
  out.moment = moment.has_value() ? tile_floats("moment", *moment, a, out.stride) : nullptr;
  head_stats_cpu(a, out);
}

Tensor head_merge_op(const Tensor& z_target, const Tensor& top, const Tensor& total,
                     const MaybeTensor& moment) {
  const int64_t rows = z_target.numel();
  const int64_t count = rows ? top.numel() / rows : 0;
  HeadTiles tiles;
  const auto flat = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() &&
                        t.numel() == rows * count,
                    name, ": expected contiguous float32 [rows, tiles]");
    return static_cast<const float*>(t.const_data_ptr());
  };
  tiles.top = flat("top", top);
  tiles.total = flat("total", total);
  tiles.moment = moment.has_value() ? flat("moment", *moment) : nullptr;
  tiles.count = count;
  Tensor out = new_floats(z_target, {4, rows});
  head_merge_cpu(floats("z_target", z_target, rows), tiles, rows,
                 static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

void head_grad_op(const Tensor& logits, const Tensor& out, const Tensor& target,
                  const MaybeTensor& bias, const MaybeTensor& inv_temperatures,
                  double inv_temperature, double softcap, int64_t num_valid,
                  const Tensor& log_norm, const Tensor& log_norm_low, const Tensor& logp,
                  const MaybeTensor& entropy, const Tensor& grad_logp,
                  const MaybeTensor& grad_entropy) {
  const HeadLogits a = head_logits(logits, target, bias, inv_temperatures, inv_temperature,
                                   softcap, num_valid);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == a.rows && out.size(1) == a.columns &&
                      out.scalar_type() == logits.scalar_type() &&
                      (a.columns < 2 || out.stride(1) == 1),
                  "out: expected the shape and dtype of the logits, the last dimension dense");
  HeadGradArgs g;
  g.log_norm = floats("log_norm", log_norm, a.rows);
  g.log_norm_low = floats("log_norm_low", log_norm_low, a.rows);
  g.logp = floats("logp", logp, a.rows);
  g.entropy = floats("entropy", entropy, a.rows);
  g.grad_logp = floats("grad_logp", grad_logp, a.rows);
  g.grad_entropy = floats("grad_entropy", grad_entropy, a.rows);
  STD_TORCH_CHECK(!g.grad_entropy || g.entropy, "grad_entropy: given without entropy");
  g.out = out.mutable_data_ptr();
  g.out_stride = out.stride(0);
  head_grad_cpu(a, g);
}

}  // namespace
}  // namespace m2k
