"""LM head at selected rows: log-probs, the policy loss and the mean negative log-prob, with both gradients.

The implementations that are written out here are plain torch:

torch           full logits of all rows: the baseline
torch-gathered  full logits of the selected rows
torch-chunked   the selected rows in chunks, gradients formed with the loss and summed in float32: what one writes by
                hand when memory is short
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2train.bench import peers, shapes
from m2train.bench.case import Case, Fn, Impl, Setup, Skip, Subset, case, compiled

MODELS = ("smollm2-135m", "qwen3-1.7b", "qwen3-8b", "llama-3.1-8b", "qwen2.5-32b")
CPU_LIMIT = 3e11
"""FLOPs of a forward over the selected rows beyond which a CPU would take minutes."""
EAGER_BYTES = 2e10
"""Full float32 logits beyond which the baseline takes the selected rows in chunks: a GPU holds no three copies."""
CHUNK_BYTES = 64 << 20
"""Logits of a chunk of torch-chunked on a CPU; sixteen times that on a GPU, as in the op."""
SPEC = mk.LossSpec()
EPS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""A loss is one number, on which the baseline is right by luck; torch sums a narrow gradient in its own dtype.

The tests of the ops hold them to far less."""
DEVICE: dict[str, Any] = {"oracle_device": "same", "cuda_timer": "events"}
"""Float64 would take minutes on a CPU; rows with a gradient are counted on the host, so there is no graph."""
RUN = 64
"""Packed rows of a sequence, prompt and reply: those of the reply, at its end, are selected."""


def _log_probs_shapes() -> dict[str, dict[str, Any]]:
    small = shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 1024, (0.1, 0.5, 1.0))
    large = shapes.heads(MODELS, 8192, (0.1, 0.35, 1.0))
    forward = shapes.heads(("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"), 32768, (1.0,))
    return small | _loss_shapes() | large | forward


def _loss_shapes() -> dict[str, dict[str, Any]]:
    cpu = shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 2048, (0.35,))
    cpu |= shapes.heads(("qwen3-1.7b",), 256, (0.35,))
    gpu: dict[str, dict[str, Any]] = {}
    for tokens in (4096, 16384, 32768):
        gpu |= shapes.heads(("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"), tokens, (0.35, 1.0))
    return cpu | gpu


NIGHTLY = tuple(name for name in _loss_shapes() if "16384" in name or ("32768" in name and "qwen2.5" not in name))
VERL = "verl.utils.kernel.linear_cross_entropy"
FIRST = ("qwen3-8b-4096-35pct", "qwen3-8b-4096-100pct")


def _flops(s: Setup, rows: int) -> float:
    flops = 2.0 * rows * s.D * s.V
    if s.device.type == "cpu" and flops > CPU_LIMIT:
        raise Skip(f"{flops:.1e} FLOPs a forward: for a GPU")
    return flops


# ------------------------------------------------------------------------------------------------- log-probs


def eager(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """All logits of the selected rows at once, in fp32 after the GEMM."""
    logits = F.linear(hidden.index_select(0, rows), weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None])[:, 0]


