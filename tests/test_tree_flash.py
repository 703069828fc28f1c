"""Backend `flash` of tree_attention: what it hands to the varlen kernels, and when it says that it cannot.

No varlen kernel runs on a CPU: stand-ins take its place that accept what the real functions accept.
"""

import importlib.machinery
import inspect
import types

import pytest
import torch
from forests import replies
from torch.nn import functional as F
from tree_cases import inputs

import m2kernels as mk
from m2kernels import _tree_attention_flash as flash
from m2kernels.tree_attention import unsupported_reason

SEQUENCES = [list(range(n)) for n in (9, 1, 14)]


def causal(q, k, v, bounds, scale):
    """(out, lse [heads, rows]) of sequences one after another."""
    outs, lses = [], []
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        part = [x[first:last].transpose(0, 1) for x in (q, k, v)]
        outs.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True))
        scores = part[0] @ part[1].repeat_interleave(q.shape[1] // k.shape[1], 0).transpose(1, 2) * scale
        n = last - first
        lses.append(scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).logsumexp(2))
    return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)


@pytest.fixture(autouse=True)
def forget():
    """Which package is there is asked once a process."""
    cached_functions = (flash._package, flash._torch_has_varlen)
    for cached in cached_functions:
        cached.cache_clear()
    yield
    for cached in cached_functions:
        cached.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """flash_attn's function with the arguments of version 2.8; what it was called with."""
    seen = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        seen.append(dict(locals()))
        assert causal and return_attn_probs and dropout_p == 0.0
        out, lse = globals()["causal"](q, k, v, cu_seqlens_q.tolist(), softmax_scale)
        return out, lse, None

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", module)
    return seen


def compare(plan, padding=3, **options):
    (q, k, v), d = inputs(plan.num_rows + padding, (4, 2), 16, torch.float32)
    for x in (q, k, v):
        x.data[plan.num_rows :] = torch.nan
    out, lse = flash.flash_tree_attention(q, k, v, plan, 0.3, **{"deterministic": True, **options})
    want, want_lse = mk.tree_attention(q, k, v, plan, scale=0.3, return_lse=True, backend="torch")
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert not lse.requires_grad
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), d) for o in (out, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("deterministic", [True, False])
def test_flash_attn(calls, deterministic):
    plan = mk.plan_tree(SEQUENCES, keys=range(3))
    compare(plan, deterministic=deterministic)
    (call,) = calls
    assert call["cu_seqlens_q"].dtype == torch.int32 and call["cu_seqlens_q"].tolist() == [0, 9, 10, 24]
    assert call["cu_seqlens_k"] is call["cu_seqlens_q"] and call["max_seqlen_q"] == call["max_seqlen_k"] == 14
    assert call["q"].shape == (24, 4, 16) and call["k"].shape == call["v"].shape == (24, 2, 16)
    assert call["deterministic"] is deterministic and call["softmax_scale"] == 0.3


def test_chains_of_merged_sequences(calls):
    """Equal ones, and one how another begins, share rows and still are chains."""
    plan = mk.plan_tree([[1, 2, 3], [1, 2], [1, 2, 3], [7, 8]])
    assert flash.first_branch(plan) is None
    compare(plan, padding=0)
    assert calls[0]["cu_seqlens_q"].tolist() == [0, 3, 5]


def test_torch_varlen(monkeypatch):
    from torch.nn.attention import varlen

    accepts, seen = inspect.signature(varlen.varlen_attn), []

    def stand_in(*args, **kwargs):
        call = accepts.bind(*args, **kwargs).arguments
        seen.append(call)
        return causal(call["query"], call["key"], call["value"], call["cu_seq_q"].tolist(), call["scale"])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(flash, "_package", lambda: (None, "none"))
    compare(mk.plan_tree(SEQUENCES, keys=range(3)))
    (call,) = seen
    assert call["window_size"] == (-1, 0) and call["enable_gqa"] is True and call["return_aux"].lse
    assert call["cu_seq_k"] is call["cu_seq_q"] and call["max_q"] == call["max_k"] == 14


def test_reasons(monkeypatch):
    chains = mk.plan_tree(SEQUENCES, keys=range(3))
    tree = mk.plan_tree(replies(1, 2, 5, 3))
    assert unsupported_reason("flash", torch.zeros(24, 2, 64), chains) == "q is on cpu; varlen kernels are CUDA's"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unsupported_reason("flash") == "no CUDA device is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unsupported_reason("flash") is None, "this torch has varlen attention"

    class OnCuda:
        """What is asked of queries; there is no device to put any on."""

        device = torch.device("cuda", 0)

        def __init__(self, dim, dtype=torch.bfloat16):
            self.shape, self.dtype = (24, 2, dim), dtype

        def dim(self):
            return 3

    assert unsupported_reason("flash", OnCuda(64), chains) is None
    for q, plan, word in (
        (OnCuda(64), tree, "the forest branches at row 8; varlen kernels know chains alone"),
        (OnCuda(64, torch.float32), chains, "take bfloat16 and float16"),
        (OnCuda(260), chains, "head_dim is 260"),
    ):
        assert word in unsupported_reason("flash", q, plan)
    assert "deterministic only under" in unsupported_reason("flash", deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert unsupported_reason("flash", deterministic=True) is None
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(flash, "_torch_has_varlen", lambda: False)
    reason = unsupported_reason("flash")
    assert "flash_attn_interface is not installed, flash_attn is not installed" in reason


def test_a_package_that_does_not_import_is_a_reason(monkeypatch, calls):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unsupported_reason("flash", deterministic=True) is None  # flash_attn is there, and takes the option
    flash._package.cache_clear()
    monkeypatch.delattr("flash_attn.flash_attn_varlen_func")
    assert "flash_attn does not import (AttributeError" in unsupported_reason("flash", deterministic=True)


def test_flash_attn_3(monkeypatch):
    """Its earlier builds return the log-sum-exp without being asked, and know no option for it."""
    seen = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        seen.append(deterministic)
        return causal_(q, k, v, cu_seqlens_q.tolist(), softmax_scale)

    causal_ = globals()["causal"]
    monkeypatch.setattr(flash, "_package", lambda: (flash_attn_varlen_func, ""))
    compare(mk.plan_tree(SEQUENCES, keys=range(3)))
    assert seen == [True]


def test_auto_never_takes_it_and_a_forest_is_refused():
    plan = mk.plan_tree(replies(1, 2, 5, 3))
    x = torch.zeros(plan.num_rows, 2, 16)
    with pytest.raises(ValueError, match="backend 'flash' cannot run: q is on cpu"):
        mk.tree_attention(x, x, x, plan, backend="flash")
