"""Training data: samples, batches, their file format, and their packing into micro-batches.

A sample is one reply with its context. Packing is a function of the lengths and the recipe alone, so every rank
computes the same plan from the same file and no data is sent between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

import m2kernels as mk
from m2train.config import ConfigError, Recipe
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

    def __post_init__(self) -> None:
        reply = self.token_ids.numel() - self.loss_start
        if self.loss_start < 1 or reply < 1:
            raise ValueError(
                f"sample {self.seq_id}: loss_start = {self.loss_start} of {self.token_ids.numel()} tokens; expected "
                "at least one token of context and one of reply"
            )
        for name in ("rollout_logp", "old_logp"):
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


# ------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Samples packed one after another, on the learner's device."""

    members: list[int]
    """Indices into the batch's samples; empty: a dummy that carries no loss."""
    lengths: list[int]
    """Tokens of each packed sequence, a closing pad sequence included."""
    tokens: torch.Tensor
    """int64 [1, T]"""
    rows: torch.Tensor
    """int64 [M]: rows whose next token carries loss"""
    target: torch.Tensor
    """int64 [M]"""
    seq: torch.Tensor
    """int64 [M]: which member"""
    advantage: torch.Tensor
    """f32 [members]"""
    rollout_logp: torch.Tensor
    """f32 [M]"""
    old_logp: torch.Tensor | None
    """f32 [M]"""


def plan_micro_batches(lengths: Sequence[int], recipe: Recipe, hidden: int) -> list[list[list[int]]]:
    """`plan[dp rank][micro-batch]` is a list of sample indices; all ranks have equally many, empty ones are dummies.

    Bins are balanced by cost, L (1 + L / 12 hidden): linear layers plus attention. Bins of similar cost run at the
    same time on different ranks.

    Raises:
        ConfigError: `learner.micro_batches` is too small for the token cap, or a sample exceeds the cap.
    """
    learner = recipe.learner
    cap = learner.micro_batch_tokens - _pad_room(recipe)
    longest = max(lengths)
    if longest > cap:
        raise ConfigError(f"a sample has {longest} tokens; learner.micro_batch_tokens = {learner.micro_batch_tokens}")
    if learner.packing == "none":
        bins = [[i] for i in range(len(lengths))]
    else:
        bins = _pack(lengths, cap, learner.dp, learner.micro_batches, hidden)
    cost = [sum(_cost(lengths[i], hidden) for i in one) for one in bins]
    order = sorted(range(len(bins)), key=lambda b: -cost[b])
    bins = [bins[b] for b in order]
    bins += [[] for _ in range(-len(bins) % learner.dp)]
    return [bins[rank :: learner.dp] for rank in range(learner.dp)]


def _pack(lengths: Sequence[int], cap: int, dp: int, micro_batches: int | None, hidden: int) -> list[list[int]]:
    tokens = torch.tensor(lengths, dtype=torch.int64)
    cost = torch.tensor([_cost(n, hidden) for n in lengths], dtype=torch.float64)
    caps = torch.tensor([cap], dtype=torch.int64)
    if micro_batches is not None:
        try:
            return mk.pack_balanced(cost, dp * micro_batches, weights=tokens[:, None], max_weights=caps)
        except ValueError as err:
            raise ConfigError(
                f"{int(tokens.sum())} tokens do not fit in learner.dp x learner.micro_batches = {dp * micro_batches} "
                f"micro-batches of {cap} tokens; raise learner.micro_batches or learner.micro_batch_tokens"
            ) from err
    fewest = len(mk.pack_balanced(tokens.double(), max_cost=float(cap)))
    num = -(-fewest // dp) * dp
    while True:  # balance by cost may need more bins than the densest packing; one sample a bin always fits
        try:
            return mk.pack_balanced(cost, num, weights=tokens[:, None], max_weights=caps)
        except ValueError:
            num += dp
            if num >= len(lengths) + dp:
                raise


def _cost(length: int, hidden: int) -> float:
    return length * (1.0 + length / (12.0 * hidden))


def _pad_room(recipe: Recipe) -> int:
    """Tokens kept free for the closing pad sequence that sequence parallelism may need."""
    return recipe.learner.tp - 1


def build_micro_batch(batch: TrainBatch, members: Sequence[int], multiple: int, device: torch.device) -> MicroBatch:
    """Pack samples; a pad sequence of its own fills up to a multiple of `multiple` tokens (sequence parallelism)."""
    samples = [batch.samples[i] for i in members]
    lengths = [s.token_ids.numel() for s in samples]
    pad = -sum(lengths) % multiple if samples else multiple
    tokens = torch.cat([*(s.token_ids for s in samples), torch.zeros(pad, dtype=torch.int64)])
    rows, start = [torch.empty(0, dtype=torch.int64)], 0
    for s, n in zip(samples, lengths, strict=True):
        rows.append(torch.arange(start + s.loss_start - 1, start + n - 1))
        start += n
    row = torch.cat(rows)
    empty = torch.empty(0, dtype=torch.float32)
    old = [s.old_logp for s in samples if s.old_logp is not None]
    return MicroBatch(
        members=list(members),
        lengths=lengths + ([pad] if pad else []),
        tokens=tokens[None].to(device),
        rows=row.to(device),
        target=tokens[row + 1].to(device),
        seq=torch.repeat_interleave(torch.tensor([s.reply_length for s in samples], dtype=torch.int64)).to(device),
        advantage=torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device),
        rollout_logp=torch.cat([empty, *(s.rollout_logp.float() for s in samples)]).to(device),
        old_logp=torch.cat(old).float().to(device) if old else None,
    )
