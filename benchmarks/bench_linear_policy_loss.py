"""GRPO's loss straight from hidden states at selected rows, with both gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from head_common import (
    EAGER_BYTES,
    LOSS_CASE,
    RUN,
    SMOKE,
    ChunkedLoss,
    TokenLoss,
    budget,
    eager,
    frozen,
    gemms,
    idle,
    loss_settings,
    loss_shapes,
    selected_rows,
    torch_lce,
    trl_log_probs,
    whole,
)
from torch.nn import functional as F

import m2kernels as mk
from m2train.bench import peers
from m2train.bench.case import Case, Fn, Setup, Skip, case, compiled

SPEC = mk.LossSpec()


class Batch(NamedTuple):
    """Inputs of every implementation: N packed rows, of which M are selected, of S sequences."""

    hidden: torch.Tensor
    """[N, D]."""
    weight: torch.Tensor
    """[V, D]."""
    target: torch.Tensor
    """int64 [M]."""
    rows: torch.Tensor
    """int64 [M]."""
    old: torch.Tensor
    """Old log-probs, float32 [M]."""
    advantage: torch.Tensor
    """float32 [S]."""
    seq: torch.Tensor
    """int64 [M]: the sequence of a row."""

    @property
    def selected(self) -> torch.Tensor:
        return self.hidden.index_select(0, self.rows)

    @property
    def denom(self) -> float:
        return float(len(self.rows))

    def loss(self, logp: torch.Tensor) -> torch.Tensor:
        return self.token_losses(logp, slice(None)).sum()

    def token_losses(self, logp: torch.Tensor, part: slice) -> torch.Tensor:
        """GRPO's clipped objective per token of a part of the selected rows, negated, over the denominator."""
        ratio = (logp - self.old[part]).exp()
        low, high = 1 - SPEC.clip_low, 1 + SPEC.clip_high
        advantage = self.advantage[self.seq[part]]
        return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage) / self.denom


def m2(*inputs: Any) -> torch.Tensor:
    x = Batch(*inputs)
    return mk.linear_policy_loss(
        x.hidden, x.weight, x.target, x.old, x.advantage, x.seq, denom=x.denom, spec=SPEC, rows=x.rows
    ).loss


def two_ops(*inputs: Any) -> torch.Tensor:
    x = Batch(*inputs)
    logp = mk.linear_logprob(x.hidden, x.weight, x.target, rows=x.rows).logp
    return mk.policy_loss(logp, x.old, x.advantage, x.seq, denom=x.denom, spec=SPEC).loss


def full(*inputs: Any) -> torch.Tensor:
    x = Batch(*inputs)
    every = torch.arange(len(x.hidden), device=x.hidden.device)
    targets = torch.zeros_like(every).index_copy(0, x.rows, x.target)
    return x.loss(eager(x.hidden, x.weight, targets, every)[x.rows])


def gathered(*inputs: Any) -> torch.Tensor:
    x = Batch(*inputs)
    return x.loss(eager(x.hidden, x.weight, x.target, x.rows))


def chunked(limit: float) -> Fn:
    def run(*inputs: Any) -> torch.Tensor:
        x = Batch(*inputs)
        loss: TokenLoss = x.token_losses
        total: torch.Tensor = ChunkedLoss.apply(x.selected, x.weight, x.target, loss, limit)
        return total

    return run


def torch_own(*inputs: Any) -> torch.Tensor:
    x = Batch(*inputs)
    options = torch.nn.LinearCrossEntropyOptions()
    nll = F.linear_cross_entropy(x.selected, x.weight, x.target, reduction="none", options=options)
    return x.loss(-nll)


def trl(module: Any) -> Fn:
    logp_of = trl_log_probs(module)

    def run(*inputs: Any) -> torch.Tensor:
        x = Batch(*inputs)
        return x.loss(logp_of(x.hidden, x.weight, x.target, x.rows))

    return run


def liger(module: Any, sequences: int, reply: int) -> Fn:
    """Liger's chunked loss on the replies alone, [sequences, reply, D], in one chunk: its fastest; not compiled."""
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=sequences,
        epsilon_low=SPEC.clip_low,
        epsilon_high=SPEC.clip_high,
        loss_type="dr_grpo",
        max_completion_length=reply,
    )

    def run(*inputs: Any) -> torch.Tensor:
        x = Batch(*inputs)

        def square(per_row: torch.Tensor) -> torch.Tensor:
            return per_row.view(sequences, reply, *per_row.shape[1:])

        target = square(x.target)
        mask, old = torch.ones_like(target), square(x.old)
        value: torch.Tensor
        value, _ = loss(square(x.selected), x.weight, target, mask, x.advantage, old_per_token_logps=old)
        return value

    return run


def batch(s: Setup) -> Batch:
    rows = selected_rows(s, s.M / s.N)
    count = len(rows)
    hidden, weight = s.randn(s.N, s.D), s.randn(s.V, s.D, scale=3 * s.D**-0.5)
    target = s.randint(s.V, count)
    with torch.no_grad():
        logp = mk.linear_logprob(hidden, weight, target, rows=rows).logp
    # Ratios stay off the clips: a token that one dtype clips and another does not would be all of the error, and
    # rows without a gradient, which ours skips, would flatter it.
    old = logp + 0.2 * (s.rand(count, dtype=torch.float32) - 0.5)
    advantage = s.randn(s.N // RUN, dtype=torch.float32)
    advantage[: round(len(advantage) * s.dims.get("idle", 0.0))] = 0
    return Batch(hidden, weight, target, rows, old, advantage, rows // RUN)


@case(
    "linear_policy_loss",
    shapes=loss_shapes()
    | frozen(("smollm2-135m-2048-35pct", "qwen3-1.7b-256-35pct"))
    | idle(("smollm2-135m-2048-35pct", "qwen3-8b-4096-35pct", "qwen2.5-32b-32768-35pct"), 0.4),
    smoke=(SMOKE,),
    **LOSS_CASE,
)
def linear_policy_loss(s: Setup) -> Case:
    """GRPO's loss straight from hidden states, gradients included."""
    inputs = batch(s)
    count, sequences = len(inputs.rows), len(inputs.advantage)
    return Case(
        oracle=chunked(8 * budget(s)),
        inputs=tuple(inputs),
        impls={
            "m2": m2,
            "m2-two-ops": two_ops,
            "torch": whole(s, full),
            "torch-gathered": gathered if 4.0 * count * s.V < EAGER_BYTES else Skip("full logits do not fit"),
            "torch-chunked": chunked(budget(s)),
            "compile": whole(s, compiled(full)),
            "torch-lce": torch_lce(s, torch_own),
            "liger": peers.peer(
                "liger-chunked",
                s.device,
                "liger_kernel.chunked_loss",
                lambda module: liger(module, sequences, count // sequences),
            ),
            "trl": peers.peer("trl", s.device, "trl.kernels.chunked_logprob", trl),
            "gemms": gemms(count, lambda logits: logits[0, 0]),
        },
        ours=("m2", "m2-two-ops"),
        **loss_settings(s, count),
    )
