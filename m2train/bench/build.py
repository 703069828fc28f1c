"""Builds a commit, native libraries and all, for `compare`: a worktree of it is installed into a folder of its own.

A build is kept by commit, Python and torch; comparing a commit with itself uses one build for both sides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LIMIT_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """A commit that can be measured."""

    ref: str
    sha: str
    site: Path
    """Holds m2kernels and m2train."""


def build(ref: str, checkout: Path, say: Callable[[str], None]) -> Build:
    """Build a commit unless that has been done.

    Args:
        ref: anything git understands: main, HEAD~2, a hash.
        checkout: a folder inside the repository.
        say: told what takes long.

    Raises:
        ValueError: there is no such commit, or it does not build; names the log.
    """
    sha = _git(checkout, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if sha is None:
        raise ValueError(f"{ref!r} is neither a row file nor a commit of {checkout}")
    import torch

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "m2bench" / "builds"
    site = cache / f"{sha}-py{python}-torch{torch.__version__}"
    if not site.exists():
        say(f"building {ref} ({sha[:12]}), a minute or two")
        _install(sha, checkout, site)
    return Build(ref=ref, sha=sha, site=site)


def _install(sha: str, checkout: Path, site: Path) -> None:
    site.parent.mkdir(parents=True, exist_ok=True)
    log = site.with_name(f"{sha}.log")
    with tempfile.TemporaryDirectory(prefix="m2bench-build-", dir=site.parent) as scratch:
        tree, target = Path(scratch) / "tree", Path(scratch) / "site"
        if _git(checkout, "worktree", "add", "--quiet", "--detach", str(tree), sha) is None:
            raise ValueError(f"git cannot make a worktree of {sha} from {checkout}")
        try:
            with log.open("wb") as out:
                done = subprocess.run(
                    [
                        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
                        *("--no-build-isolation", "--no-compile", "--target", str(target), str(tree)),
                    ],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=_LIMIT_S,
                )
        finally:
            _git(checkout, "worktree", "remove", "--force", str(tree))
        if done.returncode != 0:
            raise ValueError(f"commit {sha[:12]} does not build; see {log}")
        shutil.move(target, site)
    log.unlink()


def _git(folder: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
