"""Three faults of Megatron-core's DistributedOptimizer with torch.optim.Adam: without Transformer Engine or apex.

They are not CPU-specific. torch's Adam keeps a `step` tensor per parameter; the DistributedOptimizer of 0.16.1
    1. asserts in state_dict() that there is exactly one step, also before the first step (distrib_optimizer.py:642);
    2. raises KeyError 'step' when it loads the fully reshardable format, which leaves the steps out (:940);
    3. gives all parameters ONE shared step tensor on load (:822-825): each parameter's `step += 1` then counts for
       all, and Adam's bias correction is silently wrong after every resume.
"""

from __future__ import annotations

from typing import Any

import torch


def prepare_state(optimizer: Any) -> None:
    """Allocate Adam's state, with a step tensor of its own for each parameter (faults 1 and 2).

    A zero-gradient step of a fresh Adam would leave moments of zero but count a step and decay weights; this does
    neither. With another optimizer class, or state already there, nothing happens.
    """
    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


def own_steps(optimizer: Any) -> None:
    """Undo fault 3 after a load: a step tensor of its own for each parameter."""
    for inner in _torch_adams(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].detach().clone()


def tolerate_missing_step(optimizer: Any) -> None:
    """Let the fully reshardable load pass without steps; they come from the parameter groups (fault 2)."""
    for megatron in _megatron_parts(optimizer):
        if not isinstance(getattr(megatron, "optimizer", None), torch.optim.Adam):
            continue
        set_states = megatron._set_main_param_and_optimizer_states

        def with_step(param: Any, tensors: dict[str, Any], megatron: Any = megatron, inner: Any = set_states) -> None:
            group, order = megatron.model_param_group_index_map[param]
            state = megatron.optimizer.state[megatron.optimizer.param_groups[group]["params"][order]]
            inner(param, tensors if "step" in tensors else {**tensors, "step": state["step"]})

        megatron._set_main_param_and_optimizer_states = with_step


def fuse_on_cpu(optimizer: Any) -> None:
    """Let torch's Adam do a parameter in one pass instead of six. CPU only: on CUDA that wants `step` there too."""
    for inner in _torch_adams(optimizer):
        for group in inner.param_groups:
            if all(p.device.type == "cpu" for p in group["params"]):
                group["fused"], group["foreach"] = True, False


def _megatron_parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adams(optimizer: Any) -> list[torch.optim.Adam]:
    """AdamW included: it is a subclass of Adam."""
    inner = [getattr(part, "optimizer", None) for part in _megatron_parts(optimizer)]
    return [one for one in inner if isinstance(one, torch.optim.Adam)]
