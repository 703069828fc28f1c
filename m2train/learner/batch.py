"""Training data: samples, batches and their file format. A sample is one reply with its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from m2train.config import Recipe
from m2train.files import write_atomic
from m2train.records import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A reply to train on."""

    token_ids: torch.Tensor
    """int64 [context + reply]"""
    loss_start: int
    """The reply is token_ids[loss_start:]."""
    rollout_logp: torch.Tensor
    """f32 [reply]: log-probs under the engine that sampled it"""
    advantage: float
    seq_id: int
    """Index of the reply in its step; results come back in the batch's order, this is for people."""
    old_logp: torch.Tensor | None = None
    """f32 [reply]: log-probs under the policy before the step's first update; None: on-policy"""
    ref_logp: torch.Tensor | None = None
    """f32 [reply]: log-probs under the reference policy, which the learner computes; never in a file"""

    def __post_init__(self) -> None:
        reply = self.token_ids.numel() - self.loss_start
        if self.loss_start < 1 or reply < 1:
            raise ValueError(
                f"sample {self.seq_id}: loss_start = {self.loss_start} of {self.token_ids.numel()} tokens; expected "
                "at least one token of context and one of reply"
            )
        for name in ("rollout_logp", "old_logp", "ref_logp"):
            value = getattr(self, name)
            if value is not None and value.numel() != reply:
                raise ValueError(f"sample {self.seq_id}: {name} has {value.numel()} values for {reply} reply tokens")

    @property
    def reply_length(self) -> int:
        """Tokens that carry loss."""
        return self.token_ids.numel() - self.loss_start


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """The samples of one optimizer step."""

    samples: list[Sample]
    denom: float
    """What the summed token terms are divided by: groups x G x l_max (M2 report, eq. 2)."""
    temperature: float
    """Of sampling; log-probs are those of the tempered distribution."""


def batches_from_groups(groups: Sequence[Group], recipe: Recipe) -> list[TrainBatch]:
    """One batch per optimizer step (`algo.updates_per_step` of them; fewer if there are fewer groups).

    Groups are dealt out in turn, whole. The denominator counts the groups that are there: a dropped one does not
    dilute the others.
    """
    batches = []
    seq_id = 0
    for part in range(min(recipe.algo.updates_per_step, len(groups))):
        mine = groups[part :: recipe.algo.updates_per_step]
        samples = []
        for group in mine:
            for reply in group.replies:
                samples.append(
                    Sample(
                        token_ids=torch.tensor(group.context_ids + reply.generation.token_ids),
                        loss_start=len(group.context_ids),
                        rollout_logp=torch.tensor(reply.generation.logprobs, dtype=torch.float32),
                        advantage=reply.advantage,
                        seq_id=seq_id,
                    )
                )
                seq_id += 1
        denom = float(len(samples) * recipe.algo.max_new_tokens)
        batches.append(TrainBatch(samples=samples, denom=denom, temperature=recipe.rollout.temperature))
    return batches


# ------------------------------------------------------------------------------------------------- file format


def save_batch(path: Path, batch: TrainBatch) -> None:
    """Write a batch as one safetensors file, atomically."""
    samples = batch.samples
    tensors = {
        "token_ids": torch.cat([s.token_ids for s in samples]),
        "lengths": torch.tensor([s.token_ids.numel() for s in samples]),
        "loss_start": torch.tensor([s.loss_start for s in samples]),
        "rollout_logp": torch.cat([s.rollout_logp.float() for s in samples]),
        "advantage": torch.tensor([s.advantage for s in samples], dtype=torch.float64),
        "seq_id": torch.tensor([s.seq_id for s in samples]),
        "scalars": torch.tensor([batch.denom, batch.temperature], dtype=torch.float64),
    }
    given = [s.old_logp is not None for s in samples]
    if any(given):
        if not all(given):
            raise ValueError("old_logp is given for some samples of a batch only; expected all or none")
        tensors["old_logp"] = torch.cat([s.old_logp.float() for s in samples if s.old_logp is not None])
    write_atomic(path, save(tensors))


def load_batch(path: Path) -> TrainBatch:
    """Read what `save_batch` wrote."""
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        t = {name: file.get_tensor(name) for name in file.keys()}
    lengths, starts = t["lengths"].tolist(), t["loss_start"].tolist()
    replies = [n - s for n, s in zip(lengths, starts, strict=True)]
    tokens, rollout = t["token_ids"].split(lengths), t["rollout_logp"].split(replies)
    old = t["old_logp"].split(replies) if "old_logp" in t else [None] * len(lengths)
    columns = zip(tokens, starts, rollout, t["advantage"].tolist(), t["seq_id"].tolist(), old, strict=True)
    samples = [
        Sample(token_ids=tok, loss_start=start, rollout_logp=roll, advantage=adv, seq_id=seq, old_logp=o)
        for tok, start, roll, adv, seq, o in columns
    ]
    denom, temperature = t["scalars"].tolist()
    return TrainBatch(samples=samples, denom=denom, temperature=temperature)
