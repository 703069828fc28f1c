"""Writes the tokenizer of a Hugging Face folder: byte-level BPE, a chat template, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_tokenizer(
    folder: Path,
    *,
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Sequence[tuple[int, str, bool]],
    split_digits: bool = False,
    names: Mapping[str, str],
    max_positions: int,
    chat_template: str,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        folder: must exist.
        vocab: token -> id, the added tokens included.
        merges: pairs of tokens, in order of rank.
        added: (id, text, special) of tokens that are matched whole; special ones are left out of decoded text.
        split_digits: every digit is a word of its own.
        names: `bos_token`, `eos_token`, ... -> token.
        max_positions: of the model.
        chat_template: jinja source.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags, "special": special} for i, text, special in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]} if split_digits else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [list(merge) for merge in merges],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_positions}
    config |= {"clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(chat_template)
