"""Log-probs of targets at selected rows straight from hidden states, with both gradients; some with entropies."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from head_common import (
    DEVICE,
    EAGER_BYTES,
    FIRST,
    MODELS,
    NIGHTLY,
    SMOKE,
    eager,
    eager_entropy,
    gemm_flops,
    gemms,
    loss_shapes,
    trl_log_probs,
)
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Setup, Skip, Subset, case, compiled

VERL = "verl.utils.kernel.linear_cross_entropy"
ENTROPY = "-entropy"
"""Ends the names of shapes at which the entropy of each row is asked for as well."""


def _shapes() -> dict[str, dict[str, Any]]:
    small = shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 1024, (0.1, 0.5, 1.0))
    large = shapes.heads(MODELS, 8192, (0.1, 0.35, 1.0))
    forward = shapes.heads(("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"), 32768, (1.0,))
    every = small | loss_shapes() | large | forward
    wanted = [name for name in loss_shapes() if name.endswith("-100pct")]
    wanted += ["smollm2-135m-128-50pct", "smollm2-135m-1024-100pct"]
    return every | {name + ENTROPY: every[name] | {"entropy": True} for name in wanted}


SHAPES = _shapes()


def fused(entropy: bool) -> Fn:
    """Chunks of rows; logits are computed again in backward."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        found = mk.linear_logprob(hidden, weight, target, rows=rows, entropy=entropy)
        return tuple(found) if entropy else found.logp

    return run


def in_parts(whole: Fn) -> Fn:
    """`whole` for 2048 rows at a time, logits computed again in backward: what fits everywhere."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        parts = zip(target.split(2048), rows.split(2048), strict=True)
        found = [checkpoint(whole, hidden, weight, y, r, use_reentrant=False) for y, r in parts]
        if isinstance(found[0], torch.Tensor):
            return torch.cat(found)
        return tuple(map(torch.cat, zip(*found, strict=True)))

    return run


def on_logits(entropy: bool) -> Fn:
    """Logits by torch's GEMM, which are kept: forward, what the invariance of the fused one costs or spares."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        found = mk.logprob(torch.nn.functional.linear(hidden[rows], weight), target, entropy=entropy)
        return tuple(found) if entropy else found.logp

    return run


def _on_rows(fn: Fn) -> Fn:
    """For heads that take hidden states of the scored rows alone and return a negative log-prob per row first."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        found = fn(hidden.index_select(0, rows), weight, target)
        return -found if isinstance(found, torch.Tensor) else (-found[0], *found[1:])

    return run


@case(
    "lm_head",
    shapes=SHAPES,
    dtypes=(torch.bfloat16, torch.float32),
    smoke=(SMOKE,),
    nightly=(
        "qwen2.5-32b-8192-100pct",
        *NIGHTLY,
        *(f"{name}{ENTROPY}" for name in NIGHTLY if f"{name}{ENTROPY}" in SHAPES),
    ),
    first=(*FIRST, f"qwen3-8b-4096-100pct{ENTROPY}"),
)
def lm_head(s: Setup) -> Case:
    """Log-probs of targets at some rows of a packed batch; at shapes named so with the entropies there."""
    flops = gemm_flops(s, s.M)
    entropy = bool(s.dims.get("entropy"))
    hidden, weight = s.randn(s.N, s.D), s.randn(s.V, s.D, scale=s.D**-0.5)
    rows = torch.sort(torch.randperm(s.N, generator=s.generator)[: s.M]).values.to(s.device)
    target = s.randint(s.V, s.M)
    size, part = s.dtype.itemsize, s.M // 2
    moved = (s.M * s.D + s.V * s.D) * size + 4 * s.M * (1 + entropy)
    one: dict[str, Any] = {"device": s.device}
    fits = 4.0 * s.M * s.V < EAGER_BYTES
    full = eager_entropy if entropy else eager
    upstream = tuple(s.randn(s.M, dtype=torch.float32) / s.M for _ in range(1 + entropy))
    cce = peers.peer("cce", module="cut_cross_entropy", adapt=lambda m: _on_rows(_cce(m)), **one)
    return Case(
        oracle=in_parts(full),
        inputs=(hidden, weight, target, rows),
        grad=upstream if entropy else upstream[0],
        wrt=(0, 1),
        impls={
            "m2": fused(entropy),
            "m2-on-logits": on_logits(entropy) if fits else Skip("full logits do not fit"),
            "torch": full if fits else Skip("full logits do not fit"),
            "torch-chunked": in_parts(full),
            "compile": compiled(full) if fits else Skip("full logits do not fit"),
            "cce": Skip("cut-cross-entropy has no entropy") if entropy else cce,
            "liger": peers.peer(
                "liger", module="liger_kernel.ops", adapt=lambda m: _on_rows(_liger(m, entropy)), **one
            ),
            "quack": Skip("quack's linear_cross_entropy has the reductions mean and sum only: no log-prob per row"),
            "verl": peers.peer("verl", module=VERL, adapt=lambda m: _verl(m, entropy), bare=True, **one),
            "trl": peers.peer(
                "trl", module="trl.kernels.chunked_logprob", adapt=lambda m: trl_log_probs(m, entropy), **one
            ),
            "gemms": gemms(s.M, lambda logits: (logits[:, 0], logits[:, 1]) if entropy else logits[:, 0]),
        },
        # Least traffic: hidden rows and weight read once, both gradients written once; no logits at all.
        bytes={"fwd": moved, "both": 2.0 * moved + s.N * s.D * size},
        # Forward, and in backward two GEMMs: what any method must do. Recomputed logits are a method's own cost.
        flops={"fwd": flops, "both": 3 * flops},
        baseline="torch" if fits else "torch-chunked",
        ours=("m2", "m2-on-logits"),
        **DEVICE,
        subset=Subset(
            inputs=lambda x: (x[0], x[1], x[2][:part], x[3][:part]),
            output=lambda y: tuple(x[:part] for x in y) if entropy else y[:part],
        ),
    )


def _cce(module: Any) -> Fn:
    def run(hidden: Any, weight: Any, target: Any) -> torch.Tensor:
        loss: torch.Tensor = module.linear_cross_entropy(hidden, weight, target, reduction="none")
        return loss

    return run


def _liger(module: Any, entropy: bool) -> Fn:
    """The Hopper kernel of 0.8.2 and later: negative log-prob per row, with a temperature, and its entropy."""

    def run(hidden: Any, weight: Any, target: Any) -> Any:
        # After the temperature: the target to ignore, its tiles of a cluster (both at their defaults), the entropy.
        out = module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, entropy)
        nll = out[0] if isinstance(out, tuple) else out
        return (nll, out[1]) if entropy else nll

    module.LigerFusedLinearScaledCrossEntropyFunction  # noqa: B018  (an older version: the AttributeError is the reason)
    return run


def _verl(module: Any, entropy: bool) -> Fn:
    """The kernel file alone: the package around it wants a whole trainer. Its Triton kernels are imported late."""
    importlib.import_module(f"{VERL.rpartition('.')[0]}.kernels")

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        found = module.linear_cross_entropy(hidden.index_select(0, rows), weight, target, 1.0, "none")
        return found if entropy else found[0]

    return run
