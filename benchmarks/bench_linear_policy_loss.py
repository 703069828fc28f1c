"""GRPO's loss straight from hidden states at selected rows, with both gradients."""

from __future__ import annotations

from typing import Any

import torch
from head_common import (
    DEVICE,
    EAGER_BYTES,
    EPS,
    FIRST,
    NIGHTLY,
    RUN,
    ChunkedLoss,
    baseline,
    budget,
    costs,
    eager,
    frozen,
    loss_shapes,
    selected_rows,
    trl_log_probs,
)
from torch.nn import functional as F

import m2kernels as mk
from m2train.bench import peers
from m2train.bench.case import Case, Fn, Impl, Setup, Skip, case, compiled

SPEC = mk.LossSpec()


def token_losses(logp: Any, old: Any, advantage: Any) -> torch.Tensor:
    """GRPO's clipped objective per token, negated."""
    ratio = (logp - old).exp()
    low, high = 1 - SPEC.clip_low, 1 + SPEC.clip_high
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


@case(
    "linear_policy_loss",
    shapes=loss_shapes() | frozen(("smollm2-135m-2048-35pct", "qwen3-1.7b-256-35pct")),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=NIGHTLY,
    first=FIRST,
)
def linear_policy_loss(s: Setup) -> Case:
    """GRPO's loss straight from hidden states, gradients included."""
    rows = selected_rows(s, s.M / s.N)
    count = len(rows)
    stated = costs(s, count)
    hidden, weight = s.randn(s.N, s.D), s.randn(s.V, s.D, scale=3 * s.D**-0.5)
    target, seq = s.randint(s.V, count), rows // RUN
    with torch.no_grad():
        logp = mk.linear_logprob(hidden, weight, target, rows=rows).logp
    # Ratios stay off the clips: a token that one dtype clips and another does not would be all of the error, and
    # rows without a gradient, which ours skips, would flatter it.
    old = logp + 0.2 * (s.rand(count, dtype=torch.float32) - 0.5)
    inputs = (hidden, weight, target, rows, old, s.randn(s.N // RUN, dtype=torch.float32), seq)
    denom = float(count)

    def m2(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
        found = mk.linear_policy_loss(hidden, weight, target, old, advantage, seq, denom=denom, spec=SPEC, rows=rows)
        return found.loss

    def two_ops(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
        logp = mk.linear_logprob(hidden, weight, target, rows=rows).logp
        return mk.policy_loss(logp, old, advantage, seq, denom=denom, spec=SPEC).loss

    def full(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
        everywhere = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device).index_copy(0, rows, target)
        logp = eager(hidden, weight, everywhere, torch.arange(len(hidden), device=hidden.device))[rows]
        return token_losses(logp, old, advantage[seq]).sum() / denom

    def gathered(
        hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any
    ) -> torch.Tensor:
        return token_losses(eager(hidden, weight, target, rows), old, advantage[seq]).sum() / denom

    def chunked(limit: float) -> Fn:
        def run(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
            each = advantage[seq]

            def loss(logp: torch.Tensor, part: slice) -> torch.Tensor:
                return token_losses(logp, old[part], each[part]) / denom

            total: torch.Tensor = ChunkedLoss.apply(hidden.index_select(0, rows), weight, target, loss, limit)
            return total

        return run

    def trl(module: Any) -> Fn:
        logp_of = trl_log_probs(module)

        def run(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
            return token_losses(logp_of(hidden, weight, target, rows), old, advantage[seq]).sum() / denom

        return run

    def torch_own(
        hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any
    ) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        selected = hidden.index_select(0, rows)
        nll = F.linear_cross_entropy(selected, weight, target, reduction="none", options=options)
        return token_losses(-nll, old, advantage[seq]).sum() / denom

    one: dict[str, Any] = {"device": s.device}
    impls: dict[str, Impl] = {
        "m2": m2,
        "m2-two-ops": two_ops,
        "torch": full if baseline(s) == "torch" else Skip("full logits of all rows do not fit"),
        "torch-gathered": gathered if 4.0 * count * s.V < EAGER_BYTES else Skip("full logits do not fit"),
        "torch-chunked": chunked(budget(s)),
        "compile": compiled(full) if baseline(s) == "torch" else Skip("full logits of all rows do not fit"),
        "torch-lce": torch_own
        if hasattr(torch.nn, "LinearCrossEntropyOptions")
        else Skip(f"torch {torch.__version__} has no chunked F.linear_cross_entropy"),
        "liger": peers.peer(
            "liger-chunked", module="liger_kernel.chunked_loss", adapt=lambda m: _liger_grpo(m, s, count), **one
        ),
        "trl": peers.peer("trl", module="trl.kernels.chunked_logprob", adapt=trl, **one),
    }
    return Case(
        oracle=chunked(8 * budget(s)),
        inputs=inputs,
        grad=torch.ones((), device=s.device),
        wrt=(0,) if s.dims.get("frozen") else (0, 1),
        impls=impls,
        baseline=baseline(s),
        ours=("m2", "m2-two-ops"),
        eps=EPS[s.dtype],
        pure=s.V * s.D * 4 < 1e9,  # a second set of inputs and their float64 gradients would be 10 GB
        **stated,
        **DEVICE,
    )


def _liger_grpo(module: Any, s: Setup, count: int) -> Fn:
    """Liger's chunked loss on the replies alone, [sequences, reply, D], in one chunk: its fastest; not compiled."""
    sequences = s.N // RUN
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=sequences,
        epsilon_low=SPEC.clip_low,
        epsilon_high=SPEC.clip_high,
        loss_type="dr_grpo",
        max_completion_length=count // sequences,
    )

    def run(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
        def square(x: torch.Tensor) -> torch.Tensor:
            return x.view(sequences, count // sequences, *x.shape[1:])

        mask = torch.ones_like(square(target))
        value: torch.Tensor = loss(
            square(hidden.index_select(0, rows)),
            weight,
            square(target),
            mask,
            advantage,
            old_per_token_logps=square(old),
        )[0]
        return value

    return run
