"""This machine: GPUs, ports and addresses, children that must not outlive their parent, memory that glibc keeps."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import os
import re
import resource
import signal
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec nothing may be imported.
_libc = ctypes.CDLL(None, use_errno=True)


def on_cpu() -> bool:
    """Whether no NVIDIA GPU can be used: none is there or visible, or torch is a build without CUDA.

    As torch.cuda.is_available(), which the learner goes by; no torch import, for it is asked before anything starts.
    """
    return not visible_gpus() or _torch_version().endswith("+cpu")


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def visible_gpus() -> list[str]:
    """Names of the GPUs that a child may be given (no torch import).

    Those of CUDA_VISIBLE_DEVICES, read as CUDA does: the first that is no number and no id (-1, NoDevFiles) ends the
    list. If it is not set all, from 0 on: a container's device files have the numbers of the host, CUDA's its own.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    names = [name.strip() for name in listed.split(",")]
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))


def free_port(host: str = LOOPBACK) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


def address_towards(host: str, port: int) -> str:
    """The address under which `host` sees this machine. Nothing is sent: connecting UDP only asks for the route.

    Raises:
        OSError: no such host, or no route to it.
    """
    family, kind, proto, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, proto) as sock:
        sock.connect(target)
        return str(sock.getsockname()[0])


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however that happens."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def forks_die_too() -> None:
    """Have the kernel kill what this process forks from now on when this process dies, however that happens.

    A fork does not inherit :func:`die_with_parent`: a checkpoint writer that Megatron had forked waited for ever for
    the queue of its killed parent.
    """
    forker = [os.getpid()]

    def before() -> None:
        forker[0] = os.getpid()

    def in_child() -> None:
        die_with_parent()
        if os.getppid() != forker[0]:  # it died before the kernel was told
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)


def parent_of(pid: int) -> int | None:
    """The parent of a process; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the name before it may hold anything


def open_files_limit() -> float:
    """How many files this process may open, at most."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return float("inf") if hard == resource.RLIM_INFINITY else hard


def allow_open_files() -> None:
    """Let this process open as many files as it may: each request in flight is a socket; a common limit is 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def trim_heap() -> None:
    """Give freed memory back to the kernel, where the C library is glibc."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
