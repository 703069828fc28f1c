"""Where weights pass from the learner to the engines: shared memory where two exports fit, else the run directory.

Two, because an export is written beside the one before it, which stays readable until it is replaced. A container has
64 MB of shared memory unless told otherwise (`docker run --shm-size`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from m2train.config import Recipe
from m2train.models import weights_size

SHARED_MEMORY = Path("/dev/shm")


def export_place(recipe: Recipe, model: Path) -> tuple[Path | None, str]:
    """The folder for exports (None: the run directory), and a line that says which and why.

    Args:
        recipe: where engines and ranks are, and the dtype of an export.
        model: folder of the model that is trained.

    Raises:
        ModelError: weights whose size cannot be read.
    """
    if recipe.rollout.urls or recipe.learner.launch == "external":
        cause = "engines or ranks may be on other machines (rollout.urls, learner.launch)"
    elif not os.access(SHARED_MEMORY, os.W_OK):
        cause = f"{SHARED_MEMORY} cannot be written"
    else:
        needed = 2 * weights_size(model, recipe.export_dtype)
        free = shutil.disk_usage(SHARED_MEMORY).free
        sizes = f"{free / 1e9:.2f} GB free, two exports take {needed / 1e9:.2f} GB"
        if free >= needed:
            return SHARED_MEMORY, f"weights pass through {SHARED_MEMORY}: {sizes}"
        cause = f"{SHARED_MEMORY} has {sizes}"
    return None, f"weights pass through the run directory: {cause}"


def open_export_folder(run_dir: Path, recipe: Recipe, model: Path) -> tuple[Path, str]:
    """Make the folder of a run; arguments and the line as of `export_place`.

    One folder per run directory, so that what a killed run left is found and removed by the next.
    """
    name = f"m2train-{hashlib.blake2b(str(run_dir).encode(), digest_size=8).hexdigest()}"
    for base in (SHARED_MEMORY, run_dir):  # before the free space is looked at
        shutil.rmtree(base / name, ignore_errors=True)
    shared, line = export_place(recipe, model)
    folder = (shared or run_dir) / name
    folder.mkdir()
    return folder, line
