"""Other ways to attend over a prefix forest, for the tree-attention case: callables of (q, k, v) in packed rows.

Three things that can be done without a tree kernel, by whatever kernels are installed:

-each   every sequence by itself, what they share computed again for each (`sdpa-each`, `cudnn-each`, `varlen-each`,
        `fa2-each`, `fa3-each`, `fa4-each`)
-paths  each row's query once, against a copy of the keys on its path (`varlen-paths`, `fa2-paths`, ...)
mask    packed rows with a mask: dense (`sdpa-mask`), or FlexAttention's blocks (`flex`)

Masks, indices and lengths are made before the clock starts: a step needs them once for all layers. Copies of q, k, v
and o between packed and repeated rows are inside of it: they depend on the layer's values. Trainers that never pack
have no such copies; for `-each` they are a few percent of attention over thousands of tokens, and
`Repeated.attend` is the same without them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from m2kernels import TreePlan
from m2train.bench import peers, registry
from m2train.bench.case import Fn, Impl, Skip, SlowStart

Varlen = Callable[..., torch.Tensor]
"""(q, k, v, cu_seqlens_q, cu_seqlens_k, longest query, longest key) -> o; causal from the lower right."""
MASK_LIMIT = 32768
"""Rows beyond which a dense mask is left out: 1 GiB of booleans."""


class Repeated:
    """The rows of each sequence by itself, one after another, as varlen kernels and trainers without trees hold them.

    Args:
        plan: whose rows q, k and v have, without padding.
    """

    def __init__(self, plan: TreePlan) -> None:
        paths = [plan.rows(i).long() for i in range(len(plan.lengths))]
        self.lengths = [n for n in plan.lengths if n]
        self.index = torch.cat(paths)
        # Rows that several sequences share are computed for each of them; the result is that of the last one.
        owner = torch.empty(plan.num_rows, dtype=torch.int64)
        owner[self.index.cpu()] = torch.arange(len(self.index))  # on the CPU the last one stays, every time
        self.owner = owner.to(self.index.device)
        self.offsets = plan.cu_seqlens()
        self.longest = max(plan.lengths)

    def packed(self, attend: Fn) -> Fn:
        """`attend` on repeated rows as a function of packed rows."""

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = attend(*(x.index_select(0, self.index) for x in (q, k, v)))
            return found.index_select(0, self.owner)

        return run

    def attend(self, sdpa: Fn) -> Fn:
        """Causal attention of every sequence, a call each, on repeated rows."""

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # split: its backward is one copy, where that of slices would add up whole tensors
            parts = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
            return torch.cat([sdpa(*part) for part in parts])

        return run

    def varlen(self, kernel: Varlen) -> Fn:
        """All sequences in one call, on repeated rows."""
        cu, longest = self.offsets, self.longest
        return lambda q, k, v: kernel(q, k, v, cu, cu, longest, longest)


def paths(plan: TreePlan, kernel: Varlen) -> Fn:
    """Queries in packed rows, once each; keys and values are copied along every segment's path."""
    index, queries, keys = plan.gathered_kv()
    index = index.long()
    longest_q, longest_k = (int(x.diff().max()) for x in (queries, keys))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernel(q, k.index_select(0, index), v.index_select(0, index), queries, keys, longest_q, longest_k)

    return run


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """torch's attention of [rows, heads, dim], causal without a mask; torch chooses the kernel."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return found[0].transpose(0, 1)


def visible(plan: TreePlan) -> torch.Tensor:
    """bool [rows, rows]: row i (first axis) sees row j (second)."""
    row = torch.arange(plan.num_rows, device=plan.subtree_end.device)
    return (row <= row[:, None]) & (row[:, None] < plan.subtree_end)


def flex(plan: TreePlan, *, compile: bool = True) -> Fn:
    """FlexAttention with a block mask of the forest; both are made, and compiled, at the first call."""
    made: list[Any] = []

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            end, rows, where = plan.subtree_end, plan.num_rows, plan.subtree_end.device

            def sees(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
                return (j <= i) & (i < end[j])

            mask = create_block_mask(sees, None, None, rows, rows, device=where, _compile=compile and q.is_cuda)
            made.extend((torch.compile(flex_attention, dynamic=False) if compile else flex_attention, mask))
        attend, mask = made
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        found: torch.Tensor = attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return found[0].transpose(0, 1)

    return run


def _torch_varlen(module: Any) -> Varlen:
    """torch.nn.attention.varlen, FlashAttention-2 inside: before 2.11 causal was a flag, and there was no GQA."""
    accepts = inspect.signature(module.varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in accepts else {"window_size": (-1, 0)}

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *lengths: Any) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        more = dict(causal)
        if group > 1 and "enable_gqa" in accepts:
            more["enable_gqa"] = True
        elif group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        found: torch.Tensor = module.varlen_attn(q, k, v, *lengths, **more)
        return found

    return run


def _flash_varlen(module: Any) -> Varlen:
    """flash_attn_varlen_func of FlashAttention 2, 3 and 4: the same arguments; some versions return lse too."""
    attend = module.flash_attn_varlen_func

    def run(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Any, cu_k: Any, max_q: int, max_k: int
    ) -> torch.Tensor:
        found = attend(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, causal=True
        )
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    return run


def _cudnn(module: Any) -> Fn:
    """SDPA with cuDNN's kernel alone: where that cannot run, torch raises instead of choosing another."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with module.sdpa_kernel(module.SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    return run


