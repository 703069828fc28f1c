"""Packing of a step's samples into micro-batches.

It is a function of the samples and the recipe alone, so every rank computes the same plan from the same file and no
data is sent between ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

import m2kernels as mk
from m2kernels.packing_cost import ASSUMED, pairs_apart
from m2train.config import ConfigError, Recipe
from m2train.learner.batch import Sample, TrainBatch
from m2train.learner.grouping import Limit, SharedPrefixes, Unit
from m2train.learner.hf_config import HfModel

_WAYS = ("tree", "varlen")
Packed: TypeAlias = tuple[list[list[list[int]]], list[list[int]], int]
"""What plan_micro_batches returns."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Work of a packed batch, in tokens' way through the linear layers."""

    pair: float
    """Of a visible (query, key) pair."""
    row: float
    """Of a scored row, in the head."""

    @classmethod
    def of(cls, model: HfModel) -> Costs:
        """From FLOPs of the forward: 2 a weight and token, 4 heads x head_dim a pair, 2 h V a scored row."""
        attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
        layer = 2 * (attention + 3 * model.hidden * model.ffn)
        pair = 4 * model.heads * model.head_dim
        return cls(pair / layer, 2 * model.hidden * model.vocab / (layer * model.layers))

    def __call__(self, tokens: float, pairs: float, rows: float) -> float:
        """The sum."""
        return tokens + self.pair * pairs + self.row * rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """How a step's samples are packed."""

    members: list[list[list[int]]]
    """[data-parallel rank][micro-batch]: sample indices. All ranks have equally many micro-batches, empty ones are
    dummies."""
    tokens: list[list[int]]
    """Packed tokens of each, without padding."""
    forests: list[mk.TreePlan]
    """Of this rank's micro-batches; padding is a sequence of its own, the last."""
    input_tokens: int
    """Tokens of all samples, shared ones as often as they occur."""
    seconds: float
    """Spent on planning."""
    packing: str
    """tree | varlen | none: the recipe's, or what was chosen for it."""
    choice: mk.PackingChoice | None
    """Why, under `packing = "auto"`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Samples packed into one forest, on the learner's device."""

    members: list[int]
    """Indices into the batch's samples; empty: a dummy that carries no loss."""
    forest: mk.TreePlan
    tokens: torch.Tensor
    """int64 [1, T]"""
    rows: torch.Tensor
    """int64 [M]: row before each scored token, members one after another; several may share a row"""
    target: torch.Tensor
    """int64 [M]: the scored token"""
    seq: torch.Tensor
    """int64 [M]: which member"""
    advantage: torch.Tensor
    """f32 [members]"""
    rollout_logp: torch.Tensor
    """f32 [M]"""
    old_logp: torch.Tensor | None
    """f32 [M]"""
    ref_logp: torch.Tensor | None
    """f32 [M]"""


def plan_step(batch: TrainBatch, recipe: Recipe, costs: Costs, rank: int = 0, multiple: int = 1) -> StepPlan:
    """Pack a batch; touches no device and no process group, so it may run on a thread.

    Args:
        batch: the step's samples.
        recipe: learner section.
        costs: of the model.
        rank: this process's data-parallel rank.
        multiple: rows of a micro-batch are padded to a multiple of it (sequence parallelism).

    Raises:
        ConfigError: `learner.micro_batches` is too small for the caps, or a sample exceeds one.
    """
    started = time.perf_counter()
    recipe, choice, (members, tokens, _) = choose_packing(batch.samples, recipe, costs, multiple)
    shared = recipe.learner.packing == "tree"
    forests = []
    for one, rows in zip(members[rank], tokens[rank], strict=True):
        pad = -rows % multiple if one else multiple
        forests.append(plan_forest([batch.samples[i] for i in one], shared, pad))
    return StepPlan(
        members=members,
        tokens=tokens,
        forests=forests,
        input_tokens=sum(s.token_ids.numel() for s in batch.samples),
        seconds=time.perf_counter() - started,
        packing=recipe.learner.packing,
        choice=choice,
    )


