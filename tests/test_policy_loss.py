"""m2kernels.policy_loss: hand-computed values, float64 oracle, hostile inputs, invariances."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import assert_kernel, device_of, threads
from policy_cases import LENGTHS, SPECS, assert_metrics, device_case, for_spec, ids, make_case, oracle_run, run, step

import m2kernels as mk
from m2kernels._native import ISA_NAMES, cpu_isa
from m2kernels.metrics import MAX_KEYS, RAW_METRICS
from m2kernels.policy_loss import unsupported_reason

BACKENDS = [b for b in ("cpu", "torch", "cuda", "triton") if unsupported_reason(b) is None]
KERNELS = [b for b in BACKENDS if b != "torch"]
ON_CPU = [b for b in KERNELS if device_of(b) == "cpu"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("per_token", [False, True], ids=["seq_adv", "token_adv"])
def test_oracle(backend, spec, per_token):
    case = for_spec(make_case(LENGTHS, per_token=per_token), spec)
    loss, grad, entropy_grad = oracle_run(case, spec, 17.0)
    device = device_of(backend)
    got = run(case, spec, 17.0, device=device, backend=backend)
    plain = run(case, spec, 17.0, backend="torch")
    assert_kernel("loss", got[0], plain[0], loss)
    assert_kernel("grad_logp", got[1], plain[1], grad)
    assert bool((got[1].cpu()[~case["mask"]] == 0).all())
    if entropy_grad is not None:
        assert_kernel("grad_entropy", got[2], plain[2], entropy_grad)
    if spec == mk.LossSpec():  # the case must meet both clips, or their bounds go untested
        assert min(float(got[3]["clip_frac_low"]), float(got[3]["clip_frac_high"])) > 0.02
    assert_metrics(got[3], case, spec)
    assert_metrics(plain[3], case, spec)
    # What the loss does not need is measured where it is given.
    whole = make_case(LENGTHS, per_token=per_token, seed=1)
    assert_metrics(run(whole, spec, 17.0, device=device, backend=backend)[3], whole, spec)
    assert_metrics(run(whole, spec, 17.0, backend="torch")[3], whole, spec)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_on_policy_has_a_gradient(backend, kind):
    spec = mk.LossSpec(kind=kind, tis_cap=2.0)
    case = for_spec(make_case(LENGTHS), spec)
    case["old_logp"] = None
    loss, grad, _ = oracle_run(case, spec, 3.0)
    got = run(case, spec, 3.0, device=device_of(backend), backend=backend)
    plain = run(case, spec, 3.0, backend="torch")
    assert_kernel("loss", got[0], plain[0], loss)
    assert_kernel("grad_logp", got[1], plain[1], grad)
    assert float(got[1].abs().max()) > 0
    assert_metrics(got[3], case, spec)
    assert_metrics(plain[3], case, spec)
    assert float(got[3]["ratio_max"]) == 1.0
    assert float(got[3]["approx_kl"]) == float(got[3]["kl_k3"]) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend):
    # Ratios 2, 2, 0.5, 0.5 with A = 1, -1, 1, -1; clipped to 1.28 and 0.8.
    # min terms: 1.28, -2, 0.5, -0.8 -> sum -1.02, loss 1.02 / 4.
    device = device_of(backend)
    two = math.log(2)
    logp = torch.tensor([two, two, -two, -two], device=device, requires_grad=True)
    old = torch.zeros(4, device=device)
    advantage = torch.tensor([1.0, -1, 1, -1], device=device)
    seq = torch.arange(4, device=device)
    out = mk.policy_loss(logp, old, advantage, seq, denom=4, backend=backend)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(1.02 / 4, rel=1e-6)
    assert logp.grad.tolist() == pytest.approx([0, 2 / 4, -0.5 / 4, 0], rel=1e-6)
    m = {k: float(v) for k, v in out.metrics.items()}
    assert (m["clip_frac_low"], m["clip_frac_high"], m["num_tokens"]) == (0.25, 0.25, 4)
    assert m["ratio_max"] == pytest.approx(2)
    assert m["approx_kl"] == pytest.approx(0, abs=1e-7)
    assert m["kl_k3"] == pytest.approx((2 + 0.5 - 2) / 2, rel=1e-6)
    assert m["ess"] == pytest.approx(5**2 / (4 * 8.5), rel=1e-6)
    # dual clip 1.5 lifts the second term from -2 to -1.5 and stops its gradient.
    dual = mk.policy_loss(logp, old, advantage, seq, denom=4, spec=mk.LossSpec(dual_clip=1.5), backend=backend)
    assert dual.loss.item() == pytest.approx(0.52 / 4, rel=1e-6)
    assert float(dual.metrics["dual_clip_frac"]) == 0.25
    # gspo, one sequence of all four: mean log-ratio 0, one term A = 1 -> loss -1 / 4.
    one = torch.zeros(4, dtype=torch.int32, device=device)
    gspo = mk.LossSpec(kind="gspo")
    out = mk.policy_loss(logp, old, advantage[:1], one, denom=4, spec=gspo, backend=backend)
    assert out.loss.item() == pytest.approx(-1 / 4, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS[:3], ids=ids)
def test_nothing_live(backend, spec):
    device = device_of(backend)
    case = for_spec(make_case([3, 4], masked=1.1), spec)
    loss, grad, _, metrics = run(case, spec, 2.0, device=device, backend=backend)
    assert loss == 0 and not grad.any()
    assert all(float(v) == 0 for v in metrics.values())
    empty = for_spec(make_case([0]), spec)
    loss, grad, _, _ = run(empty, spec, 2.0, device=device, backend=backend)
    assert loss == 0 and grad.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_live_nan_is_not_hidden_and_zero_advantage_is_exact(backend):
    device = device_of(backend)
    case = for_spec(make_case([5, 6], masked=0.0), mk.LossSpec())
    case["logp"][2] = float("nan")
    loss, *_ = run(case, mk.LossSpec(), 1.0, device=device, backend=backend)
    assert loss.isnan()
    # exp overflows fp32 here; with no advantage the term and the gradient are still zero.
    case = for_spec(make_case([5, 6], masked=0.0), mk.LossSpec())
    case["old_logp"] -= 500.0
    case["advantage"] = torch.zeros(2)
    loss, grad, _, metrics = run(case, mk.LossSpec(), 1.0, device=device, backend=backend)
    assert loss == 0 and not grad.any()
    assert all(math.isfinite(float(metrics[k])) for k in ("ratio_max", "ess"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_nan_has_no_finite_gradient(backend):
    """On a GPU ids out of range say so by a NaN alone; an optimizer must not step on what the other tokens give."""
    device = device_of(backend)
    logp = torch.full((6,), -1.0, device=device, requires_grad=True)
    advantage, seq = torch.tensor([1.0, float("nan")], device=device), torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    loss = mk.policy_loss(logp, logp.detach() - 0.1, advantage, seq, denom=6.0, backend=backend).loss
    loss.backward()
    assert loss.isnan() and (backend == "torch" or logp.grad.isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_index_types_agree_bitwise(backend):
    device = device_of(backend)
    spec = SPECS[9]
    wide, narrow = make_case(LENGTHS), make_case(LENGTHS, index=torch.int32)
    expected = run(wide, spec, 5.0, device=device, backend=backend)
    assert torch.equal(run(narrow, spec, 5.0, device=device, backend=backend)[1], expected[1])
    strided = {k: torch.stack([v, v], 1)[:, 0] if isinstance(v, torch.Tensor) else v for k, v in wide.items()}
    assert not strided["logp"].is_contiguous()
    args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in strided.items()}
    assert torch.equal(mk.policy_loss(**args, denom=5.0, spec=spec, backend=backend).loss.cpu(), expected[0])


@pytest.mark.parametrize("backend", KERNELS)
def test_upstream_gradient_denominator_tensor_and_no_second_derivative(backend):
    device = device_of(backend)
    spec = mk.LossSpec()
    case = for_spec(make_case(LENGTHS), spec)
    _, grad, _, _ = run(case, spec, 1.0, device=device, backend=backend)
    args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    args["logp"] = args["logp"].clone().requires_grad_()
    denom = torch.tensor(8, device=device)
    loss = mk.policy_loss(**args, denom=denom, spec=spec, backend=backend).loss
    factor = torch.tensor(3.0, device=device, requires_grad=True)
    (scaled,) = torch.autograd.grad(loss * factor, args["logp"], create_graph=True)
    torch.testing.assert_close(scaled, grad * 3 / 8, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        scaled.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[8]], ids=ids)
def test_repeats_to_the_bit(backend, spec):
    args = device_case(LENGTHS, spec, device=device_of(backend))
    first, again = step(args, 5.0, backend), step(args, 5.0, backend)
    assert len(first) > 20 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = step(device_case(LENGTHS, spec, device=device_of(backend), seed=1), 5.0, backend)
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("spec", SPECS[:4] + SPECS[8:10], ids=ids)
def test_gradcheck_of_the_reference(spec):
    case = for_spec(make_case([2, 4], masked=0.2, poison=False), spec)
    fixed = {
        k: v.double() if v.is_floating_point() else v
        for k, v in case.items()
        if k not in ("logp", "entropy", "per_token", "mask", "seq")
    }
    entropy = case.get("entropy", torch.zeros(6)).double().requires_grad_()

    def loss(logp, entropy):
        return mk.policy_loss(
            logp, seq=case["seq"], mask=case["mask"], entropy=entropy, denom=3.0, spec=spec, **fixed
        ).loss

    if spec.kind == "cispo":  # the ratio is a constant for autograd, not for finite differences
        fixed["old_logp"] = None
    logp = case["logp"].double().requires_grad_()
    if spec.kind != "cispo":
        assert torch.autograd.gradcheck(loss, (logp, entropy))
    oracle = for_spec({**case, "entropy": entropy, "old_logp": fixed["old_logp"]}, spec)
    want = oracle_run({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in oracle.items()}, spec, 3.0)
    (got,) = torch.autograd.grad(loss(logp, entropy), logp)
    torch.testing.assert_close(got, want[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_micro_batches_add_up(spec):
    # Whole sequences go to each micro-batch; losses and gradients add up, metrics combine.
    case = for_spec(make_case([6, 11, 3, 20]), spec)
    whole = mk.policy_loss(**case, denom=9.0, spec=spec)
    parts = []
    for low, high in ((0, 6), (6, 20), (20, 40)):
        part = {k: v[low:high] if isinstance(v, torch.Tensor) and k != "advantage" else v for k, v in case.items()}
        parts.append(mk.policy_loss(**part, denom=9.0, spec=spec))
    assert float(sum(p.loss for p in parts)) == pytest.approx(float(whole.loss), rel=1e-5)
    combined = mk.combine_metrics([p.metrics for p in parts])
    assert combined.keys() == whole.metrics.keys()
    for key, value in combined.items():
        assert value.shape == () and value.dtype == torch.float32
        assert float(value) == pytest.approx(float(whole.metrics[key]), rel=1e-5, abs=1e-6), key
    assert set(MAX_KEYS) < set(RAW_METRICS)
    with pytest.raises(ValueError, match="empty list"):
        mk.combine_metrics([])


@pytest.mark.parametrize("spec", [SPECS[9], SPECS[13]], ids=ids)
def test_thread_count_changes_nothing(spec):
    case = for_spec(make_case([700] * 30), spec)
    results = []
    for num in (1, 3):
        with threads(num):
            loss, grad, _, metrics = run(case, spec, 100.0, backend="cpu")
        results.append((loss, grad, torch.stack(list(metrics.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ISA_SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
from m2kernels._native import cpu_isa
try:
    cpu_isa()
    sys.exit("a wrong name was taken")
except RuntimeError as error:
    assert "M2KERNELS_CPU_ISA is 'nonsense'" in str(error)
os.environ["M2KERNELS_CPU_ISA"] = {isa!r}
try:
    name = cpu_isa()
except RuntimeError:
    print("cannot"); sys.exit()
import test_policy_loss as t
for spec in t.SPECS:
    t.test_oracle("cpu", spec, False)
print(name)
"""


