"""Weights from a file in shared memory into tensors: what an update of an engine costs beside vLLM's own work.

The file engine's transfer is measured alone, on tensors that are simply overwritten; vLLM's repacking of its layers
and the HTTP calls around it are not in it.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from m2train.bench.case import Case, Fn, Setup, Skip, SlowStart, case
from m2train.bench.models import model_config

Tensors = dict[str, torch.Tensor]
SHARED = Path("/dev/shm")


class _Source:
    """A weights file, and the tensors that it is loaded into; both go when the case goes."""

    def __init__(self, s: Setup) -> None:
        from safetensors.torch import save_file

        from m2train.testing.tiny_model import random_weights

        config = model_config(s.model, layers=s.layers)
        self.weights: Tensors = {k: v.to(s.dtype) for k, v in random_weights(config, seed=0).items()}
        self.bytes = sum(x.nbytes for x in self.weights.values())
        if not SHARED.is_dir() or shutil.disk_usage(SHARED).free < 2 * self.bytes:
            raise Skip(f"{SHARED} has no room for {self.bytes} bytes twice")
        self._folder = tempfile.TemporaryDirectory(prefix="m2bench-", dir=SHARED)
        self.path = Path(self._folder.name) / "weights.safetensors"
        save_file(self.weights, self.path)
        self.target: Tensors = {k: torch.empty_like(v, device=s.device) for k, v in self.weights.items()}

    def result(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.target.values())

    def verify(self, result: Any, inputs: tuple[Any, ...]) -> str | None:
        """Bitwise what is in the file."""
        for (name, wanted), got in zip(self.weights.items(), result, strict=True):
            if not torch.equal(got.cpu(), wanted):
                return f"{name} is not that of the file"
        return None


def _file_engine(source: _Source) -> SlowStart | Skip:
    if importlib.util.find_spec("vllm") is None:
        return Skip("the file engine runs inside vLLM, which is not installed (pip install 'm2train[rollout]')")
    engine: list[Any] = []

    class Model:
        def load_weights(self, pairs: Any) -> None:
            for name, value in pairs:
                source.target[name].copy_(value)

    def run(path: str) -> tuple[torch.Tensor, ...]:
        from m2train.sync.file_engine import FileUpdateInfo, FileWeightTransferEngine

        if not engine:  # its constructor wants a whole vLLM configuration
            made: Any = FileWeightTransferEngine.__new__(FileWeightTransferEngine)
            made.model, made._update, made._load_s, made.stale = Model(), None, 0.0, []
            engine.append(made)
        engine[0].receive_weights(FileUpdateInfo(path=path, check=False))
        return source.result()

    return SlowStart(run)


def _safetensors(source: _Source) -> Fn:
    def run(path: str) -> tuple[torch.Tensor, ...]:
        from safetensors.torch import load_file

        for name, value in load_file(path).items():
            source.target[name].copy_(value)
        return source.result()

    return run


def _pickle(source: _Source) -> Fn:
    path = source.path.with_suffix(".pt")
    torch.save(source.weights, path)

    def run(_: str) -> tuple[torch.Tensor, ...]:
        for name, value in torch.load(path, weights_only=True).items():
            source.target[name].copy_(value)
        return source.result()

    return run


@case(
    "weight_sync",
    shapes={
        "smollm2-135m-4-layers": {"model": "smollm2-135m", "layers": 4},
        "smollm2-135m": {"model": "smollm2-135m", "layers": None},
        "qwen3-1.7b": {"model": "qwen3-1.7b", "layers": None},
    },
    dtypes=(torch.bfloat16,),
    nightly=("qwen3-1.7b",),
)
def weight_sync(s: Setup) -> Case:
    """All weights of a model, from shared memory into tensors."""
    if importlib.util.find_spec("safetensors") is None:
        raise Skip("safetensors is not installed (pip install 'm2train[bench]')")
    source = _Source(s)
    return Case(
        verify=source.verify,
        inputs=(str(source.path),),
        impls={
            "file_engine": _file_engine(source),
            "safetensors": _safetensors(source),
            "torch_load": _pickle(source),
        },
        baseline="safetensors",
        ours=("file_engine",),
        bytes=2.0 * source.bytes,
        rotate=False,
        pure=False,
        cuda_timer="wall",
    )
