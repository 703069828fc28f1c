"""Weights pass through shared memory only where two exports fit."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from m2train import exports, preflight
from m2train.config import Recipe, parse
from m2train.doctor import diagnose, render
from m2train.exports import export_place, open_export_folder
from m2train.models import ModelError, weights_size

Usage = namedtuple("Usage", "total used free")


def recipe(model: Path, dtype: str = "float32", **rollout: Any) -> Recipe:
    rollout |= {"dtype": dtype, "max_context_tokens": 128}
    learner = {"dtype": "float32"}
    return parse(
        {"model": {"path": str(model)}, "rollout": rollout, "learner": learner, "algo": {"max_new_tokens": 64}}
    )


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stands for /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(exports, "SHARED_MEMORY", folder)
    return folder


def leave(patch: pytest.MonkeyPatch, free: int) -> None:
    patch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, free))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_memory_must_hold_two_exports(
    dtype: str, tiny_model: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = recipe(tiny_model, dtype)
    size = weights_size(tiny_model, settings.export_dtype)
    leave(monkeypatch, 2 * size)
    folder, line = open_export_folder(tmp_path / "run", settings, tiny_model)
    assert folder.parent == shared and f"weights pass through {shared}" in line
    (folder / "left by a killed run").write_text("x")
    leave(monkeypatch, 2 * size - 1)
    (tmp_path / "run").mkdir()
    folder, line = open_export_folder(tmp_path / "run", settings, tiny_model)
    assert folder.parent == tmp_path / "run" and f"the run directory: {shared} has" in line
    assert list(shared.iterdir()) == [] and list(folder.iterdir()) == []


def test_the_size_is_that_of_the_file(tiny_model: Path) -> None:
    file = (tiny_model / "model.safetensors").stat().st_size
    assert weights_size(tiny_model, "float32") == file
    header = 8 + int.from_bytes((tiny_model / "model.safetensors").read_bytes()[:8], "little")
    assert weights_size(tiny_model, "bfloat16") == header + (file - header) // 2


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]"])
def test_weights_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        weights_size(tmp_path, "float32")


def test_engines_elsewhere_get_the_run_directory(
    tiny_model: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, 2**40)
    assert export_place(recipe(tiny_model), tiny_model)[0] == shared
    place, line = export_place(recipe(tiny_model, urls=["http://node1:8000"]), tiny_model)
    assert place is None and "may be on other machines" in line
    shared.chmod(0o500)
    monkeypatch.setattr(exports.os, "access", lambda *_: False)  # root may write anywhere
    assert export_place(recipe(tiny_model), tiny_model)[1].endswith(f"{shared} cannot be written")


def test_doctor_says_which(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (preflight._installed("vllm") and preflight._installed("megatron.core")):
        pytest.skip("vllm and megatron-core are not both installed")
    leave(monkeypatch, 64 * 2**20)
    assert "recipe    weights pass through /dev/shm: 0.07 GB free" in render(diagnose(recipe(tiny_model)))
    leave(monkeypatch, 2**10)
    text = render(diagnose(recipe(tiny_model)))
    assert "recipe    can run here" in text
    assert "recipe    weights pass through the run directory: /dev/shm has 0.00 GB free" in text
