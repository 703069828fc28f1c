"""Packed batches and loss specs that the policy-loss tests share, and how one is run."""

import pytest
import torch

import m2kernels as mk
from m2kernels.reference import policy_loss_ref, policy_metrics_ref

# Lengths: 1 (a sequence of one token), 0 (an id without tokens), more than a tile of 64, and a
# total that is no multiple of any block.
LENGTHS = [1, 0, 7, 90, 0, 33, 2]
KL = {"kl_coef": 0.3}
SPECS = [
    mk.LossSpec(),
    mk.LossSpec(kind="gspo"),
    mk.LossSpec(kind="cispo"),
    mk.LossSpec(dual_clip=1.5),
    mk.LossSpec(kind="gspo", dual_clip=1.05, clip_low=0.05, clip_high=0.05),
    mk.LossSpec(kl="k1", **KL),
    mk.LossSpec(kl="k2", **KL),
    mk.LossSpec(kl="k3", **KL),
    mk.LossSpec(kind="gspo", kl="k3", entropy_coef=0.2, **KL),
    mk.LossSpec(kind="cispo", kl="k2", entropy_coef=0.2, tis_cap=1.1, **KL),
    mk.LossSpec(tis_cap=1.1),
    mk.LossSpec(tis_cap=1.2, tis_level="sequence", entropy_coef=-0.1),
    mk.LossSpec(kind="gspo", tis_cap=1.1),
    mk.LossSpec(kind="gspo", tis_cap=1.3, tis_level="sequence"),
]
FLOATS = ("logp", "old_logp", "entropy", "rollout_logp", "ref_logp")
LEAVES = {"logp", "entropy"}


def ids(spec):
    parts = [spec.kind, spec.kl, f"dual{spec.dual_clip}", f"tis{spec.tis_cap}", spec.tis_level]
    return "-".join(p for p in parts if "None" not in p and p not in ("none", "token"))


def make_case(lengths, *, seed=0, per_token=False, masked=0.3, index=torch.int64, poison=True):
    """A packed batch. `lengths` may hold zeros: ids without tokens. Masked tokens hold NaN."""
    g = torch.Generator().manual_seed(seed)
    m = sum(lengths)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(index)
    logp = -torch.rand(m, generator=g) * 3
    noise = {name: torch.randn(m, generator=g) * 0.25 for name in FLOATS}
    case = {name: logp + (noise[name] if name != "logp" else 0) for name in FLOATS}
    case["entropy"] = torch.rand(m, generator=g)
    # Both signs among the long sequences of LENGTHS, so that both clips are met.
    advantage = torch.randn(m if per_token else len(lengths), generator=g)
    sign = 1 - (torch.arange(len(advantage)) // 2 % 2) * 2
    case["advantage"] = advantage.abs() * sign
    case["seq"] = seq
    case["mask"] = torch.rand(m, generator=g) >= masked
    if poison:
        for name in FLOATS:
            case[name][~case["mask"]] = float("nan")
    case["per_token"] = per_token
    return case


def for_spec(case, spec):
    """Leaves out the tensors that this spec does not need; returns keyword arguments."""
    out = dict(case)
    drop = {"entropy": spec.entropy_coef == 0, "ref_logp": spec.kl_coef == 0}
    drop["rollout_logp"] = spec.tis_cap is None
    for name, unused in drop.items():
        if unused:
            out.pop(name, None)
    return out


def run(case, spec, denom, dtype=torch.float32, device="cpu", fn=mk.policy_loss, **kwargs):
    """(loss, grad of logp, grad of entropy or None, metrics or None)."""
    args = {}
    for name, value in case.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            if value.is_floating_point():
                value = value.to(dtype)
            if name in ("logp", "entropy"):
                value = value.clone().requires_grad_()
        args[name] = value
    out = fn(**args, denom=denom, spec=spec, **kwargs)
    loss, metrics = (out, None) if isinstance(out, torch.Tensor) else out
    loss.backward()
    entropy_grad = args["entropy"].grad if "entropy" in args else None
    return loss.detach().cpu(), args["logp"].grad, entropy_grad, metrics


def assert_metrics(got, case, spec):
    """Against float64: 1e-6 of the value, or 1e-7 a token where values of both signs are summed."""
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    want = policy_metrics_ref(**wide, spec=spec)
    assert got.keys() == want.keys()
    for key, exact in want.items():
        tokens = max(want["num_tokens"], 1) if key.startswith("raw/") else 1
        assert float(got[key]) == pytest.approx(exact, rel=1e-6, abs=1e-7 * tokens), key


def oracle_run(case, spec, denom):
    """run() of the oracle; masked NaN is never looked at, and its gradient is zero."""
    loss, grad, entropy_grad, _ = run(case, spec, denom, torch.float64, fn=policy_loss_ref)
    zero = torch.zeros_like(case["logp"], dtype=torch.float64)
    return loss, zero if grad is None else grad, entropy_grad


def device_case(lengths, spec, *, device, seed=0):
    """Arguments of mk.policy_loss on `device`, with logp, and entropy where the spec has one, as leaves."""
    case = for_spec(make_case(lengths, seed=seed), spec)
    args = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    for name in LEAVES & args.keys():
        args[name].requires_grad_()
    return args | {"spec": spec}


def step(args, denom, backend):
    """[loss, gradients, metrics] of one forward and backward, nothing of it read on the host."""
    out = mk.policy_loss(**args, denom=denom, backend=backend)
    grads = torch.autograd.grad(out.loss, [args[name] for name in sorted(LEAVES & args.keys())])
    return [out.loss.detach(), *grads, *out.metrics.values()]
