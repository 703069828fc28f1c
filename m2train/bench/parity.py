"""Whether two ways to run a training step are the same step: loss, log-probs and the gradient of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from m2train.learner.batch import TrainBatch
    from m2train.learner.trainer import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step computed before it changed a weight."""

    loss: float
    """0 on ranks other than the first"""
    logp: list[torch.Tensor]
    """f32 [reply] per sample; [] on ranks other than the first"""
    grads: dict[str, torch.Tensor]
    """f32, this rank's tensors by Megatron's names, on the CPU, summed over micro-batches and data-parallel ranks"""

    @property
    def largest_grad(self) -> float:
        """Largest element of any gradient."""
        return max(float(grad.abs().max()) for grad in self.grads.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far two steps are apart."""

    loss: float
    """|difference|"""
    logp: float
    """Largest |difference|."""
    grad: float
    """Largest |difference| of any element of any gradient."""
    relative: float
    """Largest over tensors: |difference| / largest element of that tensor's gradient."""
    tensor: str
    """Where `relative` is."""


def run_step(trainer: Trainer, batch: TrainBatch) -> Step:
    """Train one step and keep its gradients. A collective of all ranks."""
    with captured(trainer) as grads:
        result = trainer.train_step(batch)
    return Step(loss=result.metrics.get("policy/loss", 0.0), logp=result.logp, grads=grads)


@contextmanager
def captured(trainer: Trainer) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients as the optimizer finds them, copied at its last step inside; whole on every data-parallel rank."""
    found: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def keep() -> Any:
        _gather_shards(trainer)
        for name, parameter in trainer.parameters().items():
            found[name] = parameter.main_grad.to("cpu", torch.float32, copy=True)  # type: ignore[attr-defined]
        return step()

    trainer.optimizer.step = keep
    try:
        yield found
    finally:
        trainer.optimizer.step = step


def _gather_shards(trainer: Trainer) -> None:
    """Under the distributed optimizer each data-parallel rank holds its shard of the sum: fill in the others."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    group = parallel_state.get_data_parallel_group()
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return
    for buffer in trainer.ddp.buffers:
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.chunk(size))
            dist.all_gather(parts, parts[rank].clone(), group=group)


def gap(mine: Step, theirs: Step) -> Gap:
    """Compare with a step that is taken for right.

    Raises:
        ValueError: they have other tensors or samples.
    """
    if mine.grads.keys() != theirs.grads.keys() or len(mine.logp) != len(theirs.logp):
        raise ValueError("two steps of other models or batches cannot be compared")
    largest = max((float((a - b).abs().max()) for a, b in zip(mine.logp, theirs.logp, strict=True)), default=0.0)
    grad, relative, tensor = 0.0, 0.0, ""
    for name, want in theirs.grads.items():
        error, size = float((mine.grads[name] - want).abs().max()), float(want.abs().max())
        ratio = error / size if size else float(error > 0)
        grad = max(grad, error)
        if ratio >= relative:
            relative, tensor = ratio, name
    return Gap(loss=abs(mine.loss - theirs.loss), logp=largest, grad=grad, relative=relative, tensor=tensor)


def worst(gaps: Sequence[Gap]) -> Gap:
    """The largest of each over all ranks."""
    where = max(gaps, key=lambda one: one.relative)
    loss, logp, grad = (max(getattr(one, name) for one in gaps) for name in ("loss", "logp", "grad"))
    return Gap(loss=loss, logp=logp, grad=grad, relative=where.relative, tensor=where.tensor)


def parity_table(parity: dict[str, Any] | None) -> list[str]:
    """Lines for people; `parity` is what benchmarks/step.py writes."""
    if parity is None:
        return ["variants were not compared"]
    lines = [
        f"first step against {parity['base']}: loss {parity['loss']:.6g}, "
        f"largest gradient {parity['largest_grad']:.3g}",
        f"{'variant':<11} {'|d loss|':>9} {'|d logp|':>9} {'|d grad|':>9} {'of its tensor':>13}",
    ]
    for name, one in parity["gaps"].items():
        lines.append(
            f"{name:<11} {one['loss']:>9.1e} {one['logp']:>9.1e} {one['grad']:>9.1e} {one['relative']:>13.1e} "
            f"{one['tensor']}"
        )
    return lines
