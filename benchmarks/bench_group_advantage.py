"""Group advantage: reward minus the mean of its group."""

from __future__ import annotations

from typing import Any

import torch

import m2kernels as mk
from m2kernels.reference import group_advantage_ref
from m2train.bench import shapes
from m2train.bench.case import Case, Fn, Setup, Skip, Subset, case, compiled


def _advantage(backend: str) -> Fn:
    def run(reward: Any, group: Any) -> torch.Tensor:
        return mk.group_advantage(reward, group, scale="std", backend=backend)

    return run


def _recorded(workload: shapes.Workload) -> dict[str, Any]:
    return {"sizes": tuple(len(group) for group in workload.lengths)}


def _oracle(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Plain per group: the reference goes through all pairs of rows, which large batches do not allow."""
    if len(reward) <= 512:
        return group_advantage_ref(reward, group, scale="std")
    out = torch.zeros_like(reward)
    for label in group.unique():
        rows = (group == label).nonzero()[:, 0]
        out[rows] = group_advantage_ref(reward[rows], group[rows], scale="std")
    return out


@case(
    "group_advantage",
    shapes={f"{8 * n}": {"sizes": (8,) * n} for n in (16, 128, 1024)},
    smoke=("1024",),
    workload=_recorded,
)
def group_advantage(s: Setup) -> Case:
    """Advantages of a step's replies, divided by their group's standard deviation."""
    rows = sum(s.sizes)
    # Scores of rubrics: a few levels, so that some groups are all equal.
    reward = (s.rand(rows) * 5).floor() / 5
    native = "cuda" if s.device.type == "cuda" else "cpu"
    why = mk.doctor()["group_advantage"][native]
    half = sum(s.sizes[: len(s.sizes) // 2])
    return Case(
        oracle=_oracle,
        inputs=(reward, s.segments(s.sizes)),
        impls={
            "m2": Skip(why) if why else _advantage(native),
            "torch": _advantage("torch"),
            "compile": compiled(_advantage("torch")),
            "loop": _loop,
        },
        bytes=16.0 * rows,
        flops=8.0 * rows,
        subset=Subset(inputs=lambda x: tuple(t[:half] for t in x), output=lambda y: y[:half]),
    )


def _loop(reward: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """A dict of lists, as trainers that take any labels do it (verl's shape of the algorithm, written anew)."""
    members: dict[int, list[int]] = {}
    for row, label in enumerate(group.tolist()):
        members.setdefault(label, []).append(row)
    out = torch.zeros_like(reward)
    for rows in members.values():
        part = reward[rows].double()
        if len(rows) > 1 and bool((part != part[0]).any()):
            out[rows] = ((part - part.mean()) / (part.std() + 1e-6)).to(reward.dtype)
    return out
