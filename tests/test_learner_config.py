"""What is refused, the schedule, and what we rely on in Megatron-core."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
sys.path.insert(0, str(Path(__file__).parent / "dist"))

import megatron.core  # noqa: E402
from learner_models import write_model  # noqa: E402

import m2kernels as mk  # noqa: E402
from m2train.config import ConfigError, parse  # noqa: E402
from m2train.learner import spec  # noqa: E402
from m2train.learner.attention import ThdCoreAttention, packed_rows  # noqa: E402
from m2train.learner.hf import layer_entries  # noqa: E402
from m2train.learner.hf_config import read_hf_config  # noqa: E402
from m2train.learner.model import PolicyModel, check_megatron_keys, takes_output_processor, transformer_config  # noqa: E402
from m2train.learner.schedule import learning_rate  # noqa: E402

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 64,
}


def read(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    return read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_models_that_are_not_trained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_old_and_new_rope_entries(tmp_path: Path) -> None:
    assert read(tmp_path, rope_theta=5e5).rope.theta == 5e5
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).rope.theta == 1e6
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 2.0}).rope
    torch.testing.assert_close(linear.inverse_frequencies(8), read(tmp_path).rope.inverse_frequencies(8) / 2)


def test_padded_vocabulary_does_not_depend_on_tp(tmp_path: Path) -> None:
    model = read(tmp_path)
    assert {model.padded_vocab(tp) for tp in (1, 2, 4, 8)} == {256}
    assert model.padded_vocab(3) % 3 == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_methods_std": 0.1}, "did you mean megatron.init_method_std"),
        ({"num_layers_in_first_pipeline_stage": 1}, "cannot be set: the learner"),
        ({"window_size": [64, 0]}, "config.json of the model"),
        ({"tensor_model_parallel_size": 2}, "learner.tp"),
        ({"calculate_per_token_loss": False}, "cannot be set"),
    ],
)
def test_megatron_keys(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_megatron_keys(parse({"megatron": settings}))


def test_megatron_keys_pass_through(tmp_path: Path) -> None:
    config = transformer_config(
        read(tmp_path), parse({"megatron": {"distribute_saved_activations": False, "init_method_std": 0.5}})
    )
    assert config.init_method_std == 0.5
    with pytest.raises(ConfigError, match="megatron"):
        transformer_config(read(tmp_path), parse({"megatron": {"fp16": True}, "learner": {"dtype": "bfloat16"}}))


def rates(n: int, **learner: Any) -> list[float]:
    config = parse({"learner": {"lr": 1.0} | learner}).learner
    return [learning_rate(i, n, config) for i in range(n)]


def test_schedules() -> None:
    assert rates(4) == [1.0] * 4
    assert rates(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert rates(5, lr_schedule="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(5, lr_schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
    assert rates(5, lr_schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    beyond = parse({"learner": {"lr": 1.0, "lr_schedule": "linear", "min_lr": 0.1}}).learner
    assert learning_rate(99, 5, beyond) == pytest.approx(0.1)
    assert rates(1, lr_schedule="cosine", warmup_steps=1) == [1.0]


def test_rope_positions_restart() -> None:
    packed = packed_rows(mk.plan_tree([[1] * 3, [2] * 5, [3]]), torch.tensor([1.0, 0.1]), torch.float32)
    position = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0]).float()
    torch.testing.assert_close(packed.cos[:, 0], torch.cos(position[:, None] * torch.tensor([1.0, 0.1])))
    assert packed.cu_seqlens_q.tolist() == [0, 3, 8, 9] and packed.max_seqlen_q == 5
    shared = packed_rows(mk.plan_tree([[1, 2], [1, 3, 4]]), torch.tensor([1.0, 0.1]), torch.float32)
    assert shared.cu_seqlens_q is None
    torch.testing.assert_close(shared.sin[:, 0, 0], torch.tensor([0.0, 1.0, 2.0, 1.0]).sin())


@pytest.mark.parametrize("fixed", [True, False])
def test_the_order_of_sums_reaches_attention(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = mk.tree_attention
    monkeypatch.setattr(mk, "tree_attention", lambda *a, **k: seen.append(k["deterministic"]) or real(*a, **k))
    packed = packed_rows(mk.plan_tree([[1, 2], [1, 3]]), torch.ones(8), torch.float32, deterministic=fixed)
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    ThdCoreAttention(SimpleNamespace(kv_channels=16))(q, k, k, packed_seq_params=packed)
    assert seen == [fixed]


def test_llama3_rope_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = write_model(tmp_path / "m", "llama")
    want = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    torch.testing.assert_close(read_hf_config(folder).rope.inverse_frequencies(16), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", ["tree", "auto", "varlen", "none"])
def test_transformer_engine_layers(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spec is asked for as the installed Megatron offers it; core attention is ours where there may be trees."""
    real = inspect.signature(spec.get_gpt_layer_with_transformer_engine_spec)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        asked = real.bind(*args, **kwargs).arguments
        assert asked == {"qk_layernorm": True}
        attention = SimpleNamespace(submodules=SimpleNamespace(core_attention="theirs"))
        return SimpleNamespace(submodules=SimpleNamespace(self_attention=attention))

    monkeypatch.setattr(spec, "use_transformer_engine", lambda: True)
    monkeypatch.setattr(spec, "get_gpt_layer_with_transformer_engine_spec", stand_in)
    config: Any = SimpleNamespace(qk_layernorm=True)
    core = spec.layer_spec(config, packing).submodules.self_attention.submodules.core_attention
    assert core is ThdCoreAttention if packing in ("tree", "auto") else core == "theirs"


