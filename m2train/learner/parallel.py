"""Processes of the learner: torch.distributed, Megatron's groups, and a gloo group for commands and results."""

from __future__ import annotations

import datetime
import os
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import distributed as dist

from m2train.config import ConfigError, Recipe
from m2train.learner import cpu_compat


def start_process_group(timeout_s: float) -> None:
    """Join the ranks that torchrun started: nccl with CUDA, else gloo."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def control_group(timeout_s: float) -> dist.ProcessGroup | None:
    """A gloo group of all ranks: idle ranks that wait on it neither burn a core nor hold the GPU."""
    if dist.get_backend() == "gloo":
        return None  # the default group will do
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    assert isinstance(group, dist.ProcessGroup)
    return group


def start_model_parallel(recipe: Recipe) -> None:
    """Divide the ranks into TP x PP x DP.

    Raises:
        ConfigError: the number of ranks is not tp x pp x dp.
    """
    learner = recipe.learner
    world, expected = dist.get_world_size(), learner.tp * learner.pp * learner.dp
    if world != expected:
        raise ConfigError(
            f"{world} learner ranks joined; learner.tp x pp x dp = {learner.tp} x {learner.pp} x {learner.dp} = "
            f"{expected} are needed"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=learner.tp, pipeline_model_parallel_size=learner.pp
    )
    cpu_compat.apply()
    torch.manual_seed(recipe.seed)
    model_parallel_cuda_manual_seed(recipe.seed)


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_scoring_rank() -> bool:
    """Whether this rank's results are the ones reported for its data-parallel replica."""
    return parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def gather_to_first(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """All ranks' values on rank 0, [] elsewhere; None values are left out."""
    first = dist.get_rank() == 0
    found: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(value, found, dst=0, group=group)
    return [v for v in found or [] if v is not None]
