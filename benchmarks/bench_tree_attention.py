"""Tree attention on the CPU beside torch: on each sequence by itself, and with a dense mask on the packed rows.

Forward and backward in fp32. The results are compared before they are timed; the best of the runs is reported, rivals
interleaved. Lengths are those of `bench_tree_plan.py` divided by --shrink.

    python benchmarks/bench_tree_attention.py [--shrink 8] [--repeats 3] [--no-dense]
"""

import argparse
import time
from collections.abc import Callable

import torch
from bench_tree_plan import INPUTS, dialogues
from torch.nn import functional as F

import m2kernels as mk

HEADS, KV_HEADS, DIM = 9, 3, 64
Tensors = list[torch.Tensor]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """torch's attention of `[rows, heads, dim]`."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)[
        0
    ].transpose(0, 1)


def seconds(attend: Callable[[Tensors], Tensors], inputs: Tensors, clock: Callable[[], float]) -> float:
    """Of one forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = clock()
    outs = attend(leaves)
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    return clock() - start


def compare(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> None:
    """Print a line for each way to attend."""
    plan = mk.plan_tree(dialogues(*(n if i < 2 else n // args.shrink for i, n in enumerate(shape))))
    packed = [torch.randn(plan.num_rows, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
    rows = [plan.rows(i).long() for i in range(len(plan.lengths))]
    apart = [x[torch.cat(rows)] for x in packed]
    lengths = list(plan.lengths)
    ways: dict[str, tuple[Callable[[Tensors], Tensors], Tensors]] = {
        "tree": (lambda x: [mk.tree_attention(*x, plan)], packed),
        # split: its backward is one copy, where that of slices would add up whole tensors.
        "each sequence": (
            lambda x: [causal(*parts) for parts in zip(*(t.split(lengths) for t in x), strict=True)],
            apart,
        ),
    }
    if args.dense:
        row = torch.arange(plan.num_rows)
        mask = (row <= row[:, None]) & (row[:, None] < plan.subtree_end)
        ways["dense mask"] = (lambda x: [causal(*x, mask=mask)], packed)
    tree = mk.tree_attention(*packed, plan)
    for path, want in zip(rows, ways["each sequence"][0](apart), strict=True):
        if not torch.allclose(tree[path], want, atol=1e-4):
            raise RuntimeError("results differ: a broken kernel must not be timed")
    clock = time.process_time if args.cpu_time else time.perf_counter
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(args.repeats):
        for way, (attend, inputs) in ways.items():
            best[way] = min(best[way], seconds(attend, inputs, clock))
    print(f"{name} / {args.shrink}: {plan.num_input_tokens} tokens, {plan.num_rows} unique")
    for way, value in best.items():
        print(f"  {way:<14} {value * 1e3:>9.1f} ms  {value / best['tree']:>6.2f} x tree")


def main() -> None:
    """Print each input's table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shrink", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--inputs", nargs="*", default=["16 replies of 2k to 4k", "8 dialogues of 6 turns"])
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread, for a machine that is shared"
    )
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    for name in args.inputs:
        compare(name, INPUTS[name], args)


if __name__ == "__main__":
    main()
