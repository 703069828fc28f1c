"""The Triton and CUDA kernels on a Hopper GPU, at real shapes: what interpreter and sm_90 gate cannot show."""

import re

import head_cases
import pytest
import test_linear_policy_loss as fused
import torch
from forests import dialogues, replies
from kernel_testing import assert_kernel
from policy_cases import SPECS, device_case, for_spec, ids
from policy_cases import make_case as make_policy_case
from policy_cases import run as run_policy
from policy_cases import step as policy_loss_step
from tree_cases import EPS, NAMES, assert_matches, inputs, run
from triton_head_cases import check_head, make_case, oracle_rows
from triton_testing import on_hopper

import m2kernels as mk
from m2kernels.group_advantage import unsupported_reason as group_advantage_reason
from m2kernels.policy_loss import unsupported_reason as policy_loss_reason

pytestmark = on_hopper

# rows, dim, vocabulary: Qwen's and SmolLM's padded ones, GPT-2's ragged one, and a hidden size of no whole block.
SHAPES = [(256, 2048, 151936), (300, 576, 49152), (129, 888, 50257)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def backends(unsupported_reason):
    """Both ways to run an op on a GPU; one that cannot run here is skipped with its reason."""
    reasons = {name: unsupported_reason(name) for name in ("triton", "cuda")}
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"backend {name}: {why}"))
            for name, why in reasons.items()
        ],
    )


def late(x):
    """`x`, there only after long work of the current stream: a launch on another one would read it too soon."""
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(8):
        busy = busy @ busy * 1e-4
    return x + 0 * busy[0, 0].to(x.dtype).nan_to_num(0, 0, 0)


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
    for rows in (order, order[:1488], order[:129], order[:128], order[:1]):  # Triton specialises on multiples of 16
        part, _ = forward(case.pick(rows))
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[rows], b)


