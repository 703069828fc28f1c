"""Mean negative log-prob at selected rows, with both gradients: where supervised heads are peers."""

from __future__ import annotations

from typing import Any

import torch
from head_common import LOSS_CASE, ChunkedLoss, budget, loss_settings, loss_shapes, selected_rows, torch_lce, whole
from torch.nn import functional as F

import m2kernels as mk
from m2train.bench import peers
from m2train.bench.case import Case, Fn, Setup, case


@case("linear_nll", shapes=loss_shapes(), smoke=(), **LOSS_CASE)
def linear_nll(s: Setup) -> Case:
    """Mean negative log-prob at some rows: supervised heads compute nothing else, so here they are peers."""
    rows = selected_rows(s, s.M / s.N)
    count = len(rows)
    inputs = (s.randn(s.N, s.D), s.randn(s.V, s.D, scale=3 * s.D**-0.5), s.randint(s.V, count), rows)
    seq, ones = torch.zeros_like(rows), torch.ones(1, device=s.device)

    def m2(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        """On-policy CISPO with advantage 1 is the sum of log-probs."""
        spec = mk.LossSpec(kind="cispo")
        return mk.linear_policy_loss(hidden, weight, target, None, ones, seq, denom=count, spec=spec, rows=rows).loss

    def full(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        everywhere = torch.full((len(hidden),), -100, dtype=torch.int64, device=hidden.device)
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, everywhere.index_copy(0, rows, target))

    def chunked(limit: float) -> Fn:
        def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
            selected = hidden.index_select(0, rows)
            total: torch.Tensor = ChunkedLoss.apply(selected, weight, target, lambda logp, _: -logp / count, limit)
            return total

        return run

    def torch_own(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden.index_select(0, rows), weight, target, options=options)

    return Case(
        oracle=chunked(8 * budget(s)),
        inputs=inputs,
        impls={
            "m2": m2,
            "torch": whole(s, full),
            "torch-chunked": chunked(budget(s)),
            "torch-lce": torch_lce(s, torch_own),
            "cce": peers.peer("cce", s.device, "cut_cross_entropy", lambda m: _mean_on_rows(m.linear_cross_entropy)),
            "quack": peers.peer("quack", s.device, "quack.linear_cross_entropy", _quack),
        },
        **loss_settings(s, count),
    )


def _mean_on_rows(fn: Fn) -> Fn:
    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        loss: torch.Tensor = fn(hidden.index_select(0, rows), weight, target)
        return loss

    return run


def _quack(module: Any) -> Fn:
    return _mean_on_rows(lambda h, w, y: module.chunked_linear_cross_entropy(h, w, y, reduction="mean"))
