"""Other projects' kernels behind one interface: a callable, or the reason why it is not one.

None of them is installed with m2train. The pins are those that the adapters were written against; none was run on a
GPU by the authors.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    "cce": Peer(module="cut_cross_entropy", distribution="cut-cross-entropy", pin="25.1.1"),
    "quack": Peer(module="quack", distribution="quack-kernels", pin="0.6.5"),
    "verl": Peer(module="verl", distribution="verl", pin="0.9.1"),
    "trl": Peer(module="trl", distribution="trl", pin="1.16.0", needs_gpu=False),
    "flash-attn": Peer(module="flash_attn", how="no wheel on PyPI: build flash-attn 2 from source"),
    "fa3": Peer(module="flash_attn_interface", how="no wheel on PyPI: build flash-attention/hopper from source"),
    "fa4": Peer(module="flash_attn.cute", distribution="flash-attn-4", pin="4.0.0b36"),
    "flex": Peer(module="torch.nn.attention.flex_attention", needs_gpu=False),
    "cudnn": Peer(module="cudnn", distribution="nvidia-cudnn-frontend", pin="1.32.0"),
}


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


def peer(name: str, device: torch.device, module: str, adapt: Callable[[Any], Fn]) -> Fn | Skip:
    """An implementation out of another project.

    Args:
        name: one of PEERS.
        device: where it is to run.
        module: what to import of it.
        adapt: the module -> a callable of the case's inputs.

    Returns:
        The callable, or a Skip that says why there is none.
    """
    why = reason(name, device)
    if why is not None:
        return Skip(why)
    try:
        return adapt(importlib.import_module(module))
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
