"""The part of tests/dist/test_head_tp.py that runs on four ranks: `torchrun head_worker.py FOLDER BACKEND`.

The same head is run over groups of 1, 2 and 4 ranks, with shards that begin at multiples of the tile
and with shards that cut tiles. Rank 0 writes whole tensors to FOLDER/head.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

import m2kernels as mk

ROWS, DEPTH, PADDED, VOCAB, HIDDEN = 61, 24, 1536, 1290, 40
CUTS = {
    "tp1": [0, PADDED],
    "tp2": [0, 768, PADDED],
    "tp4": [0, 384, 768, 1152, PADDED],
    "tp2 uneven": [0, 333, PADDED],
    "tp4 uneven": [0, 100, 777, 1300, PADDED],  # the last shard is padding alone
    "tp4 aligned, of unequal widths": [0, 128, 640, 1280, PADDED],
}

TRITON_CUTS = ("tp1", "tp2", "tp4", "tp4 uneven")  # the interpreter takes seconds for each


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The whole head, the same on all ranks; some targets have p ~ e^-40, some are nearly certain."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(HIDDEN, DEPTH, generator=g)
    weight = torch.randn(PADDED, DEPTH, generator=g)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(PADDED, generator=g),
        "target": torch.randint(0, VOCAB, (ROWS,), generator=g),
        "rows": torch.randint(0, HIDDEN, (ROWS,), generator=g),
        "temperature": torch.rand(ROWS, generator=g) + 0.5,
        "grad": torch.randn(2, ROWS, generator=g),
        "advantage": torch.randn(6, generator=g),
        "noise": torch.randn(ROWS, generator=g) * 0.2,
        "seq": torch.arange(ROWS) // 11,
    }


def gathered(parts: torch.Tensor, group: dist.ProcessGroup, cuts: list[int]) -> torch.Tensor:
    """Shards of different lengths -> the whole."""
    found = [torch.zeros(b - a, *parts.shape[1:], dtype=parts.dtype) for a, b in zip(cuts, cuts[1:], strict=False)]
    widest = max(len(x) for x in found)
    padded = torch.zeros(widest, *parts.shape[1:], dtype=parts.dtype)
    padded[: len(parts)] = parts
    everything = [torch.empty_like(padded) for _ in found]
    dist.all_gather(everything, padded, group=group)
    return torch.cat([x[: len(f)] for x, f in zip(everything, found, strict=True)])


def run(x: dict[str, torch.Tensor], cuts: list[int], group: dist.ProcessGroup, backend: str) -> dict[str, Any]:
    """Every head op over this group."""
    rank = dist.get_rank(group)
    mine = slice(cuts[rank], cuts[rank + 1])
    common = {"tp_group": group, "vocab_start": cuts[rank], "backend": backend}
    head = {**common, "rows": x["rows"], "temperature": x["temperature"], "vocab_size": VOCAB, "chunk_bytes": 1}
    out: dict[str, Any] = {}

    def leaves() -> list[torch.Tensor]:
        return [t.clone().requires_grad_() for t in (x["hidden"], x["weight"][mine], x["bias"][mine])]

    def gradients(name: str, grads: tuple[torch.Tensor, ...]) -> None:
        to_hidden = grads[0].float()
        dist.all_reduce(to_hidden, group=group)
        out[f"{name} hidden"] = to_hidden
        out[f"{name} weight"] = gathered(grads[1], group, cuts)
        out[f"{name} bias"] = gathered(grads[2], group, cuts)

    hidden, weight, bias = leaves()
    lp = mk.linear_logprob(hidden, weight, x["target"], bias=bias, entropy=True, **head)
    out["logp"], out["entropy"] = lp.logp.detach(), lp.entropy.detach()
    gradients("logprob", torch.autograd.grad(list(lp[:2]), [hidden, weight, bias], list(x["grad"])))

    hidden, weight, bias = leaves()
    main_grad = torch.zeros(weight.shape)
    loss = mk.linear_policy_loss(
        hidden, weight, x["target"], lp.logp.detach() + x["noise"], x["advantage"], x["seq"], denom=9.0, bias=bias,
        main_grad=main_grad, grad_scale=3.0, **head,
    )  # fmt: skip
    (loss.loss * 3.0).backward()
    out["loss"], out["policy logp"] = loss.loss.detach(), loss.logp
    gradients("policy", (hidden.grad, main_grad, bias.grad))

    logits = (x["hidden"][x["rows"]].float() @ x["weight"][mine].float().T).requires_grad_()
    found = mk.logprob(logits, x["target"], entropy=True, **common)
    found.logp.sum().backward()
    out["of logits"], out["grad of logits"] = found.logp.detach(), gathered(logits.grad.T.contiguous(), group, cuts)
    return out


def real_size(groups: dict[int, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Forward of a real head, 49152 x 576, for a few rows over 1, 2 and 4 ranks; torch's in dtype and float64."""
    g = torch.Generator().manual_seed(1)
    vocab, depth, rows = 49152, 576, 7
    hidden = torch.randn(rows, depth, generator=g).to(dtype)
    weight = torch.empty(vocab, depth).uniform_(-0.15, 0.15, generator=g).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=g)
    found: dict[str, Any] = {}
    for size, group in groups.items():
        width = vocab // size
        start = dist.get_rank(group) * width
        mine = weight[start : start + width]
        found[f"tp{size}"] = mk.linear_logprob(
            hidden, mine, target, entropy=True, tp_group=group, vocab_start=start, backend="cpu"
        )[:2]
    if dist.get_rank() == 0:
        for name, x in (("plain", dtype), ("exact", torch.float64)):
            logits = torch.cat([hidden.to(x) @ part.to(x).T for part in weight.split(8192)], dim=1)
            log_p = logits.to(torch.promote_types(x, torch.float32)).log_softmax(-1)
            found[name] = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    return found