def fused(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """Chunks of rows; logits are computed again in backward."""
    logp: torch.Tensor = mk.linear_logprob(hidden, weight, target, rows=rows).logp
    return logp


def in_parts(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """The same for 2048 rows at a time, logits computed again in backward: what fits everywhere."""
    parts = zip(target.split(2048), rows.split(2048), strict=True)
    return torch.cat([checkpoint(eager, hidden, weight, y, r, use_reentrant=False) for y, r in parts])


def fast(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """The same without invariance to the batch."""
    logp: torch.Tensor = mk.linear_logprob(hidden, weight, target, rows=rows, invariant=False).logp
    return logp


def _on_rows(fn: Fn) -> Fn:
    """For heads that take hidden states of the scored rows alone and return a negative log-prob per row."""

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        return -fn(hidden.index_select(0, rows), weight, target)

    return run


@case(
    "lm_head",
    shapes=_log_probs_shapes(),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=("qwen2.5-32b-8192-100pct", *NIGHTLY),
    first=FIRST,
)
def lm_head(s: Setup) -> Case:
    """Log-probs of targets at some rows of a packed batch."""
    flops = _flops(s, s.M)
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
            "m2-fast": fast,
            "torch": eager if whole else Skip("full logits do not fit"),
            "torch-chunked": in_parts,
            "compile": compiled(eager) if whole else Skip("full logits do not fit"),
            "cce": peers.peer("cce", module="cut_cross_entropy", adapt=lambda m: _on_rows(_cce(m)), **one),
            "liger": peers.peer("liger", module="liger_kernel.ops", adapt=lambda m: _on_rows(_liger(m)), **one),
            "quack": Skip("quack's linear_cross_entropy has the reductions mean and sum only: no log-prob per row"),
            "verl": peers.peer("verl", module=VERL, adapt=_verl, bare=True, **one),
            "trl": peers.peer("trl", module="trl.kernels.chunked_logprob", adapt=_trl, **one),
        },
        # Least traffic: hidden rows and weight read once, both gradients written once; no logits at all.
        bytes={"fwd": moved, "both": 2.0 * moved + s.N * s.D * size},
        # Forward, and in backward two GEMMs: what any method must do. Recomputed logits are a method's own cost.
        flops={"fwd": flops, "both": 3 * flops},
        baseline="torch" if whole else "torch-chunked",
        ours=("m2", "m2-fast"),
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


def _trl(module: Any) -> Fn:
    """TRL's chunked path: vocabulary chunks of 8192, its default, and an online log-sum-exp."""
    importlib.import_module("trl.trainer.utils")  # its backward asks for it

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        selected = hidden.index_select(0, rows)
        logp: torch.Tensor = module.ChunkedLogProbFunction.apply(
            selected, weight, None, target, 1.0, 8192, None, 1.0, ()
        )[0]
        return logp

    return run


# ------------------------------------------------------------------------------------------------- losses


def token_losses(logp: Any, old: Any, advantage: Any) -> torch.Tensor:
    """GRPO's clipped objective per token, negated."""
    ratio = (logp - old).exp()
    low, high = 1 - SPEC.clip_low, 1 + SPEC.clip_high
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]


class _Chunked(torch.autograd.Function):
    """A loss that is a sum over rows, in chunks of rows; gradients are formed with it, in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, loss: TokenLoss, budget: float
    ) -> torch.Tensor:
        rows = len(hidden)
        parts = max(1, -(-rows * len(weight) * 4 // int(budget)))
        step = -(-rows // parts)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs = any(ctx.needs_input_grad)
        total = hidden.new_zeros((), dtype=wide)
        to_hidden, to_weight = torch.empty_like(hidden), None
        for start in range(0, rows, step):
            part = slice(start, start + step)
            h, w = hidden[part].detach(), weight.detach()
            with torch.set_grad_enabled(needs):
                leaves = [h.requires_grad_(needs), w.requires_grad_(needs)]
                log_p = F.linear(*leaves).to(wide).log_softmax(-1)
                value = loss(log_p.gather(1, target[part, None])[:, 0], part).sum()
            total += value.detach()
            if not needs:
                continue
            to_hidden[part], dw = torch.autograd.grad(value, leaves)
            if parts == 1:
                to_weight = dw
            elif to_weight is None:
                to_weight = dw.to(wide)
            else:
                to_weight += dw
        ctx.grads = (to_hidden, to_weight.to(weight.dtype)) if to_weight is not None else None
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        to_hidden, to_weight = ctx.grads
        if float(grad) != 1.0:
            to_hidden, to_weight = to_hidden * grad, to_weight * grad
        return to_hidden, to_weight, None, None, None


def _selected(s: Setup, share: float) -> torch.Tensor:
    """The last rows of each sequence: int64 [M]."""
    row = torch.arange(s.N)
    return row[row % RUN >= RUN - max(1, int(RUN * share + 0.5))].to(s.device)


def _budget(s: Setup) -> float:
    return CHUNK_BYTES if s.device.type == "cpu" else 16 * CHUNK_BYTES


def _baseline(s: Setup) -> str:
    return "torch" if 4.0 * s.N * s.V < EAGER_BYTES else "torch-chunked"


def _costs(s: Setup, rows: int) -> dict[str, Any]:
    """What any method must move and multiply; three GEMMs with gradients."""
    flops, size = _flops(s, rows), s.dtype.itemsize
    moved = (rows * s.D + s.V * s.D) * size
    return {
        "bytes": {"fwd": moved, "both": 2.0 * moved + s.N * s.D * size},
        "flops": {"fwd": flops, "both": 3 * flops},
    }


@case(
    "linear_policy_loss",
    shapes=_loss_shapes(),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=NIGHTLY,
    first=FIRST,
)
def linear_policy_loss(s: Setup) -> Case:
    """GRPO's loss straight from hidden states, gradients included."""
    rows = _selected(s, s.M / s.N)
    count = len(rows)
    costs = _costs(s, count)
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

    def chunked(budget: float) -> Fn:
        def run(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
            each = advantage[seq]

            def loss(logp: torch.Tensor, part: slice) -> torch.Tensor:
                return token_losses(logp, old[part], each[part]) / denom

            total: torch.Tensor = _Chunked.apply(hidden.index_select(0, rows), weight, target, loss, budget)
            return total

        return run

    def trl(module: Any) -> Fn:
        logp_of = _trl(module)

        def run(hidden: Any, weight: Any, target: Any, rows: Any, old: Any, advantage: Any, seq: Any) -> torch.Tensor:
            return token_losses(logp_of(hidden, weight, target, rows), old, advantage[seq]).sum() / denom

        return run

    one: dict[str, Any] = {"device": s.device}
    impls: dict[str, Impl] = {
        "m2": m2,
        "m2-two-ops": two_ops,
        "torch": full if _baseline(s) == "torch" else Skip("full logits of all rows do not fit"),
        "torch-gathered": gathered if 4.0 * count * s.V < EAGER_BYTES else Skip("full logits do not fit"),
        "torch-chunked": chunked(_budget(s)),
        "compile": compiled(full) if _baseline(s) == "torch" else Skip("full logits of all rows do not fit"),
        "liger": peers.peer(
            "liger-chunked", module="liger_kernel.chunked_loss", adapt=lambda m: _liger_grpo(m, s, count), **one
        ),
        "trl": peers.peer("trl", module="trl.kernels.chunked_logprob", adapt=trl, **one),
    }
    return Case(
        oracle=chunked(8 * _budget(s)),
        inputs=inputs,
        grad=torch.ones((), device=s.device),
        wrt=(0, 1),
        impls=impls,
        baseline=_baseline(s),
        ours=("m2", "m2-two-ops"),
        eps=EPS[s.dtype],
        pure=s.V * s.D * 4 < 1e9,  # a second set of inputs and their float64 gradients would be 10 GB
        **costs,
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


@case(
    "linear_nll",
    shapes=_loss_shapes(),
    dtypes=(torch.bfloat16, torch.float32),
    smoke=("smollm2-135m-128-50pct",),
    nightly=NIGHTLY,
    first=FIRST,
)
def linear_nll(s: Setup) -> Case:
    """Mean negative log-prob at some rows: supervised heads compute nothing else, so here they are peers."""
    rows = _selected(s, s.M / s.N)
    count = len(rows)
    costs = _costs(s, count)
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

    def chunked(budget: float) -> Fn:
        def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
            selected = hidden.index_select(0, rows)
            total: torch.Tensor = _Chunked.apply(selected, weight, target, lambda logp, _: -logp / count, budget)
            return total

        return run

    def torch_own(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden.index_select(0, rows), weight, target, options=options)

    there = hasattr(torch.nn, "LinearCrossEntropyOptions")
    old = Skip(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return Case(
        oracle=chunked(8 * _budget(s)),
        inputs=inputs,
        grad=torch.ones((), device=s.device),
        wrt=(0, 1),
        impls={
            "m2": m2,
            "torch": full if _baseline(s) == "torch" else Skip("full logits of all rows do not fit"),
            "torch-chunked": chunked(_budget(s)),
            "torch-lce": torch_own if there else old,
            "cce": peers.peer("cce", s.device, "cut_cross_entropy", lambda m: _mean_on_rows(m.linear_cross_entropy)),
            "quack": peers.peer("quack", s.device, "quack.linear_cross_entropy", _quack),
        },
        baseline=_baseline(s),
        eps=EPS[s.dtype],
        pure=s.V * s.D * 4 < 1e9,
        **costs,
        **DEVICE,
    )


def _mean_on_rows(fn: Fn) -> Fn:
    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
        loss: torch.Tensor = fn(hidden.index_select(0, rows), weight, target)
        return loss

    return run


def _quack(module: Any) -> Fn:
    return _mean_on_rows(lambda h, w, y: module.chunked_linear_cross_entropy(h, w, y, reduction="mean"))
