"""Float64 oracles: obvious, slow, one token and one row at a time.

Nothing here is shared with an implementation, so that a mistake in one cannot hide in the other.
All take float64 tensors on the CPU, and are differentiable by autograd where their op is.
"""

import math
from collections.abc import Sequence
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
    out = torch.zeros(rows, dtype=torch.float64, device="cpu")
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
            weight = torch.ones(len(tokens), dtype=torch.float64, device="cpu")
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


def policy_metrics_ref(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    seq: torch.Tensor,
    *,
    spec: "LossSpec",
    per_token: bool = False,
    mask: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    rollout_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
) -> dict[str, float]:
    """Oracle of the metrics of :func:`m2kernels.policy_loss`, as :mod:`m2kernels.metrics` defines them.

    Arguments are those of :func:`policy_loss_ref`; ids are in order and in range.
    """
    live = [i for i in range(len(logp)) if mask is None or bool(mask[i])]
    x = {i: 0.0 if old_logp is None else float(logp[i] - old_logp[i]) for i in live}
    drift = {i: 0.0 for i in live}
    if rollout_logp is not None:
        drift = {i: float((logp if old_logp is None else old_logp)[i] - rollout_logp[i]) for i in live}
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    rows: list[dict[str, float]] = []
    for i in live:
        peers = [j for j in live if int(seq[j]) == int(seq[i])]
        r = math.exp(sum(x[j] for j in peers) / len(peers) if spec.kind == "gspo" else x[i])
        a = float(advantage[i] if per_token else advantage[int(seq[i])])
        clipped = min(max(r, low), high)
        # cispo clips the weight itself; elsewhere the clip counts where it makes the term smaller.
        changed = clipped != r if spec.kind == "cispo" else clipped * a < r * a
        dual = spec.dual_clip is not None and a < 0 and min(r * a, clipped * a) < spec.dual_clip * a
        w = math.exp(sum(drift[j] for j in peers) if spec.tis_level == "sequence" else drift[i])
        cap = math.inf if spec.tis_cap is None else spec.tis_cap
        y = 0.0 if ref_logp is None else float(logp[i] - ref_logp[i])
        rows.append({
            "clip_low": changed and r < low,
            "clip_high": changed and r > high,
            "dual_clip": dual,
            "kl_k1": -x[i],
            "kl_k3": math.exp(x[i]) - 1 - x[i],
            "weight": r * min(w, cap),
            "weight_squared": (r * min(w, cap)) ** 2,
            "tis": min(w, cap),
            "tis_capped": w > cap,
            "ref_kl": {"k1": y, "k2": y**2 / 2}.get(spec.kl, math.exp(-y) - 1 + y),
            "entropy": 0.0 if entropy is None else float(entropy[i]),
            "ratio": r,
        })  # fmt: skip
    names = {"clip_frac_low": "clip_low", "clip_frac_high": "clip_high", "dual_clip_frac": "dual_clip"}
    names |= {"approx_kl": "kl_k1", "tis_mean": "tis", "tis_capped_frac": "tis_capped", "entropy_mean": "entropy"}
    names |= {"kl_k3": "kl_k3", "ref_kl": "ref_kl"}
    keys = [*names.values(), "weight", "weight_squared"]
    total = {key: sum(float(row[key]) for row in rows) for key in keys}
    n = len(rows)
    return {
        "num_tokens": n,
        "num_bad_seq": 0,
        "ratio_max": max((row["ratio"] for row in rows), default=0.0),
        "ess": total["weight"] ** 2 / (n * total["weight_squared"]) if n else 0.0,
        **{f"raw/{key}": total[key] for key in keys},
        **{name: total[key] / max(n, 1) for name, key in names.items()},
    }


def tree_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Sequence[torch.Tensor], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle of :func:`m2kernels.tree_attention`: plain causal attention, one sequence and one query at a time.

    It knows nothing of trees: `rows[i]` holds the packed rows of sequence i in order. A row's result is taken from
    the first sequence that has it; the others must agree.

    Args:
        q: float64 [N, Hq, D].
        k: float64 [N, Hkv, D].
        v: float64 [N, Hkv, D].
        rows: int [length] per sequence.
        scale: of the scores.

    Returns:
        o [N, Hq, D] and lse [N, Hq]; rows in no sequence are 0.
    """
    group = q.shape[1] // k.shape[1]
    out: dict[int, torch.Tensor] = {}
    lse: dict[int, torch.Tensor] = {}
    for sequence in rows:
        path = sequence.long()
        keys, values = (x[path].repeat_interleave(group, dim=1) for x in (k, v))
        for place, row in enumerate(path.tolist()):
            scores = scale * (q[row] * keys[: place + 1]).sum(dim=2)
            got = (scores.softmax(dim=0)[..., None] * values[: place + 1]).sum(dim=0)
            if row in out:
                assert float((out[row] - got).detach().abs().max()) < 1e-12, "sequences disagree about a shared row"
                continue
            out[row], lse[row] = got, scores.logsumexp(dim=0)
    nothing = torch.zeros_like(q[0]) if len(q) else q
    rest = range(len(q))
    o = torch.stack([out.get(i, nothing) for i in rest]) if len(q) else q
    sums = torch.stack([lse.get(i, nothing[:, 0]) for i in rest]) if len(q) else q[..., 0]
    return o, sums


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