_VARLEN = {
    "varlen": ("varlen", "torch.nn.attention.varlen", _torch_varlen),
    "fa2": ("flash-attn", "flash_attn", _flash_varlen),
    "fa3": ("fa3", "flash_attn_interface", _flash_varlen),
    "fa4": ("fa4", "flash_attn.cute", _flash_varlen),
}
"""Name here -> (peer, module, adapter)."""


def attention_impls(
    plan: TreePlan, device: torch.device, dtype: torch.dtype, *, backward: bool = True
) -> dict[str, Impl]:
    """Every other way to attend over `plan`: a callable of q [N, Hq, D], k, v [N, Hkv, D] -> o [N, Hq, D].

    Args:
        plan: on `device`; N is its num_rows, without padding.
        device: where q, k and v are.
        dtype: theirs.
        backward: gradients will be asked for (FlexAttention has none on a CPU).

    Returns:
        name -> callable, or a Skip that says why it cannot run: each has its own reason.
    """
    repeated = Repeated(plan)
    found: dict[str, Impl] = {"sdpa-each": repeated.packed(repeated.attend(sdpa))}
    if plan.num_rows > MASK_LIMIT:
        found["sdpa-mask"] = Skip(f"a dense mask of {plan.num_rows} rows; up to {MASK_LIMIT} are run")
    else:
        mask = visible(plan)
        found["sdpa-mask"] = lambda q, k, v: sdpa(q, k, v, mask)
    why = peers.reason("flex", device)
    if why is None and backward and device.type == "cpu":
        why = "FlexAttention has no backward on a CPU"
    found["flex"] = Skip(why) if why else SlowStart(flex(plan))
    narrow = dtype in (torch.bfloat16, torch.float16)
    for name, (key, module, adapt) in [*_VARLEN.items(), ("cudnn", ("cudnn", "torch.nn.attention", _cudnn))]:
        ways = ("each",) if name == "cudnn" else ("each", "paths")
        kernel = peers.peer(key, device, module, adapt)
        if not isinstance(kernel, Skip) and not narrow:
            kernel = Skip(f"{module} takes bfloat16 and float16; got {registry.dtype_name(dtype)}")
        for way in ways:
            if isinstance(kernel, Skip):
                found[f"{name}-{way}"] = Skip(str(kernel))
            elif name == "cudnn":
                found[f"{name}-{way}"] = repeated.packed(repeated.attend(kernel))
            elif way == "each":
                found[f"{name}-{way}"] = repeated.packed(repeated.varlen(kernel))
            else:
                found[f"{name}-{way}"] = paths(plan, kernel)
    return found
