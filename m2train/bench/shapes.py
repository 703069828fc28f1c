"""Shapes of real models, and of RL batches: ragged replies with a long tail, few of the tokens selected for loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a model's config.json says about its sizes."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    family: str

    @property
    def parameters(self) -> int:
        """Weights of the linear layers and embeddings (norms and biases are left out)."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.ffn
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2)


MODELS: dict[str, Model] = {
    "qwen2.5-32b": Model(
        hidden=5120,
        ffn=27648,
        layers=64,
        heads=40,
        kv_heads=8,
        head_dim=128,
        vocab=152064,
        tied=False,
        family="qwen2",
    ),
    "qwen3-8b": Model(
        hidden=4096,
        ffn=12288,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=151936,
        tied=False,
        family="qwen3",
    ),
    "qwen3-1.7b": Model(
        hidden=2048, ffn=6144, layers=28, heads=16, kv_heads=8, head_dim=128, vocab=151936, tied=True, family="qwen3"
    ),
    "llama-3.1-8b": Model(
        hidden=4096,
        ffn=14336,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        tied=False,
        family="llama",
    ),
    "smollm2-135m": Model(
        hidden=576, ffn=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152, tied=True, family="llama"
    ),
}


def ragged(count: int, mean: int, longest: int, *, sigma: float = 0.8, seed: int = 0) -> tuple[int, ...]:
    """Lengths of `count` replies: lognormal, cut at `longest`, about `mean` tokens each.

    Sampled replies have such a tail: the 95th percentile is near 3 times the mean for sigma = 0.8.
    """
    draw = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return tuple(int(n) for n in np.clip(np.rint(draw), 1, longest))


def rl_batches() -> dict[str, dict[str, Any]]:
    """Optimizer steps by their packed tokens: groups of 8 replies, each group sharing its prompt."""
    sizes = {"2k": (2, 128, 512), "32k": (8, 512, 4096), "256k": (32, 1024, 16384)}
    return {
        name: {"group": 8, "prompts": ragged(groups, 512, 4096, seed=1), "lengths": ragged(groups * 8, mean, longest)}
        for name, (groups, mean, longest) in sizes.items()
    }


def heads(names: tuple[str, ...], tokens: int, selected: tuple[float, ...]) -> dict[str, dict[str, Any]]:
    """LM-head shapes: a model's [D, V] with N packed tokens, of which a part carries loss (multi-turn: few)."""
    return {
        f"{name}-{tokens}-{round(part * 100)}pct": {
            "N": tokens,
            "D": MODELS[name].hidden,
            "V": MODELS[name].vocab,
            "M": round(tokens * part),
        }
        for name in names
        for part in selected
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The lengths of recorded rollouts: no text, no token ids."""

    name: str
    prompts: tuple[int, ...]
    """Tokens of each group's context."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each reply, by group."""
    advantages: tuple[tuple[float, ...], ...]

    @property
    def flat(self) -> tuple[int, ...]:
        """Reply lengths, one group after another."""
        return tuple(n for group in self.lengths for n in group)


def as_batch(workload: Workload) -> dict[str, Any]:
    """A workload as dimensions of an RL batch."""
    sizes = {len(group) for group in workload.lengths}
    return {"group": max(sizes), "prompts": workload.prompts, "lengths": workload.flat}


WORKLOAD_FORMAT = "m2bench-workload-1"


def load_workload(path: Path) -> Workload:
    """Read what recorder.record wrote.

    Raises:
        ValueError: not a workload file of this version.
    """
    try:
        raw: Mapping[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise ValueError(f"cannot read workload {path}: {err}") from err
    if raw.get("format") != WORKLOAD_FORMAT:
        raise ValueError(f"{path}: format is {raw.get('format')!r}; expected {WORKLOAD_FORMAT!r}; record it again")
    return Workload(
        name=str(raw["name"]),
        prompts=tuple(raw["prompts"]),
        lengths=tuple(tuple(group) for group in raw["lengths"]),
        advantages=tuple(tuple(group) for group in raw["advantages"]),
    )
