"""Learner checkpoints: Megatron's distributed format, loadable under another TP x PP x DP.

A checkpoint is written under a temporary name, flushed to disk and renamed, so a folder with the final name is whole.
The random state is saved per rank and restored only under the same layout; nothing on our path draws from it while
training, so another layout just starts from the recipe's seed.
"""

from __future__ import annotations

import os
import queue
import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver  # noqa: F401
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from m2train.config import ConfigError
from m2train.files import sync_folder
from m2train.learner import cpu_compat, optimizer_fixes

if TYPE_CHECKING:
    from m2train.learner.trainer import Trainer

_FORMAT = 1
# Larger than what a writer that ran out of room may leave free, small beside any checkpoint.
_PROBE_BYTES = 16 * 2**20
# The default sharding of the optimizer cannot be loaded under another TP or PP (0.16.1: "flattened_range").
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}


def save(trainer: Trainer, path: Path) -> None:
    """Write `path`, replacing a checkpoint of that name. A collective.

    Raises:
        OSError: the disk is full, or a limit on file sizes or a quota is reached; an older `path` is left whole.
    """
    temp = path.with_name(f".{path.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
    dist.barrier()
    # Saves are synchronous, so a queue of this process does. Megatron's own is a manager process per rank
    # (filesystem_async.py:54 of 0.16.1), which lives on when a rank is killed.
    filesystem_async._results_queue = queue.Queue()
    with cpu_compat.cuda_names():
        cpu_compat.apply()
        try:
            dist_checkpointing.save(_state(trainer, is_loading=False), str(temp))
        except (Exception, CheckpointException) as err:  # the latter is a BaseException
            _name_full_disk(temp, err)
            raise
    dist.barrier()
    if dist.get_rank() == 0:
        _flush(temp)
        if path.exists():
            old = path.with_name(f".{path.name}.old.tmp")
            path.rename(old)
            temp.rename(path)
            shutil.rmtree(old)
        else:
            temp.rename(path)
        sync_folder(path.parent)
    dist.barrier()


def load(trainer: Trainer, path: Path) -> None:
    """Restore what `save` wrote. A collective.

    Raises:
        ConfigError: no checkpoint there, or one of another model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(str(path)):
        raise ConfigError(f"{path} is not a learner checkpoint")
    # A random state of another layout is not asked for: its name in the checkpoint is the layout.
    common = dist_checkpointing.load_common_state_dict(str(path))
    facts, layout = common["facts"], _layout(trainer)
    _check(facts, trainer, path)
    with cpu_compat.cuda_names():
        cpu_compat.apply()
        wanted = _state(trainer, is_loading=True)
        if facts["layout"] != layout:
            del wanted["rng"]
        state = dist_checkpointing.load(wanted, str(path))
        trainer.policy.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
    optimizer_fixes.own_steps(trainer.optimizer)
    optimizer_fixes.fuse_on_cpu(trainer.optimizer)
    trainer.update = facts["update"]
    if "rng" in state:
        _set_rng(state["rng"])


def _state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    model = trainer.policy.sharded_state_dict(metadata=dict(_METADATA))
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))
    world, rank = dist.get_world_size(), dist.get_rank()
    state = {"model": model, "optimizer": optimizer, "rng": ShardedObject("rng", _rng(), (world,), (rank,))}
    if not is_loading:
        state["facts"] = {
            "format": _FORMAT,
            "update": trainer.update,
            "layout": _layout(trainer),
            "vocab_rows": trainer.hf.padded_vocab(trainer.recipe.learner.tp),
            "dtype": trainer.recipe.learner.dtype,
            "layers": trainer.hf.layers,
            "hidden": trainer.hf.hidden,
        }
    return state


def _layout(trainer: Trainer) -> list[int]:
    learner = trainer.recipe.learner
    return [learner.tp, learner.pp, learner.dp]


def _check(facts: dict[str, Any], trainer: Trainer, path: Path) -> None:
    here = {
        "format": _FORMAT,
        "layers": trainer.hf.layers,
        "hidden": trainer.hf.hidden,
        "vocab_rows": trainer.hf.padded_vocab(trainer.recipe.learner.tp),
        "dtype": trainer.recipe.learner.dtype,
    }
    for name, value in here.items():
        if facts[name] != value:
            raise ConfigError(f"checkpoint {path} has {name} {facts[name]}, this learner {value}")


def _rng() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _name_full_disk(folder: Path, cause: BaseException) -> None:
    """Raise the system's own error if `folder` takes no more data.

    torch's zip writer does not look at what a write returned and fails later, at "unexpected pos" (caffe2/serialize).
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, _PROBE_BYTES)
    except OSError as err:
        raise OSError(
            err.errno,
            f"{err.strerror}: writing a checkpoint; {shutil.disk_usage(folder).free / 2**20:.1f} MiB are free there",
            str(folder.parent),
        ) from cause


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    sync_folder(folder)
