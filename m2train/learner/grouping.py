"""Which samples stay together when a batch is cut into micro-batches, so that little of what they share is repeated.

A batch's prefix forest is cut from the bottom: a subtree that fits a limit together with the path above it is one
unit; of one that does not, the units below its branches are joined again as far as they fit: they share that path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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
        # Segments are numbered depth first: a subtree is a range of them, and of the samples by where they end.
        self._after = np.searchsorted(seg.start, seg.subtree_end).tolist()
        self._by_leaf = np.argsort(seg.leaf, kind="stable").tolist()
        self._first_ending = np.searchsorted(seg.leaf[self._by_leaf], np.arange(len(self._own) + 1)).tolist()
        self._rows_before = np.cumsum([0, *(self.rows[i] for i in self._by_leaf)]).tolist()

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
        top: list[list[Unit]] = []  # of each tree
        # Of each segment whose subtree does not fit, parents first: its children's units, and its own.
        below: dict[int, list[list[Unit]]] = {}
        own: dict[int, list[Unit]] = {}
        s = 0
        while s < len(self._own):
            whole = self._subtree(s)
            fits = whole.tokens <= limit.tokens and whole.rows <= limit.rows
            units = [whole] if fits else []
            (below[self._parent[s]] if self._parent[s] >= 0 else top).append(units)
            if not fits:
                below[s], own[s] = [], units
            s = self._after[s] if fits else s + 1
        for s in reversed(below):
            path = self._depth[s] + self._own[s]
            ending = self._by_leaf[self._first_ending[s] : self._first_ending[s + 1]]
            parts = [unit for units in below[s] for unit in units]
            own[s] += _join([*parts, *(Unit([i], path, self.rows[i]) for i in ending)], path, limit)
        found = [unit for units in top for unit in units]
        for unit in found:
            unit.samples.sort()
        return sorted(found, key=lambda unit: unit.samples)

    def _subtree(self, s: int) -> Unit:
        first, last = self._first_ending[s], self._first_ending[self._after[s]]
        rows = self._rows_before[last] - self._rows_before[first]
        return Unit(self._by_leaf[first:last], self._depth[s] + self._size[s], rows)


def _join(parts: list[Unit], path: int, limit: Limit) -> list[Unit]:
    """Units that share `path` tokens, joined as far as they fit: largest first, each into the first with room."""
    joined: list[Unit] = []
    rooms = _Rooms(len(parts))
    for part in sorted(parts, key=lambda unit: -unit.tokens):
        at = rooms.first(part.tokens - path, part.rows)
        if at is None:
            at = len(joined)
            joined.append(part)
        else:
            into = joined[at]
            into.samples += part.samples
            into.tokens += part.tokens - path
            into.rows += part.rows
        rooms.set(at, limit.tokens - joined[at].tokens, limit.rows - joined[at].rows)
    return joined


class _Rooms:
    """The room that is left in each of several units; finds the first with enough without looking at all.

    A binary tree of maxima. With one of the two limits infinite a look takes log(units) steps; with both, a branch
    whose maxima belong to different units may be searched in vain.
    """

    def __init__(self, num: int) -> None:
        self._leaves = 1 << max(0, num - 1).bit_length()
        self._room = [(-1.0, -1.0)] * (2 * self._leaves)

    def set(self, at: int, tokens: float, rows: float) -> None:
        """State the room of a unit."""
        node = at + self._leaves
        self._room[node] = (tokens, rows)
        while node > 1:
            node //= 2
            a, b = self._room[2 * node], self._room[2 * node + 1]
            self._room[node] = (max(a[0], b[0]), max(a[1], b[1]))

    def first(self, tokens: int, rows: int) -> int | None:
        """The first unit with room for both; None if there is none."""
        stack = [1]
        while stack:
            node = stack.pop()
            room = self._room[node]
            if room[0] < tokens or room[1] < rows:
                continue
            if node >= self._leaves:
                return node - self._leaves
            stack += (2 * node + 1, 2 * node)
        return None
