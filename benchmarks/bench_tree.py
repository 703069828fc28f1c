"""Prefix forests: planning one, cutting one into micro-batches, and attention over one.

The forests are those of a training step: replies to one prompt, and dialogues of which each turn is trained with its
thinking while later turns see the history without it. A shape GxT has G dialogues of T turns from one prompt.

tree_plan           mk.plan_tree beside TRL's TreeRow (its trie, rows and path index) and a trie of dicts
tree_micro_batches  what the trainer does with a step's samples beside verl's get_seqlen_balanced_partitions, which
                    balances lengths and knows no prefixes
tree_attention      mk.tree_attention beside torch's attention of each sequence, dense and block masks, FlashAttention

TRL and verl are run where they are installed (`pip install --no-deps --target DIR trl==1.16.0 verl==0.9.1`,
M2BENCH_PEERS=DIR), and of each the one file alone: the packages around it want much more.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2train.bench import peers
from m2train.bench.attention_peers import Repeated, attention_impls, sdpa
from m2train.bench.case import Case, Fn, Impl, Setup, Skip, case

Sequences = list[torch.Tensor]
VOCAB = 150_000

# Dialogues, turns, and the tokens of prompt, thinking, answer and the user's turn.
SINGLE = (16, 1, 4096, 1024, 1024, 0)
SIX = (8, 6, 4096, 1024, 256, 512)
TWELVE = (16, 12, 4096, 1024, 256, 512)
TWENTY = (8, 20, 2048, 512, 128, 1024)
LONG_REPLIES = (16, 1, 1024, 2048, 2048, 0)


def divided(tree: tuple[int, ...], by: int) -> tuple[int, ...]:
    """The same dialogues with all lengths divided."""
    return (*tree[:2], *(n // by for n in tree[2:]))


def dialogues(s: Setup) -> Sequences:
    """int64 token ids of each trained sequence of `s.tree`."""
    groups, turns, prompt, think, answer, user = s.tree
    start = s.randint(VOCAB, prompt).cpu()
    out = []
    for _ in range(groups):
        history = start
        for _ in range(turns):
            said = s.randint(VOCAB, answer).cpu()
            out.append(torch.cat([history, s.randint(VOCAB, think).cpu(), said]))
            history = torch.cat([history, said, s.randint(VOCAB, user).cpu()])
    return out


# ------------------------------------------------------------------------------------------------- planning


def m2_plan(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Packed tokens, their positions, tile inflation."""
    plan = mk.plan_tree(sequences)
    return plan.tokens, plan.position, plan.tile_inflation


