"""Planning time of prefix forests: m2kernels.plan_tree beside a trie of dicts in plain Python.

Inputs are those of one training step: replies to one prompt, and dialogues whose turns are trained with their
thinking while later turns see the history without it. Each planner's number of unique tokens is checked before it is
timed; the best and the median of the runs are reported, on one thread.

    python benchmarks/bench_tree_plan.py [--repeats 20] [--plain]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

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


def measure(plan: Callable[[Sequences], object], sequences: Sequences, repeats: int) -> tuple[float, float]:
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
    parser.add_argument("--plain", action="store_true", help="also time the plain trie (seconds a run)")
    args = parser.parse_args()
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
        if args.plain:
            if plain_trie(sequences) != plan.num_rows:
                raise RuntimeError("the planners disagree: a broken one must not be timed")
            slow, _ = measure(plain_trie, sequences, 1)
            print(f"{'  trie of dicts':<30} {'':>9} {'':>8} {'':>8} {'':>9} {slow:>8.2f} {slow / best:>7.0f}x")


if __name__ == "__main__":
    main()
