// Torch side of the LM head's row kernels on the CPU: checks, and the call. They write into tensors
// of the caller, who hands them one panel of logits after another.
#pragma once

#include "cpu_kernels.h"
#include "torch_glue.h"

namespace m2k {
namespace {

// What is given by row.
HeadLogits head_rows(const Tensor& target, int64_t rows, const MaybeTensor& inv_temperatures,
                     double inv_temperature) {
  HeadLogits a;
  a.rows = rows;
  check_vector("target", target, ScalarType::Long, rows);
  a.target = static_cast<const int64_t*>(target.const_data_ptr());
  a.inv_temperatures = floats("inv_temperatures", inv_temperatures, rows);
  a.inv_temperature = static_cast<float>(inv_temperature);
  return a;
}

HeadGradArgs head_grads(int64_t rows, const Tensor& log_norm, const Tensor& log_norm_low,
                        const Tensor& logp, const MaybeTensor& entropy, const Tensor& grad_logp,
                        const MaybeTensor& grad_entropy) {
  HeadGradArgs g;
  g.log_norm = floats("log_norm", log_norm, rows);
  g.log_norm_low = floats("log_norm_low", log_norm_low, rows);
  g.logp = floats("logp", logp, rows);
  g.entropy = floats("entropy", entropy, rows);
  g.grad_logp = floats("grad_logp", grad_logp, rows);
  g.grad_entropy = floats("grad_entropy", grad_entropy, rows);
  STD_TORCH_CHECK(!g.grad_entropy || g.entropy, "grad_entropy: given without entropy");
  return g;
}

HeadLogits head_logits(const Tensor& logits, const Tensor& target, const MaybeTensor& bias,
                       const MaybeTensor& inv_temperatures, double inv_temperature,
                       double softcap, int64_t num_valid) {
  STD_TORCH_CHECK(logits.dim() == 2 && (logits.size(1) < 2 || logits.stride(1) == 1),
                  "logits: expected two dimensions, the last one dense");
  const bool bf16 = logits.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bf16 || logits.scalar_type() == ScalarType::Float,
                  "logits: expected float32 or bfloat16");
  HeadLogits a = head_rows(target, target.numel(), inv_temperatures, inv_temperature);
  a.columns = logits.size(1);
  STD_TORCH_CHECK(a.rows <= logits.size(0), "logits: fewer rows than targets");
  STD_TORCH_CHECK(num_valid >= 0 && num_valid <= a.columns, "num_valid: out of range");
  a.data = logits.const_data_ptr();
  a.stride = logits.stride(0);
  a.bf16 = bf16;
  a.bias = floats("bias", bias, a.columns);
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

int64_t lanes_of(int64_t rows) { return (rows + 15) / 16 * 16; }

// A float tensor of this shape, dense; null when absent.
float* dense_floats(const char* name, const MaybeTensor& t, std::initializer_list<int64_t> shape) {
  if (!t.has_value()) return nullptr;
  bool right = t->scalar_type() == ScalarType::Float && t->is_contiguous() &&
               t->dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) right = right && t->size(d++) == size;
  STD_TORCH_CHECK(right, name, ": unexpected shape, dtype or layout");
  return static_cast<float*>(t->mutable_data_ptr());
}

// Per lane: the target and 1 / temperature of its row; lanes past the rows have none.
struct LaneInputs {
  Tensor target, inverse;

