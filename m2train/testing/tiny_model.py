"""A tiny random model folder: loads in transformers, vLLM and the learner in a second, for tests and dry runs.

Llama, Qwen2 (qkv bias) or Qwen3 (qk-norm), tied or not, with a byte-level BPE tokenizer of 300 tokens and a ChatML
template. Same arguments, same bytes. Weights are drawn wider than usual so that log-probs differ from token to token
and a test that mixes up positions or weights fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from m2train.models.tokenizer_files import write_tokenizer

Family = Literal["llama", "qwen2", "qwen3"]

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# "_" stands for the byte character of a space. 39 merges bring the vocabulary to 300: padding has work.
_MERGES = (
    (
        "_ t|h e|i n|_ a|_t he|e r|o n|r e|_ w|a t|_ s|e n|o u|_ o|n d|_ b|i s|o r|e s|_ c|in g|_ f|_ p|a n|i t|a r|"
        "a l|_ d|_ m|_ h|_ in|_ y|_y ou|e d|t o|_ to|u s|s t|a in"
    )
    .replace("_", chr(0x120))
    .split("|")
)


def write_tiny_model(
    folder: Path,
    *,
    family: Family = "llama",
    tied: bool = True,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 256,
    max_positions: int = 512,
    std: float = 0.15,
    dtype: Literal["float32", "bfloat16"] = "float32",
    chat_template: str = CHATML,
) -> Path:
    """Write config, tokenizer, template and random weights to `folder`; returns it.

    vLLM's CPU attention needs heads of at least 32 dimensions, hence hidden = 128 with 4 heads.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_tokenizer(folder, chat_template=chat_template, max_positions=max_positions)
    vocab = len(tiny_vocab())
    config = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    weights = random_weights(config, seed=seed, std=std)
    save_file(
        {k: v.to(getattr(torch, dtype)) for k, v in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def random_weights(config: dict[str, Any], *, seed: int, std: float = 0.15) -> dict[str, Any]:
    """fp32 weights under Hugging Face names for a config of `write_tiny_model`; a tied lm_head is left out."""
    import torch

    gen = torch.Generator().manual_seed(seed)
    hidden, ffn, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows_q, rows_kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    out: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, mean: float = 0.0) -> None:
        out[f"{name}"] = torch.randn(*shape, generator=gen) * std + mean

    draw("model.embed_tokens.weight", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        draw(f"{layer}.input_layernorm.weight", hidden, mean=1.0)
        for part, rows in (("q", rows_q), ("k", rows_kv), ("v", rows_kv)):
            draw(f"{layer}.self_attn.{part}_proj.weight", rows, hidden)
            if config["model_type"] == "qwen2":
                draw(f"{layer}.self_attn.{part}_proj.bias", rows)
        draw(f"{layer}.self_attn.o_proj.weight", hidden, rows_q)
        if config["model_type"] == "qwen3":
            draw(f"{layer}.self_attn.q_norm.weight", dim, mean=1.0)
            draw(f"{layer}.self_attn.k_norm.weight", dim, mean=1.0)
        draw(f"{layer}.post_attention_layernorm.weight", hidden, mean=1.0)
        draw(f"{layer}.mlp.gate_proj.weight", ffn, hidden)
        draw(f"{layer}.mlp.up_proj.weight", ffn, hidden)
        draw(f"{layer}.mlp.down_proj.weight", hidden, ffn)
    draw("model.norm.weight", hidden, mean=1.0)
    if not config["tie_word_embeddings"]:
        draw("lm_head.weight", config["vocab_size"], hidden)
    return out


def write_tiny_tokenizer(
    folder: Path,
    *,
    chat_template: str = CHATML,
    special: tuple[str, ...] = SPECIAL_TOKENS,
    max_positions: int = 512,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    The thinking markers are added tokens but not special ones, as in Qwen3.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(
        folder,
        vocab=tiny_vocab(special),
        merges=[merge.split(" ") for merge in _MERGES],
        added=[(i, text, "think" not in text) for i, text in enumerate(special)],
        names={"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]},
        max_positions=max_positions,
        chat_template=chat_template,
    )


def tiny_vocab(special: tuple[str, ...] = SPECIAL_TOKENS) -> dict[str, int]:
    """Special tokens, the 256 byte characters, the merges."""
    tokens = [*special, *_byte_characters(), *(merge.replace(" ", "") for merge in _MERGES)]
    return {token: i for i, token in enumerate(tokens)}


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE uses for each byte: itself, or one from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(b) if b in own else chr(next(spare)) for b in range(256)]
