"""Forests of token sequences for the tree tests, and a planner that anyone can check by eye."""

import numpy as np
import torch
from hypothesis import strategies as st


def dialogues(groups, turns, prompt, think, answer, user, seed=0):
    """tree.md 6.5: each turn is trained with its thinking, later turns see the history without it."""
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, 150_000, n, dtype=np.int64)  # noqa: E731
    out, start = [], ids(prompt)
    for _ in range(groups):
        history = start
        for _ in range(turns):
            said = ids(answer)
            out.append(np.concatenate([history, ids(think), said]))
            history = np.concatenate([history, said, ids(user)])
    return out


def replies(groups, per_group, prompt, reply, seed=0):
    """One-turn groups: a prompt each and replies to it."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(groups):
        start = rng.integers(0, 150_000, prompt)
        out += [np.concatenate([start, rng.integers(0, 150_000, reply)]) for _ in range(per_group)]
    return out


@st.composite
def forests(draw, max_sequences=12, max_new=40, alphabet=3):
    """Sequences of which each goes on from somewhere in an earlier one, or starts anew; many are equal, empty or a
    prefix of another. And a key for each, or None."""
    out = []
    for _ in range(draw(st.integers(0, max_sequences))):
        start = []
        if out and draw(st.booleans()):
            other = out[draw(st.integers(0, len(out) - 1))]
            start = other[: draw(st.integers(0, len(other)))]
        new = draw(st.lists(st.integers(0, alphabet - 1), max_size=max_new))
        out.append(start + new)
    keys = draw(st.none() | st.lists(st.sampled_from(["a", "b"]), min_size=len(out), max_size=len(out)))
    return out, keys


def long_forest(seed, total, longest):
    """`total` tokens in sequences that begin as another does, or anew, and go on for up to `longest` of their own."""
    rng = np.random.default_rng(seed)
    out = []
    while total > 0:
        start = np.empty(0, dtype=np.int64)
        if out and rng.random() < 0.8:
            other = out[rng.integers(len(out))]
            start = other[: rng.integers(len(other) + 1)]
        new = int(min(rng.integers(1, longest + 1), total))
        out.append(np.concatenate([start, rng.integers(0, 150_000, new)]))
        total -= new
    return out


def prefix_ids(sequences, keys=None):
    """For each sequence the number of each of its prefixes, equal for equal ones under one key: a trie of dicts."""
    known, out = {}, []
    for i, sequence in enumerate(sequences):
        at, ids = ("root", None if keys is None else keys[i]), []
        for token in sequence:
            at = known.setdefault((at, int(token)), len(known))
            ids.append(at)
        out.append(ids)
    return out, len(known)


def visible_mask(plan):
    """bool [rows, rows] from the sequences' paths alone; subtree_end is not looked at."""
    mask = torch.zeros(plan.num_rows, plan.num_rows, dtype=torch.bool)
    for i in range(len(plan.lengths)):
        rows = plan.rows(i).long()
        mask[rows[:, None], rows[None]] |= torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    return mask
