"""Other projects' kernels behind one interface: a callable, or the reason why it is not one.

None of them is installed with m2train. `pip install --no-deps --target DIR ...` and M2BENCH_PEERS=DIR make them known
to every process of m2bench; DIR comes last on the path: nothing in it stands in for what is installed. The pins are
those that the adapters were written against; none was run on a GPU by the authors.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from m2train.bench.case import Fn, Skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A project that a case may be compared with.

    Attributes:
        module: what is imported.
        distribution: its name on PyPI; None: part of torch, or built from source.
        pin: the version that the adapters expect.
        needs_gpu: it has no CPU code.
        how: how to get it, where pip has no wheel.
    """

    module: str
    distribution: str | None = None
    pin: str = ""
    needs_gpu: bool = True
    how: str = ""


PEERS: dict[str, Peer] = {
    "liger": Peer(module="liger_kernel", distribution="liger-kernel", pin="0.8.5"),
    "liger-chunked": Peer(module="liger_kernel", distribution="liger-kernel", pin="0.8.5", needs_gpu=False),
    "cce": Peer(module="cut_cross_entropy", distribution="cut-cross-entropy", pin="25.1.1"),
    "quack": Peer(module="quack", distribution="quack-kernels", pin="0.6.5"),
    "verl": Peer(module="verl", distribution="verl", pin="0.9.1"),
    "verl-balance": Peer(module="verl", distribution="verl", pin="0.9.1", needs_gpu=False),
    "trl": Peer(module="trl", distribution="trl", pin="1.16.0", needs_gpu=False),
    "flash-attn": Peer(module="flash_attn", how="no wheel on PyPI: build flash-attn 2 from source"),
    "fa3": Peer(module="flash_attn_interface", how="no wheel on PyPI: build flash-attention/hopper from source"),
    "fa4": Peer(module="flash_attn.cute", distribution="flash-attn-4", pin="4.0.0b36"),
    "flex": Peer(module="torch.nn.attention.flex_attention", needs_gpu=False),
    "varlen": Peer(module="torch.nn.attention.varlen", how="part of torch from 2.10 on"),
    "cudnn": Peer(module="torch.nn.attention", how="part of torch: SDPA with cuDNN's kernel"),
}
FOLDER_ENV = "M2BENCH_PEERS"


def use_folder() -> None:
    """Make the packages in $M2BENCH_PEERS importable.

    Raises:
        ValueError: there is no such folder.
    """
    given = os.environ.get(FOLDER_ENV)
    if not given:
        return
    folder = Path(given)
    if not folder.is_dir():
        raise ValueError(f"{FOLDER_ENV}={given} is no folder; fill one with `pip install --no-deps --target DIR ...`")
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
        importlib.invalidate_caches()


def import_bare(module: str) -> Any:
    """Import a module without running the `__init__` of the packages around it, which may want much more.

    Raises:
        ImportError: it is not there, or lacks what it needs itself.
    """
    parents = module.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        name = ".".join(parents[:depth])
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is not a package")
        empty = types.ModuleType(name)
        empty.__path__ = list(spec.submodule_search_locations)
        empty.__spec__ = spec
        sys.modules[name] = empty
    return importlib.import_module(module)


def import_past(module: str, unused: tuple[str, ...]) -> Any:
    """Import a module that names others at its top which nothing here calls: those not installed are stood in for.

    Raises:
        ImportError: it is not there, or lacks what it needs itself.
    """
    absent = [name for name in unused if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in absent:
        sys.modules[name] = mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    try:
        return importlib.import_module(module)
    finally:
        for name in absent:
            del sys.modules[name]


def reason(name: str, device: torch.device) -> str | None:
    """Why a peer cannot run on `device`, or None; imports nothing but parent packages."""
    peer = PEERS[name]
    try:
        found = importlib.util.find_spec(peer.module) is not None
    except ImportError:
        found = False
    if not found:
        how = peer.how or f"pip install {peer.distribution}=={peer.pin}"
        return f"{peer.module} is not installed ({how})"
    if peer.needs_gpu and device.type != "cuda":
        return f"{peer.module} needs a GPU"
    return None


def peer(
    name: str, device: torch.device, module: str, adapt: Callable[[Any], Fn], *, bare: bool = False
) -> Fn | Skip:
    """An implementation out of another project.

    Args:
        name: one of PEERS.
        device: where it is to run.
        module: what to import of it.
        adapt: the module -> a callable of the case's inputs.
        bare: without the packages around the module.

    Returns:
        The callable, or a Skip that says why there is none.
    """
    why = reason(name, device)
    if why is not None:
        return Skip(why)
    try:
        return adapt(import_bare(module) if bare else importlib.import_module(module))
    except (ImportError, AttributeError, OSError, RuntimeError) as err:
        return Skip(f"{PEERS[name].module} {version(name)} does not offer it: {type(err).__name__}: {err}")


def version(name: str) -> str | None:
    """The installed version, torch's for what is part of torch."""
    distribution = PEERS[name].distribution
    if distribution is None:
        return str(torch.__version__) if PEERS[name].module.startswith("torch") else None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Distribution -> version of every peer that is here."""
    found = {entry.distribution: version(name) for name, entry in PEERS.items() if entry.distribution}
    return {name: here for name, here in found.items() if here is not None}
