"""The LM head over tensor-parallel groups of 1, 2 and 4: equal to the bit, or nearly; right everywhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from head_cases import HeadCase, run_oracle, run_torch  # noqa: E402
from head_worker import CUTS, TRITON_CUTS, VOCAB, inputs  # noqa: E402
from kernel_testing import assert_kernel  # noqa: E402
from triton_testing import interpreted  # noqa: E402

pytestmark = pytest.mark.timeout(240)
FORWARD = ("logp", "entropy", "policy logp", "of logits")
DTYPES = [torch.float32, torch.bfloat16]
UNEVEN = [name for name in CUTS if "uneven" in name]
ALIGNED = [name for name in CUTS if name != "tp1" and name not in UNEVEN]
Results = dict[Any, dict[str, torch.Tensor]]


def run_ranks(folder: Path, backend: str) -> Results:
    """torchrun in a process group of its own, ended whole when it takes too long."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=4", "--nnodes=1"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(Path(__file__).with_name("head_worker.py")), str(folder), backend),
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the ranks hung:\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-6000:]
    found: Results = torch.load(folder / "head.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every layout on the C++ kernels, one on torch's."""
    return run_ranks(tmp_path_factory.mktemp("head"), "cpu")


def assert_same_bits(results: Results, layout: str, dtype: torch.dtype) -> None:
    one, many = results["tp1", dtype], results[layout, dtype]
    for key in (*FORWARD, "loss"):
        assert torch.equal(one[key], many[key]), key


def assert_two_ulp(results: Results, layout: str, dtype: torch.dtype) -> None:
    one, many = results["tp1", dtype], results[layout, dtype]
    for key in FORWARD:
        # A small entropy is a difference of numbers around 1.
        size = one[key].abs().clamp(min=1.0 if key == "entropy" else 0.0)
        ulp = torch.finfo(torch.float32).eps * torch.exp2(size.log2().floor())
        assert float(((one[key] - many[key]).abs() / ulp).max()) <= 2, key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ALIGNED)
def test_aligned_shards_are_equal_to_the_bit(results, layout, dtype):
    assert_same_bits(results, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_of_real_size_is_equal_to_the_bit(results, dtype):
    found = results["real size", dtype]
    for k, name in enumerate(("logp", "entropy")):
        assert_kernel(name, found["tp1"][k], found["plain"][k], found["exact"][k])
        assert torch.equal(found["tp2"][k], found["tp1"][k]) and torch.equal(found["tp4"][k], found["tp1"][k]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", UNEVEN)
def test_shards_that_cut_tiles_are_within_two_ulp(results, layout, dtype):
    assert_two_ulp(results, layout, dtype)


@pytest.mark.parametrize(("layout", "dtype"), [(n, d) for n in CUTS for d in DTYPES] + [("torch", torch.float32)])
def test_gradients(results, layout, dtype):
    x = inputs(dtype)
    options = {k: x[k] for k in ("rows", "temperature", "bias")}
    case = HeadCase(x["hidden"], x["weight"], x["target"], {**options, "vocab_size": VOCAB}, *x["grad"])
    got, plain, want = results[layout, dtype], run_torch(case), run_oracle(case)
    assert_kernel("logp", got["logp"], plain.logp, want.logp)
    assert_kernel("entropy", got["entropy"], plain.entropy, want.entropy)
    for name, torchs, exact in zip(("hidden", "weight", "bias"), plain.grads, want.grads, strict=True):
        # Each rank's part of a narrow gradient is rounded before the parts are added.
        eps = 1e-7 if dtype == torch.float32 else 2**-7
        assert_kernel(name, got[f"logprob {name}"], torchs, exact, eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [name for name in CUTS if name != "tp1"])
def test_policy_loss_and_logits(results, layout, dtype):
    one, many = results["tp1", dtype], results[layout, dtype]
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for key in ("policy hidden", "policy weight", "policy bias", "grad of logits"):
        torch.testing.assert_close(many[key], one[key], msg=key, **close)
    assert not many["policy weight"][VOCAB:].any()


def test_a_chunk_is_one_collective(results):
    """Who holds which ids was said in an earlier call over this group."""
    assert results["collectives"] == [1, 2, 1]


def test_shards_that_overlap_or_leave_a_gap(results):
    overlap, again, gap = results["wrong shards"]
    for message, shards in ((overlap, [(0, 384), (300, 384)]), (gap, [(0, 384), (500, 384)])):
        assert f"hold (vocab_start, width) {shards}" in message and "without a gap" in message
    assert again == overlap


def test_ids_that_no_rank_holds(results):
    held = CUTS["tp2"][-1]
    for message in results["wrong ids"]:
        assert f"target holds {held} to {held}; expected ids from 0 and below {held}" in message


@interpreted
def test_triton_shards(tmp_path):
    """Triton's kernels; gradients against those of one rank."""
    found = run_ranks(tmp_path, "triton")
    one = found["tp1", torch.float32]
    for layout in TRITON_CUTS[1:]:
        check = assert_two_ulp if layout in UNEVEN else assert_same_bits
        check(found, layout, torch.float32)
        for key, value in found[layout, torch.float32].items():
            torch.testing.assert_close(value, one[key], msg=f"{layout}: {key}", rtol=1e-4, atol=1e-5)
