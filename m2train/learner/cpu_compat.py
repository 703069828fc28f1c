"""What Megatron-core needs in order to run where there is no CUDA. Applied only there.

Megatron-core names the device "cuda" in its source. Instead of patching torch for the whole process, its modules are
given a stand-in for their global `torch` that says "cpu"; transformers, safetensors and our code see torch itself.
Two checks ask a tensor rather than the module `torch`, so they are patched on the class, within `cuda_names()` only.

Line numbers are those of megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange")


class _Forward(types.ModuleType):
    """A module that answers like `target`, except for the attributes set on it."""

    def __init__(self, target: types.ModuleType) -> None:
        super().__init__(target.__name__)
        self.__dict__["_target"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def apply() -> None:
    """Give all loaded megatron.core modules the stand-in; call after importing them. A no-op with CUDA.

    Which lines need which part:
        factories      pipeline_parallel/schedules.py:596,983,2138; transformer/utils.py:35;
                       optimizer/optimizer.py:473-485; optimizer/clip_grads.py:90,103,115
        current_device tensor_parallel/mappings.py:91,141; tensor_parallel/layers.py:552;
                       pipeline_parallel/p2p_communication.py:190-321; distributed/param_and_grad_buffer.py:783-806;
                       optimizer/distrib_optimizer.py:791; dist_checkpointing/strategies/state_dict_saver.py:252
        synchronize    p2p_communication.py:242,398; dist_checkpointing/strategies/filesystem_async.py:230
        rng            tensor_parallel/random.py:50-108 (get and set), :235 and :330 (manual_seed)
        alone          distributed/param_and_grad_buffer.py:285,443, where gloo copies whole buffers to themselves
        streams        distributed/param_and_grad_buffer.py:632 of 0.19 (current_stream); not on our path in 0.16
    """
    if not needed():
        return
    stand_in = _stand_in()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random

    if not hasattr(buffers.dist_reduce_scatter_func, "alone"):
        buffers.dist_reduce_scatter_func = _unless_alone(buffers.dist_reduce_scatter_func)
        buffers.dist_all_gather_func = _unless_alone(buffers.dist_all_gather_func)
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state


@contextlib.contextmanager
def cuda_names() -> Iterator[None]:
    """For building, stepping and saving: Tensor.type() says torch.cuda.*, Tensor.cuda() is the tensor itself.

    Needed by optimizer/distrib_optimizer.py:361,420,433,582, optimizer/optimizer.py:671,690 and
    optimizer/clip_grads.py:167 (type), models/common/language_module/language_module.py:244 and
    distrib_optimizer.py:1089 (cuda). A no-op with CUDA.
    """
    if not needed():
        yield
        return
    plain_type, plain_cuda = torch.Tensor.type, torch.Tensor.cuda

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return plain_type(self, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = named_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = plain_type  # type: ignore[method-assign]
        torch.Tensor.cuda = plain_cuda  # type: ignore[method-assign]


def _stand_in() -> types.ModuleType:
    cuda = _Forward(torch.cuda)
    vars(cuda).update(
        current_device=lambda: _CPU,
        synchronize=lambda *_: None,
        manual_seed=torch.manual_seed,
        get_rng_state=_get_rng_state,
        set_rng_state=_set_rng_state,
        current_stream=lambda *_: _Stream(),
        default_stream=lambda *_: _Stream(),
        Stream=_Stream,
        stream=lambda _: contextlib.nullcontext(),
    )
    stand_in = _Forward(torch)
    vars(stand_in).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}, cuda=cuda)
    return stand_in


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Skip an in-place collective of one rank. NCCL does that itself; gloo copied 538 MB back and forth, 16 % of a
    step of 1229 tokens on a 135M model."""

    def call(out: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        same = out.data_ptr() == source.data_ptr() and out.numel() == source.numel()
        if group is not None and group.size() == 1 and same and not kwargs.get("async_op"):
            return None
        return collective(out, source, *args, **kwargs)

    call.alone = True  # type: ignore[attr-defined]
    return call


class _Stream:
    """Stands for a stream where everything is done at once."""

    def wait_stream(self, other: object) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)