def choose_packing(
    samples: Sequence[Sample], recipe: Recipe, costs: Costs, multiple: int = 1
) -> tuple[Recipe, mk.PackingChoice | None, Packed]:
    """The recipe with `packing = "auto"` decided for this batch, why (None if nothing was to decide), and the result.

    Every rank decides the same: the costs are given, not measured.
    """
    learner = recipe.learner
    if learner.packing != "auto":
        return recipe, None, plan_micro_batches(samples, recipe, costs, multiple)
    ways = {way: recipe.model_copy(update={"learner": learner.model_copy(update={"packing": way})}) for way in _WAYS}
    forest = plan_micro_batches(samples, ways["tree"], costs, multiple)
    _, tokens, pairs = forest
    lengths = [s.token_ids.numel() for s in samples]
    work = mk.PackingWork(
        tree_tokens=sum(size for rank in tokens for size in rank),
        tree_pairs=pairs,
        varlen_tokens=sum(lengths),
        varlen_pairs=pairs_apart(lengths),
        rows=sum(s.reply_length for s in samples),
    )
    flops = mk.ModelFlops(token=1.0, pair=costs.pair, row=costs.row)
    kernels = ASSUMED["cuda" if torch.cuda.is_available() else "cpu"]
    choice = mk.choose_packing(work, flops, kernels, recompute=learner.recompute)
    if choice.packing == "varlen":
        try:
            return ways["varlen"], choice, plan_micro_batches(samples, ways["varlen"], costs, multiple)
        except ConfigError as err:  # more tokens than the recipe's micro-batches have room for
            choice = replace(choice, packing="tree", reason=f"tree, for as varlen {err}; {choice.reason}")
    return ways["tree"], choice, forest


def plan_forest(samples: Sequence[Sample], shared: bool, pad: int = 0) -> mk.TreePlan:
    """One micro-batch's forest, with a sequence of `pad` rows as its last if there are any."""
    sequences = [s.token_ids for s in samples]
    keys = [0 if shared else i for i in range(len(samples))]
    if pad:
        sequences, keys = [*sequences, torch.zeros(pad, dtype=torch.int64)], [*keys, -1]
    return mk.plan_tree(sequences, keys=keys)


def build_micro_batch(
    batch: TrainBatch, members: Sequence[int], forest: mk.TreePlan, device: torch.device
) -> MicroBatch:
    """The tensors of a micro-batch whose forest has these samples first."""
    samples = [batch.samples[i] for i in members]
    empty, none = torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.int64)
    rows = [forest.rows(i)[s.loss_start - 1 : -1].long() for i, s in enumerate(samples)]
    replies = torch.tensor([s.reply_length for s in samples], dtype=torch.int64)
    return MicroBatch(
        members=list(members),
        forest=forest.to(device),
        tokens=forest.tokens.long()[None].to(device),
        rows=torch.cat([none, *rows]).to(device),
        target=torch.cat([none, *(s.token_ids[s.loss_start :] for s in samples)]).to(device),
        seq=torch.repeat_interleave(replies).to(device),
        advantage=torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device),
        rollout_logp=torch.cat([empty, *(s.rollout_logp.float() for s in samples)]).to(device),
        old_logp=_joined([s.old_logp for s in samples], device),
        ref_logp=_joined([s.ref_logp for s in samples], device),
    )


