"""Model folders of a named shape with random weights, for benchmarks of whole steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m2train.bench.shapes import MODELS, Model

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def model_config(name: str, *, layers: int | None = None, positions: int = 32768) -> dict[str, Any]:
    """A Hugging Face config.json.

    Args:
        name: one of shapes.MODELS.
        layers: fewer than the model has; None: all.
        positions: of the context.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"got model {name!r}; expected one of {', '.join(MODELS)}")
    model: Model = MODELS[name]
    return {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": layers or model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": model.tied,
    }


def write_random_model(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    """Write config and weights; returns the folder. Narrow weights: activations stay of order one."""
    import torch
    from safetensors.torch import save_file

    from m2train.testing.tiny_model import random_weights

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind = getattr(torch, dtype)
    weights = {name: value.to(kind) for name, value in random_weights(config, seed=0, std=0.02).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
