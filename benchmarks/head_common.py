"""Shapes, plain torch and one peer that the LM-head cases share.

The implementations that are written out here are plain torch:

torch           full logits of all rows: the baseline
torch-gathered  full logits of the selected rows
torch-chunked   the selected rows in chunks, gradients formed with the loss and summed in float32: what one writes by
                hand when memory is short
gemms           a ceiling, not an implementation: the GEMMs alone, as torch calls its BLAS for them (cuBLAS on a GPU).
                It computes no loss, and its results are never checked
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from m2train.bench import peers, shapes
from m2train.bench.case import Ceiling, Fn, Impl, Setup, Skip, SlowStart

MODELS = ("smollm2-135m", "qwen3-1.7b", "qwen3-8b", "llama-3.1-8b", "qwen2.5-32b")
CPU_LIMIT = 3e11
"""FLOPs of a forward over the selected rows beyond which a CPU would take minutes."""
EAGER_BYTES = 2e10
"""Full float32 logits beyond which the baseline takes the selected rows in chunks: a GPU holds no three copies."""
CHUNK_BYTES = 64 << 20
"""Logits of a chunk of torch-chunked on a CPU; sixteen times that on a GPU, as in the op."""
EPS = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""A loss is one number, on which the baseline is right by luck, and which F.linear_cross_entropy takes from bfloat16
logits; torch sums a narrow gradient in its own dtype.

The tests of the ops hold them to far less."""
DEVICE: dict[str, Any] = {"oracle_device": "same", "cuda_timer": "events"}
"""Float64 would take minutes on a CPU; rows with a gradient are counted on the host, so there is no graph."""
RUN = 64
"""Packed rows of a sequence, prompt and reply: those of the reply, at its end, are selected."""


SMOKE = "smollm2-135m-tp8-512-50pct"
"""What one rank of eight holds of the vocabulary: all of it takes minutes over all methods and their checks."""


