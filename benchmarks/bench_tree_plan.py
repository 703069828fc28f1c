"""Planning time of prefix forests: m2kernels.plan_tree beside TRL's TreeRow and a trie of dicts in plain Python.

Inputs are those of one training step: replies to one prompt, and dialogues whose turns are trained with their
thinking while later turns see the history without it. Each planner's number of unique tokens is checked before it is
timed; the best and the median of the runs are reported, on one thread. TRL's row also lists its loss terms; it is
given samples without any.

    python benchmarks/bench_tree_plan.py [--repeats 20] [--rivals]
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import m2kernels as mk

Sequences = list[np.ndarray]


def dialogues(groups: int, turns: int, prompt: int, think: int, answer: int, user: int) -> Sequences:
    """`groups` dialogues from one prompt; with one turn and no history these are replies to it."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 150_000, prompt)
    out = []
    for _ in range(groups):
        history = start
        for _ in range(turns):
            said = rng.integers(0, 150_000, answer)
            out.append(np.concatenate([history, rng.integers(0, 150_000, think), said]))
            history = np.concatenate([history, said, rng.integers(0, 150_000, user)])
    return out


INPUTS = {
    "16 replies of 2k to 4k": (16, 1, 4096, 1024, 1024, 0),
    "8 dialogues of 6 turns": (8, 6, 4096, 1024, 256, 512),
    "16 dialogues of 12 turns": (16, 12, 4096, 1024, 256, 512),
    "8 dialogues of 20 short turns": (8, 20, 2048, 512, 128, 1024),
}


def plain_trie(sequences: Sequences) -> int:
    """Unique tokens, by one dict a token."""
    root: dict[int, dict] = {}
    count = 0
    for sequence in sequences:
        node = root
        for token in sequence.tolist():
            child = node.get(token)
            if child is None:
                child = node[token] = {}
                count += 1
            node = child
    return count


def tree_row() -> Any:
    """TRL's class, or why it cannot be had. Its module is loaded alone: the package around it wants `datasets`."""
    package = importlib.util.find_spec("trl")
    if package is None or package.origin is None:
        return "trl is not installed"
    path = pathlib.Path(package.origin).parent / "experimental" / "async_grpo" / "packing.py"
    if not path.exists():
        return "this trl has no experimental/async_grpo/packing.py"
    spec = importlib.util.spec_from_file_location("trl_packing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TreeRow


def as_samples(sequences: Sequences) -> list[dict[str, Any]]:
    """What TreeRow takes, nothing trained."""
    columns = [(torch.from_numpy(s), torch.zeros(len(s), dtype=torch.int64), torch.zeros(len(s))) for s in sequences]
    return [
        {"input_ids": ids, "completion_mask": mask, "old_log_probs": logp, "advantage": 0.0, "group_id": 0}
        for ids, mask, logp in columns
    ]


def trl_plan(row_class: Any, samples: list[dict[str, Any]]) -> int:
    """Unique tokens of a packed row, with those that it adds at forks."""
    row = row_class()
    for sample in samples:
        row.add(sample)
    return len(row.pack()["input_ids"])


def measure(plan: Callable[[Any], object], sequences: Any, repeats: int) -> tuple[float, float]:
    """Best and median milliseconds."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        plan(sequences)
        seconds.append(time.perf_counter() - start)
    return min(seconds) * 1e3, statistics.median(seconds) * 1e3


def main() -> None:
    """Print one line an input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rivals", action="store_true", help="also time the others (seconds a run)")
    args = parser.parse_args()
    row_class = tree_row() if args.rivals else None
    if isinstance(row_class, str):
        print(f"TreeRow is skipped: {row_class}")
    print(f"{'input':<30} {'tokens':>9} {'unique':>8} {'tiles':>8} {'inflation':>9} {'best ms':>8} {'median':>8}")
    for name, shape in INPUTS.items():
        sequences = dialogues(*shape)
        plan = mk.plan_tree(sequences)
        best, median = measure(mk.plan_tree, sequences, args.repeats)
        tiles = len(plan.tiles.forward_kv)
        print(
            f"{name:<30} {plan.num_input_tokens:>9} {plan.num_rows:>8} {tiles:>8} {plan.tile_inflation:>9.3f} "
            f"{best:>8.2f} {median:>8.2f}"
        )
        if not args.rivals:
            continue
        rivals: dict[str, tuple[Callable[[Any], int], Any]] = {"trie of dicts": (plain_trie, sequences)}
        if not isinstance(row_class, str):
            rivals["TRL TreeRow"] = (functools.partial(trl_plan, row_class), as_samples(sequences))
        for rival, (run, given) in rivals.items():
            extra = run(given) - plan.num_rows
            if not 0 <= extra <= len(sequences):  # TreeRow forks one token early
                raise RuntimeError(f"{rival} finds {extra} unique tokens more: a broken planner must not be timed")
            slow, _ = measure(run, given, 1)
            print(f"  {rival:<28} {'':>9} {'':>8} {'':>8} {'':>9} {slow:>8.1f} {slow / best:>7.0f}x")


if __name__ == "__main__":
    main()
