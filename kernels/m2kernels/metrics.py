"""Metrics of the policy loss: what each one is, and how calls are merged without error.

A mean of means is wrong when micro-batches differ in size, so every call also returns the sums
that its means come from (keys ``raw/...``); :func:`combine_metrics` adds those up. A trainer that
runs on several ranks can all-reduce the values of :data:`SUM_KEYS` (sum) and :data:`MAX_KEYS`
(max), and then finish with ``combine_metrics([reduced])``.

All sums are over live (unmasked) tokens; r is the ratio that the loss uses (the sequence's, for
gspo), w the TIS weight (1 without rollout log-probs):

====================  ====================================================================
num_tokens            live tokens
clip_frac_low, _high  share where clipping at 1 - clip_low, 1 + clip_high changed the term
dual_clip_frac        share where dual_clip did
ratio_max             the largest r; 0 without tokens
approx_kl, kl_k3      mean of -x and of exp(x) - 1 - x, x = logp - old_logp of the token
ess                   (sum r w)^2 / (n sum (r w)^2), in (0, 1]: effective sample size
tis_mean              mean of w
tis_capped_frac       share of tokens where the cap lowered w
ref_kl                mean of k(logp, ref_logp), k3 when the spec names none; 0 without ref_logp
entropy_mean          mean entropy; 0 when none was given
num_bad_seq           ids out of order or out of range: anything but 0 makes the loss NaN
====================  ====================================================================
"""

from collections.abc import Mapping, Sequence

import torch

RAW_METRICS = (
    "num_tokens",
    "raw/clip_low",
    "raw/clip_high",
    "raw/dual_clip",
    "raw/kl_k1",
    "raw/kl_k3",
    "raw/weight",
    "raw/weight_squared",
    "raw/tis",
    "raw/tis_capped",
    "raw/ref_kl",
    "raw/entropy",
    "num_bad_seq",
    "ratio_max",
)
FINAL_METRICS = (
    "clip_frac_low",
    "clip_frac_high",
    "dual_clip_frac",
    "approx_kl",
    "kl_k3",
    "ess",
    "tis_mean",
    "tis_capped_frac",
    "ref_kl",
    "entropy_mean",
)
MAX_KEYS = ("ratio_max",)
SUM_KEYS = tuple(key for key in RAW_METRICS if key not in MAX_KEYS)

_MEANS = {
    "clip_frac_low": "raw/clip_low",
    "clip_frac_high": "raw/clip_high",
    "dual_clip_frac": "raw/dual_clip",
    "approx_kl": "raw/kl_k1",
    "kl_k3": "raw/kl_k3",
    "tis_mean": "raw/tis",
    "tis_capped_frac": "raw/tis_capped",
    "ref_kl": "raw/ref_kl",
    "entropy_mean": "raw/entropy",
}


def finish_metrics(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Raw values, 0-d of any float dtype, keys :data:`RAW_METRICS` -> all metrics, 0-d float32."""
    wide = {key: raw[key].double() for key in RAW_METRICS}
    n = wide["num_tokens"].clamp(min=1)
    final = {key: wide[source] / n for key, source in _MEANS.items()}
    squares = wide["raw/weight_squared"]
    ess = wide["raw/weight"].square() / torch.where(squares == 0, 1, squares) / n
    final["ess"] = torch.where(squares == 0, 0, ess)
    ordered = {**wide, **{key: final[key] for key in FINAL_METRICS}}
    return {key: value.float() for key, value in ordered.items()}


def combine_metrics(metrics: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Merge the metrics of several calls, as if their tokens had been in one call.

    Args:
        metrics: `PolicyLoss.metrics` of each micro-batch or rank, on one device. Other keys are
            ignored.

    Returns:
        The same keys, 0-d float32 on the same device, summed in float64; nothing synchronises.

    Raises:
        ValueError: the list is empty.
    """
    if not metrics:
        raise ValueError("combine_metrics: got an empty list; expected at least one call's metrics")
    raw: dict[str, torch.Tensor] = {}
    for key in RAW_METRICS:
        stacked = torch.stack([m[key] for m in metrics]).double()
        raw[key] = stacked.amax() if key in MAX_KEYS else stacked.sum()
    return finish_metrics(raw)


def metrics_from_stats(stats: torch.Tensor) -> dict[str, torch.Tensor]:
    """The kernels' float32 vector (raw, then final) as a dict of 0-d views."""
    return dict(zip(RAW_METRICS + FINAL_METRICS, stats.unbind(0), strict=True))