  LaneInputs(const HeadLogits& rows, const Tensor& like, int64_t stride)
      : target(new_floats(like, {stride}, ScalarType::Long)), inverse(new_floats(like, {stride})) {
    auto* to = static_cast<int64_t*>(target.mutable_data_ptr());
    auto* by = static_cast<float*>(inverse.mutable_data_ptr());
    for (int64_t i = 0; i < stride; ++i) {
      const bool there = i < rows.rows;
      to[i] = there ? rows.target[i] : -1;
      by[i] = there && rows.inv_temperatures ? rows.inv_temperatures[i] : rows.inv_temperature;
    }
  }
};

void head_tiles_op(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                   const MaybeTensor& bias, const MaybeTensor& inv_temperatures,
                   double inv_temperature, double softcap, int64_t num_valid,
                   const MaybeTensor& z_target, const MaybeTensor& stats,
                   const MaybeTensor& kept) {
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                      hidden.scalar_type() == weight.scalar_type() &&
                      (bf16 || weight.scalar_type() == ScalarType::Float),
                  "hidden, weight: expected two matrices of one depth and dtype, float or bfloat16");
  const int64_t depth = hidden.size(1);
  STD_TORCH_CHECK(depth < 2 || (hidden.stride(1) == 1 && weight.stride(1) == 1),
                  "hidden, weight: rows are not dense");
  const HeadLogits rows = head_rows(target, hidden.size(0), inv_temperatures, inv_temperature);
  HeadGemm a;
  a.rows = rows.rows;
  a.stride = lanes_of(a.rows);
  a.groups = a.stride / 16;
  a.depth = depth;
  a.vocab = weight.size(0);
  STD_TORCH_CHECK(num_valid >= 0 && num_valid <= a.vocab, "num_valid: out of range");
  const bool dot = bf16 && depth % 2 == 0 && bf16_kernels() != nullptr;
  Tensor packed = new_floats(hidden, {a.groups * depth * 16},
                             dot ? ScalarType::BFloat16 : ScalarType::Float);
  const HeadRows from = {hidden.const_data_ptr(), a.rows, depth, hidden.stride(0), bf16};
  if (dot) {
    head_pack_cpu(from, a.groups, static_cast<uint16_t*>(packed.mutable_data_ptr()));
  } else {
    head_pack_cpu(from, a.groups, static_cast<float*>(packed.mutable_data_ptr()));
  }
  a.hidden = packed.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.weight_stride = weight.stride(0);
  a.weight_bf16 = bf16;
  a.num_valid = num_valid;
  a.bias = floats("bias", bias, a.vocab);
  const LaneInputs lanes(rows, hidden, a.stride);
  a.inverse = static_cast<const float*>(lanes.inverse.const_data_ptr());
  a.target = static_cast<const int64_t*>(lanes.target.const_data_ptr());
  a.softcap = static_cast<float>(softcap);
  const int64_t tiles = (a.vocab + kHeadTile - 1) / kHeadTile;
  const int64_t fields = stats.has_value() ? stats->size(0) : 0;
  STD_TORCH_CHECK(z_target.has_value() == stats.has_value() && (fields == 0 || fields == 2 || fields == 3),
                  "stats: expected two or three fields, and z_target with them");
  a.z_target = dense_floats("z_target", z_target, {a.stride});
  a.top = dense_floats("stats", stats, {fields, tiles, a.stride});
  a.total = a.top ? a.top + tiles * a.stride : nullptr;
  a.moment = fields == 3 ? a.total + tiles * a.stride : nullptr;
  a.kept = dense_floats("kept", kept, {a.vocab, a.stride});
  if (a.rows > 0 && a.vocab > 0) head_tiles_cpu(a, dot);
}

// The gradient takes the place of `kept`: as bfloat16 the first half of each row.
void head_lanes_op(const Tensor& kept, bool bf16, const Tensor& target,
                   const MaybeTensor& bias, const MaybeTensor& inv_temperatures,
                   double inv_temperature, double softcap, int64_t num_valid,
                   const Tensor& log_norm, const Tensor& log_norm_low, const Tensor& logp,
                   const MaybeTensor& entropy, const Tensor& grad_logp,
                   const MaybeTensor& grad_entropy, const MaybeTensor& live) {
  const HeadLogits rows = head_rows(target, target.numel(), inv_temperatures, inv_temperature);
  const HeadGradArgs g =
      head_grads(rows.rows, log_norm, log_norm_low, logp, entropy, grad_logp, grad_entropy);
  HeadLaneGrad a;
  a.stride = lanes_of(rows.rows);
  a.vocab = kept.size(0);
  STD_TORCH_CHECK(num_valid >= 0 && num_valid <= a.vocab, "num_valid: out of range");
  float* memory = dense_floats("kept", kept, {a.vocab, a.stride});
  a.kept = memory;
  a.num_valid = num_valid;
  a.bias = floats("bias", bias, a.vocab);
  a.softcap = static_cast<float>(softcap);
  a.out = memory;
  a.out_stride = bf16 ? 2 * a.stride : a.stride;
  a.out_bf16 = bf16;
  const int64_t* picked = nullptr;
  int64_t count = rows.rows;
  if (live.has_value()) {
    count = live->numel();
    check_vector("live", *live, ScalarType::Long, count);
    picked = static_cast<const int64_t*>(live->const_data_ptr());
    for (int64_t j = 0; j < count; ++j) {
      STD_TORCH_CHECK(picked[j] >= (j ? picked[j - 1] + 1 : 0) && picked[j] < rows.rows,
                      "live: expected ascending rows");
    }
  }
  if (count > 0) head_lanes_cpu(a, rows, g, picked, count);
}

