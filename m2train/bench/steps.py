"""Batches, recipes and arithmetic of whole training steps, shared by the learner-step case and benchmarks/step.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from m2train.config import Recipe
    from m2train.learner.batch import TrainBatch


def synthetic_batch(prompts: Sequence[int], lengths: Sequence[int], group: int, vocab: int) -> TrainBatch:
    """A step's batch with random tokens: groups of `group` replies share their prompt.

    Args:
        prompts: tokens of each group's prompt.
        lengths: tokens of each reply, one group after another.
        group: replies of a group.
        vocab: token ids are below it.

    Raises:
        ValueError: the lengths are not those of that many groups.
    """
    from m2train.learner.batch import Sample, TrainBatch

    if len(lengths) != group * len(prompts):
        raise ValueError(f"{len(lengths)} replies; expected {len(prompts)} prompts x {group} replies")
    g = torch.Generator().manual_seed(0)
    context = [torch.randint(vocab, (n,), generator=g) for n in prompts]
    samples = []
    for i, length in enumerate(lengths):
        reply = torch.randint(vocab, (length,), generator=g)
        samples.append(
            Sample(
                token_ids=torch.cat([context[i // group], reply]),
                loss_start=prompts[i // group],
                rollout_logp=torch.full((length,), -10.0) + 0.1 * torch.randn(length, generator=g),
                advantage=float(torch.randn((), generator=g)),
                seq_id=i,
            )
        )
    return TrainBatch(samples=samples, denom=float(len(samples) * max(lengths)), temperature=1.0)


def packed_batch(tokens: int, vocab: int) -> TrainBatch:
    """A batch that packs into `tokens` as trees: groups of 4 replies of 90 tokens to a prompt of 664, 35 % scored.

    Raises:
        ValueError: `tokens` is no multiple of a group's 1024.
    """
    groups, rest = divmod(tokens, 1024)
    if rest or not groups:
        raise ValueError(f"got {tokens} packed tokens; expected a multiple of 1024")
    return synthetic_batch((664,) * groups, (90,) * (4 * groups), 4, vocab)


def recorded_batch(run_dir: Path, step: int) -> TrainBatch:
    """The batch of a step that a run saved, as its own recipe makes it; its first update where there are several."""
    from m2train.config import load
    from m2train.learner.batch import batches_from_groups
    from m2train.rundir import load_rollouts, rollout_file

    recipe = load(run_dir / "config.toml")
    found = batches_from_groups(load_rollouts(rollout_file(run_dir, step)).groups, recipe)
    if not found:
        raise ValueError(f"step {step} of {run_dir} has no groups")
    return found[0]


def make_recipe(batch: TrainBatch, *, dtype: str, lr: float, micro_batch_tokens: int, **learner: Any) -> Recipe:
    """A recipe that such a batch fits."""
    from m2train.config import parse

    longest = max(s.token_ids.numel() for s in batch.samples)
    reply = max(s.reply_length for s in batch.samples)
    settings = {"dtype": dtype, "lr": lr, "micro_batch_tokens": max(micro_batch_tokens, longest + 16)}
    return parse(
        {
            "steps": 1000,
            "algo": {"max_new_tokens": reply, "group_size": len(batch.samples), "tis_cap": 2.0},
            "rollout": {"max_context_tokens": max(16, longest - reply), "cases_per_step": 1, "max_turns": 1},
            "learner": settings | learner,
        }
    )


def step_flops(config: dict[str, Any], batch: TrainBatch) -> float:
    """FLOPs that a step cannot do without: forward and twice that for the backward; recomputation does not count.

    2 per weight of the linear layers and token, 2 D V per scored row, and 4 per head dimension, head, layer and pair
    of a causal attention.
    """
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads, layers = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["num_hidden_layers"],
    )
    layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
    lengths = [s.token_ids.numel() for s in batch.samples]
    linear = 2.0 * layers * layer * sum(lengths)
    attention = 4.0 * layers * heads * dim * sum(n * (n + 1) / 2 for n in lengths)
    head = 2.0 * hidden * config["vocab_size"] * sum(s.reply_length for s in batch.samples)
    return 3.0 * (linear + attention + head)
