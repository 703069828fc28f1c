"""Is a batch trained faster as a prefix forest, or with its sequences one after another? Says which, and why.

A forest holds every shared token once: fewer tokens for the linear layers, fewer visible pairs for attention. Its
attention kernel may be slower a pair than a varlen kernel, so where little is shared plain varlen wins. Times of both
are predicted from FLOPs,

    linear layers  t tokens       forward t, backward 2 t
    attention      p pairs        forward p, backward 2.5 p: five products where the forward has two
    head           r scored rows  forward r, backward 2 r; the same rows in both

times what a FLOP costs in the kernel that does it. Recomputing activations repeats the layers' forward. The backward
counts useful FLOPs: products that a deterministic kernel does twice are in its cost.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from m2kernels.plan_tree import TreePlan

MIN_GAIN = 0.05
"""A forest must be predicted to save more than this part of the time: predictions are not that good."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of a forward pass, in any unit: 2 W a token, 4 heads x head_dim x layers a pair, 2 hidden x vocabulary a
    scored row, with W the weights of the linear layers without the head."""

    token: float
    pair: float
    row: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCosts:
    """Time of a useful FLOP of attention, where one of a linear layer takes 1.

    Attributes:
        source: where the numbers are from; it is part of the reason that a choice gives.
    """

    tree_forward: float
    tree_backward: float
    varlen_forward: float
    varlen_backward: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingWork:
    """A batch both ways: as a forest, and with its sequences apart."""

    tree_tokens: int
    tree_pairs: int
    varlen_tokens: int
    varlen_pairs: int
    rows: int = 0
    """Scored ones."""

    @classmethod
    def of(cls, plans: Iterable[TreePlan], rows: int = 0) -> "PackingWork":
        """Of the forests of a batch, one a micro-batch; what several of them repeat counts as often."""
        plans = list(plans)
        lengths = [n for plan in plans for n in plan.lengths]
        return cls(
            tree_tokens=sum(plan.num_rows for plan in plans),
            tree_pairs=sum(plan.num_pairs for plan in plans),
            varlen_tokens=sum(lengths),
            varlen_pairs=pairs_apart(lengths),
            rows=rows,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingChoice:
    """What was chosen. Times are in units of a linear layer's FLOP, as ModelFlops has it."""

    packing: Literal["tree", "varlen"]
    tree_time: float
    varlen_time: float
    gain: float
    """Part of the varlen time that the forest is predicted to save; negative: it would lose."""
    reason: str


ASSUMED = {
    "cpu": KernelCosts(
        tree_forward=1.6,
        tree_backward=1.6,
        varlen_forward=1.6,
        varlen_backward=1.6,
        source="on a CPU one kernel does both",
    ),
    "cuda": KernelCosts(
        tree_forward=1.6,
        tree_backward=2.3,
        varlen_forward=1.1,
        varlen_backward=1.4,
        source="assumed, not measured: FlashAttention-3 against a deterministic Triton kernel without its tricks",
    ),
}
"""By device type. The CPU's was measured: on one Zen core with AVX-512, float32, heads 9/3 of 64 and 8 replies of 256
tokens to a prompt of 512, attention did 60 GFLOP/s forward and backward, a product of hidden 576 by 1536 did 95.
CUDA's say that the forest's kernel is slow and its rival the fastest there is: of the two mistakes that a wrong guess
makes, missing a small gain is the cheaper one."""


def pairs_apart(lengths: Iterable[int]) -> int:
    """Visible pairs of sequences that share nothing."""
    return sum(n * (n + 1) // 2 for n in lengths)


def choose_packing(
    work: PackingWork,
    model: ModelFlops,
    costs: KernelCosts,
    *,
    recompute: bool = False,
    backward: bool = True,
    min_gain: float = MIN_GAIN,
) -> PackingChoice:
    """Predict both times, and choose the forest if it saves more than `min_gain` of varlen's.

    Args:
        work: tokens, pairs and scored rows of both layouts.
        model: FLOPs of each.
        costs: of the attention kernels; see ASSUMED.
        recompute: the layers' forward is run again in the backward.
        backward: False for a pass that scores alone.
        min_gain: in [0, 1).

    Raises:
        ValueError: a count or a cost is negative, or min_gain is outside [0, 1).
    """
    if not 0 <= min_gain < 1:
        raise ValueError(f"choose_packing: got min_gain {min_gain}; expected at least 0 and below 1")
    _check_counts(work, model, costs)
    again = int(backward and recompute)
    linear, pair = (1 + again + 2 * backward) * model.token, model.pair
    head = (1 + 2 * backward) * model.row * work.rows
    tree_pair = pair * ((1 + again) * costs.tree_forward + 2.5 * backward * costs.tree_backward)
    varlen_pair = pair * ((1 + again) * costs.varlen_forward + 2.5 * backward * costs.varlen_backward)
    tree = linear * work.tree_tokens + tree_pair * work.tree_pairs + head
    varlen = linear * work.varlen_tokens + varlen_pair * work.varlen_pairs + head
    gain = 1 - tree / varlen if varlen else 0.0
    packing: Literal["tree", "varlen"] = "tree" if gain > min_gain else "varlen"
    reason = (
        f"{packing}: a forest has {_share(work.tree_tokens, work.varlen_tokens)} of the tokens and "
        f"{_share(work.tree_pairs, work.varlen_pairs)} of the attention, and is predicted to take "
        f"{_share(tree, varlen)} of varlen's time ({'less' if packing == 'tree' else 'not less'} than "
        f"{1 - min_gain:.0%}; {costs.source})"
    )
    return PackingChoice(packing=packing, tree_time=tree, varlen_time=varlen, gain=gain, reason=reason)


def _check_counts(work: PackingWork, model: ModelFlops, costs: KernelCosts) -> None:
    for owner in (work, model, costs):
        for name in owner.__slots__:
            value = getattr(owner, name)
            if not isinstance(value, str) and not value >= 0:
                raise ValueError(f"choose_packing: {name} is {value}; expected a number that is not negative")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "all"
