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
