"""Which curves a report has."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_TIME_KEYS = ("time/step", "time/total")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """One chart: `series` maps metric keys to labels; keys that no row has are left out."""

    title: str
    unit: str
    series: dict[str, str]
    band: tuple[str, str] | None = None
    """Keys of mean and spread: a band one spread wide on both sides."""
    range: tuple[str, str] | None = None
    """Keys of the least and greatest value: two thin lines."""
    note: str = ""
    log: bool = False
    zero: bool = False
    end_labels: bool = False
    stacked: bool = False
    exact: bool = False
    """Never smoothed: the value is set, not measured."""
    wide: bool = False
    prefix: str = ""
    """Metrics that start so are the series, named by the run."""


SECTIONS: list[tuple[str, list[Spec]]] = [
    (
        "Learning",
        [
            Spec(
                title="Held-out reward",
                unit="mean over unseen cases, greedy replies",
                series={"heldout/reward": "held-out"},
                band=("heldout/reward", "heldout/stderr"),
                note="Band: one standard error over cases.",
                end_labels=True,
                wide=True,
            ),
            Spec(
                title="Training reward",
                unit="mean over the step's replies",
                series={"reward/mean": "mean"},
                band=("reward/mean", "reward/std"),
                range=("reward/min", "reward/max"),
                note="Band: one standard deviation; thin lines: least and greatest.",
                wide=True,
            ),
            Spec(
                title="Rubric dimensions, training",
                unit="share of the points earned",
                series={},
                prefix="dim/",
                wide=True,
            ),
            Spec(
                title="Rubric dimensions, held out",
                unit="share of the points earned",
                series={},
                prefix="heldout/dim/",
                wide=True,
            ),
            Spec(
                title="Reply length",
                unit="tokens, mean",
                series={"reply/length_mean": "training", "heldout/length_mean": "held-out"},
                zero=True,
            ),
            Spec(
                title="Truncated replies",
                unit="fraction that ran into the token limit",
                series={"reply/truncated_frac": "truncated"},
                zero=True,
            ),
            Spec(
                title="Reward spread",
                unit="std. deviation within groups, mean",
                series={"reward/group_std": "spread"},
                zero=True,
            ),
            Spec(
                title="Groups",
                unit="per step; no signal: all replies equal",
                series={"groups/count": "all", "groups/zero_advantage": "no signal"},
                zero=True,
            ),
            Spec(
                title="Dialogue length",
                unit="doctor turns, mean",
                series={"dialogues/turns_mean": "turns"},
                zero=True,
            ),
            Spec(
                title="Tokens",
                unit="tokens per step",
                series={"tokens/generated": "generated", "tokens/trained": "trained"},
                zero=True,
            ),
            Spec(
                title="Grader failures",
                unit="unknown verdicts per step",
                series={"grader/unknown": "unknown"},
                zero=True,
            ),
            Spec(
                title="Length bonus",
                unit="mean reward for short replies",
                series={"reward/length_bonus": "bonus"},
                zero=True,
            ),
        ],
    ),
    (
        "Policy and optimizer",
        [
            Spec(
                title="Entropy",
                unit="nats per token",
                series={"policy/entropy": "entropy"},
                zero=True,
            ),
            Spec(
                title="Loss",
                unit="per step",
                series={"policy/loss": "loss"},
            ),
            Spec(
                title="Clipped tokens",
                unit="fraction of trained tokens",
                series={"policy/clip_frac_low": "low", "policy/clip_frac_high": "high"},
                zero=True,
            ),
            Spec(
                title="KL to the reference",
                unit="nats per token",
                series={"policy/ref_kl": "algo.kl"},
                zero=True,
            ),
            Spec(
                title="Gradient norm",
                unit="before clipping",
                series={"learner/grad_norm": "norm"},
                zero=True,
            ),
            Spec(
                title="Learning rate",
                unit="per optimizer step",
                series={"learner/lr": "rate"},
                zero=True,
                exact=True,
            ),
        ],
    ),
    (
        "Rollout against learner",
        [
            Spec(
                title="Log-prob difference",
                unit="|rollout - learner| per token, log scale",
                series={"mismatch/max_abs": "max", "mismatch/mean_abs": "mean"},
                log=True,
            ),
            Spec(
                title="KL of rollout and learner",
                unit="k3 estimate, nats per token",
                series={"mismatch/k3": "k3"},
            ),
            Spec(
                title="Importance weights",
                unit="learner / rollout probability (TIS)",
                series={"tis/mean": "mean", "tis/max": "max"},
            ),
            Spec(
                title="Capped importance weights",
                unit="fraction of the weights, of tokens or sequences (algo.tis_level)",
                series={"tis/capped_frac": "capped"},
                zero=True,
            ),
        ],
    ),
    (
        "Learner",
        [
            Spec(
                title="Time of the learner",
                unit="seconds per step",
                series={"learner/forward_backward_s": "forward and backward", "learner/optimizer_s": "optimizer"},
                stacked=True,
                wide=True,
            ),
            Spec(
                title="Tokens of the learner",
                unit="tokens per step; duplicates: shared with another reply",
                series={"learner/unique_tokens": "computed", "learner/duplicate_tokens": "duplicates, not computed"},
                stacked=True,
                wide=True,
            ),
            Spec(
                title="Tile inflation",
                unit="pairs in the tiles of attention / visible pairs",
                series={"learner/tile_inflation": "inflation"},
                note="Tiles of the plan, which GPU kernels visit; the CPU kernel needs none.",
            ),
            Spec(
                title="Planning",
                unit="seconds per step, log scale",
                series={"learner/plan_s": "on its thread", "learner/plan_wait_s": "the step waited"},
                log=True,
            ),
            Spec(
                title="Fill of micro-batches",
                unit="tokens / cap, and / those of the fullest",
                series={"learner/packing_efficiency": "of the cap", "learner/balance": "of the fullest"},
                zero=True,
            ),
            Spec(
                title="Micro-batches",
                unit="per rank and step",
                series={"learner/micro_batches": "micro-batches"},
                zero=True,
            ),
        ],
    ),
    (
        "Time",
        [
            Spec(
                title="Time per step",
                unit="seconds, by phase",
                series={},
                prefix="time/",
                stacked=True,
                wide=True,
                note="Phases that overlap are both counted in full.",
            ),
        ],
    ),
]
NOT_CURVES = (
    "step",
    "drops/",
    "warnings/",
    *TOTAL_TIME_KEYS,
    "reward/std",
    "reward/min",
    "reward/max",
    "heldout/stderr",
    "heldout/cases",
)
PEAK_KEYS = ("mismatch/max_abs", "tis/max", "reward/max")
