"""The LM head in other trainers' hands: frozen weights, no_grad, mixed dtypes, autocast, logits; wrong arguments."""

import pytest
import torch
from head_cases import make_case, run_op
from kernel_testing import assert_kernel
from test_linear_logprob import BACKENDS, DTYPES, assert_case
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import m2kernels as mk
from m2kernels._head_cpu import CpuHead
from m2kernels._head_torch import TorchHead
from m2kernels.linear_logprob import unsupported_reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weight_costs_no_weight_gradient(backend, monkeypatch):
    case = make_case()
    want = run_op(case, mk.linear_logprob, backend=backend).grads[0]
    for kernels in (CpuHead, TorchHead):
        monkeypatch.setattr(kernels, "weight_grad", lambda *a, **k: pytest.fail("dW of a frozen weight"))
    hidden = case.hidden.requires_grad_()
    out = mk.linear_logprob(hidden, case.weight, case.target, entropy=True, backend=backend, **case.options)
    (got,) = torch.autograd.grad([out.logp, out.entropy], [hidden], [case.grad_logp, case.grad_entropy])
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_stores_nothing(backend):
    case = make_case()
    leaves, options = case.leaves()
    with torch.no_grad():
        out = mk.linear_logprob(*leaves, case.target, backend=backend, **options)
    assert out.logp.grad_fn is None and out.entropy is None
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        mk.linear_logprob(*leaves, case.target, backend=backend, **options)
    inputs = {x.data_ptr() for x in (*leaves, case.target, options["rows"])}
    own = [x for x in packed if x.numel() and x.data_ptr() not in inputs]
    assert own and all(x.shape == case.target.shape for x in own), "f32[M] is all that a backward keeps"


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(backend):
    case = make_case(dtype=torch.float32)
    case.hidden = case.hidden.bfloat16()
    got = assert_case(case, backend)
    assert [g.dtype for g in got.grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    case = make_case(bias=True)
    want = make_case(bias=True)
    want.hidden, want.weight = want.hidden.bfloat16(), want.weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = run_op(case, mk.linear_logprob, backend=backend)
    inside = run_op(want, mk.linear_logprob, backend=backend)
    assert torch.equal(got.logp, inside.logp)
    assert [g.dtype for g in got.grads] == [torch.float32] * 3
    for mine, narrow in zip(got.grads, inside.grads, strict=True):
        torch.testing.assert_close(mine.to(narrow.dtype), narrow, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_logprob_of_logits(backend, dtype):
    if unsupported_reason(backend, torch.empty(0), dtype) is not None:
        pytest.skip(unsupported_reason(backend, torch.empty(0), dtype))
    g = torch.Generator().manual_seed(2)
    logits = (torch.randn(90, 777, generator=g) * 9 + 1000 * (dtype == torch.float32)).to(dtype)
    target, t = torch.randint(0, 777, (90,), generator=g).int(), torch.rand(90, generator=g) + 0.5
    up = torch.randn(2, 90, generator=g)
    up[:, 4] = 0

    def run(fn, x, temperature):
        x = x.clone().requires_grad_()
        logp, entropy = fn(x, temperature)
        grads = torch.autograd.grad([logp, entropy], [x], [u.to(logp.dtype) for u in up])
        return logp.detach(), entropy.detach(), *grads

    def plain(x, temperature):
        log_p = (x if x.dtype == torch.float64 else x.float()).div(temperature[:, None]).log_softmax(-1)
        return log_p.gather(1, target[:, None].long())[:, 0], -(log_p.exp() * log_p).sum(-1)

    wide = torch.zeros(90, 1554, dtype=dtype)
    wide[:, ::2] = logits
    for x in (logits, wide[:, ::2]):
        got = run(lambda a, b: mk.logprob(a, target, temperature=b, entropy=True, backend=backend), x, t)
        want, yardstick = run(plain, logits.double(), t.double()), run(plain, logits, t)
        for name, mine, torchs, exact in zip(("logp", "entropy", "grad"), got, yardstick, want, strict=True):
            assert_kernel(name, mine, torchs, exact)
        assert not got[2][4].any()
    assert mk.logprob(logits[:0], target[:0], backend=backend).logp.shape == (0,)
    with pytest.raises(ValueError, match="expected ids from 0 and below 777"):
        mk.logprob(logits, target + 777, backend=backend)


def test_no_second_derivative():
    case = make_case()
    leaves, options = case.leaves()
    out = mk.linear_logprob(*leaves, case.target, **options)
    (grad,) = torch.autograd.grad(out.logp.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 16, 1)}, r"hidden has shape .*; flatten it: .flatten\(0, -2\)"),
        ({"weight": torch.zeros(300, 17)}, "hidden has 16 columns, weight 17"),
        ({"weight": torch.zeros(300, 16).double()}, "weight is float64; expected float32"),
        ({"target": torch.zeros(36, dtype=torch.int64)}, r"target has shape \[36\]; expected shape \[37\]"),
        ({"target": torch.zeros(37)}, "target is float32; expected int32 or int64"),
        ({"target": torch.full((37,), 300)}, "target holds 300 to 300; expected ids from 0 and below 300"),
        ({"target": torch.full((37,), -1)}, "target holds -1 to -1"),
        ({"vocab_size": 2}, "expected ids from 0 and below 2"),
        ({"vocab_size": 0}, "got vocab_size 0"),
        ({"rows": torch.ones(24) > 0}, r"rows is a mask; expected row numbers.*pass rows.nonzero\(\)\[:, 0\]"),
        ({"rows": torch.full((37,), 24)}, "rows holds 24 to 24; expected ids from 0 and below 24"),
        ({"bias": torch.zeros(299)}, "bias has shape"),
        ({"temperature": 0.0}, "got temperature 0.0"),
        ({"temperature": torch.ones(3)}, "temperature has shape"),
        ({"softcap": -1.0}, "got softcap -1.0"),
        ({"vocab_start": 128}, "a shard needs its group"),
        ({"chunk_bytes": 0}, "got chunk_bytes 0"),
        ({"backend": "cuda"}, "got backend 'cuda'; expected auto, "),
    ],
)
def test_wrong_arguments(change, message):
    case = make_case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "target": case.target, **case.options, **change}
    with pytest.raises(ValueError, match=message):
        mk.linear_logprob(**arguments)


