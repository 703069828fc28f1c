"""Turns a run's own rollouts into a workload file: `python -m m2train.bench.recorder RUN_DIR -o run.workload.json`.

Lengths and advantages only: neither text nor token ids leave the run directory, so the file may be shared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from m2train.bench.shapes import WORKLOAD_FORMAT


def record(run_dir: Path, steps: int | None = None) -> dict[str, object]:
    """The workload of the last `steps` steps of a run (None: of all).

    Raises:
        ValueError: there are no rollouts, or a file is not one.
    """
    from m2train.rundir import load_rollouts

    files = sorted((run_dir / "rollouts").glob("step_*.json"))
    files = files[-steps:] if steps else files
    groups = [group for path in files for group in load_rollouts(path).groups]
    if not groups:
        raise ValueError(f"no rollouts in {run_dir}/rollouts; expected a run directory of `m2train train`")
    return {
        "format": WORKLOAD_FORMAT,
        "name": run_dir.resolve().name,
        "prompts": [len(group.context_ids) for group in groups],
        "lengths": [[len(reply.generation.token_ids) for reply in group.replies] for group in groups],
        "advantages": [[reply.advantage for reply in group.replies] for group in groups],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="m2train.bench.recorder", description=__doc__.partition(":")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="the last so many steps; default: all")
    args = parser.parse_args()
    try:
        found = record(args.run_dir, args.steps)
    except ValueError as err:
        parser.exit(1, f"m2train.bench.recorder: {err}\n")
    args.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
