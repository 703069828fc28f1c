"""m2kernels.doctor, the compiled libraries' promises, and the package's imports."""

import ast
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import torch

import m2kernels as mk
from m2kernels import _native, _triton
from m2kernels._backend import BACKENDS, choose_backend
from m2kernels._triton import interpreting, triton_reason


def test_report_is_json_and_names_every_backend():
    report = json.loads(json.dumps(mk.doctor()))
    for op in ("group_advantage", "policy_loss"):
        assert set(report[op]) == set(BACKENDS)
        assert report[op]["torch"] is None
        assert report[op]["cpu"] is None, "the CPU kernels must be built for the tests"
        if torch.version.cuda is None:
            assert report[op]["cuda"] == "this torch is built without CUDA"
            assert (report[op]["triton"] is None) == (interpreting() and triton_reason() is None)
    assert report["pack_balanced"] == report["plan_tree"] == {"cpu": None}
    assert report["environment"]["torch"] == torch.__version__
    assert "triton" in report["environment"]
    assert report["environment"]["cpu_isa"] in ("baseline", "avx2", "avx512")


def test_auto_takes_the_first_backend_without_a_reason():
    reasons = {"cuda": "no device", "cpu": None, "torch": None}
    assert choose_backend("op", "auto", reasons.get) == "cpu"
    with pytest.raises(ValueError, match="'cuda' cannot run: no device; use backend='auto'"):
        choose_backend("op", "cuda", reasons.get)
    with pytest.raises(ValueError, match="no backend can run"):
        choose_backend("op", "auto", lambda name: "never")


def test_kernels_import_no_trainer_and_no_optional_package_at_module_level():
    folder = pathlib.Path(mk.__file__).parent
    assert not (folder.parent / "__init__.py").exists() or folder.parent.name != "kernels"
    plain = {"m2kernels", "torch", "numpy"} | sys.stdlib_module_names
    for path in sorted(folder.glob("*.py")):
        # Modules of Triton kernels are themselves imported only when an op needs them.
        allowed = plain | ({"triton"} if re.fullmatch(r"_\w+_triton(_kernels)?", path.stem) else set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert "m2train" not in roots, path
            at_module_level = getattr(node, "col_offset", 1) == 0
            assert not at_module_level or roots <= allowed, path
            if "triton" not in allowed and at_module_level:
                assert not any(re.search(r"\._\w+_triton", name) for name in names), path


@pytest.mark.parametrize("name", ["_ops_cpu", "_ops_cuda"])
def test_libraries_use_the_stable_abi_only(name):
    spec = importlib.util.find_spec(f"m2kernels.{name}")
    if spec is None and name == "_ops_cuda":
        pytest.skip("built without nvcc")
    run = subprocess.run(["nm", "-DC", spec.origin], capture_output=True, text=True, check=True)
    undefined = [line.split(" U ")[1] for line in run.stdout.splitlines() if " U " in line]
    assert any(s.startswith(("torch_", "aoti_torch_")) for s in undefined)
    assert not [s for s in undefined if s.startswith(("at::", "c10::", "Py", "_Py", "torch::"))]
    needed = subprocess.run(["readelf", "-d", spec.origin], capture_output=True, text=True)
    assert "libtorch.so" in needed.stdout
    assert "cudart" not in needed.stdout and "libpython" not in needed.stdout


def test_version_is_the_project_s():
    project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert mk.__version__ == project["version"]


@pytest.mark.parametrize(
    ("driver", "capability", "cuda", "head"),
    [
        (13000, (9, 0), None, None),
        (12080, (9, 0), "the driver is for CUDA 12.8", None),
        (13010, (12, 0), "compute capability 12.0", "compute capability 12.0; the kernels need 9.0"),
        (13010, (8, 0), "compute capability 8.0", "compute capability 8.0; the kernels need 9.0"),
    ],
)
def test_kernels_are_for_the_gpu_and_the_driver_that_are_there(driver, capability, cuda, head, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(_native, "CUDA_ERROR", None)
    monkeypatch.setattr(_native, "cuda_runtime", lambda: 13000)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for found, wanted in ((_native._machine_reason("cuda"), cuda), (_triton.triton_head_reason(), head)):
        assert (found is None) if wanted is None else (found is not None and wanted in found), found
    assert triton_reason() is None, "the element-wise kernels run on any GPU from Ampere on"


@pytest.mark.skipif(_native.CUDA_ERROR is not None, reason=str(_native.CUDA_ERROR))
def test_the_linked_runtime_is_known_without_a_gpu():
    assert 12000 <= _native.cuda_runtime() < 20000