def _joined(values: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor | None:
    """Values of each sample, all given or none."""
    given = [x for x in values if x is not None]
    return torch.cat(given).float().to(device) if given else None


# ------------------------------------------------------------------------------------------------- which go together


def plan_micro_batches(samples: Sequence[Sample], recipe: Recipe, costs: Costs, multiple: int = 1) -> Packed:
    """`members[dp rank][micro-batch]`, the tokens of each, and the visible pairs of all; bins of similar cost run at
    the same time.

    Raises:
        ConfigError: `learner.micro_batches` is too small for the caps, or a sample exceeds one.
    """
    learner = recipe.learner
    limit = Limit(
        # What is padded to the multiple must not exceed the cap either.
        learner.micro_batch_tokens - learner.micro_batch_tokens % multiple,
        float("inf") if learner.micro_batch_loss_rows is None else learner.micro_batch_loss_rows,
    )
    _check_samples(samples, limit, recipe)
    sequences, rows = [s.token_ids for s in samples], [s.reply_length for s in samples]
    keys = None if learner.packing == "tree" else range(len(samples))
    prefixes = SharedPrefixes(sequences, rows, keys)
    if learner.packing == "none":
        bins = [[i] for i in range(len(samples))]
    else:
        bins = _pack(prefixes, limit, recipe, costs)
    sizes = [prefixes.size(one) for one in bins]
    cost = [costs(*size, sum(rows[i] for i in one)) for size, one in zip(sizes, bins, strict=True)]
    order = sorted(range(len(bins)), key=lambda b: -cost[b])
    members, tokens = [bins[b] for b in order], [sizes[b][0] for b in order]
    dummies = -len(bins) % learner.dp
    members, tokens = members + [[]] * dummies, tokens + [0] * dummies
    ranks = range(learner.dp)
    pairs = sum(size[1] for size in sizes)
    return [members[rank :: learner.dp] for rank in ranks], [tokens[rank :: learner.dp] for rank in ranks], pairs


def _check_samples(samples: Sequence[Sample], limit: Limit, recipe: Recipe) -> None:
    learner = recipe.learner
    longest, scored = max(s.token_ids.numel() for s in samples), max(s.reply_length for s in samples)
    if longest > limit.tokens:
        raise ConfigError(
            f"a sample has {longest} tokens; learner.micro_batch_tokens = {learner.micro_batch_tokens} has room for "
            f"{limit.tokens:g}"
        )
    if scored > limit.rows:
        raise ConfigError(
            f"a reply has {scored} tokens; learner.micro_batch_loss_rows = {learner.micro_batch_loss_rows}"
        )


def _pack(prefixes: SharedPrefixes, limit: Limit, recipe: Recipe, costs: Costs) -> list[list[int]]:
    """As few micro-batches as fit, or the recipe's number of them; equally many on each rank, of similar cost."""
    learner = recipe.learner
    tokens, rows = prefixes.plan.num_rows, sum(prefixes.rows)
    if learner.micro_batches is not None:
        num = learner.dp * learner.micro_batches
        bins = _best_bins(prefixes, num, limit, recipe, costs)
        if bins is None:
            raise ConfigError(
                f"{tokens} tokens do not fit in learner.dp x learner.micro_batches = {num} micro-batches of "
                f"{limit.tokens} tokens; raise learner.micro_batches or learner.micro_batch_tokens"
            )
        return bins
    fewest = max(-(-tokens // int(limit.tokens)), -int(-rows // limit.rows))
    num = -(-fewest // learner.dp) * learner.dp
    bins = _best_bins(prefixes, num, limit, recipe, costs)
    if bins is not None:
        return bins
    # Paths are repeated, so it takes more: between too few and what is found without a number.
    bins = _fill(prefixes, prefixes.units(limit), None, limit, costs)
    assert bins is not None, "a unit is within the limit"
    few, many = num // learner.dp, -(-len(bins) // learner.dp)
    bins = _best_bins(prefixes, many * learner.dp, limit, recipe, costs) or bins
    while many - few > 1:
        middle = (few + many) // 2
        found = _best_bins(prefixes, middle * learner.dp, limit, recipe, costs)
        if found is None:
            few = middle
        else:
            many, bins = middle, found
    return bins


def _best_bins(
    prefixes: SharedPrefixes, num: int, limit: Limit, recipe: Recipe, costs: Costs
) -> list[list[int]] | None:
    """The cheapest of several ways to fill `num` bins; None if none is found.

    Large units repeat little and balance badly, small ones the other way round: several sizes are tried. Ranks wait
    for each other in every micro-batch, and a pipeline fills and drains at the pace of the largest.
    """
    dp = recipe.learner.dp
    even = prefixes.plan.num_rows / num
    # A number that was asked for (to fill a pipeline, to save memory) is not met by empty micro-batches.
    fewest = min(num, len(prefixes.rows)) if recipe.learner.micro_batches is not None else 1
    best, best_cost = None, float("inf")
    for size in dict.fromkeys(min(limit.tokens, even * share) for share in (float("inf"), 1.5, 1.0, 0.5, 0.25, 0.0)):
        units = prefixes.units(Limit(size, limit.rows))
        bins = _fill(prefixes, units, num, limit, costs) if len(units) >= fewest else None
        if bins is None:
            continue
        each = sorted((_cost(prefixes, one, costs) for one in bins), reverse=True)
        cost = sum(each[::dp]) + (recipe.learner.pp - 1) * each[0]
        if cost < best_cost * (1 - 1e-9):
            best, best_cost = bins, cost
        if num == 1 or len(units) == len(prefixes.rows):
            break
    return best


def _fill(
    prefixes: SharedPrefixes, units: list[Unit], num: int | None, limit: Limit, costs: Costs
) -> list[list[int]] | None:
    caps = [float(limit.tokens), min(limit.rows, float(sum(prefixes.rows)))]
    weights = [[unit.tokens, unit.rows] for unit in units]
    try:
        bins = mk.pack_balanced(
            [_cost(prefixes, unit.samples, costs) for unit in units], num, weights=weights, max_weights=caps
        )
    except ValueError:  # the caps rule it out, or no packing was found
        return None
    return [sorted(i for u in one for i in units[u].samples) for one in bins]


def _cost(prefixes: SharedPrefixes, samples: Sequence[int], costs: Costs) -> float:
    return costs(*prefixes.size(samples), sum(prefixes.rows[i] for i in samples))
