"""Resolve `model.path` of a recipe to a Hugging Face folder and read its shape.

Neither function imports torch: a login node can check a recipe. Only the first use of `smollm2-135m` does, to
write the folder.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m2train.config import ConfigError

SMOLLM2 = "smollm2-135m"
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_TOKENIZER = "tokenizer.json"


class ModelError(ConfigError):
    """A model that cannot be used; the message says what was found, what is needed and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The numbers of `config.json` that layouts depend on."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    hidden: int
    vocab: int
    max_positions: int
    tied: bool


def cache_root(cache_dir: Path | None = None) -> Path:
    """Where converted models live: the argument, $M2TRAIN_CACHE, or ~/.cache/m2train."""
    if cache_dir is not None:
        return cache_dir
    return Path(os.environ.get("M2TRAIN_CACHE") or Path.home() / ".cache" / "m2train")


def resolve_model(path_or_name: str | Path, cache_dir: Path | None = None) -> Path:
    """The Hugging Face folder behind a recipe's `model.path`.

    Args:
        path_or_name: `smollm2-135m`, or a folder of the Llama, Qwen2 or Qwen3 family.
        cache_dir: where a converted model is kept (default: `cache_root()`).

    Raises:
        ModelError: no such folder, files missing, or a family that the learner cannot train.
    """
    if str(path_or_name) == SMOLLM2:
        from m2train.models.smollm2 import ensure_smollm2

        return ensure_smollm2(cache_root(cache_dir))
    folder = Path(path_or_name).expanduser()
    _check_folder(folder)
    return folder.resolve()


def model_shape(folder: Path) -> ModelShape:
    """Read heads, layers, vocabulary ... from `config.json`.

    Raises:
        ModelError: unreadable or incomplete config, or an unknown family.
    """
    config = _read_config(folder)
    family = _family(folder, config)
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            family=family,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            vocab=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as err:
        raise ModelError(
            f"{folder / 'config.json'} has no {err.args[0]!r}; expected a complete Hugging Face config; "
            "save the model again with save_pretrained"
        ) from err
    except (TypeError, ValueError) as err:
        raise ModelError(
            f"{folder / 'config.json'} has a value that is no number: {err}; save the model again"
        ) from err


def weights_size(folder: Path, dtype: Literal["float32", "bfloat16"]) -> int:
    """Bytes of the folder's weights as one safetensors file of this dtype; only headers are read.

    Raises:
        ModelError: a file that is not safetensors.
    """
    width = {"float32": 4, "bfloat16": 2}[dtype]
    size = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                tensors = json.loads(handle.read(min(length, path.stat().st_size)))
            elements = sum(math.prod(entry["shape"]) for name, entry in tensors.items() if name != "__metadata__")
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as err:
            raise ModelError(f"{path} is not a safetensors file ({err}); download or save the model again") from err
        size += 8 + length + width * elements
    return size


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"model.path: got {str(folder)!r}, which is not a folder; expected {SMOLLM2!r} or a Hugging Face model "
            "folder; models are not downloaded, so download it first and give its folder"
        )
    _family(folder, _read_config(folder))
    if not any(folder.glob("*.safetensors")):
        found = sorted(p.name for p in folder.iterdir())[:6]
        raise ModelError(
            f"{folder}: got no *.safetensors (found {', '.join(found)}); expected safetensors weights; convert with "
            "save_pretrained(folder)"
        )
    if not (folder / _TOKENIZER).exists():
        raise ModelError(
            f"{folder}: got no tokenizer; expected {_TOKENIZER}; save the fast tokenizer beside the weights "
            "with tokenizer.save_pretrained(folder)"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as err:
        raise ModelError(
            f"{path}: {err.strerror}; expected the config.json of a Hugging Face model folder; check model.path"
        ) from err
    except json.JSONDecodeError as err:
        raise ModelError(f"{path} is not valid JSON ({err}); save the model again") from err
    if not isinstance(config, dict):
        raise ModelError(f"{path}: got a {type(config).__name__}; expected a JSON object; save the model again")
    return config


def _family(folder: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    got = ", ".join(map(str, names)) or config.get("model_type") or "no architecture"
    raise ModelError(
        f"{folder}: got {got}; expected one of {', '.join(FAMILIES)}; use a model of the Llama, Qwen2 or Qwen3 family"
    )
