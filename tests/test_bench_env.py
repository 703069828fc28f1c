"""What m2bench asks nvidia-smi; a script stands for it."""

import stat
import time

import pytest

from m2train.bench import env


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """Write the script that is found as nvidia-smi, and nothing else."""

    def write(body: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return write


LINE = "GPU-{n}, NVIDIA H100 80GB HBM3, 580.65, 81559, Enabled, Disabled, 700.00, {clock}, 2619, 91.50, 41, {bits}"


def test_the_state_of_the_gpu_in_use(monkeypatch, smi):
    lines = [LINE.format(n=n, clock=1980 - n, bits=bits) for n, bits in ((0, "0x0000000000000001"), (1, "0x4"))]
    smi("\n".join(f"echo '{line}'" for line in lines))
    state = env.gpu_state()
    assert state["uuid"] == "GPU-0" and state["sm_clock_mhz"] == 1980 and state["power_w"] == 91.5
    assert env.throttle_bits(state) == 0, "idle is no throttling"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert env.gpu_state()["uuid"] == "GPU-1" and env.throttle_bits(env.gpu_state()) == 4


def test_a_load_runs_until_the_answer_is_there(smi):
    smi(f"sleep 0.3; echo '{LINE.format(n=0, clock=1755, bits='0x0')}'")
    calls = []
    state = env.gpu_state(lambda: (calls.append(0), time.sleep(0.01)))
    assert state["sm_clock_mhz"] == 1755 and len(calls) >= 5


@pytest.mark.parametrize("body", ["sleep 60", "echo no devices were found; exit 9"])
@pytest.mark.parametrize("busy", [None, lambda: time.sleep(0.01)])
def test_a_driver_that_hangs_or_fails_says_nothing(monkeypatch, smi, body, busy):
    monkeypatch.setattr(env, "_SMI_S", 0.3)
    smi(f"exec {body}" if "sleep" in body else body)
    start = time.monotonic()
    assert env.gpu_state(busy) == {} and time.monotonic() - start < 10


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.gpu_state() == {} and env.others() == 0