def dict_trie(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions of a trie, by one dict a token."""
    root: dict[int, dict[int, Any]] = {}
    tokens, positions = [], []
    for sequence in sequences:
        node = root
        for depth, token in enumerate(sequence.tolist()):
            child = node.get(token)
            if child is None:
                child = node[token] = {}
                tokens.append(token)
                positions.append(depth)
            node = child
    return torch.tensor(tokens), torch.tensor(positions)


def tree_row(module: Any, lengths: Sequence[int]) -> Fn:
    """TRL's packer; its samples are trained nowhere, so that it lists no loss terms."""
    nothing = [(torch.zeros(n, dtype=torch.int64), torch.zeros(n)) for n in lengths]

    def run(sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        row = module.TreeRow()
        for ids, (mask, logp) in zip(sequences, nothing, strict=True):
            sample = {"input_ids": ids, "completion_mask": mask, "old_log_probs": logp}
            row.add(sample | {"advantage": 0.0, "group_id": 0})
        packed = row.pack()
        return packed["input_ids"], packed["position_ids"]

    return run


def unique_tokens(sequences: Sequences) -> np.ndarray:
    """(position, token) of every node of the trie, as sorted numbers: in sorted order, what each sequence adds to the
    one before it."""
    big_endian = [s.numpy().astype(">i4").tobytes() for s in sequences]
    found, before = [], np.empty(0, dtype=np.int64)
    for i in sorted(range(len(sequences)), key=big_endian.__getitem__):
        now = sequences[i].numpy()
        both = min(len(before), len(now))
        differs = np.flatnonzero(before[:both] != now[:both])
        shared = int(differs[0]) if len(differs) else both
        found.append(np.arange(shared, len(now)) * VOCAB + now[shared:])
        before = now
    return np.sort(np.concatenate(found))


def planned(result: Any, inputs: tuple[Any, ...]) -> str | None:
    """What is wrong with a planner's rows, or None. TreeRow forks one token early, so a few may occur twice."""
    (sequences,) = inputs
    rows = np.sort(result[1].long().numpy() * VOCAB + result[0].long().numpy())
    wanted = unique_tokens(sequences)
    extra = len(rows) - len(wanted)
    if not 0 <= extra <= len(sequences):
        return f"{len(rows)} rows; expected {len(wanted)}, and at most {len(sequences)} more"
    if not np.array_equal(np.unique(rows), np.unique(wanted)):
        return "its tokens and positions are not those of the prefix tree"
    return None


def inflation(result: Any) -> dict[str, float]:
    """Unique tokens, and the tile inflation of planners that cut tiles."""
    more = {"tile_inflation": float(result[2])} if len(result) > 2 else {}
    return {"unique_tokens": float(len(result[0])), **more}


@case(
    "tree_plan",
    shapes={
        "8x6-44k": {"tree": divided(SIX, 8)},
        "16x1-98k": {"tree": SINGLE},
        "8x6-350k": {"tree": SIX},
        "16x12-1840k": {"tree": TWELVE},
        "8x20-2180k": {"tree": TWENTY},
    },
)
def tree_plan(s: Setup) -> Case:
    """A prefix forest out of a step's token ids, tiles of attention included."""
    if s.device.type != "cpu":
        raise Skip("planning runs on the host: --device cpu measures it")
    sequences = dialogues(s)
    lengths = [len(x) for x in sequences]
    trl = peers.peer(
        "trl", s.device, "trl.experimental.async_grpo.packing", lambda m: tree_row(m, lengths), bare=True
    )
    return Case(
        verify=planned,
        inputs=(sequences,),
        impls={"m2": m2_plan, "dict-trie": dict_trie, "trl": trl},
        baseline="dict-trie",
        rotate=False,
        quality=inflation,
    )


# ------------------------------------------------------------------------------------------------- micro-batches


def partitioned(result: Any, inputs: tuple[Any, ...]) -> str | None:
    """What keeps `result` from being a partition of the samples, or None."""
    sequences, bins = inputs
    if len(result) != bins:
        return f"{len(result)} micro-batches; {bins} were asked for"
    if sorted(i for one in result for i in one) != list(range(len(sequences))):
        return "not a partition of the samples"
    return None


def verl_partitions(device: torch.device) -> Fn | Skip:
    """verl's balancer out of its one file; what that imports for others (ray, tensordict) is stood in for."""
    why = peers.reason("verl-balance", device)
    if why is not None:
        return Skip(why)
    package = importlib.util.find_spec("verl")
    assert package is not None and package.submodule_search_locations
    path = Path(next(iter(package.submodule_search_locations))) / "utils" / "seqlen_balancing.py"
    spec = importlib.util.spec_from_file_location("verl_seqlen_balancing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    unused = ("verl", "verl.protocol", "verl.utils", "verl.utils.tensordict_utils", "verl.utils.device")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in unused}):
        try:
            spec.loader.exec_module(module)
            partitions = module.get_seqlen_balanced_partitions
        except (ImportError, AttributeError, OSError) as err:
            return Skip(f"verl {peers.version('verl')} does not offer it: {type(err).__name__}: {err}")
    return lambda sequences, bins: partitions([len(x) for x in sequences], bins, equal_size=False)


@case(
    "tree_micro_batches",
    shapes={
        "8x6-44k": {"tree": divided(SIX, 8), "bins": 8},
        "16x1-98k": {"tree": SINGLE, "bins": 8},
        "8x6-350k": {"tree": SIX, "bins": 8},
        "16x12-1840k": {"tree": TWELVE, "bins": 8},
    },
)
def tree_micro_batches(s: Setup) -> Case:
    """A step's samples into micro-batches of equal cost."""
    if s.device.type != "cpu":
        raise Skip("packing runs on the host: --device cpu measures it")
    for package in ("pydantic", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{package} is not installed (pip install 'm2train[learner]')")
    from m2train.bench.steps import make_recipe
    from m2train.learner.batch import Sample, TrainBatch
    from m2train.learner.packing import Costs, plan_micro_batches

    _, _, _, think, answer, _ = s.tree
    reply = think + answer
    costs = Costs(1 / 6144, 0.1)

    def batch_of(sequences: Sequences) -> TrainBatch:
        zeros = torch.zeros(reply)
        samples = [
            Sample(token_ids=x, loss_start=len(x) - reply, rollout_logp=zeros, advantage=1.0, seq_id=i)
            for i, x in enumerate(sequences)
        ]
        return TrainBatch(samples=samples, denom=1.0, temperature=1.0)

    sequences = dialogues(s)
    total = sum(map(len, sequences))
    recipe = make_recipe(
        batch_of(sequences), dtype="float32", lr=1e-9, micro_batch_tokens=total, micro_batches=s.bins, packing="tree"
    )

    def m2(sequences: Sequences, bins: int) -> list[list[int]]:
        members, _, _ = plan_micro_batches(batch_of(sequences).samples, recipe, costs)
        return members[0]

    def plain(sequences: Sequences, bins: int) -> list[list[int]]:
        """Longest first, each to the emptiest bin."""
        sums, out = [0] * bins, [[] for _ in range(bins)]
        for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
            b = sums.index(min(sums))
            out[b].append(i)
            sums[b] += len(sequences[i])
        return out

    def packed(result: Any) -> dict[str, float]:
        sizes = [mk.plan_tree([sequences[i] for i in one]).num_rows for one in result]
        return {"computed_tokens": float(sum(sizes)), "largest_over_mean": max(sizes) * len(sizes) / sum(sizes)}

    return Case(
        verify=partitioned,
        inputs=(sequences, s.bins),
        impls={
            "m2": m2,
            "longest-first": plain,
            "verl": verl_partitions(s.device),
        },
        baseline="longest-first",
        rotate=False,
        quality=packed,
    )


# ------------------------------------------------------------------------------------------------- attention


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax attention of a sequence's last rows [rows, heads, dim] to it and what is before, spelled out."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
    later = later.triu(1 + len(k) - len(q))
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))


def by_sequence(plan: mk.TreePlan) -> Fn:
    """Each sequence by itself, unpacked: it never sees `subtree_end`. A shared row is one sequence's.

    Long ones: on a CPU torch's kernel in the oracle's float64, which takes seconds where `causal` takes minutes; on a
    GPU, which has none, some rows and a KV head at a time, recomputed in backward.
    """
    repeated = Repeated(plan)

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(q) <= FEW:
            return causal(q, k, v)
        if not q.is_cuda:
            return sdpa(q, k, v)
        heads = zip(q.chunk(k.shape[1], dim=1), k.split(1, dim=1), v.split(1, dim=1), strict=True)
        return torch.cat([some_rows(*parts) for parts in heads], dim=1)

    def some_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ends = range(ROWS, len(q) + ROWS, ROWS)
        return torch.cat(
            [checkpoint(causal, q[end - ROWS : end], k[:end], v[:end], use_reentrant=False) for end in ends]
        )

    return repeated.packed(repeated.attend(one))


FEW, ROWS = 512, 4096
"""Rows of a sequence up to which the oracle is `causal` at once, and of a longer one's on a GPU at a time."""
SMALL = {"heads": (9, 3), "dim": 64, "on": "cpu"}
LARGE = {"heads": (32, 8), "dim": 128, "on": "cuda"}


@case(
    "tree_attention",
    shapes={
        "4x3-2k": {"tree": (4, 3, 96, 32, 16, 24), **SMALL, "on": None},
        "8x6-44k": {"tree": divided(SIX, 8), **SMALL},
        "16x1-12k": {"tree": divided(SINGLE, 8), **SMALL},
        "16x1-98k": {"tree": SINGLE, **LARGE},
        "8x6-350k": {"tree": SIX, **LARGE},
        "16x1-82k": {"tree": LONG_REPLIES, **LARGE},
        "8x20-2180k": {"tree": TWENTY, **LARGE},
    },
    dtypes=(torch.float32, torch.bfloat16),
    nightly=("8x20-2180k",),
    first=("8x6-350k", "16x1-98k"),
)
def tree_attention(s: Setup) -> Case:
    """Attention of packed rows to themselves and the rows above them; lengths are of repeated tokens."""
    if s.on not in (None, s.device.type):
        raise Skip(f"the size is one for --device {s.on}")
    if s.on and s.dtype != (torch.bfloat16 if s.device.type == "cuda" else torch.float32):
        raise Skip("float32 is measured on a CPU, bfloat16 on a GPU")
    plan = mk.plan_tree(dialogues(s)).to(s.device)
    (heads, kv_heads), dim, rows = s.heads, s.dim, plan.num_rows
    impls: dict[str, Impl] = {"m2": lambda q, k, v: mk.tree_attention(q, k, v, plan)}
    if s.device.type == "cuda":
        impls["m2-any-order"] = lambda q, k, v: mk.tree_attention(q, k, v, plan, deterministic=False)
    forward = 4.0 * heads * dim * plan.num_pairs
    moved = 2.0 * rows * dim * (heads + kv_heads) * s.dtype.itemsize
    return Case(
        oracle=by_sequence(plan),
        oracle_device="same",
        inputs=(s.randn(rows, heads, dim), s.randn(rows, kv_heads, dim), s.randn(rows, kv_heads, dim)),
        grad=s.randn(rows, heads, dim),
        impls=impls | attention_impls(plan, s.device, s.dtype),
        baseline="sdpa-each",
        ours=("m2", "m2-any-order") if s.device.type == "cuda" else ("m2",),
        flops={"fwd": forward, "bwd": 2.5 * forward, "both": 3.5 * forward},
        bytes={"fwd": moved, "both": 3 * moved},
        phases=("fwd", "both"),
        quality=lambda _: {"tile_inflation": plan.tile_inflation, "repeated_tokens": float(plan.num_input_tokens)},
    )
