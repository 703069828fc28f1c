"""Which samples stay together when a batch is cut into micro-batches, so that little of what they share is repeated.

A batch's prefix forest is cut from the bottom: a subtree that fits a limit together with the path above it is one
unit; of one that does not, the units below its branches are joined again as far as they fit: they share that path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

import m2kernels as mk


@dataclass(frozen=True, slots=True)
class Limit:
    """What fits in a micro-batch."""

    tokens: float
    """Unique ones."""
    rows: float
    """Scored ones."""


@dataclass(slots=True)
class Unit:
    """Samples that are not separated."""

    samples: list[int]
    tokens: int
    """Unique ones, the path from the root included."""
    rows: int

    def fits(self, limit: Limit) -> bool:
        """Whether it is within the limit."""
        return self.tokens <= limit.tokens and self.rows <= limit.rows


class SharedPrefixes:
    """The prefix forest of a batch.

    Args:
        sequences: token ids of each sample, none empty.
        rows: scored tokens of each.
        keys: sequences share only under equal keys; None: all may.
    """

    def __init__(
        self, sequences: Sequence[torch.Tensor], rows: Sequence[int], keys: Sequence[int] | None = None
    ) -> None:
        plan = mk.plan_tree(sequences, keys=keys)
        self.plan, self.rows = plan, list(rows)
        seg = plan.segments
        self._parent, self._leaf = seg.parent.tolist(), seg.leaf.tolist()
        self._depth, self._own = seg.depth.tolist(), (seg.end - seg.start).tolist()
        self._size = (seg.subtree_end - seg.start).tolist()
        self._below: list[list[int]] = [[] for _ in self._own]
        self._ending: list[list[int]] = [[] for _ in self._own]
        self._total_rows = [0] * len(self._own)
        for i, s in enumerate(self._leaf):
            self._ending[s].append(i)
            self._total_rows[s] += self.rows[i]
        for s in reversed(range(len(self._own))):
            if self._parent[s] >= 0:
                self._below[self._parent[s]].append(s)
                self._total_rows[self._parent[s]] += self._total_rows[s]

    def size(self, samples: Iterable[int]) -> tuple[int, int]:
        """Unique tokens and visible pairs of these samples packed together."""
        tokens = pairs = 0
        seen: set[int] = set()
        for i in samples:
            s = self._leaf[i]
            while s >= 0 and s not in seen:
                seen.add(s)
                own = self._own[s]
                tokens += own
                pairs += own * self._depth[s] + own * (own + 1) // 2
                s = self._parent[s]
        return tokens, pairs

    def units(self, limit: Limit) -> list[Unit]:
        """All samples in units within the limit; one over it is a unit of its own."""
        found: list[list[Unit] | None] = [None] * len(self._own)
        out: list[Unit] = []
        for s in reversed(range(len(self._own))):  # children have larger numbers
            whole = Unit([], self._depth[s] + self._size[s], self._total_rows[s])
            parts = [unit for child in self._below[s][::-1] for unit in found[child] or []]
            if whole.fits(limit):
                whole.samples = [*self._ending[s], *(i for part in parts for i in part.samples)]
                found[s] = [whole]
            else:
                path = self._depth[s] + self._own[s]
                parts += [Unit([i], path, self.rows[i]) for i in self._ending[s]]
                found[s] = _join(parts, path, limit)
            for child in self._below[s]:
                found[child] = None
            if self._parent[s] < 0:
                out += found[s] or []
        for unit in out:
            unit.samples.sort()
        return sorted(out, key=lambda unit: unit.samples)


def _join(parts: list[Unit], path: int, limit: Limit) -> list[Unit]:
    """Units that share `path` tokens, joined as far as they fit, largest first."""
    joined: list[Unit] = []
    for part in sorted(parts, key=lambda unit: -unit.tokens):
        for into in joined:
            both = Unit([*into.samples, *part.samples], into.tokens + part.tokens - path, into.rows + part.rows)
            if both.fits(limit):
                into.samples, into.tokens, into.rows = both.samples, both.tokens, both.rows
                break
        else:
            joined.append(part)
    return joined