@pytest.mark.parametrize("isa", [i for i in ISA_NAMES if i != cpu_isa()])
def test_every_other_instruction_set(isa):
    # The set is chosen once a process; this process has tested its own in test_oracle.
    script = ISA_SCRIPT.format(tests=os.path.dirname(__file__), isa=isa)
    env = {**os.environ, "M2KERNELS_CPU_ISA": "nonsense"}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() in ((isa,) if isa == "baseline" else (isa, "cannot"))


def op(backend, suffix):
    return getattr(torch.ops.m2kernels, f"policy_loss_{'triton_' if backend == 'triton' else ''}{suffix}")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad, backend):
    case = make_case(LENGTHS, poison=False)
    logp = case["logp"].requires_grad_(requires_grad)
    entropy = case["entropy"].requires_grad_(requires_grad)
    tensors = [logp, case["old_logp"], case["advantage"], case["seq"], case["mask"], entropy]
    tensors += [case["rollout_logp"], case["ref_logp"]]
    args = (*tensors, 1, 3, 0.2, 0.28, math.inf, 0.1, 0.2, 1.1, True, False, 10.0)
    torch.library.opcheck(op(backend, "fwd"), args)
    tensors = [logp, None, case["advantage"], case["seq"], None, None, None, None]
    plain = (*tensors, 0, 0, 0.2, 0.28, math.inf, 0.0, 0.0, math.inf, False, False, 10.0)
    torch.library.opcheck(op(backend, "fwd"), plain)
    bwd = (torch.tensor(2.0), torch.randn(5), torch.randn(0))
    torch.library.opcheck(op(backend, "bwd"), bwd)


