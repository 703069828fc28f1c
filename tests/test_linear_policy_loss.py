"""m2kernels.linear_policy_loss: float64 oracle, the two ops one after the other, hostile inputs, opcheck, compile."""

import importlib

import pytest
import torch
from head_cases import plain_torch as plain_head
from head_loss_cases import DEPTH, HIDDEN, TINY, VOCAB, for_spec, make_case, run
from kernel_testing import assert_kernel
from policy_cases import SPECS, ids

import m2kernels as mk
from m2kernels.linear_logprob import unsupported_reason
from m2kernels.reference import linear_policy_loss_ref

BACKENDS = [b for b in ("cpu", "torch") if unsupported_reason(b) is None]


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
    from m2kernels import _head_grads

    leaves, case = make_case()
    added = []
    add = _head_grads.HeadGrads.add
    monkeypatch.setattr(
        _head_grads.HeadGrads, "add", lambda self, dz, *a: added.append(dz.shape[0]) or add(self, dz, *a)
    )
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


# ---- Hostile inputs: what test_linear_logprob.py does to the head, done to the loss.
def head_case(vocab, depth, lengths, dtype=torch.float32, *, scale=3.0, offset=0.0, hidden_rows=9):
    """(leaves, keyword arguments) of a plain loss on any head; old log-probs lie near the new ones."""
    g = torch.Generator().manual_seed(0)
    m = sum(lengths)
    hidden = torch.randn(hidden_rows, depth, generator=g)
    weight = torch.randn(vocab, depth, generator=g) * scale / depth**0.5
    if offset:
        hidden[:, 0], weight[:, 0] = 1.0, offset
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    case = {
        "target": torch.randint(0, vocab, (m,), generator=g),
        "rows": torch.randint(0, hidden_rows, (m,), generator=g),
        "seq": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        "temperature": torch.rand(m, generator=g) + 0.5,
        "advantage": torch.randn(len(lengths), generator=g),
    }
    wide = [x.detach().double() for x in leaves]
    exact, _ = plain_head(*wide, case["target"], rows=case["rows"], temperature=case["temperature"].double())
    # 0.1 from the old policy: nowhere near a clip, which a rounding could switch.
    case["old_logp"] = exact.float() + 0.1 * torch.randn(m, generator=g).clamp(-1, 1)
    return leaves, case


