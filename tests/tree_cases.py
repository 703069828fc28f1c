"""Problems for tree attention, their float64 oracle, and torch's dense attention as the yardstick."""

import torch
from forests import visible_mask
from kernel_testing import assert_kernel
from torch.nn import functional as F

import m2kernels as mk
from m2kernels.reference import tree_attention_ref

EPS = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 1e-3, torch.float16: 1e-4}
NAMES = ("o", "lse", "dq", "dk", "dv")


def rows_of(plan):
    return [plan.rows(i) for i in range(len(plan.lengths))]


def inputs(num, heads, dim, dtype, seed=0, size=1.0):
    """q, k, v and the gradient of the result, as leaves of dtype."""
    g = torch.Generator().manual_seed(seed)
    make = lambda h: (size * torch.randn(num, h, dim, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
    q, k, v, d = make(heads[0]), make(heads[1]), make(heads[1]), make(heads[0]) / size
    return [x.requires_grad_() for x in (q, k, v)], d


def run(xs, d, plan, backend, **options):
    """out, lse, dq, dk, dv; everything is on the device of d."""
    out, lse = mk.tree_attention(*xs, plan, return_lse=True, backend=backend, **options)
    return [out, lse, *torch.autograd.grad(out, xs, d, materialize_grads=True)]


def oracle(xs, d, plan, scale):
    """Causal attention on each sequence by itself in float64."""
    wide = [x.detach().double().requires_grad_() for x in xs]
    out, lse = tree_attention_ref(*wide, rows_of(plan), scale)
    grads = torch.autograd.grad(out, wide, d.double(), allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(wide, grads, strict=True))]


def dense(xs, d, plan, scale):
    """torch's attention at the same dtype with the whole mask: the yardstick."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    group = xs[0].shape[1] // xs[1].shape[1]
    q, k, v = (x.transpose(0, 1) for x in leaves)
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    mask = visible_mask(plan.to("cpu")).to(q.device)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0].transpose(0, 1)
    lse = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf).logsumexp(2).t()
    return [out, lse, *torch.autograd.grad(out, leaves, d)]


def assert_matches(xs, d, plan, backend, scale=None, device="cpu", **options):
    """A backend against the oracle; error at most twice the yardstick's.

    On a device everything happens there, and the reference in float64, itself tested against the oracle, stands for
    it: the oracle goes row by row, which takes too long for forests that are worth a GPU's while.
    """
    number = xs[0].shape[2] ** -0.5 if scale is None else scale
    if device == "cpu":
        want = oracle(xs, d, plan, number)
    else:
        xs, d, plan = [x.detach().to(device).requires_grad_() for x in xs], d.to(device), plan.to(device)
        wide = [x.detach().double().requires_grad_() for x in xs]
        want = run(wide, d.double(), plan, "torch", scale=number)
    plain = dense(xs, d, plan, number)
    got = run(xs, d, plan, backend, scale=scale, **options)
    eps = EPS[xs[0].dtype]
    for name, mine, theirs, true in zip(NAMES, got, plain, want, strict=True):
        assert_kernel(name, mine, theirs, true, eps=eps)