def collectives(x: dict[str, torch.Tensor], cuts: list[int], group: dist.ProcessGroup) -> list[int]:
    """How many collectives each of these takes, after the first call over this group: an op's forward, in one chunk
    and in two; the forward and backward of the loss."""
    rank = dist.get_rank(group)
    common = {"tp_group": group, "vocab_start": cuts[rank], "vocab_size": VOCAB, "backend": "torch"}
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"][cuts[rank] : cuts[rank + 1]].clone()
    weight.requires_grad_()
    widest = max(b - a for a, b in zip(cuts, cuts[1:], strict=False))
    target, half = x["target"][:HIDDEN], 4 * widest * HIDDEN // 2
    old = mk.linear_logprob(hidden, weight, target, **common).logp.detach()
    found: list[int] = []

    def count(call: Any) -> None:
        with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gather:
            call()
        found.append(gather.call_count)

    count(lambda: mk.linear_logprob(hidden, weight, target, **common))
    count(lambda: mk.linear_logprob(hidden, weight, target, chunk_bytes=half, **common))
    seq = x["seq"][:HIDDEN]
    terms = (target, old, x["advantage"], seq)
    count(lambda: mk.linear_policy_loss(hidden, weight, *terms, denom=9.0, **common).loss.backward())
    return found


def wrong_shards(x: dict[str, torch.Tensor], group: dist.ProcessGroup) -> list[str]:
    """What is said to shards that overlap, twice, and to shards with a gap."""
    found = []
    for step in (300, 300, 500):
        start = dist.get_rank(group) * step
        try:
            mk.logprob(x["weight"][:9, :16].repeat(1, 24), x["target"][:9] % 300, tp_group=group, vocab_start=start)
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def wrong_ids(x: dict[str, torch.Tensor], cuts: list[int], group: dist.ProcessGroup) -> list[str]:
    """What the ops say to an id that no rank holds, without being told how many there are."""
    rank = dist.get_rank(group)
    weight = x["weight"][cuts[rank] : cuts[rank + 1]]
    target = torch.full((3,), cuts[-1])
    common = {"tp_group": group, "vocab_start": cuts[rank], "backend": "cpu"}
    found = []
    for call in (
        lambda: mk.linear_logprob(x["hidden"][:3], weight, target, **common),
        lambda: mk.logprob(x["hidden"][:3].float() @ weight.float().T, target, **common),
    ):
        try:
            call()
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def main(folder: Path, backend: str) -> None:
    """Run every layout: for float32 and bfloat16, and torch's at TP 2, with backend cpu; for float32 with triton."""
    if backend == "triton":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from triton_interpreter import mend

        mend()
    dist.init_process_group("gloo")
    groups = {size: None for size in (1, 2, 4)}
    for size in groups:
        for first in range(0, 4, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                groups[size] = group
    results = {}
    for dtype in (torch.float32, torch.bfloat16)[: 2 if backend == "cpu" else 1]:
        for name in CUTS if backend == "cpu" else TRITON_CUTS:
            cuts = CUTS[name]
            results[name, dtype] = run(inputs(dtype), cuts, groups[len(cuts) - 1], backend)
    if backend == "cpu":
        results["torch", torch.float32] = run(inputs(torch.float32), CUTS["tp2"], groups[2], "torch")
        cuts = CUTS["tp4 aligned, of unequal widths"]
        results["collectives"] = collectives(inputs(torch.float32), cuts, groups[4])
        results["wrong ids"] = wrong_ids(inputs(torch.float32), CUTS["tp2"], groups[2])
        results["wrong shards"] = wrong_shards(inputs(torch.float32), groups[2])
        for dtype in (torch.float32, torch.bfloat16):
            results["real size", dtype] = real_size(groups, dtype)
    if dist.get_rank() == 0:
        torch.save(results, folder / "head.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
