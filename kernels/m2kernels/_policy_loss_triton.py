"""Policy loss by Triton: at most three launches forward, one backward.

    sequence_kernel   gspo, or a TIS weight per sequence: what each sequence gives to its tokens
    token_kernel      every token: its term, its gradients, and sums per block of tokens
    finish_kernel     one program adds the sums up in a fixed order; for gspo the others give each
                      token its share of its sequence's slope

No atomics, no host sync: a program takes the sequences that start in its tile of tokens, so no
table of offsets is needed.
"""

import math
from typing import Any

import torch
import triton

from m2kernels import _policy_loss_triton_kernels as kernels
from m2kernels._triton import Launch
from m2kernels.metrics import FINAL_METRICS, RAW_METRICS

GSPO: int = kernels.GSPO.value
NUM_SLOTS = 16  # partial sums of a block: the raw metrics, the objective, one to make a power of two
TOKEN_META = {"BLOCK": 512, "num_warps": 4}
SEQUENCE_META = {"TILE": 32, "BLOCK": 512, "num_warps": 4}
FINISH_META = {"BLOCK_PARTS": 64, "SLOTS": NUM_SLOTS, **SEQUENCE_META}
SCALE_META = {"BLOCK": 1024, "num_warps": 4}


def forward_launches(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    mask: torch.Tensor | None,
    entropy: torch.Tensor | None,
    rollout_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    kind: int,
    kl: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    entropy_coef: float,
    tis_cap: float,
    tis_sequence: bool,
    per_token: bool,
    denom: float,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """The launches of the forward, in order, and what they write: loss, stats, both gradients."""
    tokens = logp.shape[0]
    old_logp = logp if old_logp is None else old_logp
    loss, stats = logp.new_empty(()), logp.new_empty(len(RAW_METRICS) + len(FINAL_METRICS))
    grad_logp = torch.empty_like(logp)
    grad_entropy = logp.new_empty(tokens if entropy is not None and entropy_coef != 0 else 0)
    gspo = kind == GSPO
    tis_sequence = tis_sequence and rollout_logp is not None
    parts = triton.cdiv(tokens, TOKEN_META["BLOCK"])
    tiles = triton.cdiv(tokens, SEQUENCE_META["TILE"])
    partial = logp.new_empty((NUM_SLOTS, parts), dtype=torch.float64)
    log_ratio = share = tis_log = direct = via_ratio = None
    launches: list[Launch] = []
    args: tuple[Any, ...]
    if gspo or tis_sequence:
        log_ratio, share, tis_log = logp.new_empty((3, tokens), dtype=torch.float64)
        tis_log = tis_log if tis_sequence else None
        rollout = rollout_logp if tis_sequence else None
        args = (logp, old_logp, rollout, seq, mask, log_ratio, share, tis_log, tokens)
        launches.append(Launch(kernel=kernels.sequence_kernel, grid=(tiles,), args=args, meta=SEQUENCE_META))
    if gspo:
        direct, via_ratio = logp.new_empty((2, tokens), dtype=torch.float64)
    args = (logp, old_logp, advantage, seq, mask, entropy, rollout_logp, ref_logp, log_ratio, share, tis_log)
    args = (*args, grad_logp, grad_entropy if grad_entropy.numel() else None, direct, via_ratio, partial)
    args = (*args, tokens, advantage.shape[0])
    args = (*args, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, tis_cap, denom)
    meta: dict[str, Any] = {"KIND": kind, "KL": kl, "PER_TOKEN": per_token, "APPLY_TIS": math.isfinite(tis_cap)}
    launches.append(Launch(kernel=kernels.token_kernel, grid=(parts,), args=args, meta=meta | TOKEN_META))
    args = (partial, stats, loss, seq, mask, share, direct, via_ratio, grad_logp, tokens, parts, denom)
    grid = (1 + tiles,) if gspo else (1,)
    launches.append(Launch(kernel=kernels.finish_kernel, grid=grid, args=args, meta=FINISH_META))
    return launches, (loss, stats, grad_logp, grad_entropy)


def policy_loss_triton_fwd(logp: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    """Arguments of the native op, contiguous -> loss, stats, gradient of logp, of entropy."""
    launches, results = forward_launches(logp, *args)
    for launch in launches:
        launch.run(logp.device)
    return results


def scale_launch(
    grad: torch.Tensor, inputs: tuple[torch.Tensor, torch.Tensor], outputs: tuple[torch.Tensor, torch.Tensor]
) -> Launch:
    """The launch of the backward: gradients of logp and of entropy, each times `grad`."""
    m, e = (x.shape[0] for x in inputs)
    return Launch(
        kernel=kernels.scale_kernel,
        grid=(triton.cdiv(max(m, e), SCALE_META["BLOCK"]),),
        args=(grad, inputs[0], outputs[0], m, inputs[1], outputs[1], e),
        meta=SCALE_META,
    )


def policy_loss_triton_bwd(
    grad: torch.Tensor, grad_logp: torch.Tensor, grad_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream gradient f32, 0-d, and what the forward left -> gradients of logp and entropy."""
    outputs = torch.empty_like(grad_logp), torch.empty_like(grad_entropy)
    scale_launch(grad, (grad_logp, grad_entropy), outputs).run(grad.device)
    return outputs
