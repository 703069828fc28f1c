"""vLLM weight-transfer engine that reads one safetensors file. Imported inside vLLM's processes only.

Loaded with `--worker-extension-cls m2train.sync.file_engine.WorkerExtension`, whose import registers the engine as
`m2train_file`. The file holds Hugging Face names in fp32 or bf16 (a tied lm_head is left out); in shared memory the
transfer is a page mapping, and each rank copies only its shard.

Two traps of vLLM 0.32 on CPU are dealt with here (the third, the prefix cache, needs the scheduler: `base.py`):

1. With tied embeddings, lm_head multiplies by its own prepacked copy of the matrix. A reload renews `embed_tokens`
   and leaves that copy as it was: right until the embeddings are trained, then wrong without a sign. Cure:
   `refresh_tied_head`.
2. vLLM's `/weight_checker` hashes the parameters, which are empty after prepacking: it finds any two models equal.
   Cure: `stale_linears` asks the packed kernels themselves, with one-hot rows: their outputs are columns of the
   weight, exactly, in any dtype, so even an update of one part in a million is seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from m2train.host import die_with_parent
from m2train.sync.base import FILE_BACKEND, SUPERVISED

_PROBES = 8
"""One-hot rows per layer: 8 columns of each weight are compared."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on before the first file."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One update: all weights in one file."""

    path: str
    check: bool = True
    """Compare the loaded layers with the file (CPU, one worker)."""
    refresh_head: bool = True
    """False leaves trap 1 open; for the test that shows it."""


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads checkpoint-format weights layer by layer from a file."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._update: FileUpdateInfo | None = None
        self._load_s = 0.0
        self.stale: list[str] = []

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Make the layers ready to take weights in checkpoint format."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._update, self._load_s, self.stale = None, 0.0, []
        with self._loading():
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which synchronises an accelerator that a CPU engine does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load every tensor of the file."""
        self._update = update_info
        with safe_open(update_info.path, framework="pt", device="cpu") as file, self._loading():
            load = cast(Callable[..., Any], self.model.load_weights)
            load((name, file.get_tensor(name)) for name in _by_layer(file.keys()))

    def finish_weight_update(self) -> None:
        """Finish the layers, renew a tied lm_head, compare the result with the file.

        Without a file the layers get back what they held: that ends an update that somebody opened and left.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._loading():
            finalize_layerwise_reload(self.model, self.model_config)
            if self._update is None:
                return
            if self._update.refresh_head:
                refresh_tied_head(self.model)
        if self._update.check and self.parallel_config.world_size == 1:
            with safe_open(self._update.path, framework="pt", device="cpu") as file:
                self.stale = stale_linears(self.model, _Lazy(file))

    def report(self) -> dict[str, Any]:
        """Seconds spent loading, and layers that do not hold the file's weights."""
        return {"load_s": self._load_s, "stale": self.stale}

    def shutdown(self) -> None:
        """Nothing to release."""

    @contextmanager
    def _loading(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._load_s += time.perf_counter() - started


class WorkerExtension:
    """Methods that vLLM adds to its worker; called over `/collective_rpc`."""

    weight_transfer_engine: FileWeightTransferEngine

    def m2train_weight_report(self) -> dict[str, Any]:
        """What the last update took, and what it left stale."""
        return self.weight_transfer_engine.report()


class _Lazy(Mapping[str, torch.Tensor]):
    """A safetensors file as a mapping: a tensor is mapped when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = frozenset(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _by_layer(names: Iterable[str]) -> list[str]:
    """Layer by layer in number order: vLLM buffers a layer until its last tensor has come."""

    def key(name: str) -> tuple[int, str]:
        numbers = [part for part in name.split(".") if part.isdigit()]
        return (int(numbers[0]) if numbers else -1, name)

    return sorted(names, key=key)


def refresh_tied_head(model: torch.nn.Module) -> bool:
    """Renew the packed copy of a tied lm_head from the embeddings; False where there is none.

    Needed on CPU only: elsewhere the head multiplies by the embedding matrix itself.
    """
    head = getattr(model, "lm_head", None)
    embed = getattr(getattr(model, "model", None), "embed_tokens", None)
    config = getattr(model, "config", None)
    if (
        head is None
        or embed is None
        or not hasattr(head, "cpu_linear")
        or not getattr(config, "tie_word_embeddings", False)
    ):
        return False
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    head.weight = embed.weight
    dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    return True


@torch.no_grad()
def stale_linears(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of packed linear layers whose kernel does not multiply by the file's weights.

    A one-hot input row k gives column k of the weight without rounding. For one CPU worker without tensor
    parallelism; layers that are not prepacked have no copy that could be stale and are skipped.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    stale = []
    for name, module in model.named_modules():
        linear: Callable[..., torch.Tensor] | None = getattr(module, "cpu_linear", None)
        parts = [] if linear is None else _checkpoint_parts(name, packed, weights)
        if linear is None or not parts:
            continue
        width = parts[0].shape[1]
        columns = torch.linspace(0, width - 1, min(_PROBES, width)).long()
        dtype = next(model.parameters()).dtype
        rows = torch.nn.functional.one_hot(columns, width).to(dtype)
        out = linear(rows, module.weight, None)
        wanted = torch.cat([part[:, columns] for part in parts]).T.to(out.dtype)
        if not torch.equal(out[:, : wanted.shape[1]], wanted):  # a padded vocabulary has more outputs
            stale.append(name)
    return stale


def _checkpoint_parts(
    name: str, packed: Mapping[str, list[str]], weights: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    prefix, _, last = name.rpartition(".")
    parents = f"{prefix}." if prefix else ""
    names = [f"{parents}{part}.weight" for part in packed.get(last, [last])]
    if name == "lm_head" and names[0] not in weights:
        names = ["model.embed_tokens.weight"]
    return [weights[n] for n in names] if all(n in weights for n in names) else []


if os.environ.get(SUPERVISED):  # vLLM's EngineCore outlives a killed API server
    die_with_parent()
if FILE_BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(FILE_BACKEND, FileWeightTransferEngine)
