"""Hugging Face weights in and out: one table of names, tensor by tensor, sharded over TP and PP.

Import: each rank reads only the rows or columns that it holds. Export: one unit (embedding, layer, final norm and
head) at a time is gathered over TP, handed to rank 0 and appended to the file, so that rank 0 never holds the model.
Nothing is computed, so a round trip gives the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from torch import distributed as dist

from m2train.config import ConfigError
from m2train.files import sync_folder
from m2train.learner.hf_config import HfModel

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A Hugging Face tensor, and how TP shards it."""

    name: str
    shape: tuple[int, ...]
    axis: int | None
    """The axis that TP divides; None: every rank holds it all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A Megatron parameter and the Hugging Face pieces it is made of."""

    parameter: str
    pieces: tuple[Piece, ...]
    groups: int = 1
    """The pieces are interleaved in this many groups (KV groups of linear_qkv), on each rank groups / tp of them."""

    def join(self, parts: list[torch.Tensor], tp: int) -> torch.Tensor:
        """This rank's parts -> the parameter."""
        if len(parts) == 1:
            return parts[0]
        local = self.groups // tp if self.groups > 1 else 1
        split = [part.reshape(local, -1, *part.shape[1:]) for part in parts]
        return torch.cat(split, dim=1).flatten(0, 1)

    def split(self, value: torch.Tensor, tp: int) -> list[torch.Tensor]:
        """The inverse of `join`."""
        if len(self.pieces) == 1:
            return [value]
        local = self.groups // tp if self.groups > 1 else 1
        rows = [piece.shape[0] // tp // local for piece in self.pieces]
        parts = value.reshape(local, -1, *value.shape[1:]).split(rows, dim=1)
        return [part.flatten(0, 1) for part in parts]


def layer_entries(model: HfModel, layer: int, local: int, fused_norms: bool) -> list[Entry]:
    """Entries of decoder layer `layer`, which is number `local` of its pipeline stage.

    Args:
        fused_norms: Transformer Engine's spec keeps the norms inside the linear layers.
    """
    to, here = f"model.layers.{layer}.", f"decoder.layers.{local}."
    hidden, ffn = model.hidden, model.ffn
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    norm1 = "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
    norm2 = "mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"

    def one(parameter: str, name: str, shape: tuple[int, ...], axis: int | None) -> Entry:
        return Entry(parameter=here + parameter, pieces=(Piece(name=to + name, shape=shape, axis=axis),))

    def qkv(kind: str, tail: tuple[int, ...]) -> Entry:
        sizes = (("q", q), ("k", kv), ("v", kv))
        return Entry(
            parameter=f"{here}self_attention.linear_qkv.{kind}",
            pieces=tuple(Piece(name=f"{to}self_attn.{x}_proj.{kind}", shape=(n, *tail), axis=0) for x, n in sizes),
            groups=model.kv_heads,
        )

    entries = [one(norm1, "input_layernorm.weight", (hidden,), None), qkv("weight", (hidden,))]
    if model.qkv_bias:
        entries.append(qkv("bias", ()))
    if model.qk_norm:
        for x in ("q", "k"):
            entries.append(
                one(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", (model.head_dim,), None)
            )
    gate_up = tuple(Piece(name=f"{to}mlp.{x}_proj.weight", shape=(ffn, hidden), axis=0) for x in ("gate", "up"))
    return [
        *entries,
        one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, q), 1),
        one(norm2, "post_attention_layernorm.weight", (hidden,), None),
        Entry(parameter=f"{here}mlp.linear_fc1.weight", pieces=gate_up),
        one("mlp.linear_fc2.weight", "mlp.down_proj.weight", (hidden, ffn), 1),
    ]


def embedding_entry(model: HfModel) -> Entry:
    """The first stage's embedding."""
    piece = Piece(name="model.embed_tokens.weight", shape=(model.vocab, model.hidden), axis=0)
    return Entry(parameter="embedding.word_embeddings.weight", pieces=(piece,))


