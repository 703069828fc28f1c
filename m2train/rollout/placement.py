"""Which engines a recipe asks for, on which GPUs, and how weights reach them."""

from __future__ import annotations

from pathlib import Path

from m2train.config import ConfigError, Recipe
from m2train.host import on_cpu, visible_gpus
from m2train.models import model_shape
from m2train.rollout.server import ServerSpec


def check_engines(recipe: Recipe) -> None:
    """Refuse engines that this machine cannot have; nothing is started.

    Raises:
        ConfigError: NCCL without a GPU, or fewer GPUs than the engines take.
    """
    weight_transfer(recipe)
    if not recipe.rollout.urls:
        devices_of(recipe.rollout.servers, recipe.rollout.tensor_parallel)


def weight_transfer(recipe: Recipe) -> str:
    """How a run's weights travel: file | nccl. "auto" is nccl where there is a GPU.

    Raises:
        ConfigError: nccl is asked for on a machine without a GPU.
    """
    asked = recipe.rollout.weight_transfer
    if asked == "nccl" and on_cpu():
        raise ConfigError("rollout.weight_transfer = 'nccl' needs a GPU in this machine; use 'file', or 'auto'")
    if asked == "auto":
        return "file" if on_cpu() else "nccl"
    return asked


def server_specs(recipe: Recipe, model: Path, run_dir: Path) -> list[ServerSpec]:
    """The servers of a run that gives no URLs.

    Args:
        recipe: its `rollout` and `vllm` sections.
        model: Hugging Face folder that they start from.
        run_dir: their logs go to `logs/vllm_<i>.log` in it.

    Raises:
        ConfigError: fewer GPUs than they take.
    """
    rollout, shape = recipe.rollout, model_shape(model)
    devices = devices_of(rollout.servers, rollout.tensor_parallel)
    width = 4 if rollout.dtype == "float32" else 2
    return [
        ServerSpec(
            model=model,
            log=run_dir / "logs" / f"vllm_{i}.log",
            max_model_len=recipe.longest_request,
            max_num_seqs=-(-rollout.concurrency // rollout.servers),
            kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * width,
            dtype=rollout.dtype,
            tensor_parallel=rollout.tensor_parallel,
            threads=rollout.threads,
            devices=devices[i] if devices else None,
            weight_transfer=weight_transfer(recipe),
            options=recipe.vllm,
        )
        for i in range(rollout.servers)
    ]


def devices_of(servers: int, per_server: int) -> list[list[str]] | None:
    """The last GPUs of the machine go to the engines, the first ones to the learner. Not run on a GPU machine yet.

    Raises:
        ConfigError: fewer GPUs than the engines take.
    """
    if on_cpu():
        return None
    names = visible_gpus()
    if len(names) < servers * per_server:
        raise ConfigError(
            f"rollout.servers = {servers} x rollout.tensor_parallel = {per_server} take {servers * per_server} GPUs, "
            f"but this machine shows {len(names)} ({', '.join(names) or 'none'}); lower one of them, or let "
            "CUDA_VISIBLE_DEVICES name more"
        )
    names = names[-servers * per_server :]
    return [names[i * per_server : (i + 1) * per_server] for i in range(servers)]
