"""A case of the fused head and loss on a CPU: repeated rows, both signs, an empty sequence; and one run of it."""

import torch

import m2kernels as mk

LENGTHS = [1, 0, 7, 30, 0, 13, 2]
VOCAB, DEPTH, HIDDEN = 301, 16, 40
TINY = VOCAB * 4 * 48  # bytes: chunks of one register block


def make_case(dtype=torch.float32, *, per_token=False, bias=False, seed=0, on_policy=False):
    """(leaves, keyword arguments): rows repeat, advantages have both signs, one sequence has none."""
    g = torch.Generator().manual_seed(seed)
    m = sum(LENGTHS)
    hidden = torch.randn(HIDDEN, DEPTH, generator=g).to(dtype)
    weight = (torch.randn(VOCAB, DEPTH, generator=g) * 0.7).to(dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    case = {
        "target": torch.randint(0, VOCAB - 9, (m,), generator=g),
        "rows": torch.randint(0, HIDDEN, (m,), generator=g),
        "seq": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
        "temperature": torch.rand(m, generator=g) + 0.5,
        "vocab_size": VOCAB - 9,
        "per_token": per_token,
    }
    if bias:
        leaves.append(torch.randn(VOCAB, generator=g).requires_grad_())
    with torch.no_grad():
        head = {k: case[k] for k in ("rows", "temperature", "vocab_size")}
        base = mk.linear_logprob(*leaves[:2], case["target"], bias=leaves[2] if bias else None, **head).logp
    for name in ("old_logp", "rollout_logp", "ref_logp"):
        case[name] = base + 0.25 * torch.randn(m, generator=g)
    if on_policy:
        case["old_logp"] = None
    advantage = torch.randn(m if per_token else len(LENGTHS), generator=g).abs()
    advantage *= 1 - (torch.arange(len(advantage)) // 2 % 2) * 2
    advantage[2] = 0  # of its sequence only the entropy or the KL have a gradient, if anything
    case["advantage"] = advantage
    return leaves, case


def for_spec(case, spec):
    drop = {"ref_logp": spec.kl_coef == 0, "rollout_logp": spec.tis_cap is None}
    return {k: v for k, v in case.items() if not drop.get(k, False)}


def run(leaves, case, spec, fn=mk.linear_policy_loss, upstream=1.0, **kwargs):
    """(loss, gradients of the leaves, output)."""
    bias = {"bias": leaves[2]} if len(leaves) > 2 else {}
    out = fn(leaves[0], leaves[1], denom=7.0, spec=spec, **bias, **for_spec(case, spec), **kwargs)
    loss = out if isinstance(out, torch.Tensor) else out.loss
    return loss.detach(), torch.autograd.grad(loss * upstream, leaves), out
