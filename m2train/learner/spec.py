"""Layer specs: Transformer Engine's where it can run, else Megatron's local modules with our norm and attention."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from m2train.learner.attention import ThdCoreAttention
from m2train.learner.cpu_ops import rms_norm, swiglu


def use_transformer_engine() -> bool:
    """Whether the Transformer Engine spec can run: the package is there and so is a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def use_own_attention(packing: str) -> bool:
    """Whether ThdCoreAttention is the core attention; Transformer Engine's knows no trees."""
    return packing in ("tree", "auto") or not use_transformer_engine()


def layer_spec(config: TransformerConfig, packing: str) -> Any:
    """The decoder's spec, final norm included."""
    if use_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if use_own_attention(packing):
            spec.submodules.self_attention.submodules.core_attention = ThdCoreAttention
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    if config.use_te_activation_func:
        _mlp_submodules(layer.mlp).activation_func = SwiGlu
    attention = layer.self_attention.submodules
    attention.core_attention = ThdCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _mlp_submodules(mlp: Any) -> Any:
    """Of an MLP's spec: a ModuleSpec, from 0.17 on a partial function."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that works under sequence parallelism.

    Megatron's WrappedTorchNorm asserts that sequence parallelism is off (transformer/torch_norm.py:32 of 0.16.1).
    With it each rank sees part of the tokens, so the weight's gradient must be summed over TP: the flag asks for it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dim."""
        if not x.is_cuda:
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (self.weight.shape[0],), self.weight, self.eps)


class SwiGlu(torch.nn.Module):
    """The gated activation as one module, which Megatron's MLP allows for under `use_te_activation_func`."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., 2 F] -> [..., F]."""
        return swiglu(x)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save; Megatron's MLP asks each of its modules."""
        return {}
