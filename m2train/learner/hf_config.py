"""What the learner needs from a Hugging Face `config.json`, and a clear refusal of what it cannot train."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m2train.config import ConfigError

_MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding: frequencies are `theta ** (-2i/d)`, changed by `kind`."""

    theta: float
    kind: str
    """default | linear | llama3"""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """fp32 [head_dim / 2]."""
        power = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        plain = 1.0 / self.theta**power
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        # llama3: wave lengths beyond the original context are stretched, short ones kept, those between blended.
        turns = self.original_positions * plain / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * plain / self.factor + blend * plain


@dataclass(frozen=True, kw_only=True, slots=True)
class HfModel:
    """Shape and variant of a Llama, Qwen2 or Qwen3 model."""

    folder: Path
    model_type: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding: a multiple of 128 whatever the TP, so that checkpoints fit other layouts."""
        unit = math.lcm(128, tp)
        return -(-self.vocab // unit) * unit


def read_hf_config(folder: Path) -> HfModel:
    """Read and check `folder/config.json`.

    Raises:
        ConfigError: a family or variant that is not trained; the message names the entry.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    kind = raw.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ConfigError(f"{path}: model_type {kind!r}; the learner trains {', '.join(_MODEL_TYPES)}")
    _refuse(path, raw)
    try:
        return _model(folder, kind, raw)
    except KeyError as err:
        raise ConfigError(f"{path} has no {err.args[0]!r}; save the model again with save_pretrained") from err


def _model(folder: Path, kind: str, raw: dict[str, Any]) -> HfModel:
    heads = int(raw["num_attention_heads"])
    return HfModel(
        folder=folder,
        model_type=kind,
        layers=int(raw["num_hidden_layers"]),
        hidden=int(raw["hidden_size"]),
        ffn=int(raw["intermediate_size"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        vocab=int(raw["vocab_size"]),
        max_positions=int(raw["max_position_embeddings"]),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(folder / "config.json", raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def _refuse(path: Path, raw: dict[str, Any]) -> None:
    for key, good in (("hidden_act", ("silu", None)), ("mlp_bias", (False, None)), ("attention_bias", (False, None))):
        if raw.get(key) not in good:
            raise ConfigError(f"{path}: {key} = {raw[key]!r} is not supported; expected {good[0]!r}")
    if raw.get("use_sliding_window"):
        raise ConfigError(f"{path}: use_sliding_window is not supported; expected false")
    if raw.get("attention_dropout"):
        raise ConfigError(f"{path}: attention_dropout = {raw['attention_dropout']} is not supported; expected 0")
    if float(raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(f"{path}: partial_rotary_factor = {raw['partial_rotary_factor']} is not supported")


def _rope(path: Path, raw: dict[str, Any]) -> Rope:
    """From `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before)."""
    given: dict[str, Any] = raw.get("rope_parameters") or {}
    scaling = given or raw.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = float(given.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if kind == "default":
        return Rope(theta=theta, kind=kind)
    if kind == "linear":
        return Rope(theta=theta, kind=kind, factor=float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            theta=theta,
            kind=kind,
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_positions=int(scaling["original_max_position_embeddings"]),
        )
    raise ConfigError(f"{path}: rope_type {kind!r} is not supported; expected default, linear or llama3")
