"""LM head at selected rows: log-prob of a target from hidden states, with both gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import m2kernels as mk
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Setup, Skip, Subset, case, compiled

MODELS = ("smollm2-135m", "qwen3-1.7b", "qwen3-8b", "llama-3.1-8b", "qwen2.5-32b")
CPU_LIMIT = 3e11
"""FLOPs of a forward beyond which a CPU would take minutes."""


def _shapes() -> dict[str, dict[str, Any]]:
    small = shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 1024, (0.1, 0.5, 1.0))
    return small | shapes.heads(MODELS, 8192, (0.1, 0.35, 1.0))


def eager(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """All logits of the selected rows at once, in fp32 after the GEMM."""
    logits = F.linear(hidden.index_select(0, rows), weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None])[:, 0]


def fused(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """Chunks of rows; logits are computed again in backward."""
    logp: torch.Tensor = mk.linear_logprob(hidden, weight, target, rows=rows).logp
    return logp


def fast(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """The same without invariance to the batch."""
    logp: torch.Tensor = mk.linear_logprob(hidden, weight, target, rows=rows, invariant=False).logp
    return logp


def _on_rows(fn: Fn) -> Fn:
    """For heads that take hidden states of the scored rows alone and return a negative log-prob per row."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        return -fn(hidden.index_select(0, rows), weight, target)

    return run


def _verl(module: Any) -> Fn:
    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        logp: torch.Tensor = module.linear_cross_entropy(hidden.index_select(0, rows), weight, target, 1.0, "none")[0]
        return logp

    return run


@case(
    "lm_head",
    shapes=_shapes(),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=("qwen2.5-32b-8192-100pct",),
)
def lm_head(s: Setup) -> Case:
    """Log-probs of targets at some rows of a packed batch."""
    flops = 2.0 * s.M * s.D * s.V
    if s.device.type == "cpu" and flops > CPU_LIMIT:
        raise Skip(f"{flops:.1e} FLOPs a forward: for a GPU")
    hidden, weight = s.randn(s.N, s.D), s.randn(s.V, s.D, scale=s.D**-0.5)
    rows = torch.sort(torch.randperm(s.N, generator=s.generator)[: s.M]).values.to(s.device)
    size, part = s.dtype.itemsize, s.M // 2
    moved = (s.M * s.D + s.V * s.D) * size + 4 * s.M
    one: dict[str, Any] = {"device": s.device}
    return Case(
        oracle=eager,
        inputs=(hidden, weight, s.randint(s.V, s.M), rows),
        grad=s.randn(s.M, dtype=torch.float32) / s.M,
        wrt=(0, 1),
        impls={
            "m2": fused,
            "m2-fast": fast,
            "torch": eager,
            "compile": compiled(eager),
            "cce": peers.peer("cce", module="cut_cross_entropy", adapt=lambda m: _on_rows(_cce(m)), **one),
            "liger": peers.peer("liger", module="liger_kernel.ops", adapt=lambda m: _on_rows(_liger(m)), **one),
            "quack": Skip("quack's linear_cross_entropy has the reductions mean and sum only: no log-prob per row"),
            "verl": peers.peer("verl", module="verl.utils.kernel", adapt=_verl, **one),
        },
        # Least traffic: hidden rows and weight read once, both gradients written once; no logits at all.
        bytes={"fwd": moved, "both": 2.0 * moved + s.N * s.D * size},
        # Forward, and in backward two GEMMs: what any method must do. Recomputed logits are a method's own cost.
        flops={"fwd": flops, "both": 3 * flops},
        ours=("m2", "m2-fast"),
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
        out = module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, None, False)
        return out[0] if isinstance(out, tuple) else out

    module.LigerFusedLinearScaledCrossEntropyFunction  # noqa: B018  (an older version: the AttributeError is the reason)
    return run
