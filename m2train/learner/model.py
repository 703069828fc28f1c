"""Megatron's GPTModel for the Llama, Qwen2 and Qwen3 families, with our head in place of the full logits."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

import m2kernels as mk
from m2train.config import ConfigError, Recipe
from m2train.learner import cpu_compat
from m2train.learner.attention import PackedRows, packed_rows
from m2train.learner.hf import stage_entries
from m2train.learner.hf_config import HfModel
from m2train.learner.spec import layer_spec, use_own_attention, use_transformer_engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# TransformerConfig fields that a recipe sets elsewhere; `[megatron]` may not.
_OWNED = {
    "tensor_model_parallel_size": "learner.tp",
    "pipeline_model_parallel_size": "learner.pp",
    "sequence_parallel": "learner.sequence_parallel",
    "params_dtype": "learner.dtype",
    "pipeline_dtype": "learner.dtype",
    "bf16": "learner.dtype",
    "recompute_granularity": "learner.recompute",
}
# What the model is comes from its config.json; some of these our attention and head would not even look at.
_MODEL = {
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "qk_layernorm", "qk_l2_norm"),
    *("gated_linear_unit", "activation_func", "add_bias_linear", "add_qkv_bias", "attention_output_gate"),
    *("rotary_interleaved", "no_rope_freq", "window_size", "window_attn_skip_freq", "softmax_type", "softmax_scale"),
    *("multi_latent_attention", "num_moe_experts", "mtp_num_layers", "experimental_attention_variant"),
}
_FIXED = {
    "attention_dropout",  # our attention has none
    "apply_query_key_layer_scaling",
    "calculate_per_token_loss",
    "variable_seq_lengths",
    "finalize_model_grads_func",
    "context_parallel_size",
    "defer_embedding_wgrad_compute",
    # Layers are divided evenly over the stages (hf.stage_entries).
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadLoss:
    """The policy loss of a micro-batch; tensors are those of `m2kernels.linear_policy_loss`."""

    old_logp: torch.Tensor | None
    advantage: torch.Tensor
    seq: torch.Tensor
    rollout_logp: torch.Tensor
    denom: float
    spec: mk.LossSpec
    ref_logp: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRows:
    """What the head computes of a packed micro-batch."""

    rows: torch.Tensor
    """int64 [M]: packed rows before each scored token; where replies part, one row has several"""
    target: torch.Tensor
    """int64 [M]: the scored token"""
    temperature: float
    vocab_size: int
    loss: HeadLoss | None = None
    """None: log-probs and entropies alone."""


class HeadOutput(NamedTuple):
    """What the last stage returns."""

    logp: torch.Tensor
    """f32[M]; has a gradient if there is no loss"""
    entropy: torch.Tensor
    """f32[M], no gradient"""
    loss: torch.Tensor | None
    metrics: dict[str, torch.Tensor]


HeadFunction = Callable[[torch.Tensor, torch.Tensor, "HeadRows"], HeadOutput]
"""(hidden [T, D], weight [V / tp, D], rows to score) -> HeadOutput."""


def transformer_config(model: HfModel, recipe: Recipe) -> TransformerConfig:
    """Megatron's configuration for a model under a recipe.

    Raises:
        ConfigError: a key of `[megatron]` is unknown, or not free to be set.
    """
    learner = recipe.learner
    dtype = DTYPES[learner.dtype]
    fused = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_query_groups": model.kv_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": learner.tp,
        "pipeline_model_parallel_size": learner.pp,
        "sequence_parallel": learner.sequence_parallel and learner.tp > 1,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # no experts here, but the default refuses variable lengths
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,  # no division by micro-batches and DP ranks: the loss brings its own
        "deallocate_pipeline_outputs": True,
        "perform_initialization": False,
        "use_cpu_initialization": not fused,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": fused,
        "use_te_activation_func": not fused,  # not TE's: the switch for an activation module, see spec.SwiGlu
        "bias_dropout_fusion": fused,
        "persist_layer_norm": False,
        "apply_rope_fusion": use_transformer_engine(),
    }
    if learner.recompute:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    check_megatron_keys(recipe)
    try:
        return TransformerConfig(**(settings | recipe.megatron))
    except (ValueError, TypeError, AssertionError) as err:
        raise ConfigError(f"TransformerConfig refuses [megatron] {recipe.megatron}: {err}") from err


def check_megatron_keys(recipe: Recipe) -> None:
    """Refuse keys of `[megatron]` that TransformerConfig does not have, or that the recipe or the model settle.

    Raises:
        ConfigError: with the nearest known key, or where to set it.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key in recipe.megatron:
        if key in _OWNED:
            raise ConfigError(f"megatron.{key} is set by {_OWNED[key]}; use that")
        if key in _MODEL:
            raise ConfigError(f"megatron.{key} cannot be set: it follows from the config.json of the model")
        if key in _FIXED:
            raise ConfigError(f"megatron.{key} cannot be set: the learner depends on its own value")
        if key not in known:
            near = difflib.get_close_matches(key, known - _OWNED.keys() - _MODEL - _FIXED, n=1, cutoff=0.5)
            hint = f"; did you mean megatron.{near[0]}?" if near else ""
            raise ConfigError(f"unknown key megatron.{key}: TransformerConfig has no such field{hint}")