def test_names_of_fused_norms_are_those_of_the_installed_megatron(tmp_path: Path) -> None:
    """Transformer Engine keeps a norm's weight in the linear layer behind it; Megatron lists the names to convert."""
    text = (Path(megatron.core.__file__).parent / "post_training/modelopt/gpt/state_dict_hooks.py").read_text()
    names = {
        norm: fused
        for fused, norm in re.findall(r'\("([\w.]*layer_norm_weight)",\s*"([\w.]*layernorm.weight)"\)', text)
    }
    model = read(tmp_path)
    plain, fused = ([e.parameter for e in layer_entries(model, 1, 0, fused)] for fused in (False, True))
    here = "decoder.layers.0."
    assert fused == [here + names.get(name.removeprefix(here), name.removeprefix(here)) for name in plain]
    assert sum(a != b for a, b in zip(plain, fused, strict=True)) == 2


def test_hooks_in_installed_megatron() -> None:
    """Either GPTModel.forward has `output_processor`, or `_postprocess` is there to override, called by keyword."""
    from megatron.core.models.gpt import GPTModel

    if not takes_output_processor(GPTModel):
        parameters = inspect.signature(GPTModel._postprocess).parameters
        assert list(parameters)[1] == "hidden_states"
        assert "return self._postprocess(" in inspect.getsource(GPTModel.forward)


def test_output_processor_is_used_where_it_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of 0.18 and later, by a stand-in: forward hands the processor to `_postprocess`, which calls it."""
    from megatron.core.models.gpt import GPTModel

    class Newer:
        def forward(
            self, input_ids: Any, position_ids: Any, attention_mask: Any, *, output_processor: Any = None
        ) -> None: ...

    assert takes_output_processor(Newer)
    seen: dict[str, Any] = {}

    def postprocess(self: Any, hidden_states: Any, *, output_processor: Any, output_processor_context: Any) -> Any:
        seen["postprocess"] = hidden_states
        return output_processor(
            hidden_states=hidden_states,
            output_layer=None,
            output_weight=None,
            labels=None,
            context=output_processor_context,
        )

    monkeypatch.setattr(GPTModel, "_postprocess", postprocess)

    class Model(PolicyModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, *, output_processor: Any, output_processor_context: Any, **inputs: Any) -> Any:
            seen.update(inputs)
            return self._postprocess(
                hidden_states="hidden",
                output_processor=output_processor,
                output_processor_context=output_processor_context,
            )

        def _head(self, hidden: Any) -> Any:
            return hidden, self._head_rows

    model = Model()
    assert model.score("tokens", "packed", "rows", through=model) == ("hidden", "rows")  # type: ignore[arg-type]
    assert seen == {
        "input_ids": "tokens",
        "position_ids": None,
        "attention_mask": None,
        "packed_seq_params": "packed",
        "postprocess": "hidden",
    }
