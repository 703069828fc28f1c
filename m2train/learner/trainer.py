"""One rank of the learner: Megatron's model, optimizer and pipeline schedule around our loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import distributed as dist

import m2kernels as mk
from m2train.config import AlgoConfig, Recipe
from m2train.host import trim_heap
from m2train.learner import checkpoint, cpu_compat, optimizer_fixes
from m2train.learner.batch import TrainBatch
from m2train.learner.hf import export_weights, import_weights
from m2train.learner.hf_config import read_hf_config
from m2train.learner.metrics import step_metrics
from m2train.learner.model import DTYPES, HeadLoss, HeadOutput, HeadRows, build_model
from m2train.learner.packing import Costs, MicroBatch, StepPlan, build_micro_batch, plan_step
from m2train.learner.parallel import device, gather_to_first, is_scoring_rank, start_model_parallel
from m2train.learner.reference import Reference
from m2train.learner.schedule import learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What the last stage has to say about one micro-batch."""

    members: list[int]
    logp: torch.Tensor
    """f32[M], the members' reply tokens one after another"""
    sums: torch.Tensor
    """f32[2]: the loss, and the entropy summed over the tokens"""
    metrics: dict[str, torch.Tensor]
    area: int
    """(query, key) pairs in the tiles of its attention"""
    pairs: int
    """those of them that are visible"""

    @property
    def loss(self) -> float:
        """Of its tokens."""
        return float(self.sums[0])

    @property
    def entropy(self) -> float:
        """Summed over its tokens."""
        return float(self.sums[1])

    def on_host(self) -> Scored:
        """The same on the CPU: two copies, which wait for the device."""
        values = torch.cat([self.sums, *(value.reshape(1) for value in self.metrics.values())]).cpu()
        metrics = dict(zip(self.metrics, values[2:].unbind(), strict=True))
        return replace(self, logp=self.logp.cpu(), sums=values[:2], metrics=metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Of one optimizer step, whole on rank 0; elsewhere both are empty."""

    metrics: dict[str, float]
    logp: list[torch.Tensor]
    """f32[reply] per sample, before the update"""


class Trainer:
    """Model, optimizer and schedule of this rank. Every method is a collective of all ranks.

    Args:
        recipe: learner and algo sections are used.
        model_dir: Hugging Face folder; config and, without a checkpoint, weights.
        resume: a checkpoint folder to load.
        control: gloo group for results; None: the default group.

    Raises:
        ConfigError: layout, model or `[megatron]` settings that cannot be.
    """

    def __init__(
        self, recipe: Recipe, model_dir: Path, resume: Path | None = None, control: dist.ProcessGroup | None = None
    ) -> None:
        self.recipe = recipe
        self.hf = read_hf_config(model_dir)
        recipe.check_model(self.hf.heads, self.hf.kv_heads, self.hf.layers, self.hf.max_positions)
        self.update = 0
        """Optimizer steps done."""
        self.control = control
        start_model_parallel(recipe)
        self.policy = build_model(self.hf, recipe)
        import_weights(self.hf, self.parameters(), model_dir)
        self._reference = Reference(self.parameters()) if recipe.algo.kl != "none" else None
        self.ddp = _wrap(self.policy, recipe)
        self.optimizer = _build_optimizer(self.ddp, recipe)
        self.policy.config.finalize_model_grads_func = finalize_model_grads
        if recipe.learner.overlap:
            self.policy.announce = True
            self.policy.config.no_sync_func = self.ddp.no_sync  # only the last micro-batch starts a reduction
        self._spec = loss_spec(recipe.algo)
        cpu_compat.apply()  # modules that came in with DDP and the optimizer
        self._planner = ThreadPoolExecutor(1, "plan")
        if resume is not None:
            checkpoint.load(self, resume)

    def parameters(self) -> dict[str, torch.Tensor]:
        """This rank's parameters by Megatron's names."""
        return dict(self.policy.named_parameters())

    def train_step(self, batch: TrainBatch, ahead: Future[StepPlan] | None = None) -> StepResult:
        """Forward, backward and one optimizer step.

        Args:
            batch: the step's samples.
            ahead: its plan, if planning was started already.

        Raises:
            FloatingPointError: loss or gradient norm is not finite.
        """
        started = time.perf_counter()
        ahead = ahead or self._plan_ahead(batch)
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        waited = time.perf_counter()
        plan = ahead.result()
        waited = time.perf_counter() - waited
        with _range("forward_backward"):
            scored = self._run(batch, plan, train=True)
        forward_done = time.perf_counter()
        rate = learning_rate(self.update, self.recipe.steps * self.recipe.algo.updates_per_step, self.recipe.learner)
        for group in self.optimizer.param_groups:  # as OptimizerParamScheduler.step; norms and biases do not decay
            group["lr"] = rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.recipe.learner.weight_decay * group.get("wd_mult", 1.0)
        with _range("optimizer"), cpu_compat.cuda_names():
            _, norm, _ = self.optimizer.step()
        self.update += 1
        norm = float(norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at update {self.update}; weights are no longer usable")
        timing = {
            "learner/forward_backward_s": forward_done - started,
            "learner/optimizer_s": time.perf_counter() - forward_done,
            "learner/plan_s": plan.seconds,
            "learner/plan_wait_s": waited,
        }
        everything = [s for found in gather_to_first(scored, self.control) for s in found]
        if dist.get_rank() != 0:
            return StepResult(metrics={}, logp=[])
        if plan.choice is not None:
            print(f"update {self.update}: {plan.choice.reason}", flush=True)  # into the learner's log
        logp = _by_sample(batch, everything)
        metrics = step_metrics(batch, logp, everything, plan, self.recipe)
        metrics |= {"learner/grad_norm": norm, "learner/lr": rate, **timing}
        return StepResult(metrics=metrics, logp=logp)

    def train(self, batches: list[TrainBatch]) -> list[StepResult]:
        """One optimizer step per batch, all on rollouts of the weights as they are now.

        Reference log-probs, and the old ones of later batches, are computed before the first update. The first batch
        is on-policy: its ratio is one, so it needs no old ones.
        """
        ahead = [self._plan_ahead(batch) for batch in batches]
        if self._reference is not None:
            self._gather_weights()
            with self._reference.in_place_of(self.parameters()):
                batches = [self._scored(b, "ref_logp", plan) for b, plan in zip(batches, ahead, strict=True)]
        known = [batches[0]] if batches else []
        for batch, plan in zip(batches[1:], ahead[1:], strict=True):
            known.append(batch if batch.samples[0].old_logp is not None else self._scored(batch, "old_logp", plan))
        return [self.train_step(batch, plan) for batch, plan in zip(known, ahead, strict=True)]

    def _scored(self, batch: TrainBatch, field: str, plan: Future[StepPlan]) -> TrainBatch:
        """The batch with `field` of its samples set to their log-probs under the present weights, on every rank."""
        found = _share(self.logprobs(batch, plan), [s.reply_length for s in batch.samples], self.control)
        samples = [replace(s, **{field: logp}) for s, logp in zip(batch.samples, found, strict=True)]  # type: ignore[arg-type]
        return replace(batch, samples=samples)

    def logprobs(self, batch: TrainBatch, ahead: Future[StepPlan] | None = None) -> list[torch.Tensor]:
        """Log-probs of the replies under the current weights, on rank 0; [] elsewhere."""
        plan = (ahead or self._plan_ahead(batch)).result()
        self.ddp.eval()
        with _range("logprobs"), torch.no_grad():
            scored = self._run(batch, plan, train=False)
        everything = [s for found in gather_to_first(scored, self.control) for s in found]
        return _by_sample(batch, everything) if dist.get_rank() == 0 else []

    def export(self, path: Path, dtype: str) -> dict[str, float]:
        """Write the weights as one Hugging Face safetensors file; seconds and bytes on rank 0."""
        started = time.perf_counter()
        self._gather_weights()
        with _range("export"):
            facts = export_weights(self.hf, self.parameters(), path, DTYPES[dtype])
        return facts | {"seconds": time.perf_counter() - started} if facts else {}

    def save(self, path: Path) -> None:
        """Write a checkpoint: weights, optimizer, schedule, RNG.

        Megatron copies the optimizer's state up to three times on the way, and on CPU the allocator is told to keep
        what a step frees (client.py). Both sides of the save give it back: 11.5 GB resident became 7.5 for SmolLM2.
        """
        self._gather_weights()
        trim_heap()
        with _range("save"):
            checkpoint.save(self, path)
        trim_heap()

    def _gather_weights(self) -> None:
        """Whole weights on every rank: with overlap the next forward would gather them."""
        if self.recipe.learner.overlap and self.update:
            self.ddp.start_param_sync(force_sync=True)

    def _plan_ahead(self, batch: TrainBatch) -> Future[StepPlan]:
        """Start planning on a thread; the planner works outside the GIL."""
        multiple = self.recipe.learner.tp if self.policy.config.sequence_parallel else 1
        rank = parallel_state.get_data_parallel_rank()
        return self._planner.submit(plan_step, batch, self.recipe, Costs.of(self.hf), rank, multiple)

    def _run(self, batch: TrainBatch, plan: StepPlan, *, train: bool) -> list[Scored] | None:
        mine = plan.members[parallel_state.get_data_parallel_rank()]
        micros = [build_micro_batch(batch, m, f, device()) for m, f in zip(mine, plan.forests, strict=True)]
        schedule = get_forward_backward_func()
        found: list[Scored] = schedule(
            forward_step_func=partial(self._forward, batch, train),
            data_iterator=iter(list(enumerate(micros))),
            model=self.ddp,
            num_microbatches=len(micros),
            seq_length=max(m.tokens.shape[1] for m in micros),
            micro_batch_size=1,
            forward_only=not train,
        )
        if not is_scoring_rank():
            return None
        scored = [one.on_host() for one in found]  # all work is queued: the device is waited for once
        for index, one in enumerate(scored):
            if one.metrics and not math.isfinite(one.loss):
                raise FloatingPointError(f"loss is {one.loss} in micro-batch {index} of update {self.update}")
        return scored

    def _forward(self, batch: TrainBatch, train: bool, data: Iterator[tuple[int, MicroBatch]], _: Any) -> Any:
        index, micro = next(data)
        loss = None
        if train and micro.members:
            loss = HeadLoss(
                old_logp=micro.old_logp,
                advantage=micro.advantage,
                seq=micro.seq,
                rollout_logp=micro.rollout_logp,
                ref_logp=micro.ref_logp,
                denom=batch.denom,
                spec=self._spec,
            )
        head = HeadRows(
            rows=micro.rows,
            target=micro.target,
            temperature=batch.temperature,
            vocab_size=self.hf.vocab,
            loss=loss,
        )
        out = self.policy.score(micro.tokens, self.policy.pack(micro.forest), head, through=self.ddp)
        return out, partial(_loss, index, micro)


def _loss(index: int, micro: MicroBatch, out: HeadOutput) -> tuple[torch.Tensor, torch.Tensor, Scored]:
    """What Megatron's schedule wants of a micro-batch: the loss to go back from, its count, and what it reports."""
    # Without a loss (a dummy, or log-probs alone) a zero still takes part in the backward: all ranks issue the same
    # collectives.
    loss = out.logp.sum() * 0.0 if out.loss is None else out.loss
    # Gradients are summed over micro-batches and DP ranks, then divided by the total of these counts: one.
    share = int(index == 0 and parallel_state.get_data_parallel_rank() == 0)
    count = torch.tensor(share, dtype=torch.int, device=loss.device)
    scored = Scored(
        members=micro.members,
        logp=out.logp.detach(),
        sums=torch.stack([loss.detach().float(), out.entropy.sum()]),
        metrics=out.metrics,
        area=micro.forest.tiles.area,
        pairs=micro.forest.num_pairs,
    )
    return loss, count, scored


def loss_spec(algo: AlgoConfig) -> mk.LossSpec:
    """The loss of a recipe."""
    return mk.LossSpec(
        kind=algo.kind,
        clip_low=algo.clip_low,
        clip_high=algo.clip_high,
        dual_clip=algo.dual_clip,
        kl=algo.kl,
        kl_coef=algo.kl_coef,
        entropy_coef=algo.entropy_coef,
        tis_cap=algo.tis_cap or None,
        tis_level=algo.tis_level,
    )


def _wrap(policy: torch.nn.Module, recipe: Recipe) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=recipe.learner.overlap,
        overlap_param_gather=recipe.learner.overlap,
    )
    return DistributedDataParallel(policy.config, config, policy)