def test_a_group_of_one_rank_holds_all_ids():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        case = make_case()
        given = (case.hidden, case.weight, case.target)
        whole = mk.linear_logprob(*given, tp_group=dist.group.WORLD, **case.options)
        assert torch.equal(whole.logp, mk.linear_logprob(*given, **case.options).logp)
        for call in (
            lambda: mk.linear_logprob(*given, tp_group=dist.group.WORLD, vocab_start=20, **case.options),
            lambda: mk.logprob(case.weight, case.target[:1].expand(300), tp_group=dist.group.WORLD, vocab_start=20),
        ):
            with pytest.raises(ValueError, match="got vocab_start 20 and a tp_group of one rank; expected 0"):
                call()
    finally:
        dist.destroy_process_group()


def test_a_default_device_does_not_matter():
    """Tensors that a call makes for itself are where its arguments are."""
    case = make_case()
    plan = mk.plan_tree([[1, 2, 3], [1, 2, 4, 5], [6]])
    q, reward, seq = torch.randn(plan.num_rows, 2, 8, requires_grad=True), torch.randn(6), torch.arange(6) // 2

    def everything():
        leaves, options = case.leaves()
        logp = mk.linear_logprob(*leaves, case.target, **options).logp
        trees = [mk.tree_attention(q, q, q, plan, backend=backend) for backend in ("cpu", "torch")]
        advantage = mk.group_advantage(reward, seq)
        loss = mk.policy_loss(reward.clone().requires_grad_(), None, advantage, seq, denom=6.0, per_token=True).loss
        (sum(t.sum() for t in trees) + logp.sum() + loss).backward()
        grads, q.grad = [q.grad, *(x.grad for x in leaves)], None
        return [logp.detach(), *(t.detach() for t in trees), advantage, loss.detach(), *grads]

    want, report = everything(), mk.doctor()
    with torch.device("meta"):
        got = everything()
        assert mk.doctor() == report
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_sharded_parameter_is_refused():
    """FSDP2's parameter outside of its module's forward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = make_case()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(case.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="weight is a DTensor; expected a plain tensor; pass its .full_tensor"):
            mk.linear_logprob(case.hidden, weight, case.target, **case.options)
    finally:
        dist.destroy_process_group()


def test_the_gradient_of_hidden_leaves_a_gpu_s_gemm_in_float32():
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            dz, weight = (torch.empty(size, device="cuda", dtype=dtype) for size in ((4, 32), (32, 8)))
            assert TorchHead().hidden_grad(dz, weight).dtype == torch.float32


def test_chunks_of_the_torch_head_are_counted_in_float32():
    assert [TorchHead().logit_bytes(dtype) for dtype in (torch.bfloat16, torch.float32)] == [4, 4]
