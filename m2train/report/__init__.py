"""`run_dir/report.html`: one file that shows what a run did, with no network and nothing beside it.

`write_report` may be called at any time, also on a run that is still going or that was killed in
mid-write. Reading is in `read`, the choice of curves in `specs`, their numbers in `curves`, their
drawing in `svg`, the sample of dialogues in `dialogues`, the page in `page` with `report.html`,
`style.css` and `app.js`; several runs side by side in `compare` with `compare.html`.
"""

from __future__ import annotations

from pathlib import Path

from m2train.files import write_atomic

REPORT_FILE = "report.html"


def write_report(run_dir: Path, *, max_rollout_bytes: int = 2_200_000) -> Path:
    """Write the report of a run.

    Args:
        run_dir: a run directory, finished or not.
        max_rollout_bytes: about how much of the file dialogues may take. When they are more, a
            sample is shown and the report says how much of the whole it is.

    Returns:
        `run_dir/report.html`, replaced in one rename.

    Raises:
        ValueError: there is no such folder.
    """
    from m2train.report.page import render
    from m2train.report.read import load_run

    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"no run directory at {run_dir}")
    html = render(load_run(run_dir), max_rollout_bytes)
    path = run_dir / REPORT_FILE
    write_atomic(path, html.encode("ascii", errors="xmlcharrefreplace"))
    return path
