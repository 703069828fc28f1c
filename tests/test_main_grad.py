"""linear_policy_loss into a trainer's float32 buffer: dW once, whatever recompute does, under the promised factor."""

import pytest
import torch
from test_linear_policy_loss import BACKENDS, DEPTH, TINY, VOCAB, for_spec, make_case, run
from torch.utils.checkpoint import checkpoint

import m2kernels as mk
from m2kernels._main_grad import assert_factor


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


@pytest.mark.parametrize("grad_scale", [None, 2.5])
def test_recompute_with_a_target_made_anew_never_counts_twice(grad_scale):
    leaves, case = make_case()
    hidden = (leaves[0].detach().abs() + 0.1).requires_grad_()
    want, got = torch.zeros(VOCAB, DEPTH), torch.zeros(VOCAB, DEPTH)
    main_grad_step([hidden, leaves[1]], case, want, grad_scale, 2.5)
    labels, kept, one = case.pop("target"), [], torch.ones((), requires_grad=True)

    def forward(h):
        kept.append(labels.clone())  # each call's target has an address of its own
        loss = mk.linear_policy_loss(
            h.exp().log(), leaves[1], kept[-1], denom=7.0, main_grad=got, grad_scale=grad_scale,
            **for_spec(case, mk.LossSpec()),
        ).loss  # fmt: skip
        return loss * one  # saves the loss: the recomputation goes all the way

    loss = checkpoint(forward, hidden, use_reentrant=False)
    (loss * 2.5).backward()
    assert len(kept) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


CHECKPOINTS = [{"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": False}]


@pytest.mark.parametrize("options", CHECKPOINTS, ids=str)
@pytest.mark.parametrize("logged", [False, True])
def test_a_layer_that_asks_for_the_recomputation_after_the_loss_s_backward_never_counts_twice(options, logged):
    """The op saves nothing, so its own backward may come before the region is computed again, all of it."""
    leaves, case = make_case()
    layer = torch.nn.Linear(DEPTH, DEPTH)
    buffers = []

    def last_stage(x, main_grad):
        hidden = torch.tanh(layer(x))
        loss = mk.linear_policy_loss(
            hidden, leaves[1], denom=7.0, main_grad=main_grad, grad_scale=1.0, **for_spec(case, mk.LossSpec())
        ).loss
        return (loss, hidden.square().mean()) if logged else (loss,)

    for wrap in (False, True):
        buffers.append(torch.zeros(VOCAB, DEPTH))
        hidden = leaves[0].detach().requires_grad_()
        for _ in range(2):  # the second time beside a loss that is kept
            out = checkpoint(last_stage, hidden, buffers[-1], **options) if wrap else last_stage(hidden, buffers[-1])
            out[0].backward()
            del hidden.grad
            kept = out  # noqa: F841
    torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", CHECKPOINTS, ids=str)
def test_a_call_on_the_same_targets_does_not_silence_a_recomputation(options):
    leaves, case = make_case()
    buffers = []

    def forward(x, main_grad):
        return mk.linear_policy_loss(
            x * 1.0, leaves[1], denom=7.0, main_grad=main_grad, grad_scale=1.0, **for_spec(case, mk.LossSpec())
        ).loss

    for wrap in (False, True):
        buffers.append(torch.zeros(VOCAB, DEPTH))
        first, second = (leaves[0].detach().mul(k).requires_grad_() for k in (1.0, 2.0))
        plain = forward(first, buffers[-1])  # made first: its backward comes after the recomputation
        again = checkpoint(forward, second, buffers[-1], **options) if wrap else forward(second, buffers[-1])
        (plain + again).backward()
    torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-4, atol=1e-5)


def test_a_call_that_is_refused_adds_nothing():
    leaves, case = make_case()
    main_grad = torch.zeros(VOCAB, DEPTH)
    case["seq"] = case["seq"].flip(0)
    with pytest.raises(ValueError, match="linear_policy_loss: seq has .* ids that are out of order"):
        main_grad_step(leaves, case, main_grad, 1.0, 1.0)
    assert not main_grad.any()


def test_another_factor_than_grad_scale_raises():
    leaves, case = make_case()
    with pytest.raises(ValueError, match=r"brings a gradient of 2.0; expected grad_scale=4.0"):
        main_grad_step(leaves, case, torch.zeros(VOCAB, DEPTH), 4.0, 2.0)


def test_the_factor_is_checked_without_a_host_read():
    # What a GPU does; there a false assertion ends the process.
    assert_factor("op", torch.tensor(4.0), 4.0)
    with pytest.raises(RuntimeError, match="op: the backward brings another gradient than grad_scale=4.0"):
        assert_factor("op", torch.tensor(4.1), 4.0)
