"""Inputs that the tests of the LM head share, and how an op, plain torch and the oracle are run on them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from m2kernels.reference import linear_logprob_ref


@dataclass
class HeadCase:
    """Arguments of linear_logprob, and the gradients that come back from its outputs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_logp: torch.Tensor | None = None
    grad_entropy: torch.Tensor | None = None

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """(hidden, weight[, bias]) as leaves, of `dtype` if given, and the options with that bias."""
        tensors = [self.hidden, self.weight] + ([self.options["bias"]] if "bias" in self.options else [])
        leaves = [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]
        options = dict(self.options)
        if len(leaves) > 2:
            options["bias"] = leaves[2]
        return leaves, options


@dataclass
class Result:
    """logp, entropy, and gradients of hidden, weight and (where there is one) bias."""

    logp: torch.Tensor
    entropy: torch.Tensor
    grads: list[torch.Tensor]


def make_case(
    num_hidden=24,
    depth=16,
    vocab=300,
    num_rows=37,
    dtype=torch.float32,
    *,
    seed=0,
    scale=3.0,
    bias=False,
    row_temperature=False,
    padding=0,
    zero_share=0.3,
    **options,
):
    """Random rows that repeat; `padding` ids at the end get no mass; some incoming gradients are 0."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_hidden, depth, generator=g).to(dtype)
    weight = (torch.randn(vocab, depth, generator=g) * scale / depth**0.5).to(dtype)
    options["rows"] = torch.randint(0, num_hidden, (num_rows,), generator=g)
    if padding:
        options["vocab_size"] = vocab - padding
    target = torch.randint(0, vocab - padding, (num_rows,), generator=g)
    if bias:
        options["bias"] = torch.randn(vocab, generator=g)
    if row_temperature:
        options["temperature"] = torch.rand(num_rows, generator=g) + 0.5
    grads = torch.randn(2, num_rows, generator=g)
    grads[:, torch.rand(num_rows, generator=g) < zero_share] = 0
    grads[1, ::5] = 0  # some rows have a gradient through logp alone
    return HeadCase(hidden, weight, target, options, grads[0], grads[1])


def _backward(case, leaves, logp, entropy):
    grads = [g.to(x.dtype) for g, x in ((case.grad_logp, logp), (case.grad_entropy, entropy))]
    return torch.autograd.grad([logp, entropy], leaves, grads)


def run_op(case, fn, **kwargs):
    """The op under test."""
    leaves, options = case.leaves()
    out = fn(leaves[0], leaves[1], case.target, entropy=True, **options, **kwargs)
    return Result(out.logp.detach(), out.entropy.detach(), list(_backward(case, leaves, out.logp, out.entropy)))


def plain_torch(hidden, weight, target, rows=None, bias=None, temperature=1.0, softcap=None, vocab_size=None):
    """What one writes with torch: (logp, entropy) float32, from full logits in the inputs' dtype."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    hidden = hidden if rows is None else hidden[rows]
    z = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype))[:, :vocab_size].float()
    if bias is not None:
        z = z + bias[:vocab_size].float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = z.log_softmax(-1)
    return log_p.gather(1, target[:, None].long())[:, 0], -(log_p.exp() * log_p).sum(-1)


def run_torch(case):
    """The yardstick: autograd at the same dtype."""
    leaves, options = case.leaves()
    logp, entropy = plain_torch(leaves[0], leaves[1], case.target, **options)
    return Result(logp.detach(), entropy.detach(), list(_backward(case, leaves, logp, entropy)))


def run_oracle(case):
    """float64."""
    leaves, options = case.leaves(torch.float64)
    logp, entropy = linear_logprob_ref(leaves[0], leaves[1], case.target, **options)
    return Result(logp.detach(), entropy.detach(), list(_backward(case, leaves, logp, entropy)))
