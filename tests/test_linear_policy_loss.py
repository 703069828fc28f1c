"""m2kernels.linear_policy_loss: float64 oracle, the two ops one after the other, main_grad, recompute."""

import pytest
import torch
from head_cases import plain_torch as plain_head
from kernel_testing import assert_kernel
from policy_cases import SPECS, ids
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2kernels._main_grad import assert_factor
from m2kernels.linear_logprob import unsupported_reason
from m2kernels.reference import linear_policy_loss_ref

BACKENDS = [b for b in ("cpu", "torch") if unsupported_reason(b) is None]
LENGTHS = [1, 0, 7, 30, 0, 13, 2]
VOCAB, DEPTH, HIDDEN = 301, 16, 40
TINY = VOCAB * 4 * 48  # bytes: chunks of one register block


def make_case(dtype=torch.float32, *, per_token=False, bias=False, seed=0, on_policy=False):
    """(leaves, keyword arguments): rows repeat, advantages have both signs, one sequence has none."""
    g = torch.Generator().manual_seed(seed)
    m = sum(LENGTHS)
    hidden = torch.randn(HIDDEN, DEPTH, generator=g).to(dtype)
    weight = (torch.randn(VOCAB, DEPTH, generator=g) * 0.7).to(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    case = {
        "target": torch.randint(0, VOCAB - 9, (m,), generator=g),
        "rows": torch.randint(0, HIDDEN, (m,), generator=g),
        "seq": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        "temperature": torch.rand(m, generator=g) + 0.5,
        "vocab_size": VOCAB - 9,
        "per_token": per_token,
    }
    if bias:
        leaves.append(torch.randn(VOCAB, generator=g).requires_grad_())
    with torch.no_grad():
        head = {k: case[k] for k in ("rows", "temperature", "vocab_size")}
        base = mk.linear_logprob(*leaves[:2], case["target"], bias=leaves[2] if bias else None, **head).logp
    for name in ("old_logp", "rollout_logp", "ref_logp"):
        case[name] = base + 0.25 * torch.randn(m, generator=g)
    if on_policy:
        case["old_logp"] = None
    advantage = torch.randn(m if per_token else len(LENGTHS), generator=g).abs()
    advantage *= 1 - (torch.arange(len(advantage)) // 2 % 2) * 2
    advantage[2] = 0  # of its sequence only the entropy or the KL have a gradient, if anything
    case["advantage"] = advantage
    return leaves, case


def for_spec(case, spec):
    drop = {"ref_logp": spec.kl_coef == 0, "rollout_logp": spec.tis_cap is None}
    return {k: v for k, v in case.items() if not drop.get(k, False)}


def run(leaves, case, spec, fn=mk.linear_policy_loss, upstream=1.0, **kwargs):
    """(loss, gradients of the leaves, output)."""
    bias = {"bias": leaves[2]} if len(leaves) > 2 else {}
    out = fn(leaves[0], leaves[1], denom=7.0, spec=spec, **bias, **for_spec(case, spec), **kwargs)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    return loss.detach(), torch.autograd.grad(loss * upstream, leaves), out


def two_ops(hidden, weight, target, old_logp, advantage, seq, *, denom, spec, per_token=False, **options):
    """The same from linear_logprob and policy_loss."""
    policy = {k: options.pop(k, None) for k in ("rollout_logp", "ref_logp")}
    lp = mk.linear_logprob(hidden, weight, target, entropy=True, **options)
    return mk.policy_loss(
        lp.logp, old_logp, advantage, seq, denom=denom, spec=spec, per_token=per_token, entropy=lp.entropy, **policy
    )


def plain_torch(hidden, weight, target, old_logp, advantage, seq, *, denom, spec, per_token=False, **options):
    """The yardstick: full logits and the readable policy loss, by autograd."""
    policy = {k: options.pop(k, None) for k in ("rollout_logp", "ref_logp")}
    logp, entropy = plain_head(hidden, weight, target, **options)
    return mk.policy_loss(
        logp, old_logp, advantage, seq, denom=denom, spec=spec, per_token=per_token, entropy=entropy,
        backend="torch", **policy,
    )  # fmt: skip


def oracle(leaves, case, spec):
    wide = [x.detach().double().requires_grad_() for x in leaves]
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    return run(wide, double, spec, linear_policy_loss_ref)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_oracle(backend, spec, dtype):
    leaves, case = make_case(dtype, bias=True, per_token=dtype == torch.bfloat16)
    want_loss, want, _ = oracle(leaves, case, spec)
    plain_loss, plain, _ = run(leaves, case, spec, plain_torch)
    for chunk_bytes in (TINY, 1 << 26):
        loss, grads, _ = run(leaves, case, spec, backend=backend, chunk_bytes=chunk_bytes)
        assert_kernel("loss", loss, plain_loss, want_loss, eps=2e-7)
        for name, mine, torchs, exact in zip(("hidden", "weight", "bias"), grads, plain, want, strict=True):
            assert mine.dtype == torchs.dtype
            assert_kernel(name, mine, torchs, exact, eps=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_equals_the_two_ops(backend, spec, on_policy):
    # old_logp=None too: then sequence weights couple tokens, and chunks are whole sequences, or all twice.
    leaves, case = make_case(on_policy=on_policy)
    loss, grads, want = run(leaves, case, spec, two_ops, backend=backend, upstream=3.0)
    for chunk_bytes in (1, TINY, 1 << 26):
        got_loss, got, out = run(leaves, case, spec, backend=backend, chunk_bytes=chunk_bytes, upstream=3.0)
        # The torch backend's logits depend on the chunk.
        close = {"rtol": 1e-6, "atol": 1e-7} if backend == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(got_loss, loss, **close)
        for a, b in zip(got, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6 * float(b.abs().max()))
        assert out.metrics.keys() == want.metrics.keys()
        for key, value in out.metrics.items():
            torch.testing.assert_close(value, want.metrics[key], rtol=1e-5, atol=1e-6, msg=key)
        assert out.logp.grad_fn is None and out.entropy.grad_fn is None


def test_sequences_longer_than_a_chunk_are_done_twice(monkeypatch):
    from m2kernels import _head_policy as module

    leaves, case = make_case()
    seen = []
    two = module._two_passes
    monkeypatch.setattr(module, "_two_passes", lambda *a: seen.append(1) or two(*a))
    spec = mk.LossSpec(kind="gspo")
    first = run(leaves, case, spec, chunk_bytes=TINY)[1]  # 48 rows: the longest sequence has 30
    assert not seen
    monkeypatch.setattr(module.Head, "step", lambda self, width: 16)
    second = run(leaves, case, spec)[1]
    assert seen
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    chunks = module.sequence_chunks(torch.tensor([0, 0, 3, 3, 3, 4, 9, 9]), 4)
    assert chunks == [slice(0, 2), slice(2, 6), slice(6, 8)]
    assert module.sequence_chunks(torch.tensor([0, 0, 0]), 2) is None
    assert module.sequence_chunks(torch.tensor([], dtype=torch.int64), 2) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_gradient_cost_no_gemm(backend, monkeypatch):
    from m2kernels import _head

    leaves, case = make_case()
    added = []
    add = _head.HeadGrads.add
    monkeypatch.setattr(_head.HeadGrads, "add", lambda self, dz, *a: added.append(dz.shape[0]) or add(self, dz, *a))
    run(leaves, case, mk.LossSpec(), backend=backend)
    logp = run(leaves, case, mk.LossSpec(), backend=backend)[2].logp.requires_grad_()
    rest = {k: case[k] for k in ("advantage", "seq", "old_logp")}
    mk.policy_loss(logp, **rest, denom=7.0).loss.backward()
    live = int((logp.grad != 0).sum())
    assert added == [live, live] and 0 < live < len(logp)
    case["advantage"] = torch.zeros_like(case["advantage"])
    added.clear()
    grads = run(leaves, case, mk.LossSpec(), backend=backend)[1]
    assert not added and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_no_rows(backend, kind):
    leaves, case = make_case()
    none = {k: v[:0] if isinstance(v, torch.Tensor) and k != "advantage" else v for k, v in case.items()}
    loss, grads, out = run(leaves, none, mk.LossSpec(kind=kind), backend=backend)
    assert loss == 0 and out.logp.shape == (0,) and not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weight_and_no_grad(backend):
    leaves, case = make_case()
    spec = mk.LossSpec(entropy_coef=0.1)
    want_loss, want, _ = run(leaves, case, spec, backend=backend)
    hidden, weight = leaves
    options = {"denom": 7.0, "spec": spec, "backend": backend, **for_spec(case, spec)}
    out = mk.linear_policy_loss(hidden, weight.detach(), **options)
    (got,) = torch.autograd.grad(out.loss, [hidden])
    assert torch.equal(got, want[0])
    with torch.no_grad():
        out = mk.linear_policy_loss(hidden, weight, **options)
    assert out.loss.grad_fn is None and torch.equal(out.loss, want_loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_and_autocast(backend):
    leaves, case = make_case()
    spec = mk.LossSpec()
    mixed = [leaves[0].detach().bfloat16().requires_grad_(), leaves[1]]
    grads = run(mixed, case, spec, backend=backend)[1]
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    exact = run([mixed[0].detach().float().requires_grad_(), leaves[1]], case, spec, backend=backend)[1]
    assert torch.equal(grads[1], exact[1]) and torch.equal(grads[0], exact[0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(leaves, case, spec, backend=backend)[1]
    narrow = run([x.detach().bfloat16().requires_grad_() for x in leaves], case, spec, backend=backend)[1]
    assert [g.dtype for g in cast] == [torch.float32] * 2
    for a, b in zip(cast, narrow, strict=True):
        torch.testing.assert_close(a.bfloat16(), b, rtol=2**-6, atol=1e-3)


# ---- main_grad
def main_grad_step(leaves, case, main_grad, grad_scale, upstream, *, spec=None, wrap=None, **kwargs):
    """One forward and backward; returns the gradient of hidden."""
    spec = spec or mk.LossSpec()
    hidden = leaves[0].detach().requires_grad_()

    def forward(h):
        return mk.linear_policy_loss(
            h * 1.0, leaves[1], denom=7.0, spec=spec, main_grad=main_grad, grad_scale=grad_scale,
            **for_spec(case, spec), **kwargs,
        ).loss  # fmt: skip

    loss = forward(hidden) if wrap is None else wrap(forward, hidden)
    (loss * upstream).backward()
    assert leaves[1].grad is None
    return hidden.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad_scale", [None, 2.5])
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_main_grad_gets_dw_once(backend, dtype, grad_scale, kind):
    leaves, case = make_case(dtype)
    spec = mk.LossSpec(kind=kind)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    _, want, _ = run(wide, case, spec, backend=backend, upstream=2.5)
    for chunk_bytes in (1, TINY, 1 << 26):
        main_grad = torch.ones(VOCAB, DEPTH)
        for _ in range(2):  # two micro-batches
            got = main_grad_step(
                leaves, case, main_grad, grad_scale, 2.5, spec=spec, backend=backend, chunk_bytes=chunk_bytes
            )
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(main_grad, 1 + 2 * want[1], **tolerance)
        torch.testing.assert_close(got.float(), want[0], **tolerance)


@pytest.mark.parametrize("grad_scale", [None, 2.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_never_counts_twice(grad_scale, reentrant):
    leaves, case = make_case()
    want = torch.zeros(VOCAB, DEPTH)
    hidden = main_grad_step(leaves, case, want, grad_scale, 2.5)
    calls = []

    def wrap(forward, h):
        def counted(x):
            calls.append(1)
            return forward(x.exp().log())  # something to recompute for

        return checkpoint(counted, h, use_reentrant=reentrant)

    leaves[0] = (leaves[0].detach().abs() + 0.1).requires_grad_()
    want.zero_()
    hidden = main_grad_step(leaves, case, want, grad_scale, 2.5)
    main_grad = torch.zeros(VOCAB, DEPTH)
    got = main_grad_step(leaves, case, main_grad, grad_scale, 2.5, wrap=wrap)
    assert len(calls) == 2
    torch.testing.assert_close(main_grad, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, hidden, rtol=1e-4, atol=1e-5)
    # A forward that is dropped does not silence later ones.
    main_grad_step(leaves, case, main_grad.zero_(), grad_scale, 2.5, wrap=wrap)
    torch.testing.assert_close(main_grad, want, rtol=1e-4, atol=1e-5)


def test_another_factor_than_grad_scale_raises():
    leaves, case = make_case()
    with pytest.raises(ValueError, match=r"brings a gradient of 2.0; expected grad_scale=4.0"):
        main_grad_step(leaves, case, torch.zeros(VOCAB, DEPTH), 4.0, 2.0)


def test_the_factor_is_checked_without_a_host_read():
    # What a GPU does; there a false assertion ends the process.
    assert_factor("op", torch.tensor(4.0), 4.0)
    with pytest.raises(RuntimeError, match="op: the backward brings another gradient than grad_scale=4.0"):
        assert_factor("op", torch.tensor(4.1), 4.0)


def test_second_backward_raises():
    leaves, case = make_case()
    out = mk.linear_policy_loss(*leaves, denom=1.0, **for_spec(case, mk.LossSpec()))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.loss.backward()


def test_denominator_tensor_and_run_to_run():
    leaves, case = make_case()
    spec = mk.LossSpec(entropy_coef=0.1)
    loss, grads, _ = run(leaves, case, spec)
    args = for_spec(case, spec)
    for _ in range(2):
        out = mk.linear_policy_loss(*leaves, denom=torch.tensor(7), spec=spec, **args)
        again = torch.autograd.grad(out.loss, leaves)
        torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-6, atol=0)
        for a, b in zip(again, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(run(leaves, case, spec)[1], grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    leaves, case = make_case(bias=True)
    spec = mk.LossSpec(kl="k3", kl_coef=0.1, entropy_coef=0.1, dual_clip=3.0)

    def step(hidden, weight, bias):
        out = mk.linear_policy_loss(
            hidden * 1.0, weight, denom=3.0, spec=spec, bias=bias, backend=backend, **for_spec(case, spec)
        )
        return out.loss * 2.0, out.metrics["ess"]

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss, ess = fn(*leaves)
        results.append((loss.detach(), ess, *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    leaves, case = make_case()
    hidden, weight = (x.detach().requires_grad_(requires_grad) for x in leaves)
    args = (
        hidden, weight, None, case["target"], case["rows"], case["temperature"], 1.0, None, case["vocab_size"], 0,
        None, "cpu", 1 << 20, True, torch.float32, case["old_logp"], case["advantage"], case["seq"], None, None,
        "grpo", "none", "token", [0.2, 0.28, float("nan"), 0.0, 0.0, float("nan")], False, 3.0, None,
        [requires_grad, requires_grad, False],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.m2kernels.linear_policy_loss_fwd, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logp": torch.zeros(3)}, "old_logp has shape"),
        ({"seq": torch.zeros(53)}, "seq is float32"),
        ({"seq": torch.full((53,), 9)}, "seq has 53 ids"),
        ({"denom": 0.0}, "got denom 0"),
        ({"spec": mk.LossSpec(tis_cap=1.0), "rollout_logp": None}, "rollout_logp is None"),
        ({"spec": mk.LossSpec(kl="k1", kl_coef=1.0), "ref_logp": None}, "ref_logp is None"),
        ({"grad_scale": 2.0}, "grad_scale 2.0 without main_grad"),
        ({"main_grad": torch.zeros(3, 3)}, r"main_grad has shape \[3, 3\]"),
        ({"main_grad": torch.zeros(VOCAB, DEPTH).bfloat16()}, "main_grad is bfloat16"),
        ({"main_grad": torch.zeros(VOCAB, DEPTH), "grad_scale": float("inf")}, "got grad_scale inf"),
        ({"main_grad": torch.zeros(VOCAB, DEPTH), "weight": torch.zeros(VOCAB, DEPTH)}, "the weight is frozen"),
        ({"backend": "cuda"}, "got backend 'cuda'"),
    ],
)
def test_wrong_arguments(change, message):
    leaves, case = make_case()
    arguments = {"hidden": leaves[0], "weight": leaves[1], "denom": 1.0, **case, **change}
    with pytest.raises(ValueError, match=message):
        mk.linear_policy_loss(**arguments)