def final_norm_entry(model: HfModel) -> Entry:
    """The last stage's norm."""
    piece = Piece(name="model.norm.weight", shape=(model.hidden,), axis=None)
    return Entry(parameter="decoder.final_layernorm.weight", pieces=(piece,))


def head_entry(model: HfModel) -> Entry:
    """The last stage's output layer; a tied model's copy reads the embedding."""
    name = "model.embed_tokens.weight" if model.tied else "lm_head.weight"
    piece = Piece(name=name, shape=(model.vocab, model.hidden), axis=0)
    return Entry(parameter="output_layer.weight", pieces=(piece,))


def stage_entries(model: HfModel, parameters: dict[str, torch.Tensor]) -> list[Entry]:
    """Entries of all parameters that this rank holds."""
    stage, stages = parallel_state.get_pipeline_model_parallel_rank(), _stages()
    per_stage = model.layers // stages
    fused = _fused_norms(parameters)
    entries = [embedding_entry(model)] if stage == 0 else []
    for local in range(per_stage):
        entries += layer_entries(model, stage * per_stage + local, local, fused)
    if stage == stages - 1:
        entries.append(final_norm_entry(model))
        if "output_layer.weight" in parameters:
            entries.append(head_entry(model))
    return entries


# ---------------------------------------------------------------------------------------------------- import


@torch.no_grad()
def import_weights(model: HfModel, parameters: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of `folder`.

    Args:
        parameters: name -> parameter, as GPTModel.named_parameters() has them.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    entries = stage_entries(model, parameters)
    unknown = set(parameters) - {entry.parameter for entry in entries}
    if unknown:
        raise ConfigError(f"no Hugging Face counterpart of {', '.join(sorted(unknown)[:3])}")
    tp, rank = _tensor_ranks()
    with _Reader(folder) as reader:
        for entry in entries:
            parts = [reader.shard(piece, tp, rank, model.padded_vocab(tp)) for piece in entry.pieces]
            parameters[entry.parameter].copy_(entry.join(parts, tp))


class _Reader:
    """Slices of the tensors of a folder of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        for path in sorted(self._folder.glob("*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))  # type: ignore[no-untyped-call]
            self._where |= dict.fromkeys(file.keys(), file)
        if not self._where:
            raise ConfigError(f"{self._folder} has no *.safetensors")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def shard(self, piece: Piece, tp: int, rank: int, padded_vocab: int) -> torch.Tensor:
        """This rank's part of a tensor; rows beyond the real vocabulary are zero."""
        if piece.name not in self._where:
            raise ConfigError(f"{self._folder} has no tensor {piece.name}")
        source = self._where[piece.name].get_slice(piece.name)
        shape = tuple(source.get_shape())
        if shape != piece.shape:
            raise ConfigError(f"{self._folder}: {piece.name} is {shape}; config.json says {piece.shape}")
        if piece.axis is None:
            return source[:]
        total = padded_vocab if _is_vocab(piece) else shape[piece.axis]
        start, stop = total // tp * rank, total // tp * (rank + 1)
        if piece.axis == 1:
            return source[:, start:stop]
        part = source[min(start, shape[0]) : min(stop, shape[0])]
        if part.shape[0] < stop - start:
            part = torch.cat([part, part.new_zeros(stop - start - part.shape[0], *part.shape[1:])])
        return part


# ---------------------------------------------------------------------------------------------------- export


@torch.no_grad()
def export_weights(
    model: HfModel, parameters: dict[str, torch.Tensor], path: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Write the whole model as one safetensors file with Hugging Face names; a tied lm_head is not repeated.

    A collective of all ranks; data-parallel replicas other than the first only wait.

    Returns:
        On rank 0 `{"bytes": ...}`; elsewhere {}.
    """
    writer: _Writer | None = None
    if dist.get_rank() == 0:
        writer = _Writer(path, _manifest(model), dtype)
    try:
        if parallel_state.get_data_parallel_rank() == 0:
            for stage, entries in _units(model, _fused_norms(parameters)):
                _send_unit(model, entries, stage, parameters, dtype, writer)
        if writer is not None:
            writer.finish()
    except BaseException:
        if writer is not None:
            writer.abandon()
        raise
    dist.barrier()
    return {} if writer is None else {"bytes": float(writer.size)}


def _units(model: HfModel, fused_norms: bool) -> Iterator[tuple[int, list[Entry]]]:
    """(stage, entries) in the order of the file."""
    stages = _stages()
    per_stage = model.layers // stages
    yield 0, [embedding_entry(model)]
    for layer in range(model.layers):
        yield layer // per_stage, layer_entries(model, layer, layer % per_stage, fused_norms)
    yield stages - 1, [final_norm_entry(model)]
    if not model.tied:
        yield stages - 1, [head_entry(model)]


def _manifest(model: HfModel) -> list[Piece]:
    return [piece for _, entries in _units(model, False) for entry in entries for piece in entry.pieces]


def _send_unit(
    model: HfModel,
    entries: list[Entry],
    stage: int,
    parameters: dict[str, torch.Tensor],
    dtype: torch.dtype,
    writer: _Writer | None,
) -> None:
    """Gather one unit on its stage's first TP rank, and from there to rank 0, which writes it."""
    tp, rank = _tensor_ranks()
    mine = parallel_state.get_pipeline_model_parallel_rank() == stage
    owner = dist.get_global_rank(parallel_state.get_pipeline_model_parallel_group(), stage)
    for entry in entries:
        parts: list[torch.Tensor] = []
        if mine:
            value = parameters[entry.parameter].detach().to(dtype)
            parts = [
                _gather(part, piece, tp) for part, piece in zip(entry.split(value, tp), entry.pieces, strict=True)
            ]
        if rank != 0:
            continue
        for index, piece in enumerate(entry.pieces):
            if stage == 0:
                full = parts[index] if mine else None
            elif mine:
                dist.send(parts[index].contiguous(), 0, group=parallel_state.get_pipeline_model_parallel_group())
                full = None
            elif writer is not None:
                full = torch.empty(_full_shape(model, piece, tp), dtype=dtype, device=_device())
                dist.recv(full, owner, group=parallel_state.get_pipeline_model_parallel_group())
            else:
                full = None
            if writer is not None and full is not None:
                writer.add(piece, full[: piece.shape[0]])


def _gather(part: torch.Tensor, piece: Piece, tp: int) -> torch.Tensor:
    """Parts of all TP ranks joined; only the first rank's result is used."""
    part = part.contiguous()
    if tp == 1 or piece.axis is None:
        return part
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(tp)]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=piece.axis)


