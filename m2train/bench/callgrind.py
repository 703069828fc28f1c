"""Instruction counts from inside: valgrind's client requests, made from Python.

A client request is a magic instruction sequence that does nothing on a real CPU. Nothing here needs valgrind's
headers or a compiler: the sequence is put into an executable page. x86-64 only.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

OUT_ENV = "M2BENCH_CALLGRIND_OUT"
"""Set by the pool: the prefix of callgrind's dump files."""
_RUNNING_ON_VALGRIND = 0x1001
_BASE = (ord("C") << 24) | (ord("T") << 16)
_DUMP_STATS, _ZERO_STATS, _START, _STOP = _BASE, _BASE + 1, _BASE + 4, _BASE + 5
# mov rax, rdi; xor edx, edx; rol rdi, 3/13/61/51; xchg rbx, rbx; mov rax, rdx; ret
_CODE = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3".replace(" ", ""))


def unavailable() -> str | None:
    """Why callgrind cannot be used here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the callgrind timer is written for x86-64; this is {platform.machine()}"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    return None


def command(prefix: Path) -> list[str]:
    """What to put in front of a worker's command line, to count when asked only."""
    return [
        *("valgrind", "--tool=callgrind", "--instr-atstart=no", "--quiet"),
        *("--combine-dumps=no", f"--callgrind-out-file={prefix}"),
    ]


@functools.cache
def _page() -> mmap.mmap:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_CODE)
    return page


def _request(number: int) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(_page()))
    call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(address)
    arguments = (ctypes.c_uint64 * 6)(number)
    return int(call(ctypes.addressof(arguments)))


def require() -> None:
    """Raise ValueError unless this process runs under callgrind."""
    if platform.machine() not in ("x86_64", "AMD64") or _request(_RUNNING_ON_VALGRIND) == 0:
        raise ValueError("the callgrind timer works in workers that m2bench starts under valgrind only")


@dataclass
class Count:
    """Instructions between entering and leaving `counting`."""

    instructions: int = 0


@contextmanager
def counting() -> Iterator[Count]:
    """Count the instructions of the block, of all threads."""
    found = Count()
    prefix = Path(os.environ[OUT_ENV])
    for old in prefix.parent.glob(prefix.name + ".*"):
        old.unlink()
    _request(_START)
    _request(_ZERO_STATS)
    yield found
    _request(_DUMP_STATS)
    _request(_STOP)
    dumps = list(prefix.parent.glob(prefix.name + ".*"))
    totals = [re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE) for dump in dumps]
    found.instructions = sum(int(match[1]) for match in totals if match)
    if found.instructions == 0:
        raise RuntimeError(f"callgrind wrote no count to {prefix}.*")