def test_head_on_a_side_stream():
    case = make_case(torch.bfloat16, 512, 1024, 32000).to("cuda")
    want = both(case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = both(type(case)(**{**vars(case), "hidden": late(case.hidden)}))
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
@pytest.mark.parametrize("rows_of_a_chunk", [None, 128])
def test_linear_logprob_against_float64(dtype, rows_of_a_chunk, device="cuda", backend="triton"):
    """All that the kernels do not do themselves: rows that repeat, bias, padding, cuBLAS's dX and dW, chunks."""
    case = head_cases.make_case(200, 256, 5000, 700, dtype, bias=True, row_temperature=True, padding=45, scale=4.0)
    want = head_cases.run_oracle(case)
    there = head_cases.HeadCase(**{name: to_device(value, device) for name, value in vars(case).items()})
    plain = head_cases.run_torch(there)
    budget = None if rows_of_a_chunk is None else rows_of_a_chunk * 5000 * dtype.itemsize
    got = head_cases.run_op(there, mk.linear_logprob, backend=backend, chunk_bytes=budget)
    for name in ("logp", "entropy"):
        assert_kernel(name, getattr(got, name).cpu(), getattr(plain, name).cpu(), getattr(want, name), eps=4e-6)
    for name, *grads in zip(("hidden", "weight", "bias"), got.grads, plain.grads, want.grads, strict=True):
        mine, torchs, exact = grads
        assert_kernel(name, mine.cpu(), torchs.cpu(), exact, eps=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_scale", [None, 2.0])
@pytest.mark.parametrize("rows_of_a_chunk", [None, 128])
def test_linear_policy_loss_against_float64(dtype, grad_scale, rows_of_a_chunk, device="cuda", backend="triton"):
    """Its gradients, and what two micro-batches add to a trainer's float32 buffer."""
    leaves, case = fused.head_case(5000, 256, [300, 250, 150], dtype, hidden_rows=200)
    spec = mk.LossSpec(entropy_coef=0.1)
    want_loss, want, _ = fused.oracle(leaves, case, spec)
    leaves = [x.detach().to(device).requires_grad_() for x in leaves]
    case = to_device(case, device)
    plain_loss, plain, _ = fused.run(leaves, case, spec, fused.plain_torch)
    budget = None if rows_of_a_chunk is None else rows_of_a_chunk * 5000 * dtype.itemsize
    options = {"backend": backend, "chunk_bytes": budget}
    loss, grads, _ = fused.run(leaves, case, spec, **options)
    assert_kernel("loss", loss.cpu(), plain_loss.cpu(), want_loss, eps=4e-6)
    for name, mine, torchs, exact in zip(("hidden", "weight"), grads, plain, want, strict=True):
        assert_kernel(name, mine.cpu(), torchs.cpu(), exact, eps=4e-6)
    main_grad = torch.zeros(5000, 256, device=device)
    for _ in range(2):
        out = mk.linear_policy_loss(
            *leaves, denom=7.0, spec=spec, main_grad=main_grad, grad_scale=grad_scale, **options, **case
        )
        (out.loss * 2.0).backward()
    assert leaves[1].grad is None
    assert_kernel("main_grad", main_grad.cpu() / 4, plain[1].float().cpu(), want[1], eps=4e-6)


def to_device(value, device):
    """Tensors, and those in a dict, on a device."""
    if isinstance(value, dict):
        return {name: to_device(x, device) for name, x in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


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


def policy_case(device="cuda"):
    """(leaves, arguments of linear_policy_loss): a third of the sequences have no advantage; a ragged vocabulary."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(700, 512, generator=g), torch.randn(32001, 512, generator=g) / 22
    target = torch.randint(0, 32001, (700,), generator=g)
    advantage = torch.tensor([1.0, 0.0, -1.0] * 5)
    seq = torch.arange(700) * 15 // 700
    terms = [x.to(device) for x in (target, advantage, seq)]
    leaves = [x.to(device, torch.bfloat16).requires_grad_() for x in (hidden, weight)]
    return leaves, (terms[0], None, *terms[1:])


def policy_step(leaves, args):
    loss = mk.linear_policy_loss(*leaves, *args, denom=700.0, chunk_bytes=128 * 32001 * 2).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_linear_policy_loss_never_drains_the_queue():
    """Its one read a chunk waits for an event, not for all that is queued; rows without a gradient are left out."""
    leaves, args = policy_case()
    want = policy_step(leaves, args)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = policy_step(leaves, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    quiet = args[2][args[3]] == 0
    assert not got[1][quiet].any() and got[1][~quiet].any(dim=1).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one():
    """Every kernel's launch, stream and scratch follow the tensors."""
    reward, group = torch.rand(512).round(decimals=1), torch.arange(512) // 8
    plan = mk.plan_tree(TREES["replies"])
    xs, d = inputs(plan.num_rows, (8, 2), 64, torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaves, args = policy_case(device)
        found = [*policy_step(leaves, args)]
        for backend in ("triton", "cuda"):
            found.append(mk.group_advantage(reward.to(device), group.to(device), scale="std", backend=backend))
            logp = torch.linspace(-3, 0, 700, device=device, requires_grad=True)
            loss = mk.policy_loss(logp, *args[1:], denom=700.0, backend=backend).loss
            found += [loss.detach(), *torch.autograd.grad(loss, logp)]
        there = [x.detach().to(device).requires_grad_() for x in xs]
        found += run(there, d.to(device), plan.to(device), "triton")
        results.append([x.cpu() for x in found])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_wrong_factor_waits_for_nothing():
    from m2kernels._main_grad import check_factor

    brought = torch.tensor(2.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        check_factor("op", brought, 2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


LENGTHS = torch.randint(1, 16, (4096,), generator=torch.Generator().manual_seed(0)).tolist()


@backends(policy_loss_reason)
@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_policy_loss_at_size_without_a_sync(spec, backend):
    case = for_spec(make_policy_case(LENGTHS), spec)
    want = run_policy(case, spec, 1000.0, torch.float64, backend="torch")
    plain = run_policy(case, spec, 1000.0, backend="torch")
    args = device_case(LENGTHS, spec, device="cuda")
    mk.policy_loss(**args, denom=1000.0, backend=backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            out = mk.policy_loss(**args, denom=1000.0, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out.loss.backward()
    # Triton's are called name_kernel, those of C++ void m2k::...::name_kernel<...>(...).
    launched = [e.name for e in profile.events() if re.search(r"_kernel\b", e.name)]
    assert 2 <= len(launched) <= 3, launched
    assert_kernel("loss", out.loss, plain[0], want[0])
    assert_kernel("grad_logp", args["logp"].grad, plain[1], want[1])


# One term a token, and one a sequence with an entropy bonus: each kernel of both files is launched.
TWO_SPECS = pytest.mark.parametrize("spec", [SPECS[0], SPECS[8]], ids=ids)


@backends(policy_loss_reason)
@TWO_SPECS
def test_policy_loss_on_a_side_stream(spec, backend):
    args = device_case(LENGTHS, spec, device="cuda")
    want = policy_loss_step(args, 1000.0, backend)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        args["logp"] = late(args["logp"].detach()).requires_grad_()
        got = policy_loss_step(args, 1000.0, backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@backends(policy_loss_reason)
@TWO_SPECS
def test_policy_loss_in_a_cuda_graph(spec, backend):
    """Captured with its backward, and replayed on other log-probs; the denominator is a number of the capture."""
    args = device_case(LENGTHS, spec, device="cuda")
    other = device_case(LENGTHS, spec, device="cuda", seed=1)
    before = policy_loss_step(args, 1000.0, backend)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = policy_loss_step(args, 1000.0, backend)
    with torch.no_grad():
        args["logp"].copy_(other["logp"].nan_to_num(-1.0))  # NaN is where the other's mask is
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], before[0])
    want = policy_loss_step(args, 1000.0, backend)
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@backends(group_advantage_reason)
def test_group_advantage_at_size(backend):
    reward = torch.rand(4096, device="cuda").round(decimals=2)
    group = torch.randint(0, 512, (4096,), device="cuda")
    got = mk.group_advantage(reward, group, scale="std", backend=backend)
    want = mk.group_advantage(reward.double(), group, scale="std", backend="torch")
    plain = mk.group_advantage(reward, group, scale="std", backend="torch")
    assert_kernel("advantage", got, plain, want)
    assert torch.equal(got, mk.group_advantage(reward, group, scale="std", backend=backend))


TREES = {
    "dialogues": dialogues(3, 4, 300, 90, 40, 60),
    "replies": replies(2, 6, 257, 129),
    "short turns": dialogues(4, 10, 65, 17, 5, 9),
    "chains": [list(range(n)) for n in (700, 1, 64, 129)],
}
MODES = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomics"])


# Every dtype in the usual tiles, the other tiles in one dtype: a configuration takes seconds to compile.
@MODES
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("heads", "dim"), [((8, 2), 64), ((6, 2), 128)])
@pytest.mark.parametrize(
    ("dtype", "blocks"),
    [(dtype, (128, 128)) for dtype in DTYPES] + [(torch.bfloat16, (128, 64)), (torch.bfloat16, (64, 64))],
    ids=str,
)
def test_tree_oracle(tree, heads, dim, dtype, blocks, deterministic):
    plan = mk.plan_tree(TREES[tree], block=blocks[0], kv_block=blocks[1])
    xs, d = inputs(plan.num_rows, heads, dim, dtype)
    assert_matches(xs, d, plan, "triton", device="cuda", deterministic=deterministic)


def large(dtype=torch.bfloat16, heads=(8, 1), dim=128):
    """A prompt that thousands of rows see: one KV head, so that its blocks are split."""
    plan = mk.plan_tree(replies(1, 12, 3000, 1500) + dialogues(1, 4, 700, 300, 80, 150)).to("cuda")
    xs, d = inputs(plan.num_rows, heads, dim, dtype)
    return plan, [x.detach().cuda().requires_grad_() for x in xs], d.cuda()


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tree_of_twenty_thousand_rows(dtype, deterministic):
    """Against the reference in float64 on the device; torch's attention in the same dtype, chain by chain, beside."""
    from m2kernels._tree_attention_triton import backward_units

    plan, xs, d = large(dtype)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    assert backward_units(plan, 1, sms).num_slots > 0
    wide = [x.detach().double().requires_grad_() for x in xs]
    want = run(wide, d.double(), plan, "torch")
    plain = run(xs, d, plan, "torch")
    got = run(xs, d, plan, "triton", deterministic=deterministic)
    for name, mine, theirs, true in zip(NAMES, got, plain, want, strict=True):
        # The reference computes in float32 and rounds once: a kernel whose probabilities are bf16 may be further off.
        assert_kernel(name, mine, theirs, true, ratio=4.0, eps=EPS[dtype] * (10 if dtype == torch.bfloat16 else 1))


def test_tree_is_deterministic_to_the_bit():
    plan, xs, d = large()
    noise, stream = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    first = run(xs, d, plan, "triton")
    for _ in range(100):
        with torch.cuda.stream(stream):
            noise @ noise  # moves the schedule
        assert all(torch.equal(a, b) for a, b in zip(run(xs, d, plan, "triton"), first, strict=True))


@MODES
def test_tree_siblings_are_isolated_to_the_bit(deterministic):
    plan, xs, d = large()
    mine = plan.rows(1)[3000:].long()
    others = torch.ones(plan.num_rows, dtype=torch.bool, device="cuda")
    others[mine] = False
    d[others] = 0.0
    before = mk.tree_attention(*xs, plan, backend="triton", deterministic=deterministic)
    noisy = []
    for x in xs:
        y = x.detach().clone()
        y[mine] = (1e4 * (2 * torch.rand(y[mine].shape, device="cuda") - 1)).to(y.dtype)
        noisy.append(y.requires_grad_())
    after = mk.tree_attention(*noisy, plan, backend="triton", deterministic=deterministic)
    assert torch.equal(after[others], before[others])
    outside = torch.ones_like(others)
    outside[plan.rows(1).long()] = False
    for grad in torch.autograd.grad(after, noisy, d):
        assert not grad[outside].any()


def test_tree_padding_may_hold_nan():
    plan, xs, d = large()
    want = run(xs, d, plan, "triton")
    more = [torch.cat([x.detach(), x.new_full((77, *x.shape[1:]), torch.nan)]) for x in (*xs, d)]
    got = run([x.requires_grad_() for x in more[:3]], more[3], plan, "triton")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[: plan.num_rows], b) and not a[plan.num_rows :].any()


def test_tree_without_a_sync_and_without_compiling_again():
    """New forests of other lengths, planned and moved: nothing waits for the device, nothing is compiled."""
    from m2kernels import _tree_attention_triton_kernels as kernels

    def step(plan):
        plan = plan.to("cuda")
        xs = [torch.randn(plan.num_rows, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2)]
        out = mk.tree_attention(*(x.requires_grad_() for x in xs), plan, backend="triton")
        out.backward(torch.ones_like(out))

    plans = [mk.plan_tree(replies(1, 4, 500 + i, 300 + 7 * i)) for i in range(1, 12)]
    step(plans[0])
    compiled = [len(k.device_caches[0][0]) for k in (kernels.tree_forward_kernel, kernels.tree_dkdv_kernel)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for plan in plans[1:]:
            step(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert compiled == [len(k.device_caches[0][0]) for k in (kernels.tree_forward_kernel, kernels.tree_dkdv_kernel)]


def test_tree_on_a_side_stream_and_in_a_cuda_graph():
    plan, xs, d = large()
    want = run(xs, d, plan, "triton")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = run([late(x.detach()).requires_grad_() for x in xs], d, plan, "triton")
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(xs, d, plan, "triton")
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_on_chains(dtype):
    plan = mk.plan_tree(TREES["chains"], keys=range(4))
    xs, d = inputs(plan.num_rows, (8, 2), 128, dtype)
    assert_matches(xs, d, plan, "flash", device="cuda")
    there = [x.detach().cuda() for x in xs]
    assert torch.equal(
        mk.tree_attention(*there, plan.to("cuda")), mk.tree_attention(*there, plan.to("cuda"), backend="triton")
    )