def _full_shape(model: HfModel, piece: Piece, tp: int) -> tuple[int, ...]:
    return (model.padded_vocab(tp), *piece.shape[1:]) if _is_vocab(piece) else piece.shape


class _Writer:
    """A safetensors file written front to back under a temporary name: header first, then each tensor."""

    def __init__(self, path: Path, pieces: list[Piece], dtype: torch.dtype) -> None:
        self._path = path
        self._temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._order = iter(pieces)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for piece in pieces:
            size = torch.Size(piece.shape).numel() * dtype.itemsize
            header[piece.name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(piece.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.size = 8 + len(raw) + offset
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temp.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def add(self, piece: Piece, value: torch.Tensor) -> None:
        """Append the next tensor."""
        expected = next(self._order)
        assert piece.name == expected.name and tuple(value.shape) == piece.shape, (piece, expected, value.shape)
        raw = value.detach().cpu().contiguous().view(torch.uint8)
        self._file.write(raw.numpy().data)

    def finish(self) -> None:
        """Flush to disk and rename into place."""
        assert next(self._order, None) is None and self._file.tell() == self.size
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temp, self._path)
        sync_folder(self._path.parent)

    def abandon(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._temp.unlink(missing_ok=True)


def _is_vocab(piece: Piece) -> bool:
    return piece.name in ("model.embed_tokens.weight", "lm_head.weight")


def _fused_norms(parameters: dict[str, torch.Tensor]) -> bool:
    return any(name.endswith("linear_qkv.layer_norm_weight") for name in parameters)


def _tensor_ranks() -> tuple[int, int]:
    """(size, rank) of the tensor-parallel group."""
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _stages() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def _device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
