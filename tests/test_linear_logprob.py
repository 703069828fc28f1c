"""m2kernels.linear_logprob: float64 oracle, hostile inputs, invariance to the bit, torch's own checks."""

import math
import os
import subprocess
import sys

import pytest
import torch
from head_cases import HeadCase, make_case, plain_torch, run_op, run_oracle, run_torch
from kernel_testing import assert_kernel, threads

import m2kernels as mk
from m2kernels._native import ISA_NAMES, cpu_isa
from m2kernels.linear_logprob import unsupported_reason

BACKENDS = [b for b in ("cpu", "torch") if unsupported_reason(b) is None]
DTYPES = [torch.float32, torch.bfloat16]
VARIANTS = {
    "plain": {},
    "bias_temperature": {"bias": True, "temperature": 0.7},
    "row_temperature_padding": {"row_temperature": True, "padding": 45},
    "softcap": {"softcap": 5.0, "bias": True, "row_temperature": True, "padding": 200},
}


def assert_case(case, backend, fn=mk.linear_logprob, eps=1e-7, **kwargs):
    got, plain, want = run_op(case, fn, backend=backend, **kwargs), run_torch(case), run_oracle(case)
    assert got.logp.dtype == got.entropy.dtype == torch.float32
    assert_kernel("logp", got.logp, plain.logp, want.logp, eps=eps)
    assert_kernel("entropy", got.entropy, plain.entropy, want.entropy, eps=eps)
    for name, mine, torchs, exact in zip(
        ("hidden", "weight", "bias"), got.grads, plain.grads, want.grads, strict=False
    ):
        assert mine.dtype == torchs.dtype, name
        assert_kernel(f"grad of {name}", mine, torchs, exact, eps=eps)
    return got


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_oracle(backend, dtype, variant):
    if unsupported_reason(backend, torch.empty(0), dtype) is not None:
        pytest.skip(unsupported_reason(backend, torch.empty(0), dtype))
    case = make_case(dtype=dtype, **VARIANTS[variant])
    got = assert_case(case, backend)
    assert_case(case, backend, chunk_bytes=1)  # chunks of the smallest size
    if "vocab_size" in case.options:
        assert not got.grads[1][case.options["vocab_size"] :].any(), "padding has no gradient"


ISA_SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from m2kernels._native import cpu_isa
try:
    print(cpu_isa())
except RuntimeError:
    print("cannot"); sys.exit()
import test_linear_logprob as t
for dtype in t.DTYPES:
    for variant in t.VARIANTS:
        t.test_oracle("cpu", dtype, variant)
    for vocab, depth, rows in ((128, 64, 33), (1, 3, 4), (129, 1, 17)):
        t.test_vocabularies("cpu", vocab, depth, rows, dtype)