def loss_shapes() -> dict[str, dict[str, Any]]:
    whole = shapes.heads(("smollm2-135m",), 512, (0.5,))["smollm2-135m-512-50pct"]
    cpu = {SMOKE: whole | {"V": whole["V"] // 8}}
    cpu |= shapes.heads(("smollm2-135m",), 128, (0.5,)) | shapes.heads(("smollm2-135m",), 2048, (0.35,))
    cpu |= shapes.heads(("qwen3-1.7b",), 256, (0.35,))
    gpu: dict[str, dict[str, Any]] = {}
    for tokens in (4096, 16384, 32768):
        gpu |= shapes.heads(("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"), tokens, (0.35, 1.0))
    return cpu | gpu


NIGHTLY = tuple(name for name in loss_shapes() if "16384" in name or ("32768" in name and "qwen2.5" not in name))
FIRST = ("qwen3-8b-4096-35pct", "qwen3-8b-4096-100pct")
LOSS_CASE: dict[str, Any] = {
    "dtypes": (torch.bfloat16, torch.float32),
    "nightly": NIGHTLY,
    "first": FIRST,
}
"""What `case` is told of each loss."""


def frozen(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Shapes whose weight has no gradient (adapters), so that a peak of memory is the method's and not that of dW."""
    return {f"{name}-frozen": loss_shapes()[name] | {"frozen": True} for name in names}


def idle(names: tuple[str, ...], share: float) -> dict[str, dict[str, Any]]:
    """Shapes in which this share of the sequences has an advantage of zero, as groups of equal rewards give: rows
    without a gradient, which a method may leave out of its backward."""
    return {f"{name}-zero{round(100 * share)}": loss_shapes()[name] | {"idle": share} for name in names}


def gemm_flops(s: Setup, rows: int) -> float:
    flops = 2.0 * rows * s.D * s.V
    if s.device.type == "cpu" and flops > CPU_LIMIT:
        raise Skip(f"{flops:.1e} FLOPs a forward: for a GPU")
    return flops


def eager(hidden: Any, weight: Any, target: Any, rows: Any) -> torch.Tensor:
    """All logits of the selected rows at once, in fp32 after the GEMM."""
    logits = F.linear(hidden.index_select(0, rows), weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).gather(1, target[:, None])[:, 0]


def eager_entropy(hidden: Any, weight: Any, target: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager`, and the entropy of each selected row, in nats."""
    logits = F.linear(hidden.index_select(0, rows), weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


class _Gemms(torch.autograd.Function):
    """Logits of the first rows, and both gradients from logits that stand for their own gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, rows: int, results: Fn) -> Any:
        logits = F.linear(hidden[:rows], weight)
        ctx.save_for_backward(hidden, weight, logits)
        return results(logits)

    @staticmethod
    def backward(ctx: Any, *unused: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, dz = ctx.saved_tensors
        rows, to_hidden = len(dz), torch.empty_like(hidden)  # what lies beyond `rows` is never written
        torch.mm(dz, weight, out=to_hidden[:rows])
        to_weight = torch.mm(dz.T, hidden[:rows]) if ctx.needs_input_grad[1] else None
        return to_hidden, to_weight, None, None


def gemms(rows: int, results: Fn) -> Ceiling:
    """A ceiling for a head on M rows: z = H W^T in the forward; then dH = dz W and, if trained, dW = dz^T H.

    It computes no loss. The first M rows stand for the selected ones, a view, so that no gather is timed; dz is z
    itself, of the right shape and dtype; dW is rounded once, to the weight's dtype. A method that computes the logits
    again in its backward needs a fourth GEMM.

    Args:
        rows: M.
        results: logits [M, V] -> views of them in the shapes of the case's results.
    """
    return Ceiling(lambda hidden, weight, *rest: _Gemms.apply(hidden, weight, rows, results))


def trl_log_probs(module: Any, entropy: bool = False) -> Fn:
    """TRL's chunked path: vocabulary chunks of 8192, its default, and an online log-sum-exp."""
    # Its backward asks for a context of this file, which is empty for a weight that no DeepSpeed has sharded.
    peers.import_past("trl.trainer.utils", ("pandas", "datasets", "accelerate"))

    def run(hidden: Any, weight: Any, target: Any, rows: Any) -> Any:
        selected = hidden.index_select(0, rows)
        wanted = ("entropy",) if entropy else ()
        found = module.ChunkedLogProbFunction.apply(selected, weight, None, target, 1.0, 8192, None, 1.0, wanted)
        return found[:2] if entropy else found[0]

    return run


TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]


class ChunkedLoss(torch.autograd.Function):
    """A loss that is a sum over rows, in chunks of rows; gradients are formed with it, in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, loss: TokenLoss, budget: float
    ) -> torch.Tensor:
        rows = len(hidden)
        parts = max(1, -(-rows * len(weight) * 4 // int(budget)))
        step = -(-rows // parts)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs, trained = any(ctx.needs_input_grad), ctx.needs_input_grad[1]
        total = hidden.new_zeros((), dtype=wide)
        to_hidden, to_weight = torch.empty_like(hidden), None
        for start in range(0, rows, step):
            part = slice(start, start + step)
            h, w = hidden[part].detach(), weight.detach()
            with torch.set_grad_enabled(needs):
                leaves = [h.requires_grad_(needs), w.requires_grad_(trained)]
                log_p = F.linear(*leaves).to(wide).log_softmax(-1)
                value = loss(log_p.gather(1, target[part, None])[:, 0], part).sum()
            total += value.detach()
            if not needs:
                continue
            to_hidden[part], *rest = torch.autograd.grad(value, leaves if trained else leaves[:1])
            if not trained:
                continue
            dw = rest[0]
            if parts == 1:
                to_weight = dw
            elif to_weight is None:
                to_weight = dw.to(wide)
            else:
                to_weight += dw
        ctx.grads = (to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        to_hidden, to_weight = ctx.grads
        if float(grad) != 1.0:
            to_hidden, to_weight = to_hidden * grad, None if to_weight is None else to_weight * grad
        return to_hidden, to_weight, None, None, None


def selected_rows(s: Setup, share: float) -> torch.Tensor:
    """The last rows of each sequence: int64 [M]."""
    row = torch.arange(s.N)
    return row[row % RUN >= RUN - max(1, int(RUN * share + 0.5))].to(s.device)


def budget(s: Setup) -> float:
    return CHUNK_BYTES if s.device.type == "cpu" else 16 * CHUNK_BYTES


def baseline(s: Setup) -> str:
    return "torch" if 4.0 * s.N * s.V < EAGER_BYTES else "torch-chunked"


def whole(s: Setup, full: Fn) -> Fn | Skip:
    """A method that holds the logits of all rows, where that is the baseline."""
    return full if baseline(s) == "torch" else Skip("full logits of all rows do not fit")


def torch_lce(s: Setup, run: Fn) -> Impl:
    """A method built on torch's chunked head, where the installed torch has one; slow on a CPU, above all in bf16."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return Skip(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return SlowStart(run) if s.device.type == "cpu" else run


def loss_settings(s: Setup, rows: int) -> dict[str, Any]:
    """What the cases of a loss tell `Case` alike."""
    return {
        "grad": torch.ones((), device=s.device),
        "wrt": (0,) if s.dims.get("frozen") else (0, 1),
        "phases": ("both",),  # nobody wants the loss alone
        "baseline": baseline(s),
        "eps": EPS[s.dtype],
        "pure": s.V * s.D * 4 < 1e9,  # a second set of inputs and their float64 gradients would be 10 GB
        **costs(s, rows),
        **DEVICE,
    }


def costs(s: Setup, rows: int) -> dict[str, Any]:
    """What any method must move and multiply; three GEMMs with gradients. A narrow dW may be summed in float32."""
    flops, size = gemm_flops(s, rows), s.dtype.itemsize
    moved = (rows * s.D + s.V * s.D) * size
    trained = not s.dims.get("frozen")
    return {
        "bytes": {"fwd": moved, "both": (2.0 if trained else 1.0) * moved + s.N * s.D * size},
        "flops": {"fwd": flops, "both": (3 if trained else 2) * flops},
        "allowance": {"both": 4.0 * s.V * s.D if size < 4 and trained else 0.0},
    }