def build_model(model: HfModel, recipe: Recipe) -> PolicyModel:
    """This rank's pipeline stage and tensor shard, weights not yet filled in."""
    import megatron.core.pipeline_parallel.schedules  # noqa: F401  (loaded before the stand-ins are placed)

    cpu_compat.apply()
    config = transformer_config(model, recipe)
    with cpu_compat.cuda_names():
        policy = PolicyModel(
            config=config,
            transformer_layer_spec=layer_spec(config, recipe.learner.packing),
            vocab_size=model.padded_vocab(recipe.learner.tp),
            max_sequence_length=model.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type="none" if use_own_attention(recipe.learner.packing) else "rope",
            rotary_base=int(model.rope.theta),
            hf=model,
        )
    policy.deterministic = recipe.learner.deterministic
    _mark_shards(policy)
    return policy


def _mark_shards(policy: PolicyModel) -> None:
    """Tell Megatron which parameters TP divides.

    It does so itself when it initialises weights, which we skip. Without the mark the gradient norm counts a sharded
    parameter on the first TP rank only, and clipping goes wrong (tensor_parallel/layers.py:94 of 0.16.1).
    """
    parameters = dict(policy.named_parameters())
    for entry in stage_entries(policy.hf, parameters):
        axis, parameter = entry.pieces[0].axis, parameters[entry.parameter]
        if axis is not None and not getattr(parameter, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(parameter, True, axis, 1)


class PolicyModel(GPTModel):
    """GPTModel whose last stage returns log-probs, entropies and the policy loss at chosen rows instead of logits.

    From 0.18 on GPTModel.forward takes an `output_processor` that is handed the hidden states; before, `_postprocess`
    is overridden. Which of the two is used depends on the signature only. Either way the fused head runs as the
    forward of `output_layer`, so that whoever hooks that module is called: DDP waits there for weights that are
    still being gathered.

    Args:
        hf: the model's shape.
        **kwargs: GPTModel's.
    """

    def __init__(self, *, hf: HfModel, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hf = hf
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.inverse_frequencies = hf.rope.inverse_frequencies(hf.head_dim).to(device)
        if hasattr(self, "rotary_pos_emb"):  # Transformer Engine path: same frequencies, Megatron applies them
            self.rotary_pos_emb.inv_freq = self.inverse_frequencies
        self.deterministic = True
        """Whether the sums of attention's backward have a fixed order."""
        self.announce = False
        """Whether DDP counts gradients as they come (overlap): that of the head's weight is in main_grad already, but
        the hook on the weight has to be called."""
        self.head: HeadFunction = self._fused_head
        """Scores the rows of a step: another one may be set, to measure what the fused one gains."""
        self._head_rows: HeadRows | None = None
        if self.post_process:
            self._logits = self.output_layer.forward
            self.output_layer.forward = self._output

    def pack(self, forest: mk.TreePlan) -> PackedRows:
        """Packing description of a micro-batch."""
        return packed_rows(
            forest, self.inverse_frequencies, self.config.params_dtype, deterministic=self.deterministic
        )

    def score(self, tokens: torch.Tensor, packed: PackedRows, head: HeadRows, *, through: torch.nn.Module) -> Any:
        """Forward of `tokens [1, T]`: a HeadOutput on the last stage, hidden states before it.

        Args:
            through: this model or the DDP wrapper around it, which is the one called.
        """
        inputs = {"input_ids": tokens, "position_ids": None, "attention_mask": None, "packed_seq_params": packed}
        self._head_rows = head
        try:
            if takes_output_processor(type(self)):
                return through(**inputs, output_processor=self._process_output, output_processor_context=head)
            return through(**inputs)
        finally:
            self._head_rows = None

    def _process_output(self, *, hidden_states: torch.Tensor, **_: Any) -> HeadOutput:
        return self._head(hidden_states)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._head_rows is None or kwargs.get("output_processor") is not None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        return self._head(hidden_states) if self.post_process else hidden_states

    def _head(self, hidden: torch.Tensor) -> HeadOutput:
        """HeadOutput from the last layer's `[T, 1, D]`, or `[T / tp, 1, D]` under sequence parallelism."""
        tied = self.share_embeddings_and_output_weights
        out: HeadOutput = self.output_layer(hidden, weight=self.shared_embedding_or_output_weight() if tied else None)
        return out

    def _output(self, hidden: torch.Tensor, weight: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Stands for `output_layer.forward`: the fused head while `score` runs, logits otherwise."""
        if self._head_rows is None:
            return self._logits(hidden, weight, *args, **kwargs)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return self.head(hidden[:, 0], self.output_layer.weight if weight is None else weight, self._head_rows)

    def _fused_head(self, hidden: torch.Tensor, weight: torch.Tensor, head: HeadRows) -> HeadOutput:
        common: dict[str, Any] = {
            "rows": head.rows,
            "temperature": head.temperature,
            "vocab_size": head.vocab_size,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "vocab_start": weight.shape[0] * parallel_state.get_tensor_model_parallel_rank(),
        }
        loss = head.loss
        if loss is None:
            logp, entropy = mk.linear_logprob(hidden, weight, head.target, entropy=True, **common)
            assert entropy is not None
            return HeadOutput(logp, entropy.detach(), None, {})
        found = mk.linear_policy_loss(
            hidden,
            weight,
            head.target,
            loss.old_logp,
            loss.advantage,
            loss.seq,
            denom=loss.denom,
            spec=loss.spec,
            rollout_logp=loss.rollout_logp,
            ref_logp=loss.ref_logp,
            main_grad=weight.main_grad,  # type: ignore[attr-defined]  # DDP's fp32 buffer
            grad_scale=self._loss_factor(hidden.device),
            **common,
        )
        value = _announce(found.loss, weight) if self.announce else found.loss
        return HeadOutput(found.logp, found.entropy, value, found.metrics)

    def _loss_factor(self, device: torch.device) -> float:
        """What the schedule multiplies a loss by (`calculate_per_token_loss`: by nothing else).

        A loss scaler's factor lies on the device and is read there: the one wait that it costs.
        """
        scale = self.config.grad_scale_func
        return 1.0 if scale is None else float(scale(torch.ones(1, device=device)))


class _Announce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.like = (weight.shape, weight.dtype, weight.device)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros((), dtype=dtype, device=device).expand(shape)


def _announce(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loss, whose backward gives the weight a gradient of zeros."""
    out: torch.Tensor = _Announce.apply(loss, weight)
    return out


def takes_output_processor(model_class: type[Any]) -> bool:
    """Whether this GPTModel's forward has the hook that replaces overriding `_postprocess`."""
    return "output_processor" in inspect.signature(model_class.forward).parameters