def _build_optimizer(ddp: DistributedDataParallel, recipe: Recipe) -> Any:
    learner = recipe.learner
    config = OptimizerConfig(
        optimizer="adam",
        lr=learner.lr,
        min_lr=learner.min_lr,
        weight_decay=learner.weight_decay,
        adam_beta1=learner.beta1,
        adam_beta2=learner.beta2,
        adam_eps=learner.eps,
        clip_grad=learner.clip_grad or math.inf,  # at 0 Megatron would not even compute the norm
        bf16=learner.dtype == "bfloat16",
        params_dtype=DTYPES[learner.dtype],
        use_distributed_optimizer=True,
    )
    with cpu_compat.cuda_names():
        optimizer = get_megatron_optimizer(config, [ddp])
    optimizer_fixes.tolerate_missing_step(optimizer)
    optimizer_fixes.prepare_state(optimizer)
    optimizer_fixes.fuse_on_cpu(optimizer)
    return optimizer


def _by_sample(batch: TrainBatch, scored: list[Scored]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for one in scored:
        sizes = [batch.samples[i].reply_length for i in one.members]
        found |= dict(zip(one.members, one.logp.split(sizes), strict=True))
    return [found[i] for i in range(len(batch.samples))]


def _share(logp: list[torch.Tensor], sizes: list[int], group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """Rank 0's log-probs on every rank; as one tensor, for a pickled view takes all of its storage along."""
    box = [torch.cat(logp) if logp else None]
    dist.broadcast_object_list(box, src=0, group=group)
    assert box[0] is not None
    return list(box[0].split(sizes))


@contextmanager
def _range(name: str) -> Iterator[None]:
    """An NVTX range, if the package is there."""
    try:
        import nvtx
    except ImportError:
        yield
        return
    with nvtx.annotate(f"learner/{name}", domain="m2"):
        yield
