"""One layout's part of tests/dist/test_learner_layouts.py: `torchrun layout_worker.py FOLDER TP PP DP`.

Everything that needs this layout is done in one go, as starting the processes is most of the time. Rank 0 writes what
the test compares to FOLDER/<layout>.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from learner_models import LOSS_SCALE, OVERLAPPED, VARIANTS, make_batch, make_recipe
from megatron.core import parallel_state
from torch import distributed as dist

import m2kernels as mk
from m2train.bench.parity import captured
from m2train.learner import optimizer_fixes
from m2train.learner import trainer as trainer_module
from m2train.learner.batch import TrainBatch
from m2train.learner.hf import export_weights
from m2train.learner.model import HeadOutput, HeadRows
from m2train.learner.parallel import start_process_group
from m2train.learner.trainer import Trainer

Change = Callable[[Trainer], None]
"""What a variant changes in a trainer before its first step."""


def nothing(_: Trainer) -> None: ...


def scale_loss(trainer: Trainer) -> None:
    """Megatron's hook of a loss scaler: its schedule applies it to each micro-batch's loss before the backward."""
    trainer.policy.config.grad_scale_func = lambda loss: loss * LOSS_SCALE


def score_eagerly(trainer: Trainer) -> None:
    trainer.policy.head = eager_head


def eager_head(hidden: torch.Tensor, weight: torch.Tensor, head: HeadRows) -> HeadOutput:
    """The head as plain PyTorch: logits of every row and the whole vocabulary in fp32, autograd's backward."""
    logits = (hidden.float() @ weight.float().t())[:, : head.vocab_size] / head.temperature
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[head.rows]
    logp, loss = log_p[head.rows, head.target], head.loss
    if loss is None:
        return HeadOutput(logp, entropy.detach(), None, {})
    found = mk.policy_loss(
        logp,
        loss.old_logp,
        loss.advantage,
        loss.seq,
        denom=loss.denom,
        spec=loss.spec,
        entropy=entropy,
        rollout_logp=loss.rollout_logp,
        backend="torch",
    )
    return HeadOutput(logp.detach(), entropy.detach(), found.loss, found.metrics)


class Layout:
    """Builds trainers of one layout after another in the same processes."""

    def __init__(self, folder: Path, tp: int, pp: int, dp: int) -> None:
        self.folder, self.sizes = folder, (tp, pp, dp)
        self.name = f"tp{tp}pp{pp}dp{dp}"

    def trainer(self, variant: str, resume: Path | None = None, **learner: Any) -> Trainer:
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        recipe = make_recipe(*self.sizes, **learner)
        return Trainer(recipe, self.folder / variant, resume)

    def three_steps(self, variant: str, change: Change = nothing, **learner: Any) -> dict[str, Any]:
        """`steps` of three batches."""
        return self.steps(variant, [make_batch(seed) for seed in range(3)], change, **learner)

    def steps(
        self, variant: str, batches: list[TrainBatch], change: Change = nothing, **learner: Any
    ) -> dict[str, Any]:
        """Log-probs, losses and norms of a step per batch, and the first step's gradients by Hugging Face names."""
        trainer = self.trainer(variant, **learner)
        change(trainer)
        out: dict[str, Any] = {"initial": trainer.logprobs(batches[0])}
        grads = self.folder / f"{self.name}_{variant}_grads.safetensors"
        with captured(trainer) as found:
            results = [trainer.train_step(batches[0])]
        export_weights(trainer.hf, found, grads, torch.float32)
        results += [trainer.train_step(batch) for batch in batches[1:]]
        out["logp"] = [r.logp for r in results]
        out["metrics"] = [r.metrics for r in results]
        out["final"] = trainer.logprobs(batches[0])
        if dist.get_rank() == 0:
            from safetensors.torch import load_file

            out["grads"] = load_file(grads)
        return out

    def trained(self, variant: str, **learner: Any) -> dict[str, Any]:
        """Three steps of several micro-batches in many small buckets, then log-probs and the exported weights.

        No clipping: the norm is summed in another order where the shards are others.
        """
        whole, trainer_module.DistributedDataParallelConfig = (
            trainer_module.DistributedDataParallelConfig,
            partial(trainer_module.DistributedDataParallelConfig, bucket_size=2000),
        )
        trainer = self.trainer(variant, micro_batches=2, clip_grad=0.0, **learner)
        trainer_module.DistributedDataParallelConfig = whole
        assert not learner.get("overlap") or len(trainer.ddp.bucket_groups) > 4
        results = [trainer.train_step(make_batch(seed)) for seed in range(3)]
        path = self.folder / f"{self.name}_{variant}_trained.safetensors"
        trainer.export(path, "float32")
        out: dict[str, Any] = {"logp": [x for r in results for x in r.logp], "metrics": [r.metrics for r in results]}
        out["final"] = trainer.logprobs(make_batch())
        if dist.get_rank() == 0:
            from safetensors.torch import load_file

            out["weights"] = {name: value.clone() for name, value in load_file(path).items()}
        return out

    def round_trip(self, variant: str, dtype: str = "float32") -> Path:
        """Import and export again."""
        path = self.folder / f"{self.name}_{variant}_export.safetensors"
        self.trainer(variant, dtype=dtype).export(path, dtype)
        return path


def resumed(layout: Layout, checkpoint: Path) -> dict[str, Any]:
    """The third step after loading a checkpoint of two."""
    trainer = layout.trainer("llama_tied", checkpoint, eps=1e-8, lr=1e-3)
    result = trainer.train_step(make_batch(2))
    return {"logp": result.logp, "metrics": result.metrics, "after": trainer.logprobs(make_batch())}