"""


@pytest.mark.parametrize("isa", [i for i in ISA_NAMES if i != cpu_isa()])
def test_every_other_instruction_set(isa):
    """The set is chosen once a process; this process tests its own."""
    script = ISA_SCRIPT.format(tests=os.path.dirname(__file__))
    env = {**os.environ, "M2KERNELS_CPU_ISA": isa}
    out = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-3000:]
    assert out.stdout.strip() in ((isa,) if isa == "baseline" else (isa, "cannot"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("vocab", "depth", "rows"),
    [(128, 64, 33), (50257, 32, 12), (49152, 33, 12), (151936, 16, 5), (1, 3, 4), (129, 1, 17)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocabularies(backend, vocab, depth, rows, dtype):
    assert_case(make_case(9, depth, vocab, rows, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_and_a_common_offset(backend, dtype):
    # |z| up to about 40 around 1e3.
    case = make_case(depth=32, scale=12.0, dtype=dtype)
    case.hidden[:, 0], case.weight[:, 0] = 1.0, 1000.0
    got = assert_case(case, backend)
    assert bool((got.logp <= 0).all()) and bool((got.entropy > -1e-6).all())
    # torch's bfloat16 logits are off by up to 4 there; the C++ kernels' are float32: held to those.
    want, wide = run_oracle(case), torch.bfloat16 if backend == "torch" and dtype == torch.bfloat16 else torch.float32
    logits = (case.hidden.float() @ case.weight.float().T).to(wide).double()[case.options["rows"]]
    log_p = logits.log_softmax(-1)
    assert_kernel("logp", got.logp, log_p.gather(1, case.target[:, None])[:, 0], want.logp)
    assert_kernel("entropy", got.entropy, -(log_p.exp() * log_p).sum(-1), want.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [260, 49152])
def test_unlikely_targets(backend, dtype, vocab):
    # p ~ e^-80 and, in the last row, so small that exp of the distance overflows float64.
    hidden = torch.eye(4, dtype=dtype)
    weight = torch.zeros(vocab, 4, dtype=dtype)
    weight[7] = torch.tensor([80.0, 85.0, 90.0, 800.0])
    target = torch.full((4,), 200)
    case = HeadCase(hidden, weight, target, {}, torch.ones(4), torch.ones(4))
    got = assert_case(case, backend)
    assert got.logp.tolist() == pytest.approx([-80, -85, -90, -800], rel=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflowed_target_is_nan_and_no_certainty(backend, dtype):
    """What a loss scaler, or a look at the gradient's norm, must see; rows beside it are as ever."""
    large = torch.finfo(dtype).max / 2
    hidden = torch.tensor([[large, 0.0], [0.0, 1.0]], dtype=dtype)
    weight = torch.zeros(300, 2, dtype=dtype)
    weight[5], weight[9] = torch.tensor([8.0, 1.0]), torch.tensor([0.0, 1.0])
    if backend == "cpu" and dtype == torch.float16:
        backend = "auto"
    leaf = hidden.requires_grad_()
    out = mk.linear_logprob(leaf, weight, torch.tensor([5, 9]), entropy=True, backend=backend)
    logits = (hidden.detach() @ weight.t()).requires_grad_()
    assert logits[0, 5] == torch.inf
    of_logits = mk.logprob(logits, torch.tensor([5, 9]), entropy=True, backend=backend)
    for found, given in ((out, leaf), (of_logits, logits)):
        assert found.logp[0].isnan() and found.entropy[0].isnan()
        assert float(found.logp[1].detach()) == pytest.approx(1 - math.log(298 + 2 * math.e), rel=1e-3)
        (grad,) = torch.autograd.grad(found.logp.sum(), given)
        assert grad[0].isnan().any() and grad[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("offset", "vocab"), [(0.0, 64), (1000.0, 64), (0.0, 151936)])
def test_confident_tokens_are_exact(backend, offset, vocab):
    # Integer logits are exact in float32; the target leads by at most 60: |logp| from 1e-2 to 1e-24.
    lead = torch.arange(9, 61).float() if vocab == 64 else torch.arange(17, 61, 8).float()
    hidden = torch.stack([lead, torch.ones_like(lead)], dim=1)
    weight = torch.zeros(vocab, 2)
    weight[5, 0] = 1.0
    weight[:, 1] += offset + (torch.arange(vocab) % 3) * -1.0 * (torch.arange(vocab) != 5)
    target = torch.full((len(lead),), 5)
    out = mk.linear_logprob(hidden, weight, target, backend=backend)
    z = hidden.double() @ weight.double().T
    others = (z - z[:, 5:6]).exp()
    others[:, 5] = 0
    exact = -others.sum(dim=1).log1p()
    assert float(exact.abs().max()) < 1e-2
    relative = ((out.logp.double() - exact) / exact).abs().max()
    assert relative <= 1e-6, f"relative error {relative:.2e}"
    # The gradient of such a token is 1 - p, exact as well.
    logits = z.float().requires_grad_()
    mk.logprob(logits, target, backend=backend).logp.sum().backward()
    assert ((logits.grad[:, 5].double() + torch.expm1(exact)) / torch.expm1(exact)).abs().max() <= 1e-6


