"""The learner is the same function under every layout: log-probs, gradients, norms, checkpoints.

Each layout runs once, in its own processes (layout_worker.py); the tests compare what they wrote.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parent))

from learner_models import LOSS_SCALE, OVERLAPPED, VARIANTS, make_batch, run_ranks, write_model  # noqa: E402

pytestmark = pytest.mark.timeout(300)

# dp2 before tp2pp2: the latter loads its checkpoint.
LAYOUTS = {
    "tp1pp1dp1": (1, 1, 1),
    "tp2pp1dp1": (2, 1, 1),
    "tp1pp2dp1": (1, 2, 1),
    "tp1pp1dp2": (1, 1, 2),
    "tp2pp2dp1": (2, 2, 1),
}
OTHERS = [name for name in LAYOUTS if name != "tp1pp1dp1"]


class Runs:
    """Results of the layouts, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, dict[str, Any]] = {}
        for variant in VARIANTS:
            write_model(folder / variant, variant)
        write_model(folder / "bf16", "llama_tied", torch.bfloat16)

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name == "tp2pp2dp1":
            self["tp1pp1dp2"]
        if name not in self._found:
            run_ranks("layout_worker.py", self.folder, LAYOUTS[name])
            self._found[name] = torch.load(self.folder / f"{name}.pt", weights_only=False)
        return self._found[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"))


def max_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def assert_same_run(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Log-probs within 1e-5, first-step gradients within 1e-5 of each tensor's largest, norms within 1e-4."""
    assert max_gap(got["initial"], want["initial"]) < 1e-5
    for mine, theirs in zip(got["logp"], want["logp"], strict=True):
        assert max_gap(mine, theirs) < 1e-5
    assert max_gap(got["final"], want["final"]) < 1e-5
    assert_same_gradients(got["grads"], want["grads"])
    for mine, theirs in zip(got["metrics"], want["metrics"], strict=True):
        assert mine["learner/grad_norm"] == pytest.approx(theirs["learner/grad_norm"], rel=1e-4)
        for name in ("policy/loss", "policy/entropy", "policy/clip_frac_high", "mismatch/k3", "tis/mean"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        largest = float(grad.abs().max())
        assert largest > 0, name
        gap = float((got[name] - grad).abs().max()) / largest
        assert gap < 1e-5, (name, gap)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(runs: Runs, variant: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs.folder / variant, dtype=torch.float32)
    batch = make_batch()
    with torch.no_grad():
        for sample, got in zip(batch.samples, runs["tp1pp1dp1"][variant]["initial"], strict=True):
            logits = model(sample.token_ids[None]).logits[0] / batch.temperature
            want = logits.log_softmax(-1)[:-1].gather(1, sample.token_ids[1:, None])[:, 0]
            assert float((got - want[sample.loss_start - 1 :]).abs().max()) < 1e-5


def test_the_case_is_not_trivial(runs: Runs) -> None:
    """Losses far from zero, weights that move, tokens that are clipped: else equality would prove little."""
    for variant in VARIANTS:
        found = runs["tp1pp1dp1"][variant]
        assert abs(found["metrics"][0]["policy/loss"]) > 1e-3
        assert found["metrics"][0]["policy/clip_frac_high"] > 0.01
        assert found["metrics"][0]["policy/clip_frac_low"] > 0.01
        assert max_gap(found["initial"], found["final"]) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", OTHERS)
def test_layouts_agree(runs: Runs, layout: str, variant: str) -> None:
    assert_same_run(runs[layout][variant], runs["tp1pp1dp1"][variant])


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        ("tp1pp1dp1", "micro4"),
        ("tp1pp1dp1", "unpacked"),
        ("tp1pp1dp1", "recompute"),
        ("tp2pp1dp1", "no_sequence_parallel"),
        ("tp1pp1dp2", "micro4"),
        ("tp2pp2dp1", "micro4"),
        ("tp2pp2dp1", "recompute"),
    ],
)
def test_settings_do_not_change_the_result(runs: Runs, layout: str, case: str) -> None:
    assert_same_run(runs[layout][case], runs["tp1pp1dp1"]["qwen3"])


@pytest.mark.parametrize("variant", OVERLAPPED)
@pytest.mark.parametrize("layout", ["tp1pp1dp1", "tp2pp2dp1"])
def test_a_loss_scale_reaches_every_gradient_once(runs: Runs, layout: str, variant: str) -> None:
    """The head adds dW in the forward, before Megatron's schedule has scaled the loss of any micro-batch."""
    scaled, plain = runs[layout]["scaled", variant], runs["tp1pp1dp1"][variant]
    assert scaled["metrics"][0]["learner/micro_batches"] == 4
    assert scaled["metrics"][0]["policy/loss"] == pytest.approx(plain["metrics"][0]["policy/loss"], rel=1e-5)
    assert_same_gradients({name: grad / LOSS_SCALE for name, grad in scaled["grads"].items()}, plain["grads"])


@pytest.mark.parametrize("variant", OVERLAPPED)
def test_the_fused_head_is_the_eager_one(runs: Runs, variant: str) -> None:
    """Three updates on the same rollouts, once with all logits in fp32 and autograd."""
    fused, eager = runs["tp1pp1dp1"][variant], runs["tp1pp1dp1"]["eager", variant]
    assert_same_run(fused, eager)
    for mine, theirs in zip(fused["metrics"], eager["metrics"], strict=True):
        assert mine["policy/loss"] == pytest.approx(theirs["policy/loss"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("variant", OVERLAPPED)
def test_overlapped_communication_changes_no_bit(runs: Runs, variant: str) -> None:
    """With overlap the head's weight is still on its way when the head is called: DDP's hook has to wait for it."""
    apart, overlap = (runs["tp1pp1dp2"][case, variant] for case in ("apart", "overlap"))
    assert max_gap(overlap["logp"], apart["logp"]) == 0.0
    assert max_gap(overlap["final"], apart["final"]) == 0.0
    assert overlap["weights"].keys() == apart["weights"].keys()
    assert all(torch.equal(value, apart["weights"][name]) for name, value in overlap["weights"].items())
    for mine, theirs in zip(overlap["metrics"], apart["metrics"], strict=True):
        assert mine["policy/loss"] == theirs["policy/loss"]
        assert mine["learner/grad_norm"] == pytest.approx(theirs["learner/grad_norm"], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_is_bit_equal(runs: Runs, layout: str, variant: str) -> None:
    runs[layout]
    assert_same_file(runs.folder / f"{layout}_{variant}_export.safetensors", runs.folder / variant)


def test_bf16_export_is_bit_equal(runs: Runs) -> None:
    runs["tp1pp1dp1"]
    assert_same_file(runs.folder / "tp1pp1dp1_bf16_export.safetensors", runs.folder / "bf16")


def assert_same_file(got: Path, folder: Path) -> None:
    mine, theirs = load_file(got), load_file(folder / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype and torch.equal(mine[name], value), name


def moved(run: dict[str, Any]) -> torch.Tensor:
    return torch.cat(run["final"]) - torch.cat(run["initial"])


@pytest.mark.parametrize("layout", ["tp1pp1dp1", "tp1pp1dp2", "tp2pp2dp1"])
def test_bf16_trains_as_fp32(runs: Runs, layout: str) -> None:
    """bf16 has 8 bits: log-probs near -5 are good to a few hundredths, whatever the layout, and go the same way."""
    got, want = runs[layout]["bf16"], runs["tp1pp1dp1"]["fp32"]
    assert max_gap(got["initial"], want["initial"]) < 0.15
    far = float(moved(want).norm())
    assert far > 1.0
    assert float((moved(got) - moved(want)).norm()) < 0.15 * far


def test_bf16_resume_equals_unbroken_run(runs: Runs) -> None:
    """The fp32 weights that the optimizer keeps come back: rounding them to bf16 would be seen in the log-probs."""
    found = runs["tp1pp1dp1"]
    assert max_gap(found["bf16_resumed"]["final"], found["bf16"]["final"]) == 0.0
    other, want = moved(runs["tp2pp2dp1"]["bf16_resumed"]), torch.cat(runs["tp1pp1dp2"]["bf16"]["final"])
    assert float((torch.cat(runs["tp2pp2dp1"]["bf16_resumed"]["final"]) - want).norm()) < 0.15 * float(other.norm())


def test_weight_decay_spares_norms_and_biases(runs: Runs) -> None:
    before, after = runs["tp1pp1dp1"]["decayed"]
    kept = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert kept == {name for name in before if "norm" in name or name.endswith(".bias")} and kept
    for name in before.keys() - kept:
        torch.testing.assert_close(after[name], before[name] * (1 - 0.05 * 0.5), msg=name)


def test_resume_equals_unbroken_run(runs: Runs) -> None:
    found = runs["tp1pp1dp1"]
    assert max_gap(found["resumed"]["logp"], found["unbroken"]["logp"]) < 1e-6
    assert max_gap(found["resumed"]["after"], found["unbroken"]["after"]) < 1e-6
    for name in ("policy/loss", "learner/grad_norm", "learner/lr"):
        assert found["resumed"]["metrics"][name] == pytest.approx(found["unbroken"]["metrics"][name], rel=1e-6)


def test_shared_step_fault_is_real(runs: Runs) -> None:
    """Without optimizer_fixes.own_steps the update after a resume is visibly wrong."""
    found = runs["tp1pp1dp1"]
    assert max_gap(found["shared_step"]["after"], found["unbroken"]["after"]) > 1e-3


def test_checkpoint_under_another_layout(runs: Runs) -> None:
    """Saved at DP2, loaded at TP2 x PP2: the next step's loss and log-probs are those of the unbroken run."""
    want, got = runs["tp1pp1dp2"]["unbroken"], runs["tp2pp2dp1"]["resumed"]
    assert max_gap(got["logp"], want["logp"]) < 1e-5
    assert got["metrics"]["policy/loss"] == pytest.approx(want["metrics"]["policy/loss"], rel=1e-5)
    assert got["metrics"]["learner/grad_norm"] == pytest.approx(want["metrics"]["learner/grad_norm"], rel=1e-4)
    assert max_gap(got["after"], want["after"]) < 1e-3  # Adam with a small eps amplifies rounding: see make_recipe


def test_several_updates_use_old_logprobs_of_the_start(runs: Runs) -> None:
    """The first update is on-policy (ratio 1); the second sees ratios away from 1."""
    first, second = (m["policy/ratio_max"] for m in runs["tp1pp1dp1"]["updates"]["metrics"])
    assert first == 1.0
    assert second > 1.0 + 1e-4


@pytest.mark.parametrize("layout", ["tp1pp1dp1", "tp1pp1dp2", "tp2pp2dp1"])
def test_kl_to_the_weights_that_the_run_started_from(runs: Runs, layout: str) -> None:
    """Three updates, the last one after a checkpoint: the reference stays what it was before the first."""
    found, plain = runs[layout]["kl"], runs["tp1pp1dp1"]["updates"]
    measured = [m["policy/ref_kl"] for m in found["metrics"]]
    assert measured[0] == 0.0  # the policy is the reference still, so the first update is that without a KL
    for update, reference in ((1, found["before"]), (2, found["third"])):
        y = torch.cat(found["logp"][update]).double() - torch.cat(reference).double()
        k3 = torch.expm1(-y) + y
        assert measured[update] == pytest.approx(float(k3.mean()), rel=1e-3) and measured[update] > 1e-4
        if update == 1:  # of the same weights as without a KL, so the losses differ by its term alone
            denom = make_batch(1).denom
            added = found["metrics"][1]["policy/loss"] - plain["metrics"][1]["policy/loss"]
            assert added == pytest.approx(0.5 * float(k3.sum()) / denom, rel=1e-2)
    assert max_gap(found["before"], runs["tp1pp1dp1"]["kl"]["before"]) < 1e-5
    for mine, theirs in zip(found["logp"], runs["tp1pp1dp1"]["kl"]["logp"], strict=True):
        assert max_gap(mine, theirs) < 1e-5
    assert "policy/ref_kl" not in plain["metrics"][0]
