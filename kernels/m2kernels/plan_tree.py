"""Prefix forests: sequences that share prefixes become one packed batch that holds every shared token once.

Replies to one prompt, and the slices of one dialogue, are a tree. Its rows are laid out depth first, a parent's
largest subtree right behind it, so that row j is visible to row i iff

    j <= i < subtree_end[j]

and the trunk of a dialogue is contiguous. The work is done in C++ (csrc/planner/tree.cpp) with the GIL released:
every input token is looked at about once, no string is sorted.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Tokens: TypeAlias = "Sequence[int] | NDArray[Any] | torch.Tensor"
_OP = "plan_tree"

FINER_KEYS = 64
"""Keys of a finer forward tile of 128 rows."""
FINER_GAIN = 0.03
"""Finer tiles are taken where they spare more than this part of the pairs. A guess at what a matrix product 64 wide
loses to one of 128; not measured."""
_ALIGN = 4
"""Elements: the vectors of an upload begin on 16 bytes, which Triton specialises on."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Nodes of the compressed trie, depth first: runs of rows that the same sequences share. On the host.

    Attributes:
        start: int32 [segments], first row.
        end: int32 [segments], past the last row.
        parent: int32 [segments], segment above, -1 at a root; always a smaller number.
        depth: int32 [segments], position of the first row.
        subtree_end: int32 [segments], past the last row of everything below.
        leaf: int32 [sequences], where each sequence ends; -1: it is empty.
    """

    start: NDArray[np.int32]
    end: NDArray[np.int32]
    parent: NDArray[np.int32]
    depth: NDArray[np.int32]
    subtree_end: NDArray[np.int32]
    leaf: NDArray[np.int32]

    def path(self, segment: int) -> list[int]:
        """Segments from the root down to this one; [] for -1."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = int(self.parent[segment])
        return found[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class TreeTiles:
    """Attention cut into tiles, empty ones left out: `block` query rows by `kv_block` keys going forward, `block` by
    `block` going backward.

    Of a KV block with smallest and largest subtree end m and M, query rows [i0, i1] behind it see something iff
    M > i0 and everything iff m > i1. All tensors are int32, on the plan's device.

    Attributes:
        block: rows of a tile; the last block may be short.
        kv_block: keys of a forward tile; divides `block`.
        min_end: [blocks], m of `block` keys.
        max_end: [blocks], M.
        forward_start: [blocks + 1]; KV blocks (of `kv_block` keys) of query block i are
            forward_kv[forward_start[i]:forward_start[i + 1]]: the diagonal, then the other partial ones, then those
            that need no mask; each part ascends.
        forward_full: [blocks], where the last part begins.
        forward_kv: [forward tiles].
        backward_full_end: [blocks]; query blocks [b + 1, backward_full_end[b]) see all of KV block b.
        backward_end: [blocks]; query blocks [b, backward_end[b]) see some of it.
        forward_order: [blocks], query blocks, most tiles first.
        backward_order: [blocks], KV blocks, most tiles first.
        host_backward_end: backward_end, on the host.
        area: (query, key) pairs in all forward tiles.
    """

    block: int
    kv_block: int
    min_end: torch.Tensor
    max_end: torch.Tensor
    forward_start: torch.Tensor
    forward_full: torch.Tensor
    forward_kv: torch.Tensor
    backward_full_end: torch.Tensor
    backward_end: torch.Tensor
    forward_order: torch.Tensor
    backward_order: torch.Tensor
    host_backward_end: NDArray[np.int32]
    area: int

    @property
    def num_backward_tiles(self) -> int:
        """Of `block` rows by `block` keys."""
        return int((self.host_backward_end - np.arange(len(self.host_backward_end))).sum(dtype=np.int64))

    def backward_units(self, max_tiles: int) -> "BackwardUnits":
        """Work of the dK/dV pass with the KV blocks that very many rows see, such as a prompt's, split.

        Args:
            max_tiles: tiles of a unit, at least 1.
        """
        if max_tiles < 1:
            raise ValueError(f"backward_units: got max_tiles {max_tiles}; expected at least 1")
        first = np.arange(len(self.host_backward_end), dtype=np.int64)
        last = self.host_backward_end.astype(np.int64)
        parts = -((first - last) // max_tiles)
        before = np.cumsum(parts) - parts
        kv = np.repeat(first, parts)
        part = np.arange(len(kv)) - np.repeat(before, parts)
        begin = kv + part * max_tiles
        end = np.minimum(begin + max_tiles, last[kv])
        split = parts > 1
        first_slot = np.cumsum(parts * split) - parts * split
        slot = np.where(split[kv], first_slot[kv] + part, -1)
        longest_first = np.argsort(begin - end, kind="stable")
        units = np.stack([kv, begin, end, slot], axis=1)[longest_first]
        splits = np.stack([first, first_slot, parts], axis=1)[split]
        flat = [torch.from_numpy(x.astype(np.int32).ravel()) for x in (units, splits)]
        there = upload(flat, self.min_end.device)
        return BackwardUnits(there[0].view(-1, 4), there[1].view(-1, 3), int(parts[split].sum()))


@dataclass(frozen=True, slots=True, eq=False)
class BackwardUnits:
    """The dK/dV pass, cut up. Tensors are on the plan's device.

    Attributes:
        units: int32 [units, 4], longest first: KV block, first query block, past the last, and where its sums go: -1
            is the result itself, else a slot of its own.
        splits: int32 [split KV blocks, 3]: KV block, its first slot, how many; to be added in the order of the slots.
        num_slots: of all splits.
    """

    units: torch.Tensor
    splits: torch.Tensor
    num_slots: int


@dataclass(frozen=True, slots=True, eq=False)
class TreePlan:
    """One packed batch. Tensors are int32 and on one device; row j is visible to row i iff j <= i < subtree_end[j].

    Attributes:
        tokens: [rows].
        position: [rows], place in its sequences, for rotary embeddings.
        subtree_end: [rows].
        segments: runs of rows, on the host.
        tiles: of attention.
        num_input_tokens: sum of the sequences' lengths.
        num_pairs: visible (query, key) pairs.
        lengths: of each sequence.
        derived: what a backend works out once and keeps for the other layers and passes.
    """

    tokens: torch.Tensor
    position: torch.Tensor
    subtree_end: torch.Tensor
    segments: Segments
    tiles: TreeTiles
    num_input_tokens: int
    num_pairs: int
    lengths: tuple[int, ...]
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """Unique tokens."""
        return self.tokens.shape[0]

    @property
    def tile_inflation(self) -> float:
        """Pairs in the tiles over visible pairs, at least 1; 1 for an empty plan."""
        return self.tiles.area / self.num_pairs if self.num_pairs else 1.0

    def rows(self, i: int) -> torch.Tensor:
        """int32 [length of sequence i], on the plan's device: the packed row of each of its tokens."""
        if not 0 <= i < len(self.lengths):
            raise ValueError(f"TreePlan.rows: got {i}; expected 0 to {len(self.lengths) - 1}")
        seg = self.segments
        parts = [np.arange(seg.start[s], seg.end[s], dtype=np.int32) for s in seg.path(int(seg.leaf[i]))]
        found = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return torch.from_numpy(found).to(self.tokens.device)

    def cu_seqlens(self) -> torch.Tensor:
        """int32 [sequences + 1]: where each sequence would start if nothing were shared, as varlen kernels want."""
        ends = np.cumsum([0, *self.lengths], dtype=np.int64)
        return torch.from_numpy(ends).to(self.tokens.device, torch.int32)

    def gathered_kv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same attention for varlen kernels without a mask, at the price of a copy of each segment's path.

        Returns:
            index int32 [copied keys], cu_seqlens_q int32 [segments + 1], cu_seqlens_k int32 [segments + 1]: queries
            in packed order attend to `key[index]`, one sequence per segment, causal from the lower right.
        """
        seg = self.segments
        parts = []
        for s in range(len(seg.start)):
            parts += [np.arange(seg.start[p], seg.end[p], dtype=np.int32) for p in seg.path(s)]
        index = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        queries = np.append(seg.start, self.num_rows).astype(np.int32)
        keys = np.cumsum(np.append(0, seg.depth + seg.end - seg.start), dtype=np.int64).astype(np.int32)
        device = self.tokens.device
        return tuple(torch.from_numpy(x).to(device) for x in (index, queries, keys))  # type: ignore[return-value]

    def flashmask_bounds(self) -> torch.Tensor:
        """int32 [1, 1, rows, 1]: FlashMask's causal column bound, the first row from which a column is masked."""
        return self.subtree_end[None, None, :, None]

    def to(self, device: torch.device | str) -> "TreePlan":
        """The same plan with its tensors on `device`: one transfer for all, which does not block the host.

        A plan that is there already is returned as it is, with what backends have worked out for it.
        """
        place = torch.device(device)
        if place == torch.device("cuda"):
            place = torch.device("cuda", torch.cuda.current_device())
        if place == self.tokens.device:
            return self
        plan, tiles = _tensors(self), _tensors(self.tiles)
        moved = iter(upload([*plan.values(), *tiles.values()], place))
        there: dict[str, Any] = {name: next(moved) for name in plan}
        on_tiles: dict[str, Any] = {name: next(moved) for name in tiles}
        return replace(self, **there, tiles=replace(self.tiles, **on_tiles), derived={})


def _tensors(owner: TreePlan | TreeTiles) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(owner, f.name) for f in fields(owner)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def upload(vectors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of int32 vectors on `device`, views of one buffer; to a GPU without waiting for it."""
    sizes = [-(-len(x) // _ALIGN) * _ALIGN for x in vectors]
    pin = device.type == "cuda" and vectors[0].device.type == "cpu"
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=vectors[0].device, pin_memory=pin)
    for part, x in zip(buffer.split(sizes), vectors, strict=True):
        part[: len(x)] = x
    moved = buffer.to(device, non_blocking=pin)
    return [part[: len(x)] for part, x in zip(moved.split(sizes), vectors, strict=True)]


def _array(i: int, tokens: Any) -> NDArray[Any]:
    """A sequence as a contiguous int32 or int64 array; the caller's memory where it is one already."""
    if isinstance(tokens, torch.Tensor):
        if tokens.is_floating_point():  # numpy has no bfloat16
            raise ValueError(f"{_OP}: sequence {i} is {tokens.dtype}; expected integers, such as int32 or int64")
        tokens = tokens.detach().cpu().numpy()
    array = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"{_OP}: sequence {i} has shape {array.shape}; expected 1 dimension")
    if array.size == 0:
        return np.empty(0, dtype=np.int32)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise ValueError(f"{_OP}: sequence {i} is {array.dtype}; expected integers, such as int32 or int64")
    if array.dtype not in (np.int32, np.int64):
        array = array.astype(np.int64)
    return np.ascontiguousarray(array)


def _numbered(keys: "Sequence[Hashable] | NDArray[Any] | torch.Tensor | None", num: int) -> NDArray[np.int64]:
    """Keys as numbers: equal keys get equal ones."""
    if keys is None:
        return np.zeros(num, dtype=np.int64)
    if len(keys) != num:
        raise ValueError(f"{_OP}: got {len(keys)} keys for {num} sequences; expected one each, or None")
    if isinstance(keys, torch.Tensor | np.ndarray):  # a tensor's elements are equal and hash apart
        keys = keys.tolist()
    known: dict[Hashable, int] = {}
    try:
        return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)
    except TypeError as error:
        raise ValueError(f"{_OP}: {error} in keys; expected hashable values, such as numbers or strings") from error


def plan_tree(
    sequences: Sequence[Tokens],
    *,
    keys: Sequence[Hashable] | NDArray[Any] | torch.Tensor | None = None,
    block: int = 128,
    kv_block: int | None = None,
) -> TreePlan:
    """Merge sequences that begin alike into one prefix forest.

    Args:
        sequences: token ids, each a 1-D list, numpy array or tensor of integers that fit int32. Equal sequences, one
            that another begins with, and empty ones are all fine. int32, or int64 throughout, is read in place.
        keys: one hashable value a sequence; sequences merge only under equal keys (a LoRA slot, an image's hash).
            None: all may merge. Distinct keys give the sequences one after another, unshared.
        block: rows of an attention tile; a power of two from 16 to 1024.
        kv_block: keys of a forward tile; a power of two from 16 to `block`. None: `block`, but 64 for tiles of 128
            rows where that spares over 3 % of the pairs: forests of short segments.

    Returns:
        TreePlan on the CPU. The same arguments give the same plan. Children lie largest subtree first, then by their
        first sequence; trees by their first sequence.

    Raises:
        ValueError: something that is no sequence of token ids, another number of keys, or more rows or tiles than
            int32 can number.
    """
    if block not in (16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"{_OP}: got block {block}; expected a power of two from 16 to 1024")
    if kv_block is not None and (not 16 <= kv_block <= block or kv_block & (kv_block - 1)):
        raise ValueError(f"{_OP}: got kv_block {kv_block}; expected a power of two from 16 to block, {block}")
    arrays = [_array(i, tokens) for i, tokens in enumerate(sequences)]
    number = _numbered(keys, len(arrays))
    wide = any(array.dtype == np.int64 for array in arrays)
    if wide:
        arrays = [array.astype(np.int64, copy=False) for array in arrays]
    from m2kernels import _planner

    min_gain = FINER_GAIN if kv_block is None and block == 2 * FINER_KEYS else 0.0
    finest = FINER_KEYS if min_gain else kv_block or block
    found = _planner.plan_tree(arrays, number, wide, block, finest, min_gain)
    lengths = tuple(len(array) for array in arrays)
    start = found["segment_start"][:-1]
    subtree_end = found["subtree_end"]
    tensor = {k: torch.from_numpy(v) for k, v in found.items() if isinstance(v, np.ndarray)}
    return TreePlan(
        tokens=tensor["tokens"],
        position=tensor["position"],
        subtree_end=tensor["subtree_end"],
        segments=Segments(
            start=start,
            end=found["segment_start"][1:],
            parent=found["segment_parent"],
            depth=found["segment_depth"],
            subtree_end=subtree_end[start],
            leaf=found["leaf"],
        ),
        tiles=TreeTiles(
            block=block,
            kv_block=found["kv_block"],
            min_end=tensor["min_end"],
            max_end=tensor["max_end"],
            forward_start=tensor["start"],
            forward_full=tensor["full"],
            forward_kv=tensor["kv"],
            backward_full_end=tensor["full_end"],
            backward_end=tensor["end"],
            forward_order=tensor["forward_order"],
            backward_order=tensor["backward_order"],
            host_backward_end=found["end"],
            area=found["area"],
        ),
        num_input_tokens=sum(lengths),
        num_pairs=found["num_pairs"],
        lengths=lengths,
    )