@pytest.mark.parametrize("backend", [*ON_CPU, "torch"])
def test_compile_fullgraph(backend):
    spec = mk.LossSpec(kind="gspo", kl="k3", kl_coef=0.1, entropy_coef=0.1, tis_cap=1.5)
    case = make_case(LENGTHS)

    def step(logp, entropy):
        rest = {k: v for k, v in case.items() if k not in ("logp", "entropy")}
        out = mk.policy_loss(logp * 1.0, entropy=entropy, denom=4.0, spec=spec, backend=backend, **rest)
        return out.loss, out.metrics["ess"]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        logp, entropy = (case[k].clone().requires_grad_() for k in ("logp", "entropy"))
        loss, ess = fn(logp, entropy)
        loss.backward()
        results.append((loss.detach(), ess, logp.grad, entropy.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
def test_compiled_calls_take_other_lengths_and_denominators(backend):
    case = make_case(LENGTHS)

    def step(logp, seq, denom):
        arguments = case | {"logp": logp, "old_logp": case["old_logp"][: len(seq)], "seq": seq}
        arguments = {
            k: v[: len(seq)] if k in ("entropy", "mask") and v is not None else v for k, v in arguments.items()
        }
        arguments = for_spec(arguments, mk.LossSpec())
        return mk.policy_loss(**arguments, denom=denom, backend=backend).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for cut in (0, 1, 2):
        logp, seq = (case[k][: len(case["seq"]) - cut] for k in ("logp", "seq"))
        for denom in (len(seq), 7.5 + cut):
            torch.testing.assert_close(compiled(logp, seq, denom), step(logp, seq, denom))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_may_be_changed_in_place(backend, compiled):
    case = make_case(LENGTHS)
    arguments = for_spec(case, mk.LossSpec())

    def step(logp):
        return mk.policy_loss(**arguments | {"logp": logp}, denom=4.0, backend=backend).loss

    want, got = (case["logp"].clone().requires_grad_() for _ in range(2))
    (step(want) / 3 + want.sum()).backward()
    loss = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(got)
    loss /= 3
    loss += got.sum()
    loss.backward()
    torch.testing.assert_close(got.grad, want.grad)


def base_arguments():
    case = for_spec(make_case([2, 3]), mk.LossSpec())
    return {**case, "denom": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp": torch.zeros(5, 1)}, "logp has shape"),
        ({"old_logp": torch.zeros(4)}, r"old_logp has shape \[4\]; expected shape \[5\]"),
        ({"old_logp": torch.zeros(5).double()}, "old_logp is float64; expected float32"),
        ({"seq": torch.zeros(5)}, "seq is float32; expected int32 or int64"),
        ({"mask": torch.ones(5)}, "mask is float32; expected bool"),
        ({"per_token": True}, "advantage has shape"),
        ({"denom": 0}, "got denom 0"),
        ({"denom": float("nan")}, "got denom nan"),
        ({"denom": torch.ones(2)}, "denom has shape"),
        ({"spec": mk.LossSpec(tis_cap=1.0)}, "rollout_logp is None; pass rollout_logp"),
        ({"spec": mk.LossSpec(kl="k1", kl_coef=1.0)}, "ref_logp is None"),
        ({"spec": mk.LossSpec(entropy_coef=1.0)}, "entropy is None"),
        ({"backend": "metal"}, "got backend 'metal'"),
        ({"advantage": torch.zeros(1), "mask": None}, "seq has 3 ids"),
        ({"seq": torch.tensor([1, 0, 1, 1, 1])}, "out of order"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_wrong_arguments(change, message, backend):
    with pytest.raises(ValueError, match=message):
        mk.policy_loss(**{**base_arguments(), "backend": backend, **change})


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "ppo"}, {"kl": "k4"}, {"tis_level": "batch"}, {"clip_low": 1.5},
        {"clip_high": -0.1}, {"dual_clip": 1.0}, {"kind": "cispo", "dual_clip": 3.0},
        {"kl_coef": 0.1}, {"tis_cap": 0.0}, {"entropy_coef": math.nan},
    ],
)  # fmt: skip
def test_wrong_specs(bad):
    with pytest.raises(ValueError, match="LossSpec"):
        mk.LossSpec(**bad)


def test_explicit_backend_says_why_it_cannot_run():
    arguments = base_arguments()
    for backend, reason in itertools.product(["cuda"], ["logp is on cpu"]):
        with pytest.raises(ValueError, match=f"{backend}.*{reason}"):
            mk.policy_loss(**arguments, backend=backend)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("spec", [mk.LossSpec(dual_clip=1.5), mk.LossSpec(kind="cispo", tis_cap=1.1)], ids=ids)
def test_a_mean_over_sequences_of_token_means(backend, spec):
    """As the docstring says: advantages over lengths, divided by the number of sequences."""
    case = for_spec(make_case([5, 90, 7, 33], masked=0.0), spec)
    lengths = torch.bincount(case["seq"])
    means = []
    for s, advantage in enumerate(case["advantage"]):
        tokens = case["seq"] == s
        one = {k: v[tokens] if isinstance(v, torch.Tensor) and k != "advantage" else v for k, v in case.items()}
        one |= {"advantage": advantage[None], "seq": torch.zeros(len(one["seq"]), dtype=torch.int64)}
        means.append(run(one, spec, float(lengths[s]), backend=backend)[0])
    case["advantage"] = case["advantage"] / lengths
    got = run(case, spec, 4.0, backend=backend)[0]
    torch.testing.assert_close(got, torch.stack(means).mean())
