"""Run one command so that nothing of it outlives the process that asked for it.

    python -I -S supervise.py PARENT_PID GRACE_SECONDS COMMAND...

vLLM's EngineCore survives a `kill -9` of its own API server, and a server survives a `kill -9` of the run. This
process stands between: it leads a session that holds the server and all its children, and clears it when the run
dies, when the server dies, or on SIGTERM. It watches its parent's pid, not PR_SET_PDEATHSIG, because that signal
fires when the starting *thread* ends. Standard library only; it starts in 20 ms and must not import m2train.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _ours() -> list[int]:
    """Pids of our session, and orphans that the kernel handed to us, without ourselves."""
    me, session = os.getpid(), os.getsid(0)
    pids = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == me:
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as handle:
                state, parent, _, sid = handle.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state != "Z" and (int(sid) == session or int(parent) == me):
            pids.append(int(name))
    return pids


def _clear() -> None:
    """SIGKILL everything that is ours until nothing is left."""
    deadline = time.monotonic() + 10.0
    while (pids := _ours()) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.02)


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    parent, grace, command = int(argv[0]), float(argv[1]), argv[2:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    stop_at: list[float] = []
    signal.signal(signal.SIGTERM, lambda *_: stop_at.append(time.monotonic() + grace))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The server dies with us even if we are killed by -9 ourselves; its engine processes then die with it.
    child = subprocess.Popen(command, preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    told = False
    try:
        while child.poll() is None:
            if os.getppid() != parent:
                break
            if stop_at and not told:
                child.terminate()
                told = True
            if stop_at and time.monotonic() > stop_at[0]:
                break
            time.sleep(_POLL_S)
    finally:
        _clear()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
