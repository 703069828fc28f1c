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


def leaf_oracle(xs, d, plan, scale):
    """The same a sequence at a time, for forests of thousands: a row's d goes to its first sequence alone."""
    wide = [x.detach().double().requires_grad_() for x in xs]
    group = xs[0].shape[1] // xs[1].shape[1]
    out, lse = torch.zeros_like(wide[0]), torch.zeros_like(wide[0][..., 0])
    owned = torch.zeros(len(wide[0]), dtype=torch.bool)
    for path in (rows.long() for rows in rows_of(plan)):
        q, k, v = (x[path].transpose(0, 1) for x in wide)
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        future = torch.ones(len(path), len(path), dtype=torch.bool).triu(1)
        scores = (scale * (q @ k.transpose(1, 2))).masked_fill(future, -torch.inf)
        got = (scores.softmax(dim=2) @ v).transpose(0, 1)
        shared, mine = path[owned[path]], ~owned[path]
        assert len(shared) == 0 or float((out[shared] - got[~mine]).detach().abs().max()) < 1e-12, (
            "sequences disagree"
        )
        out[path], lse[path] = got.detach(), scores.detach().logsumexp(dim=2).t()
        owned[path] = True
        got[mine].backward(d.double()[path[mine]])
    return [out, lse, *(torch.zeros_like(x) if x.grad is None else x.grad for x in wide)]


def dense(xs, d, plan, scale):
    """torch's attention at the same dtype with the whole mask: the yardstick."""
    return dense_rows(xs, d, visible_mask(plan.to("cpu")).to(d.device), scale, slice(None))


def dense_rows(xs, d, mask, scale, rows):
    """The same of some rows: mask [rows, N] and d are theirs; dq, dk and dv are of all."""
    leaves = [x.detach().clone().requires_grad_() for x in xs]
    group = xs[0].shape[1] // xs[1].shape[1]
    q, k, v = (x.transpose(0, 1) for x in (leaves[0][rows], *leaves[1:]))
    k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0].transpose(0, 1)
    lse = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf).logsumexp(2).t()
    return [out, lse, *torch.autograd.grad(out, leaves, d)]


def assert_sampled(xs, d, plan, backend, paths):
    """As assert_matches, on some rows: the loss is theirs alone. `paths` holds what each sees, itself last."""
    scale = xs[0].shape[2] ** -0.5
    rows = torch.stack([path[-1] for path in paths])
    assert len(rows.unique()) == len(rows), "d would be counted twice"
    mask = torch.zeros(len(rows), len(d), dtype=torch.bool)
    for i, path in enumerate(paths):
        mask[i, path] = True
    wide = [x.detach().double().requires_grad_() for x in xs]
    group, outs, lses = xs[0].shape[1] // xs[1].shape[1], [], []
    for path in paths:
        keys, values = (x[path].repeat_interleave(group, dim=1) for x in wide[1:])
        scores = scale * (wide[0][path[-1]] * keys).sum(dim=2)
        outs.append((scores.softmax(dim=0)[..., None] * values).sum(dim=0))
        lses.append(scores.logsumexp(dim=0))
    out = torch.stack(outs)
    want = [out, torch.stack(lses), *torch.autograd.grad(out, wide, d[rows].double())]
    plain = dense_rows(xs, d[rows], mask, scale, rows)
    alone = torch.zeros_like(d)
    alone[rows] = d[rows]
    got = run(xs, alone, plan, backend)
    got[:2] = [x[rows] for x in got[:2]]
    for name, mine, theirs, true in zip(NAMES, got, plain, want, strict=True):
        assert_kernel(name, mine, theirs, true, eps=EPS[xs[0].dtype])


def assert_matches(xs, d, plan, *backends, scale=None, device="cpu", exact=oracle, ratio=2.0, **options):
    """Backends against the oracle `exact`; error at most `ratio` times the yardstick's.

    On a device everything happens there, and the reference in float64, itself tested against the oracle, stands for
    it: the oracle goes row by row, which takes too long for forests that are worth a GPU's while.
    """
    number = xs[0].shape[2] ** -0.5 if scale is None else scale
    if device == "cpu":
        want = exact(xs, d, plan, number)
    else:
        xs, d, plan = [x.detach().to(device).requires_grad_() for x in xs], d.to(device), plan.to(device)
        wide = [x.detach().double().requires_grad_() for x in xs]
        want = run(wide, d.double(), plan, "torch", scale=number)
    plain = dense(xs, d, plan, number)
    eps = EPS[xs[0].dtype]
    for backend in backends:
        got = run(xs, d, plan, backend, scale=scale, **options)
        for name, mine, theirs, true in zip(NAMES, got, plain, want, strict=True):
            assert_kernel(f"{name} of {backend}", mine, theirs, true, ratio=ratio, eps=eps)
