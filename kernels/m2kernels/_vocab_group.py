"""Tensor parallelism of the LM head: who holds which ids, and the merge of all ranks' tile statistics."""

import weakref

import torch
from torch import distributed as dist

from m2kernels._head_kernels import HeadKernels, RowStats, TileStats


def _resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, unused-ignore]


Shards = tuple[tuple[int, int], ...]
"""(first global id, width) of each rank of a group."""

_known_shards: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int | None, ...], Shards]] = (
    weakref.WeakKeyDictionary()
)


def find_shards(
    group: dist.ProcessGroup, start: int, width: int, device: torch.device, shared: tuple[int | None, ...] = ()
) -> Shards:
    """The shards of all ranks. A collective and a host read for the first call with these numbers, none later.

    Args:
        group: of more than one rank.
        start: this rank's first id.
        width: how many it holds.
        device: for the collective.
        shared: numbers that all ranks agree on and that tell this head from others over the group.
            All ranks must meet here or none: heads that agree in `shared` must not differ in some
            ranks' shards alone.

    Raises:
        ValueError: on all ranks, when the shards leave a gap or overlap.
    """
    known = _known_shards.setdefault(group, {})
    key = (start, width, *shared)
    if key not in known:
        mine = torch.tensor([start, width], dtype=torch.int64, device=device)
        found = mine.new_empty(group.size() * 2)
        dist.all_gather_into_tensor(found, mine, group=group)
        shards = tuple((first, size) for first, size in found.view(-1, 2).tolist())
        end = 0
        for first, size in sorted(shards):
            if first != end:
                raise ValueError(
                    f"the ranks of tp_group hold (vocab_start, width) {list(shards)}; expected shards that "
                    "follow each other from 0, without a gap; pass each rank's own vocab_start"
                )
            end = first + size
        known[key] = shards
    return known[key]


class VocabGroup:
    """The shards of a vocabulary over a process group: who holds what, and the merge of their tiles.

    Args:
        group: its name, or None.
        start: global id of this rank's first column.
        width: its columns.
        kernels: whose tiles are merged.
        like: on the device of the collectives.
        shared: as of :func:`find_shards`.
    """

    def __init__(
        self,
        group: str | None,
        start: int,
        width: int,
        kernels: HeadKernels,
        like: torch.Tensor,
        shared: tuple[int | None, ...] = (),
    ) -> None:
        self.kernels = kernels
        self.widest = self.total = width
        self.group = None if group is None else _resolve(group)
        if self.group is None or self.group.size() == 1:
            if start:
                raise ValueError(f"got vocab_start {start} and a tp_group of one rank; expected 0: it holds all ids")
            self.group = None
            return
        shards = find_shards(self.group, start, width, like.device, shared)
        self.widest, self.total = max(w for _, w in shards), sum(w for _, w in shards)
        self.tiles = [-(-w // kernels.tile) for _, w in shards]
        self.order = sorted(range(len(shards)), key=lambda rank: shards[rank])

    def merge(self, stats: TileStats, target: torch.Tensor) -> RowStats:
        """This rank's tiles -> rows over the whole vocabulary; one all-gather where there is a group."""
        stats = stats._replace(z_target=torch.where(target >= 0, stats.z_target, -torch.inf))
        if self.group is not None:
            stats = self._gather(stats)
        return self.kernels.merge(stats)

    def _gather(self, stats: TileStats) -> TileStats:
        """All ranks' statistics, packed in one tensor; the last tiles of narrower shards are filler."""
        assert self.group is not None
        most, mine = max(self.tiles), stats.top.shape[1]
        fields = [stats.top, stats.total] + ([] if stats.moment is None else [stats.moment])
        packed = stats.top.new_zeros(len(stats.top), 1 + len(fields) * most)
        packed[:, 0] = stats.z_target
        for k, field in enumerate(fields):
            packed[:, 1 + k * most : 1 + k * most + mine] = field
        world = packed.new_empty(len(self.tiles), *packed.shape)
        dist.all_gather_into_tensor(world.view(-1), packed.view(-1), group=self.group)
        joined = [
            torch.cat([world[r, :, 1 + k * most : 1 + k * most + self.tiles[r]] for r in self.order], dim=1)
            for k in range(len(fields))
        ]
        return TileStats(world[:, :, 0].amax(dim=0), joined[0], joined[1], joined[2] if len(joined) > 2 else None)
