"""m2kernels.plan_tree against tries of dicts and dense masks, its tiles against their definition."""

import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from forests import dialogues, forests, prefix_ids, replies, visible_mask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import m2kernels as mk


def assert_plan(sequences, keys, plan):
    """Every statement of TreePlan's documentation that does not need a dense mask."""
    ids, unique = prefix_ids(sequences, keys)
    assert plan.num_rows == unique == len(plan.position) == len(plan.subtree_end)
    assert plan.num_input_tokens == sum(map(len, sequences)) and plan.lengths == tuple(map(len, sequences))
    row_of = {}
    for i, sequence in enumerate(sequences):
        rows = plan.rows(i)
        assert rows.dtype == torch.int32 and plan.tokens[rows].tolist() == list(sequence)
        assert plan.position[rows].tolist() == list(range(len(sequence)))
        for prefix, row in zip(ids[i], rows.tolist(), strict=True):
            assert row_of.setdefault(prefix, row) == row, "equal prefixes share a row, others do not"
    assert len(set(row_of.values())) == unique
    assert plan.num_pairs == int((plan.position.long() + 1).sum())
    assert_segments(sequences, plan)


def assert_segments(sequences, plan):
    seg = plan.segments
    end = plan.subtree_end.numpy()
    assert np.array_equal(seg.end[:-1], seg.start[1:]) and (seg.end > seg.start).all()
    for s in range(len(seg.start)):
        assert (end[seg.start[s] : seg.end[s]] == seg.subtree_end[s]).all()
        assert plan.position[seg.start[s]] == seg.depth[s]
        children = [c for c in range(len(seg.start)) if seg.parent[c] == s]
        ends = sum(int(leaf) == s for leaf in seg.leaf)
        assert len(children) > 1 or ends, "a segment ends only where paths part or a sequence ends"
        sizes = [seg.subtree_end[c] - seg.start[c] for c in children]
        assert sizes == sorted(sizes, reverse=True), "largest subtree first"
        assert all(seg.depth[c] == seg.depth[s] + seg.end[s] - seg.start[s] for c in children)
    roots = [s for s in range(len(seg.start)) if seg.parent[s] < 0]
    first = [min(i for i in range(len(sequences)) if s in seg.path(int(seg.leaf[i]))[:1]) for s in roots]
    assert first == sorted(first), "trees lie by their first sequence"


def cut(num_rows, size):
    return [slice(b, min(b + size, num_rows)) for b in range(0, num_rows, size)]


def classes(mask, rows, keys):
    """Which tiles see something, and which everything; the diagonal is masked in any case."""
    some = torch.tensor([[bool(mask[q, k].any()) for k in keys] for q in rows], dtype=torch.bool).reshape(
        len(rows), len(keys)
    )
    full = torch.tensor(
        [[bool(mask[q, k].all()) and k.start < q.start for k in keys] for q in rows], dtype=torch.bool
    )
    return some, full.reshape(len(rows), len(keys))