def unbroken(layout: Layout, checkpoint: Path) -> dict[str, Any]:
    """Three steps with ordinary Adam, a checkpoint after the second."""
    trainer = layout.trainer("llama_tied", eps=1e-8, lr=1e-3)
    for seed in range(2):
        trainer.train_step(make_batch(seed))
    trainer.save(checkpoint)
    result = trainer.train_step(make_batch(2))
    return {"logp": result.logp, "metrics": result.metrics, "after": trainer.logprobs(make_batch())}


def decayed(layout: Layout) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after a step without any gradient, under weight decay."""
    trainer = layout.trainer("qwen2", weight_decay=0.5, algo={"entropy_coef": 0.0})
    before = {name: value.detach().clone() for name, value in trainer.parameters().items()}
    batch = make_batch()
    trainer.train_step(replace(batch, samples=[replace(sample, advantage=0.0) for sample in batch.samples]))
    return before, {name: value.detach().clone() for name, value in trainer.parameters().items()}


def bf16_steps(layout: Layout, checkpoint: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Updates in bf16 on one batch: four, saved after the second; or, resumed from there, the last two."""
    trainer = layout.trainer("bf16", resume, dtype="bfloat16", lr=2e-3, eps=1e-8, clip_grad=0.0)
    out: dict[str, Any] = {"initial": trainer.logprobs(make_batch())}
    for update in range(trainer.update, 4):
        trainer.train_step(make_batch())
        if update == 1 and checkpoint is not None:
            trainer.save(checkpoint)
    return out | {"final": trainer.logprobs(make_batch())}


def updates(layout: Layout, checkpoint: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Two updates on one step's rollouts, then, with a checkpoint, a third after it was saved and loaded."""
    batches = [make_batch(seed, old=False) for seed in range(3)]
    trainer = layout.trainer("qwen3", **settings)
    before = trainer.logprobs(batches[1])
    third = trainer.logprobs(batches[2])
    results = trainer.train(batches[:2])
    if checkpoint is not None:
        trainer.save(checkpoint)
        results += layout.trainer("qwen3", checkpoint, **settings).train(batches[2:])
    metrics = [r.metrics for r in results]
    return {"before": before, "third": third, "logp": [r.logp for r in results], "metrics": metrics}


def reference_extras(layout: Layout) -> dict[str, Any]:
    """What needs one process only."""
    out: dict[str, Any] = {}
    for name, settings in {
        "micro4": {"micro_batches": 4},
        "unpacked": {"packing": "none"},
        "recompute": {"recompute": True},
    }.items():
        out[name] = layout.three_steps("qwen3", **settings)
    for variant in OVERLAPPED:
        out["eager", variant] = layout.three_steps(variant, score_eagerly)
    checkpoint = layout.folder / "ckpt_single"
    out["unbroken"] = unbroken(layout, checkpoint)
    out["resumed"] = resumed(layout, checkpoint)
    own_steps, optimizer_fixes.own_steps = optimizer_fixes.own_steps, lambda _: None
    out["shared_step"] = resumed(layout, checkpoint)
    optimizer_fixes.own_steps = own_steps
    out["updates"] = updates(layout)
    out["decayed"] = decayed(layout)
    checkpoint = layout.folder / "ckpt_bf16"
    out["bf16"] = bf16_steps(layout, checkpoint)
    out["bf16_resumed"] = bf16_steps(layout, resume=checkpoint)
    trainer = layout.trainer("llama_tied", lr=2e-3, eps=1e-8, clip_grad=0.0)
    out["fp32"] = {"initial": trainer.logprobs(make_batch())}
    for _ in range(4):
        trainer.train_step(make_batch())
    out["fp32"]["final"] = trainer.logprobs(make_batch())
    layout.round_trip("bf16", "bfloat16")
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    layout = Layout(folder, *map(int, sys.argv[2:5]))
    start_process_group(60.0)
    out: dict[str, Any] = {variant: layout.three_steps(variant) for variant in VARIANTS}
    for variant in VARIANTS:
        layout.round_trip(variant)
    if layout.sizes == (1, 1, 1):
        out |= reference_extras(layout)
    if layout.sizes in ((1, 1, 1), (1, 1, 2), (2, 2, 1)):
        # With overlap the swapped weights pass DDP's hooks, which gather them.
        out["kl"] = updates(
            layout, folder / f"ckpt_kl_{layout.name}", overlap=layout.sizes[2] > 1, algo={"kl": "k3", "kl_coef": 0.5}
        )
    if layout.sizes in ((1, 1, 1), (2, 2, 1)):
        for variant in OVERLAPPED:
            out["scaled", variant] = layout.steps(variant, [make_batch()], scale_loss, micro_batches=4)
    if layout.sizes == (2, 1, 1):
        out["no_sequence_parallel"] = layout.three_steps("qwen3", sequence_parallel=False)
    if layout.sizes == (1, 1, 2):
        out["unbroken"] = unbroken(layout, folder / "ckpt_dp2")
        out["bf16"] = bf16_steps(layout, folder / "ckpt_bf16_dp2")
        out["micro4"] = layout.three_steps("qwen3", micro_batches=4)
        for variant in OVERLAPPED:
            out["apart", variant] = layout.trained(variant)
            out["overlap", variant] = layout.trained(variant, overlap=True)
    if layout.sizes == (2, 2, 1):
        out["resumed"] = resumed(layout, folder / "ckpt_dp2")
        out["micro4"] = layout.three_steps("qwen3", micro_batches=4)
        out["recompute"] = layout.three_steps("qwen3", recompute=True)
        out["bf16"] = bf16_steps(layout)
        out["bf16_resumed"] = bf16_steps(layout, resume=folder / "ckpt_bf16_dp2")
    if dist.get_rank() == 0:
        torch.save(out, folder / f"{layout.name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
