"""The Triton kernels on a Hopper GPU, at real shapes: what the interpreter and the sm_90 gate cannot show."""

import pytest
import torch
from kernel_testing import assert_kernel
from policy_cases import SPECS, for_spec, ids
from policy_cases import make_case as make_policy_case
from policy_cases import run as run_policy
from triton_head_cases import check_head, make_case, oracle_rows
from triton_testing import on_hopper

import m2kernels as mk

pytestmark = on_hopper

# rows, dim, vocabulary: Qwen's and SmolLM's padded ones, GPT-2's ragged one, and a hidden size of no whole block.
SHAPES = [(256, 2048, 151936), (300, 576, 49152), (129, 888, 50257)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def head():
    from m2kernels._head_triton import TritonHead

    return TritonHead()


def forward(case, keep=False):
    return head().forward(case.hidden, case.weight, case.settings, entropy=True, keep=keep)


def both(case):
    """Statistics and gradient, copied: grad reuses the memory of what forward kept."""
    stats, kept = forward(case, keep=True)
    dz = head().grad(kept, case.settings, oracle_rows(case), case.upstream)
    return *stats, dz


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "vocab"), SHAPES)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_head_oracle(dtype, rows, dim, vocab, extras):
    check_head(head(), make_case(dtype, rows, dim, vocab, extras=extras).to("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "offset"), [(12.0, 0.0), (3.0, 1000.0)], ids=["peaked", "offset"])
def test_head_large_logits(dtype, scale, offset):
    check_head(head(), make_case(dtype, 200, 1024, 32000, scale=scale, offset=offset).to("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_is_invariant_and_deterministic_to_the_bit(dtype):
    case = make_case(dtype, 1500, 1024, 50257).to("cuda")
    whole, _ = forward(case)
    again, _ = forward(case)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1)).cuda()
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    for rows in (order, order[:129], order[:1]):
        part, _ = forward(case.pick(rows))
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[rows], b)


def test_head_on_a_side_stream():
    case = make_case(torch.bfloat16, 512, 1024, 32000).to("cuda")
    want = both(case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long work first: a launch on another stream would read `hidden` before it is there.
        busy = torch.randn(8192, 8192, device="cuda")
        for _ in range(8):
            busy = busy @ busy * 1e-4
        late = case.hidden * (1 + 0 * busy[0, 0].to(case.hidden.dtype).nan_to_num(0, 0, 0))
        moved = type(case)(**{**vars(case), "hidden": late})
        got = both(moved)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_head_in_a_cuda_graph():
    case = make_case(torch.bfloat16, 512, 1024, 32000).to("cuda")
    other = make_case(torch.bfloat16, 512, 1024, 32000, seed=1).to("cuda")
    rows = oracle_rows(case)

    def step():
        stats, kept = forward(case, keep=True)
        dz = head().grad(kept, case.settings, rows, case.upstream)
        return *stats, dz

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    case.hidden.copy_(other.hidden)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob_holds_no_logits(dtype):
    rows, dim, vocab = 8192, 1024, 151936
    hidden = torch.randn(rows, dim, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab, dim, device="cuda", dtype=dtype) / 32).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    mk.linear_logprob(hidden[:128], weight, target[:128], backend="triton")  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = mk.linear_logprob(hidden, weight, target, entropy=True, backend="triton")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < rows * vocab * dtype.itemsize / 8
    (out.logp.sum() + out.entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_many_chunks_are_those_of_one(dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 512, generator=g), torch.randn(32000, 512, generator=g) / 22
    target = torch.randint(0, 32000, (700,), generator=g).cuda()
    results = []
    for chunk_bytes in (None, 128 * 32000 * dtype.itemsize):
        leaves = [x.to("cuda", dtype).requires_grad_() for x in (hidden, weight)]
        main_grad = torch.ones(32000, 512, device="cuda")
        seq = torch.zeros(700, dtype=torch.int32, device="cuda")
        loss = mk.linear_policy_loss(
            *leaves, target, None, torch.ones(1, device="cuda"), seq, denom=700.0, main_grad=main_grad,
            grad_scale=2.0, chunk_bytes=chunk_bytes,
        ).loss  # fmt: skip
        (loss * 2.0).backward()
        results.append((leaves[0].grad.float(), main_grad))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-5)


def test_a_wrong_factor_waits_for_nothing():
    from m2kernels._main_grad import check_factor

    brought = torch.tensor(2.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        check_factor("op", brought, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_policy_loss_at_size_without_a_sync(spec):
    lengths = torch.randint(1, 16, (4096,), generator=torch.Generator().manual_seed(0)).tolist()
    case = for_spec(make_policy_case(lengths), spec)
    want = run_policy(case, spec, 1000.0, torch.float64, backend="torch")
    plain = run_policy(case, spec, 1000.0, backend="torch")
    run_policy(case, spec, 1000.0, device="cuda", backend="triton")  # compiles
    args = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.items()}
    args["logp"] = args["logp"].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = mk.policy_loss(**args, denom=1000.0, spec=spec, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out.loss.backward()
    names = [e.name for e in profile.events() if e.name.endswith("_kernel") and "Memcpy" not in e.name]
    assert 2 <= len(names) <= 3, names
    assert_kernel("loss", out.loss, plain[0], want[0])
    assert_kernel("grad_logp", args["logp"].grad, plain[1], want[1])
    again = mk.policy_loss(**args, denom=1000.0, spec=spec, backend="triton")
    assert torch.equal(out.loss, again.loss)


def test_group_advantage_at_size():
    reward = torch.rand(4096, device="cuda").round(decimals=2)
    group = torch.randint(0, 512, (4096,), device="cuda")
    got = mk.group_advantage(reward, group, scale="std", backend="triton")
    want = mk.group_advantage(reward.double(), group, scale="std", backend="torch")
    plain = mk.group_advantage(reward, group, scale="std", backend="torch")
    assert_kernel("advantage", got, plain, want)
    assert torch.equal(got, mk.group_advantage(reward, group, scale="std", backend="triton"))
