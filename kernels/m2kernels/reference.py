"""Float64 oracles: obvious, slow, one token and one row at a time.

Nothing here is shared with an implementation, so that a mistake in one cannot hide in the other.
All take float64 tensors on the CPU, and are differentiable by autograd where their op is.
"""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from m2kernels.policy_loss import LossSpec


def group_advantage_ref(
    reward: torch.Tensor,
    group: torch.Tensor,
    *,
    baseline: str = "mean",
    scale: str = "none",
    valid: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Oracle of :func:`m2kernels.group_advantage`: reward [B] of any float dtype -> float64 [B]."""
    rows = len(reward)
    live = [valid is None or bool(valid[i]) for i in range(rows)]
    out = torch.zeros(rows, dtype=torch.float64)
    for i in range(rows):
        if not live[i]:
            continue
        members = [j for j in range(rows) if live[j] and int(group[j]) == int(group[i])]
        values = reward[members].double()
        if len(members) == 1 or bool((values == values[0]).all()):
            continue
        others = reward[[j for j in members if j != i]].double()
        out[i] = reward[i].double() - (values if baseline == "mean" else others).mean()
        if scale == "std":
            out[i] = out[i] / (values.std(correction=1) + eps)
    return out


def _clipped(spec: "LossSpec", r: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """min(r A, clip(r) A), with the dual clip for A < 0."""
    term = torch.minimum(r * a, r.clamp(1 - spec.clip_low, 1 + spec.clip_high) * a)
    if spec.dual_clip is not None and float(a) < 0:
        term = torch.maximum(term, spec.dual_clip * a)
    return term


def _kl_ref(kind: str, y: torch.Tensor) -> torch.Tensor:
    return {"k1": y, "k2": y**2 / 2, "k3": torch.exp(-y) + y - 1}[kind]


def policy_loss_ref(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    *,
    denom: float,
    spec: "LossSpec",
    per_token: bool = False,
    mask: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
) -> torch.Tensor:
    """Oracle of :func:`m2kernels.policy_loss`: float64 [M] tensors -> the loss, 0-d float64."""
    live = [i for i in range(len(logp)) if mask is None or bool(mask[i])]
    total = logp.new_zeros(())
    for s in sorted({int(seq[i]) for i in live}):
        tokens = [i for i in live if int(seq[i]) == s]
        old = {i: logp[i].detach() if old_logp is None else old_logp[i] for i in tokens}
        x = torch.stack([logp[i] - old[i] for i in tokens])
        if rollout_logp is not None and spec.tis_cap is not None:
            tis_log = torch.stack([old[i] - rollout_logp[i] for i in tokens])
            if spec.tis_level == "sequence":
                tis_log = tis_log.sum().expand(len(tokens))
            weight = tis_log.exp().clamp(max=spec.tis_cap).detach()
        else:
            weight = torch.ones(len(tokens), dtype=torch.float64)
        terms = []
        for k, i in enumerate(tokens):
            a = advantage[i] if per_token else advantage[s]
            if spec.kind == "cispo":
                r = x[k].exp().clamp(1 - spec.clip_low, 1 + spec.clip_high).detach()
                term = r * a * logp[i]
            else:
                term = _clipped(spec, (x.mean() if spec.kind == "gspo" else x[k]).exp(), a)
            term = term * weight[k]
            if ref_logp is not None and spec.kl_coef != 0:
                term = term - spec.kl_coef * _kl_ref(spec.kl, logp[i] - ref_logp[i])
            if entropy is not None and spec.entropy_coef != 0:
                term = term + spec.entropy_coef * entropy[i]
            terms.append(term)
        sequence = torch.stack(terms)
        total = total + (sequence.mean() if spec.kind == "gspo" else sequence.sum())
    return -total / denom


def linear_logprob_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle of :func:`m2kernels.linear_logprob`: float64 hidden, weight, bias -> (logp, entropy) [M]."""
    logps, entropies = [], []
    for i in range(len(target)):
        row = i if rows is None else int(rows[i])
        z = weight[:vocab_size] @ hidden[row]
        if bias is not None:
            z = z + bias[:vocab_size]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / (temperature[i].double() if isinstance(temperature, torch.Tensor) else temperature)
        log_p = z - torch.logsumexp(z, dim=0)
        logps.append(log_p[int(target[i])])
        entropies.append(-(log_p.exp() * log_p).sum())
    if not logps:
        nothing = hidden.new_zeros(0)
        return nothing, nothing
    return torch.stack(logps), torch.stack(entropies)


def linear_policy_loss_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    *,
    denom: float,
    spec: "LossSpec",
    per_token: bool = False,
    rollout_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    **head: Any,
) -> torch.Tensor:
    """Oracle of :func:`m2kernels.linear_policy_loss`: the two oracles, one after the other."""
    logp, entropy = linear_logprob_ref(hidden, weight, target, **head)
    return policy_loss_ref(
        logp,
        old_logp,
        advantage,
        seq,
        denom=denom,
        spec=spec,
        per_token=per_token,
        entropy=entropy,
        rollout_logp=rollout_logp,
        ref_logp=ref_logp,
    )