def assert_tiles(plan, mask):
    """Tile lists against a dense mask."""
    tiles, block = plan.tiles, plan.tiles.block
    part, keys = cut(plan.num_rows, block), cut(plan.num_rows, tiles.kv_block)
    num = len(part)
    some, full = classes(mask, part, part)
    some_keys, full_keys = classes(mask, part, keys)
    for b in range(num):
        assert tiles.min_end[b] == plan.subtree_end[part[b]].min()
        assert tiles.max_end[b] == plan.subtree_end[part[b]].max()
        kv = tiles.forward_kv[tiles.forward_start[b] : tiles.forward_start[b + 1]].tolist()
        masked = int(tiles.forward_full[b] - tiles.forward_start[b])
        own = [k for k, one in enumerate(keys) if one.start // block == b]
        assert kv[: len(own)] == own
        rest = [k for k in range(own[0]) if some_keys[b, k] and not full_keys[b, k]]
        assert kv[len(own) : masked] == rest and kv[masked:] == full_keys[b].nonzero()[:, 0].tolist()
        assert list(range(b, tiles.backward_end[b])) == some[:, b].nonzero()[:, 0].tolist()
        assert list(range(b + 1, tiles.backward_full_end[b])) == full[:, b].nonzero()[:, 0].tolist()
    own = torch.tensor([[k.start // block == i for k in keys] for i in range(num)], dtype=torch.bool)
    visited = some_keys | own.reshape(num, len(keys))
    size = lambda xs: torch.tensor([x.stop - x.start for x in xs])  # noqa: E731
    assert tiles.area == int((visited * size(part)[:, None] * size(keys)).sum())
    counts = tiles.forward_start.diff()[tiles.forward_order.long()]
    assert sorted(tiles.forward_order.tolist()) == list(range(num)) and (counts.diff() <= 0).all()
    counts = some.sum(0)[tiles.backward_order.long()]
    assert sorted(tiles.backward_order.tolist()) == list(range(num)) and (counts.diff() <= 0).all()
    assert tiles.num_backward_tiles == int(some.sum())


def num_prefixes(sequences):
    """How many prefixes they have that differ: of sorted neighbours only what follows their common start is new."""
    in_bytes = sorted(np.asarray(s).astype(">i8").tobytes() for s in sequences)  # of that order: as tokens sort
    ordered = [np.frombuffer(s, ">i8") for s in in_bytes]
    count = len(ordered[0])
    for a, b in pairwise(ordered):
        count += len(b) - common(a, b)
    return count


def common(a, b):
    """Length of the common start."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size


def assert_plan_sampled(sequences, plan, rng):
    """What assert_plan and assert_tiles say, of a sample: for plans whose dense mask or trie takes too long."""
    assert plan.num_rows == num_prefixes(sequences) == len(plan.position) == len(plan.subtree_end)
    assert plan.num_input_tokens == sum(map(len, sequences)) and plan.lengths == tuple(map(len, sequences))
    assert plan.num_pairs == int((plan.position.long() + 1).sum())
    assert_segments(sequences, plan)
    end = plan.subtree_end.numpy()
    for i, other in rng.integers(0, len(sequences), (5, 2)).tolist():
        rows, theirs = plan.rows(i).numpy(), plan.rows(other).numpy()
        assert np.array_equal(plan.tokens.numpy()[rows], sequences[i])
        assert np.array_equal(plan.position.numpy()[rows], np.arange(len(rows)))
        same = common(sequences[i], sequences[other])
        assert np.array_equal(rows[:same], theirs[:same]) and not np.intersect1d(rows[same:], theirs[same:]).size
        for p in rng.integers(0, len(rows), 5):
            assert np.array_equal(np.arange(rows[p] + 1)[end[: rows[p] + 1] > rows[p]], rows[: p + 1])
    assert_tiles_sampled(plan, rng)


def tile_classes(seen, size):
    """[queries, keys] -> for every tile of `size` keys: is something seen, everything."""
    at = np.arange(0, seen.shape[1], size)
    return np.logical_or.reduceat(seen.any(0), at), np.logical_and.reduceat(seen.all(0), at)


def assert_tiles_sampled(plan, rng):
    """The tile lists of some blocks, as queries and as keys, the first and the last too, from visibility itself."""
    tiles, block, size = plan.tiles, plan.tiles.block, plan.tiles.kv_block
    end, num = plan.subtree_end.numpy(), len(plan.tiles.min_end)
    for b in {0, num - 1, *rng.integers(0, num, 2).tolist()}:
        first, last = b * block, min((b + 1) * block, plan.num_rows)
        rows = np.arange(first, last)
        assert (tiles.min_end[b], tiles.max_end[b]) == (end[rows].min(), end[rows].max())
        keys = np.arange(last)
        some, full = tile_classes((keys <= rows[:, None]) & (rows[:, None] < end[keys]), size)
        start, masked, stop = tiles.forward_start[b], tiles.forward_full[b], tiles.forward_start[b + 1]
        own = list(range(first // size, len(some)))
        rest = [k for k in range(own[0]) if some[k] and not full[k]]
        assert tiles.forward_kv[start:masked].tolist() == own + rest
        assert tiles.forward_kv[masked:stop].tolist() == [k for k in range(own[0]) if full[k]]
        queries = np.arange(first, plan.num_rows)  # and the block as keys: one range of queries sees it
        some, full = tile_classes(((rows <= queries[:, None]) & (queries[:, None] < end[rows])).T, block)
        assert b + some.nonzero()[0].tolist()[-1] + 1 == tiles.backward_end[b] and some[: some.sum()].all()
        assert b + 1 + int(full[1:].sum()) == tiles.backward_full_end[b] and full[1 : 1 + full[1:].sum()].all()


def test_hand_computed():
    plan = mk.plan_tree([[5, 6, 1], [5, 6, 2, 3, 4], [5, 6], [9], [], [5, 6, 2, 3, 4]])
    assert plan.tokens.tolist() == [5, 6, 2, 3, 4, 1, 9]
    assert plan.position.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert plan.subtree_end.tolist() == [6, 6, 5, 5, 5, 6, 7]
    assert [plan.rows(i).tolist() for i in range(6)] == [
        [0, 1, 5], [0, 1, 2, 3, 4], [0, 1], [6], [], [0, 1, 2, 3, 4],
    ]  # fmt: skip
    assert plan.segments.parent.tolist() == [-1, 0, 0, -1] and plan.segments.leaf.tolist() == [2, 1, 0, 3, -1, 1]
    assert (plan.num_input_tokens, plan.num_rows, plan.num_pairs) == (16, 7, 19)
    assert {t.dtype for t in (plan.tokens, plan.position, plan.subtree_end)} == {torch.int32}


@settings(max_examples=80, deadline=None)
@given(forests(), st.sampled_from([(16, 16), (64, 16), (32, None)]))
def test_small_forests(case, blocks):
    sequences, keys = case
    plan = mk.plan_tree(sequences, keys=keys, block=blocks[0], kv_block=blocks[1])
    assert plan.tiles.kv_block == (blocks[1] or blocks[0])
    assert_plan(sequences, keys, plan)
    mask = visible_mask(plan)
    rows = torch.arange(plan.num_rows)
    assert torch.equal(mask, (rows <= rows[:, None]) & (rows[:, None] < plan.subtree_end))
    assert_tiles(plan, mask)


@settings(max_examples=15, deadline=None)
@example(0, 64, [1, 500, 4097], 128)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 64),
    st.sampled_from([[1], [1, 2, 63], [127, 128, 129], [1, 500, 4097]]),
    st.sampled_from([16, 128]),
)
def test_deep_and_long_forests(seed, depth, sizes, block):
    """Up to 64 levels and segments of 4097 tokens, up to a million in all."""
    rng = np.random.default_rng(seed)
    trunk, sequences = np.empty(0, dtype=np.int64), []
    for _ in range(depth):
        trunk = np.concatenate([trunk, rng.integers(0, 7, rng.choice(sizes))])
        sequences.append(np.concatenate([trunk, rng.integers(0, 7, rng.choice(sizes))]))
        if len(trunk) > 60_000:
            break
    sequences = [sequences[i] for i in rng.permutation(len(sequences))]
    plan = mk.plan_tree(sequences, block=block)
    if sum(map(len, sequences)) < 30_000:
        assert_plan(sequences, None, plan)
    assert_plan_sampled(sequences, plan, rng)


@pytest.mark.parametrize("block", [16, 128])
def test_sixty_four_levels_and_segments_of_4097(block):
    """Levels of three tokens, but one of 4097 half-way down, and a leaf of 4097 on the last but one."""
    rng = np.random.default_rng(block)
    trunk, sequences = np.empty(0, dtype=np.int64), []
    for level in range(64):
        trunk = np.concatenate([trunk, [0], rng.integers(0, 7, 4096 if level == 32 else 2)])
        sequences.append(np.concatenate([trunk, [1], rng.integers(0, 7, 4096 if level == 62 else 4)]))
    sequences = [sequences[i] for i in rng.permutation(64)]
    plan = mk.plan_tree(sequences, block=block)
    seg = plan.segments
    assert max(len(seg.path(int(leaf))) for leaf in seg.leaf) == 64 and (seg.end - seg.start == 4097).sum() == 2
    assert_plan(sequences, None, plan)
    assert_plan_sampled(sequences, plan, rng)


@settings(max_examples=60, deadline=None)
@given(forests(), st.integers(1, 4))
def test_backward_units_cover_the_tiles(case, max_tiles):
    tiles = mk.plan_tree(case[0], block=16).tiles
    found = tiles.backward_units(max_tiles)
    units = found.units.tolist()
    lengths = [end - begin for _, begin, end, _ in units]
    assert lengths == sorted(lengths, reverse=True) and all(0 < n <= max_tiles for n in lengths)
    splits = {kv: (first, num) for kv, first, num in found.splits.tolist()}
    slots = []
    for b in range(len(tiles.min_end)):
        mine = sorted((begin, end, slot) for kv, begin, end, slot in units if kv == b)
        assert [q for begin, end, _ in mine for q in range(begin, end)] == list(range(b, tiles.backward_end[b]))
        first, num = splits.get(b, (-1, 1))
        assert len(mine) == num and (b in splits) == (num > 1)
        assert [slot for _, _, slot in mine] == (list(range(first, first + num)) if num > 1 else [-1])
        slots += [slot for _, _, slot in mine if slot >= 0]
    assert sorted(slots) == list(range(found.num_slots))


def test_short_segments_get_finer_tiles():
    """Only where that spares over 3 % of the pairs, and only if nobody said otherwise."""
    short = dialogues(8, 12, 600, 60, 20, 40)
    coarse, fine = (mk.plan_tree(short, kv_block=size).tiles for size in (128, 64))
    chosen = mk.plan_tree(short).tiles
    assert fine.area < 0.97 * coarse.area and chosen.kv_block == 64 and chosen.area == fine.area
    long = mk.plan_tree(replies(2, 4, 4000, 3000)).tiles
    assert long.kv_block == 128 and mk.plan_tree(short, block=64).tiles.kv_block == 64


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, torch.int64, torch.int32, list])
def test_every_kind_of_sequence_gives_the_same_plan(kind):
    want = mk.plan_tree([[1, 2, 3], [1, 2], [4]])
    make = {list: list}.get(kind)
    if isinstance(kind, torch.dtype):
        make = lambda s: torch.tensor(s, dtype=kind)  # noqa: E731
    make = make or (lambda s: np.array(s, dtype=kind))
    got = mk.plan_tree([make([1, 2, 3]), [1, 2], make([4])])
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.subtree_end, want.subtree_end)


def test_strided_sequences():
    grid = np.arange(12).reshape(4, 3)
    assert mk.plan_tree([grid[:, 1], torch.from_numpy(grid)[:, 1]]).tokens.tolist() == [1, 4, 7, 10]


def test_nothing_to_plan():
    for sequences in ([], [[]], [[], []]):
        plan = mk.plan_tree(sequences)
        assert plan.num_rows == plan.num_pairs == plan.tiles.area == 0 and plan.tile_inflation == 1.0
        assert [plan.rows(i).numel() for i in range(len(sequences))] == [0] * len(sequences)
        units = plan.tiles.backward_units(4)
        assert units.units.shape == (0, 4) and units.splits.shape == (0, 3) and len(plan.gathered_kv()[0]) == 0
        assert plan.cu_seqlens().tolist() == [0] * (len(sequences) + 1)


def test_distinct_keys_keep_sequences_apart_and_in_order():
    sequences = [[1, 2], [1, 2, 3], [1]]
    plan = mk.plan_tree(sequences, keys=[("image", 1), None, "x"])
    assert plan.tokens.tolist() == [1, 2, 1, 2, 3, 1] and plan.cu_seqlens().tolist() == [0, 2, 5, 6]


@settings(max_examples=40, deadline=None)
@given(forests())
def test_exports(case):
    sequences, keys = case
    plan = mk.plan_tree(sequences, keys=keys)
    index, queries, keys_end = plan.gathered_kv()
    mask = visible_mask(plan)
    for s in range(len(queries) - 1):
        path = index[keys_end[s] : keys_end[s + 1]].tolist()
        rows = range(queries[s], queries[s + 1])
        for back, row in enumerate(reversed(rows)):  # causal from the lower right
            assert path[: len(path) - back] == mask[row].nonzero()[:, 0].tolist()
    assert queries[-1] == plan.num_rows
    bound = plan.flashmask_bounds()
    assert bound.shape == (1, 1, plan.num_rows, 1) and torch.equal(bound.flatten(), plan.subtree_end)


def test_the_order_of_the_input_changes_no_visibility():
    sequences = [[1, 2, 3, 4], [1, 2, 5], [1, 2], [6], [1, 2, 5, 7]]
    want = mk.plan_tree(sequences)
    for shuffle in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        got = mk.plan_tree([sequences[i] for i in shuffle])
        assert got.num_rows == want.num_rows and got.num_pairs == want.num_pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequences": [[1.5]]}, "sequence 0 is float64; expected integers"),
        ({"sequences": [torch.ones(2, dtype=torch.bfloat16)]}, "sequence 0 is torch.bfloat16; expected integers"),
        ({"sequences": [[1], [[2]]]}, "sequence 1 has shape"),
        ({"sequences": [[1], [2**31]]}, "sequence 1 has a token id that is not an int32"),
        ({"sequences": [[1]], "keys": []}, "got 0 keys for 1 sequences"),
        ({"sequences": [[1]], "keys": [[0]]}, "unhashable type: 'list' in keys; expected hashable"),
        ({"sequences": [[1]], "block": 100}, "got block 100"),
        ({"sequences": [[1]], "block": 64, "kv_block": 128}, "got kv_block 128; expected .* to block, 64"),
        ({"sequences": [[1]], "kv_block": 48}, "got kv_block 48"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mk.plan_tree(**arguments)


def test_keys_may_be_an_array():
    sequences = [[1, 2, 3], [1, 2], [1, 4], [1, 2]]
    want = mk.plan_tree(sequences, keys=[7, 7, 8, 8])
    for keys in (torch.tensor([7, 7, 8, 8]), np.array([7, 7, 8, 8])):
        assert mk.plan_tree(sequences, keys=keys).tokens.tolist() == want.tokens.tolist()


def test_bad_questions():
    plan = mk.plan_tree([[1]])
    for i in (-1, 1):
        with pytest.raises(ValueError, match="expected 0 to 0"):
            plan.rows(i)
    with pytest.raises(ValueError, match="max_tiles 0"):
        plan.tiles.backward_units(0)


def test_twenty_turn_tree_has_few_wasted_tiles():
    plan = mk.plan_tree(dialogues(8, 20, 2048, 512, 128, 1024))
    assert plan.num_input_tokens > 2_000_000 and plan.tile_inflation <= 1.05


def test_to_moves_every_tensor():
    plan = mk.plan_tree(replies(2, 3, 20, 10))
    moved = plan.to("meta")
    for owner in (moved, moved.tiles):
        for name in owner.__slots__:
            value = getattr(owner, name)
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", name
    assert moved.segments is plan.segments
    copied = plan.to("cpu")
    for mine, theirs in ((copied, plan), (copied.tiles, plan.tiles)):
        for name in mine.__slots__:
            value = getattr(mine, name)
            assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(theirs, name)), name
            assert not isinstance(value, torch.Tensor) or value.storage_offset() % 4 == 0, name


def test_threads_plan_at_once():
    """The GIL is released; plans made side by side equal those made alone."""
    cases = [dialogues(2, 4, 3000, 500, 200, 100, seed) for seed in range(4)]
    want = [mk.plan_tree(case) for case in cases]
    got = [None] * len(cases)

    def work(i):
        for _ in range(5):
            got[i] = mk.plan_tree(cases[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.tiles.forward_kv, theirs.tiles.forward_kv)


def test_a_plan_on_the_current_gpu_is_left_where_it_is(monkeypatch):
    """`plan.to("cuda")` in every layer must not upload it again, nor forget what was worked out for it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with FakeTensorMode():
        tokens = torch.empty(3, dtype=torch.int32, device="cuda:1")
    plan = replace(mk.plan_tree([[1, 2, 3]]), tokens=tokens)
    assert plan.to("cuda") is plan and plan.to("cuda:1") is plan