def exact_logp(z, target):
    """Log-probs of float64 logits; those near 0 lose nothing to a difference of large numbers."""
    others = (z - z.gather(1, target[:, None])).exp().scatter(1, target[:, None], 0)
    return -others.sum(dim=1).log1p()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_tokens_of_random_logits(backend, dtype):
    # At most twice the error of an exact softmax over the float32 logits.
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 64, generator=g).to(dtype)
    weight = (torch.randn(500, 64, generator=g) / 8).to(dtype)
    wide = hidden.float()
    lead = torch.linspace(11, 20, 40)[:, None]  # of the target's logit: log-probs of -3e-2 to -2e-6
    weight[100:140] += (lead * wide / wide.square().sum(dim=1, keepdim=True)).to(dtype)
    target = torch.arange(100, 140)
    out = mk.linear_logprob(hidden, weight, target, backend=backend).logp
    exact = exact_logp(hidden.double() @ weight.double().T, target)
    logits = (hidden.float() @ weight.float().T).to(dtype if backend == "torch" else torch.float32)
    yardstick = exact_logp(logits.double(), target)
    sure = exact.abs() < 1e-2
    assert int(sure.sum()) > 20 and 0 < float(exact.abs().min()) < 1e-5
    assert_kernel("logp", out, yardstick, exact)
    mine, theirs = (((x.double() - exact) / exact).abs()[sure] for x in (out, yardstick))
    assert float(mine.max()) <= 2 * float(theirs.max()) + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_one_row(backend):
    case = make_case(bias=True)
    leaves, options = case.leaves()
    options["rows"] = torch.empty(0, dtype=torch.int32)
    out = mk.linear_logprob(*leaves[:2], torch.empty(0, dtype=torch.int32), entropy=True, backend=backend, **options)
    assert out.logp.shape == out.entropy.shape == (0,)
    for grad in torch.autograd.grad(out.logp.sum() + out.entropy.sum(), leaves):
        assert not grad.any()
    assert_case(make_case(num_rows=1, zero_share=0.0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_selected_do_not_matter(backend):
    case = make_case()
    clean = run_op(case, mk.linear_logprob, backend=backend)
    unused = torch.ones(len(case.hidden), dtype=torch.bool)
    case.options["rows"] = case.options["rows"] // 2  # the second half is not selected
    clean = run_op(case, mk.linear_logprob, backend=backend)
    unused[case.options["rows"]] = False
    assert unused.sum() > 8
    case.hidden[unused] = math.nan
    dirty = run_op(case, mk.linear_logprob, backend=backend)
    assert torch.equal(clean.logp, dirty.logp)
    for a, b in zip(clean.grads, dirty.grads, strict=True):
        assert torch.equal(a, b)
    assert not clean.grads[0][unused].any()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_padding_never_shows(backend, softcap):
    """Padding in weight and bias may hold anything: no value and no gradient of a real row hears of it."""
    options = {} if softcap is None else {"softcap": softcap}
    case = make_case(bias=True, padding=37, **options)
    clean = run_op(case, mk.linear_logprob, backend=backend)
    case.weight[-37:], case.options["bias"][-37:] = math.nan, math.nan
    dirty = run_op(case, mk.linear_logprob, backend=backend)
    assert torch.equal(dirty.logp, clean.logp) and torch.equal(dirty.entropy, clean.entropy)
    for mine, theirs in zip(dirty.grads, clean.grads, strict=True):
        assert not mine.isnan().any() and torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_zero_gradient_are_skipped_and_nan_is_not(backend, monkeypatch):
    from m2kernels import _head

    case = make_case(num_rows=60, zero_share=0.8)
    seen = []
    gather = _head.Head.gather
    monkeypatch.setattr(_head.Head, "gather", lambda self, part: seen.append(part) or gather(self, part))
    run_op(case, mk.linear_logprob, backend=backend)
    live = (case.grad_logp != 0) | (case.grad_entropy != 0)
    assert torch.equal(seen[-1], live.nonzero()[:, 0]) and len(seen) == 2
    # A row whose gradient is zero may hold anything.
    row = int(torch.nonzero(~live)[0])
    case.options["rows"][row] = len(case.hidden)
    case.hidden = torch.cat([case.hidden, torch.full_like(case.hidden[:1], math.nan)])
    dirty = run_op(case, mk.linear_logprob, backend=backend)
    assert not any(g.isnan().any() for g in dirty.grads)
    case.grad_logp[row] = math.nan
    assert run_op(case, mk.linear_logprob, backend=backend).grads[0].isnan().any()
    case = make_case()
    case.grad_logp[3] = math.nan
    assert run_op(case, mk.linear_logprob, backend=backend).grads[1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_at_all(backend):
    case = make_case(zero_share=1.1)
    case.grad_entropy[:] = 0
    for grad in run_op(case, mk.linear_logprob, backend=backend).grads:
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_index_types(backend):
    case = make_case(row_temperature=True)
    want = run_op(case, mk.linear_logprob, backend=backend)
    other = make_case(row_temperature=True)
    other.hidden = torch.stack([other.hidden, other.hidden], dim=2)[:, :, 0]
    other.weight = other.weight.t().contiguous().t()
    other.target = other.target.int()
    other.options["rows"] = other.options["rows"].int()
    other.options["temperature"] = torch.stack([other.options["temperature"]] * 2, dim=1)[:, 0]
    assert not other.hidden.is_contiguous() and not other.weight.is_contiguous()
    leaves = [other.hidden.requires_grad_(), other.weight.requires_grad_()]
    out = mk.linear_logprob(*leaves, other.target, entropy=True, backend=backend, **other.options)
    grads = torch.autograd.grad([out.logp, out.entropy], leaves, [case.grad_logp, case.grad_entropy])
    assert torch.equal(out.logp, want.logp) and torch.equal(out.entropy, want.entropy)
    for a, b in zip(grads, want.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_in_order_need_no_index(backend):
    case = make_case(num_rows=24)
    case.options["rows"] = torch.arange(24)
    indexed = run_op(case, mk.linear_logprob, backend=backend)
    del case.options["rows"]
    plain = run_op(case, mk.linear_logprob, backend=backend)
    for a, b in zip((indexed.logp, *indexed.grads), (plain.logp, *plain.grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_same_to_the_bit_in_any_batch(dtype):
    case = make_case(40, 576, 5000, 70, dtype, row_temperature=True, scale=5.0)
    rows, target, t = case.options["rows"], case.target, case.options["temperature"]

    def run(pick, **kwargs):
        return mk.linear_logprob(
            case.hidden, case.weight, target[pick], rows=rows[pick], temperature=t[pick], entropy=True,
            backend="cpu", **kwargs,
        )  # fmt: skip

    whole = run(slice(None))
    g = torch.Generator().manual_seed(0)
    for pick in (
        slice(0, 1),
        slice(3, 20),
        slice(50, 70),
        torch.randperm(70, generator=g),
        torch.randint(70, (131,)),
    ):
        part = run(pick)
        assert torch.equal(part.logp, whole.logp[pick]) and torch.equal(part.entropy, whole.entropy[pick])
    for chunk_bytes in (1, 5000 * 4 * 48, 1 << 30):
        part = run(slice(None), chunk_bytes=chunk_bytes)
        assert torch.equal(part.logp, whole.logp) and torch.equal(part.entropy, whole.entropy)
    # Padding of the vocabulary, and the unaligned address of a view, change nothing either.
    padded = torch.zeros(5300, 577, dtype=dtype)[:, 1:]
    padded[:5000] = case.weight
    case.weight = padded
    part = run(slice(None), vocab_size=5000)
    assert torch.equal(part.logp, whole.logp) and torch.equal(part.entropy, whole.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_run_to_run_and_threads(backend, dtype):
    case = make_case(60, 96, 3000, 200, dtype)
    results = []
    for num in (2, 2, 1) if backend == "cpu" else (2, 2):
        with threads(num):
            results.append(run_op(case, mk.linear_logprob, backend=backend, chunk_bytes=1))
    for other in results[1:]:
        assert torch.equal(other.logp, results[0].logp) and torch.equal(other.entropy, results[0].entropy)
    for a, b in zip(results[0].grads, results[1].grads, strict=True):
        assert torch.equal(a, b)


# ---- torch's own checks.
def head_arguments(case, backend):
    options = {"bias": None, "rows": None, "temperature": 1.0, "softcap": None, "vocab_size": None, **case.options}
    per_row = options["temperature"] if isinstance(options["temperature"], torch.Tensor) else None
    return (
        case.hidden, case.weight, options["bias"], case.target, options["rows"], per_row, 1.0, options["softcap"],
        options["vocab_size"], 0, None, backend, 1 << 20, case.weight.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    case = make_case(bias=True, row_temperature=True, padding=3, softcap=4.0)
    for x in (case.hidden, case.weight, case.options["bias"]):
        x.requires_grad_(requires_grad)
    args = head_arguments(case, backend)
    torch.library.opcheck(torch.ops.m2kernels.linear_logprob_fwd, (*args, True))
    torch.library.opcheck(torch.ops.m2kernels.linear_logprob_fwd, (*args, False))
    logits = torch.randn(5, 40, requires_grad=requires_grad)
    target = torch.arange(5)
    torch.library.opcheck(torch.ops.m2kernels.logprob_fwd, (logits, target, None, 0.5, 0, None, backend, True))
    if not requires_grad:
        stats = [torch.rand(37) for _ in range(4)]
        bwd = (case.grad_logp, None, stats[0], torch.empty(0), *stats[1:3], *args, [True, False, True])
        torch.library.opcheck(
            torch.ops.m2kernels.linear_logprob_bwd, bwd, test_utils=("test_schema", "test_faketensor")
        )


def test_opcheck_of_the_row_kernels():
    ops, target = torch.ops.m2kernels, torch.arange(5)
    hidden, weight, logits = torch.randn(5, 8), torch.randn(200, 8), torch.randn(5, 200)
    stats, z, kept = torch.zeros(3, 2, 16), torch.zeros(16), torch.zeros(200, 16)
    torch.library.opcheck(ops.head_tiles, (hidden, weight, target, None, None, 1.0, 0.0, 200, z, stats, kept))
    new = [torch.zeros(5, 2) for _ in range(3)]
    settings = (target, None, None, 1.0, 0.0, 200)
    torch.library.opcheck(ops.head_stats, (logits, *settings, torch.zeros(5), *new))
    torch.library.opcheck(ops.head_merge, (torch.rand(5), *new))
    rows = [torch.rand(5) for _ in range(6)]
    torch.library.opcheck(ops.head_grad, (logits, torch.zeros(5, 200), *settings, *rows))
    torch.library.opcheck(ops.head_dx, (torch.randn(200, 5), torch.randn(200, 16), torch.zeros(5, 16)))
    torch.library.opcheck(ops.head_dw, (torch.randn(200, 5), torch.randn(5, 16), torch.zeros(200, 16), True))
    for bf16 in (False, True):
        torch.library.opcheck(ops.head_lanes, (kept, bf16, *settings, *rows, torch.tensor([1, 3])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend):
    case = make_case(bias=True, row_temperature=True)

    def step(hidden, weight, bias):
        options = {**case.options, "bias": bias}
        out = mk.linear_logprob(hidden * 1.0, weight, case.target, entropy=True, backend=backend, **options)
        on_logits = mk.logprob(hidden @ weight.t(), case.target[: len(hidden)], backend=backend)
        return (out.logp * case.grad_logp).sum() + (out.entropy * case.grad_entropy).sum() + on_logits.logp.sum()

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves, _ = case.leaves()
        value = fn(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["temperature", "softcap"])
def test_compiled_calls_take_other_numbers(name):
    """From its second value on, torch.compile makes a symbol of a number."""
    case = make_case()
    case.options.pop(name, None)

    def step(hidden, number):
        return mk.linear_logprob(hidden, case.weight, case.target, **{**case.options, name: number}).logp

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for number in (1.5, 2.5, 3.5):
        torch.testing.assert_close(compiled(case.hidden, number), step(case.hidden, number))


def test_compiled_calls_refuse_what_eager_ones_do():
    case = make_case()
    compiled = torch.compile(mk.linear_logprob, fullgraph=True, backend="aot_eager")
    for bad in (-100, 300):
        with pytest.raises(ValueError, match=f"target holds {bad} to {bad}; expected ids from 0 and below 300"):
            compiled(case.hidden, case.weight, torch.full_like(case.target, bad), **case.options)


def test_plain_torch_is_the_oracle_in_float64():
    # The yardstick itself must be right, or every comparison with it is loose.
    case = make_case(bias=True, row_temperature=True, softcap=3.0, padding=7)
    leaves, options = case.leaves(torch.float64)
    hidden, weight = (x.detach() for x in leaves[:2])
    logp, entropy = plain_torch(hidden, weight, case.target, **options)
    want = run_oracle(case)
    assert (logp - want.logp).abs().max() < 1e-4 and (entropy - want.entropy).abs().max() < 1e-4


def test_a_shard_of_logits_needs_its_group():
    with pytest.raises(ValueError, match="got vocab_start 75 and tp_group None; a shard needs its group"):
        mk.logprob(torch.randn(3, 75), torch.tensor([80, 1, 100]), vocab_start=75)