// A matrix with dense rows.
void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns &&
                      t.scalar_type() == dtype && (columns < 2 || t.stride(1) == 1),
                  name, ": expected a matrix [", rows, ", ", columns, "] with dense rows, of float32, ",
                  "or of bfloat16 with its fellow");
}

HeadProduct head_product(const Tensor& dz, const Tensor& other, const Tensor& out, bool add) {
  HeadProduct p;
  p.vocab = dz.size(0);
  p.rows = dz.size(1);
  p.depth = other.size(1);
  STD_TORCH_CHECK(p.depth % 16 == 0, "depth: expected a multiple of 16, got ", p.depth);
  check_rows("dz", dz, p.vocab, p.rows);
  p.dz = static_cast<const float*>(dz.const_data_ptr());
  p.dz_stride = dz.stride(0);
  p.other = static_cast<const float*>(other.const_data_ptr());
  p.other_stride = other.stride(0);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.out_stride = out.stride(0);
  p.add = add;
  return p;
}

void head_dx_bf16(const Tensor& dz, const Tensor& weight, const Tensor& out) {
  HeadDot p;
  p.vocab = dz.size(0);
  p.rows = dz.size(1);
  p.depth = weight.size(1);
  STD_TORCH_CHECK(bf16_kernels() != nullptr, "dz: this machine has no bfloat16 dot products");
  STD_TORCH_CHECK(p.depth % 32 == 0, "depth: expected a multiple of 32, got ", p.depth);
  check_rows("dz", dz, p.vocab, p.rows, ScalarType::BFloat16);
  check_rows("weight", weight, p.vocab, p.depth, ScalarType::BFloat16);
  check_rows("out", out, p.rows, p.depth);
  p.dz = static_cast<const uint16_t*>(dz.const_data_ptr());
  p.dz_stride = dz.stride(0);
  p.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  p.weight_stride = weight.stride(0);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.out_stride = out.stride(0);
  if (p.rows > 0 && p.vocab > 0) head_dx_cpu(p);
}

void head_dx_op(const Tensor& dz, const Tensor& weight, const Tensor& out) {
  if (dz.scalar_type() == ScalarType::BFloat16) return head_dx_bf16(dz, weight, out);
  const HeadProduct p = head_product(dz, weight, out, false);
  check_rows("weight", weight, p.vocab, p.depth);
  check_rows("out", out, p.rows, p.depth);
  if (p.rows > 0 && p.vocab > 0) head_dx_cpu(p);
}

void head_dw_op(const Tensor& dz, const Tensor& hidden, const Tensor& out, bool add) {
  const HeadProduct p = head_product(dz, hidden, out, add);
  check_rows("hidden", hidden, p.rows, p.depth);
  check_rows("out", out, p.vocab, p.depth);
  if (p.rows > 0 && p.vocab > 0) head_dw_cpu(p);
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
  HeadGradArgs g =
      head_grads(a.rows, log_norm, log_norm_low, logp, entropy, grad_logp, grad_entropy);
  g.out = out.mutable_data_ptr();
  g.out_stride = out.stride(0);
  head_grad_cpu(a, g);
}

}  // namespace
}  // namespace m2k
