"""Log-probs of targets at selected rows straight from hidden states, with both gradients."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from head_common import DEVICE, EAGER_BYTES, FIRST, MODELS, NIGHTLY, eager, gemm_flops, loss_shapes, trl_log_probs
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Setup, Skip, Subset, case, compiled

VERL = "verl.utils.kernel.linear_cross_entropy"


def _shapes() -> dict[str, dict[str, Any]]:
    small = shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 1024, (0.1, 0.5, 1.0))
    large = shapes.heads(MODELS, 8192, (0.1, 0.35, 1.0))
    forward = shapes.heads(("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"), 32768, (1.0,))
    return small | loss_shapes() | large | forward


def fused(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """Chunks of rows; logits are computed again in backward."""
    logp: torch.Tensor = mk.linear_logprob(hidden, weight, target, rows=rows).logp
    return logp


def in_parts(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """The same for 2048 rows at a time, logits computed again in backward: what fits everywhere."""
    parts = zip(target.split(2048), rows.split(2048), strict=True)
    return torch.cat([checkpoint(eager, hidden, weight, y, r, use_reentrant=False) for y, r in parts])


def on_logits(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """Logits by torch's GEMM, which are kept: forward, what the invariance of the fused one costs or spares."""
    logp: torch.Tensor = mk.logprob(torch.nn.functional.linear(hidden[rows], weight), target).logp
    return logp


def _on_rows(fn: Fn) -> Fn:
    """For heads that take hidden states of the scored rows alone and return a negative log-prob per row."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        return -fn(hidden.index_select(0, rows), weight, target)

    return run


@case(
    "lm_head",
    shapes=_shapes(),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=("qwen2.5-32b-8192-100pct", *NIGHTLY),
    first=FIRST,
)
def lm_head(s: Setup) -> Case:
    """Log-probs of targets at some rows of a packed batch."""
    flops = gemm_flops(s, s.M)
    hidden, weight = s.randn(s.N, s.D), s.randn(s.V, s.D, scale=s.D**-0.5)
    rows = torch.sort(torch.randperm(s.N, generator=s.generator)[: s.M]).values.to(s.device)
    size, part = s.dtype.itemsize, s.M // 2
    moved = (s.M * s.D + s.V * s.D) * size + 4 * s.M
    one: dict[str, Any] = {"device": s.device}
    whole = 4.0 * s.M * s.V < EAGER_BYTES
    return Case(
        oracle=in_parts,
        inputs=(hidden, weight, s.randint(s.V, s.M), rows),
        grad=s.randn(s.M, dtype=torch.float32) / s.M,
        wrt=(0, 1),
        impls={
            "m2": fused,
            "m2-on-logits": on_logits if whole else Skip("full logits do not fit"),
            "torch": eager if whole else Skip("full logits do not fit"),
            "torch-chunked": in_parts,
            "compile": compiled(eager) if whole else Skip("full logits do not fit"),
            "cce": peers.peer("cce", module="cut_cross_entropy", adapt=lambda m: _on_rows(_cce(m)), **one),
            "liger": peers.peer("liger", module="liger_kernel.ops", adapt=lambda m: _on_rows(_liger(m)), **one),
            "quack": Skip("quack's linear_cross_entropy has the reductions mean and sum only: no log-prob per row"),
            "verl": peers.peer("verl", module=VERL, adapt=_verl, bare=True, **one),
            "trl": peers.peer("trl", module="trl.kernels.chunked_logprob", adapt=trl_log_probs, **one),
        },
        # Least traffic: hidden rows and weight read once, both gradients written once; no logits at all.
        bytes={"fwd": moved, "both": 2.0 * moved + s.N * s.D * size},
        # Forward, and in backward two GEMMs: what any method must do. Recomputed logits are a method's own cost.
        flops={"fwd": flops, "both": 3 * flops},
        baseline="torch" if whole else "torch-chunked",
        ours=("m2", "m2-on-logits"),
        **DEVICE,
        subset=Subset(inputs=lambda x: (x[0], x[1], x[2][:part], x[3][:part]), output=lambda y: y[:part]),
    )


def _cce(module: Any) -> Fn:
    def run(hidden: Any, weight: Any, target: Any) -> torch.Tensor:
        loss: torch.Tensor = module.linear_cross_entropy(hidden, weight, target, reduction="none")
        return loss

    return run


def _liger(module: Any) -> Fn:
    """The Hopper kernel of 0.8.2 and later: negative log-prob per row, with a temperature."""

    def run(hidden: Any, weight: Any, target: Any) -> torch.Tensor:
        out = module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0)
        return out[0] if isinstance(out, tuple) else out

    module.LigerFusedLinearScaledCrossEntropyFunction  # noqa: B018  (an older version: the AttributeError is the reason)
    return run


def _verl(module: Any) -> Fn:
    """The kernel file alone: the package around it wants a whole trainer. Its Triton kernels are imported late."""
    importlib.import_module(f"{VERL.rpartition('.')[0]}.kernels")

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        logp: torch.Tensor = module.linear_cross_entropy(hidden.index_select(0, rows), weight, target, 1.0, "none")[0]
        return logp

    return run
