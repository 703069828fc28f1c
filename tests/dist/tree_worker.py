"""One layout's part of tests/test_tree_training.py: `torchrun tree_worker.py FOLDER TP PP DP MODEL:CASE:STEPS...`.

All training runs of a layout share the processes, as starting them is most of the time; rank 0 writes what the test
compares to FOLDER/tree_<layout>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from layout_worker import Layout
from learner_models import make_tree_batch
from torch import distributed as dist

from m2train.learner.parallel import start_process_group

CASES: dict[str, dict[str, Any]] = {
    "tree": {"packing": "tree"},
    # Groups over the cap are split.
    "split": {"packing": "tree", "micro_batch_tokens": 64, "micro_batch_loss_rows": 24, "recompute": True},
    "varlen": {"packing": "varlen"},
    "none": {"packing": "none"},
}


def main() -> None:
    folder = Path(sys.argv[1])
    layout = Layout(folder, *map(int, sys.argv[2:5]))
    start_process_group(60.0)
    out: dict[str, dict[str, Any]] = {}
    for job in sys.argv[5:]:
        model, case, steps = job.split(":")
        batches = [make_tree_batch(seed) for seed in range(int(steps))]
        out.setdefault(model, {})[case] = layout.steps(model, batches, **CASES[case])
    if dist.get_rank() == 0:
        torch.save(out, folder / f"tree_{layout.name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