def assert_loss(leaves, case, spec, backend, eps=1e-6, **kwargs):
    want_loss, want, _ = oracle(leaves, case, spec)
    plain_loss, plain, _ = run(leaves, case, spec, plain_torch)
    loss, grads, out = run(leaves, case, spec, backend=backend, **kwargs)
    assert_kernel("loss", loss, plain_loss, want_loss, eps=eps)
    for name, mine, torchs, exact in zip(("hidden", "weight"), grads, plain, want, strict=False):
        assert_kernel(name, mine, torchs, exact, eps=eps)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocab", "depth", "lengths"),
    [(128, 64, [9, 20, 4]), (50257, 32, [5, 7]), (49152, 33, [5, 7]), (151936, 16, [2, 3]), (129, 3, [1])],
)
def test_vocabularies(backend, vocab, depth, lengths, dtype):
    leaves, case = head_case(vocab, depth, lengths, dtype)
    assert_loss(leaves, case, mk.LossSpec(entropy_coef=0.1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits_and_a_common_offset(backend, dtype):
    leaves, case = head_case(300, 32, [9, 14], dtype, scale=12.0, offset=1000.0)
    out = assert_loss(leaves, case, mk.LossSpec(kind="cispo"), backend)
    assert bool((out.logp <= 0).all()) and float(out.logp.min()) < -20


@pytest.mark.parametrize("backend", BACKENDS)
def test_unlikely_and_confident_targets(backend):
    # p ~ e^-80 beside p ~ 1 - e^-40: one gradient is all of a row, the other almost nothing.
    leaves = [torch.eye(4).requires_grad_(), torch.zeros(260, 4).requires_grad_()]
    with torch.no_grad():
        leaves[1][7] = torch.tensor([80.0, 85.0, 45.0, 90.0])
    case = {
        "target": torch.tensor([200, 200, 7, 7]),
        "rows": torch.arange(4),
        "seq": torch.arange(4),
        "advantage": torch.ones(4),
        "old_logp": torch.tensor([-80.0, -85.0, 0.0, 0.0]),
        "temperature": torch.ones(4),
    }
    out = assert_loss(leaves, case, mk.LossSpec(), backend)
    assert out.logp[:2].tolist() == pytest.approx([-80, -85], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_selected_do_not_matter(backend):
    leaves, case = make_case()
    case["rows"] = case["rows"] // 2
    spec = mk.LossSpec(kind="gspo", entropy_coef=0.1)
    clean = run(leaves, case, spec, backend=backend)
    hidden = leaves[0].detach().clone()
    hidden[HIDDEN // 2 :] = float("nan")
    dirty = run([hidden.requires_grad_(), leaves[1]], case, spec, backend=backend)
    assert torch.equal(clean[0], dirty[0])
    for a, b in zip(clean[1], dirty[1], strict=True):
        assert torch.equal(a, b)
    assert not dirty[1][0][HIDDEN // 2 :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_index_types(backend):
    leaves, case = make_case()
    want = run(leaves, case, mk.LossSpec(), backend=backend)

    def strided(x):
        return torch.stack([x, x], dim=-1)[..., 0]

    other = {k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    for name in ("target", "rows", "seq"):
        other[name] = other[name].int()
    others = [strided(leaves[0].detach()).requires_grad_(), leaves[1].detach().t().contiguous().t().requires_grad_()]
    assert not any(x.is_contiguous() for x in (*others, other["old_logp"], other["advantage"]))
    got = run(others, other, mk.LossSpec(), backend=backend)
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_forward_is_the_same_to_the_bit_in_any_chunk_and_batch(dtype, kind):
    leaves, case = make_case(dtype)
    spec = mk.LossSpec(kind=kind, entropy_coef=0.1)
    loss, _, whole = run(leaves, case, spec, backend="cpu")
    for chunk_bytes in (1, TINY, 1 << 26):
        other_loss, _, out = run(leaves, case, spec, backend="cpu", chunk_bytes=chunk_bytes)
        assert torch.equal(out.logp, whole.logp) and torch.equal(out.entropy, whole.entropy)
        assert torch.equal(other_loss, loss)
    part = {k: v[8:38] if isinstance(v, torch.Tensor) and k != "advantage" else v for k, v in case.items()}
    out = run(leaves, part, spec, backend="cpu")[2]
    assert torch.equal(out.logp, whole.logp[8:38]) and torch.equal(out.entropy, whole.entropy[8:38])


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_float16_keeps_gradients_under_a_large_denominator(compiled, kind, monkeypatch):
    # M2's denominator, groups * G * l_max, is in the millions: a token's gradient alone is below what float16 holds,
    # and a loss scale comes only in backward.
    from m2kernels import _head

    monkeypatch.setattr(_head.Head, "step", lambda self, width: 16)  # gspo: done twice
    leaves, case = make_case(torch.float16, bias=True)
    spec = mk.LossSpec(kind=kind, entropy_coef=0.01)

    def step(*leaves):
        out = mk.linear_policy_loss(
            leaves[0], leaves[1], denom=4e6, spec=spec, bias=leaves[2], backend="torch", **for_spec(case, spec)
        )
        return out.loss * 2.0**18

    fn = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    got = torch.autograd.grad(fn(*leaves), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}
    exact = linear_policy_loss_ref(wide[0], wide[1], bias=wide[2], denom=4e6, spec=spec, **for_spec(double, spec))
    want = torch.autograd.grad(exact * 2.0**18, wide)
    for mine, leaf, grad in zip(got, leaves, want, strict=True):
        assert mine.dtype == leaf.dtype
        assert float((mine.double() - grad).norm() / grad.norm()) < 4e-3
    if not compiled:
        main_grad = torch.zeros(VOCAB, DEPTH)
        rest = {"spec": spec, "backend": "torch", "main_grad": main_grad, **for_spec(case, spec)}
        out = mk.linear_policy_loss(leaves[0], leaves[1], bias=leaves[2], denom=4e6, grad_scale=2.0**18, **rest)
        (out.loss * 2.0**18).backward()
        assert float((main_grad.double() - want[1]).norm() / want[1].norm()) < 4e-3
        with pytest.raises(ValueError, match="pass denom as a number"):
            mk.linear_policy_loss(leaves[0], leaves[1], denom=torch.tensor(4e6), grad_scale=1.0, **rest)


def test_compiled_backward_does_not_round_the_upstream_factor():
    leaves, case = make_case(torch.bfloat16)
    spec = mk.LossSpec()

    def step(*leaves):
        return mk.linear_policy_loss(*leaves, denom=7.0, spec=spec, **for_spec(case, spec)).loss

    grads = [
        torch.autograd.grad(fn(*leaves), leaves, torch.tensor(1 / 3))
        for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))
    ]
    whole = torch.autograd.grad(step(*leaves), leaves)
    for eager, compiled, grad in zip(*grads, whole, strict=True):
        wide = grad.double()[grad != 0]
        scale = [3 * float((x.double()[grad != 0] / wide).median()) for x in (eager, compiled)]
        assert scale == pytest.approx([1, 1], abs=3e-4)  # 1/3 in bfloat16 is 2e-3 off


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leaf", [0, 1], ids=["hidden", "weight"])
def test_what_backward_still_needs_must_not_be_overwritten(backend, leaf):
    leaves, case = make_case()
    out = mk.linear_policy_loss(*leaves, denom=7.0, backend=backend, **for_spec(case, mk.LossSpec()))
    with torch.no_grad():
        leaves[leaf].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_without_a_backward_forms_no_gradient(backend, monkeypatch):
    from m2kernels import _head_kernels

    monkeypatch.setattr(_head_kernels.HeadKernels, "hidden_grad", lambda *a: pytest.fail("dX"))
    monkeypatch.setattr(_head_kernels.HeadKernels, "weight_grad", lambda *a, **k: pytest.fail("dW"))
    leaves, case = make_case(torch.bfloat16)
    assert mk.linear_policy_loss(*leaves, denom=7.0, backend=backend, **for_spec(case, mk.LossSpec())).loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_bytes", [None, 1], ids=["one chunk", "several"])
def test_a_factor_and_a_buffer_at_the_end(backend, chunk_bytes):
    """main_grad without grad_scale: dW waits for the factor of backward."""
    leaves, case = make_case()
    case = {**for_spec(case, mk.LossSpec()), "backend": backend, "chunk_bytes": chunk_bytes}
    want = torch.autograd.grad(mk.linear_policy_loss(*leaves, denom=7.0, **case).loss, leaves)
    main_grad = torch.ones(leaves[1].shape)
    out = mk.linear_policy_loss(*leaves, denom=7.0, main_grad=main_grad, **case)
    to_hidden, to_weight = torch.autograd.grad(out.loss, leaves, torch.tensor(-3.0), allow_unused=True)
    assert to_weight is None
    torch.testing.assert_close(to_hidden, -3 * want[0])
    torch.testing.assert_close(main_grad, 1 - 3 * want[1])


def test_compile_without_a_loss_kernel_says_so(monkeypatch):
    module = importlib.import_module("m2kernels.linear_policy_loss")
    monkeypatch.setattr(module, "graph_reason", lambda device: "cpu: not built")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    leaves, case = make_case()
    with pytest.raises(ValueError, match=r"needs a kernel of the policy loss \(cpu: not built\)"):
        mk.linear_policy_loss(*leaves, denom=1.0, **for_spec(case, mk.LossSpec()))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    leaves, case = make_case()
    hidden, weight = (x.detach().requires_grad_(requires_grad) for x in leaves)
    args = (
        hidden, weight, None, case["target"], case["rows"], case["temperature"], 1.0, None, case["vocab_size"], 0,
        None, "cpu", 1 << 20, torch.float32, case["old_logp"], case["advantage"], case["seq"], None, None,
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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_is_nan_has_no_finite_gradient(compiled):
    """On a GPU ids out of range say so by a NaN alone; an optimizer must not step on what the other tokens give."""
    leaves, case = make_case()
    case["advantage"][0] = float("nan")

    def step(*leaves):
        return mk.linear_policy_loss(*leaves, denom=7.0, spec=mk.LossSpec(), **for_spec(case, mk.LossSpec())).loss

    fn = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    grads = torch.autograd.grad(fn(*leaves), leaves)
    assert all(grad.isnan().all() for grad in grads)


def test_ops_that_wait_for_the_host_stay_out_of_cuda_graphs():
    ops = torch.ops.m2kernels
    for op in (ops.linear_policy_loss_fwd, ops.linear_logprob_fwd, ops.linear_logprob_bwd):
        assert torch.Tag.cudagraph_unsafe in op.default.tags
