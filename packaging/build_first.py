"""As `sitecustomize.py` beside a build: m2kernels and m2train come from there alone.

An editable install's import hooks and the working directory go before PYTHONPATH otherwise, and would mix builds.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path


class BuildFirst:
    """Finds the two packages beside this file; their modules follow from where they are."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        """As of `importlib.abc.MetaPathFinder`."""
        return PathFinder.find_spec(name, [str(Path(__file__).parent)]) if name in ("m2kernels", "m2train") else None


others = [finder for finder in sys.meta_path if type(finder).__module__ != "_editable_skbc_m2train"]
sys.meta_path[:] = [BuildFirst, *others]  # type: ignore[list-item]
