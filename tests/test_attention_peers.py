"""Peers of tree attention compute tree attention: those that a CPU can run; adapters of the others, on stand-ins."""

import numpy as np
import pytest
import torch

import m2kernels as mk
from m2train.bench import attention_peers as ap
from m2train.bench.case import Skip

CPU = torch.device("cpu")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def forest():
    """Two roots; a dialogue with forks, a sequence that ends inside of another, one token alone."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 99, 37)
    sequences = [base, rng.integers(0, 99, 1)]
    for turn in range(4):
        history = np.concatenate([base, rng.integers(0, 99, 20 + 9 * turn)])
        sequences += [history, np.concatenate([history, rng.integers(0, 99, 11)])]
    return mk.plan_tree(sequences)


def gradients(attend, plan, dtype=torch.float32):
    """Result and gradients of q, k, v for fixed values."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(plan.num_rows, h, 16, generator=g).to(dtype) for h in (6, 2, 2, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.fixture(scope="module")
def wanted(forest):
    return gradients(lambda q, k, v: mk.tree_attention(q, k, v, forest, backend="torch"), forest, torch.float64)


def close(found, wanted):
    return all(float((x - y).abs().max()) < TOLERANCE for x, y in zip(found, wanted, strict=True))


def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    """What FlashAttention's varlen function promises: causal from the lower right, sequence by sequence."""
    outs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        queries, keys = int(b - a), int(d - c)
        assert 0 < queries <= max_q and keys <= max_k
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        outs.append(ap.sdpa(q[a:b], k[c:d], v[c:d], mask))
    return torch.cat(outs)


def test_peers_that_run_on_a_cpu(forest, wanted):
    impls = ap.attention_impls(forest, CPU, torch.float32)
    run = {name for name, impl in impls.items() if callable(impl)}
    assert run == {"sdpa-each", "sdpa-mask"}
    for name in run:
        assert close(gradients(impls[name], forest), wanted), name
    for name, impl in impls.items():
        assert name in run or (isinstance(impl, Skip) and str(impl)), name


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention(forest, wanted):
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(forest.num_rows, h, 16, generator=g) for h in (6, 2, 2))
        assert close([ap.flex(forest, compile=False)(q, k, v)], wanted[:1])
    assert not isinstance(ap.attention_impls(forest, CPU, torch.float32, backward=False)["flex"], Skip)


class Module:
    """Stands for flash_attn and torch.nn.attention.varlen."""

    @staticmethod
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert causal
        return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), None

    @staticmethod
    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and enable_gqa
        return varlen(query, key, value, cu_q, cu_k, max_q, max_k)


class OldModule:
    """torch 2.10's."""

    @staticmethod
    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal and key.shape[1] == query.shape[1]
        return varlen(query, key, value, cu_q, cu_k, max_q, max_k)


@pytest.mark.parametrize(
    ("adapt", "module"),
    [(ap._flash_varlen, Module), (ap._torch_varlen, Module), (ap._torch_varlen, OldModule)],
)
def test_varlen_kernels(forest, wanted, adapt, module):
    kernel, repeated = adapt(module), ap.Repeated(forest)
    assert close(gradients(repeated.packed(repeated.varlen(kernel)), forest), wanted)
    assert close(gradients(ap.paths(forest, kernel), forest), wanted)


def test_kernels_of_narrow_dtypes_say_so(forest, monkeypatch):
    monkeypatch.setattr(ap.peers, "peer", lambda *args, **options: lambda *tensors: None)
    found = ap.attention_impls(forest, CPU, torch.float32)["fa3-paths"]
    assert isinstance(found, Skip) and "float32" in str(found)
    assert callable(ap.attention_impls(forest, CPU, torch.bfloat16)["fa3-paths"])


def test_large_masks_are_left_out(forest, monkeypatch):
    monkeypatch.setattr(ap, "MASK_LIMIT", 3)
    assert "dense mask" in str(ap.attention_impls(forest, CPU, torch.float32)["sdpa-mask"])
