"""The ops of an installed wheel on small inputs with known results; needs torch and nothing else.

    python -P packaging/smoke.py SITE cpu|cuda

SITE is the folder that the wheel was installed into: an m2kernels from elsewhere would prove nothing. `cuda` runs the
CUDA kernels too, and fails where they cannot run.
"""

import importlib.util
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path


def main() -> int:
    """1 if m2kernels comes from elsewhere, or CUDA is asked for and cannot run."""
    site, device = Path(sys.argv[1]).resolve(), sys.argv[2]
    # The finder of an editable install goes before the path, and would bring that checkout's m2kernels.
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter, PathFinder)]
    spec = importlib.util.find_spec("m2kernels")
    if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(site):
        print(f"smoke: m2kernels would come from {spec and spec.origin}; expected it below {site}")
        return 1
    import m2kernels as mk

    for name in ("triton", "megatron", "vllm", "m2train.learner"):
        assert name not in sys.modules, f"import m2kernels loaded {name}"
    report = mk.doctor()
    del report["environment"]
    print("ops:", {op: [name for name, why in backends.items() if why is None] for op, backends in report.items()})
    if device == "cuda":
        reasons = {op: report[op]["cuda"] for op in ("group_advantage", "policy_loss")}
        if any(reasons.values()):
            print(f"smoke: the CUDA kernels cannot run here: {reasons}")
            return 1
    for backend in dict.fromkeys(("cpu", device)):
        ops(backend)
    assert sorted(map(sorted, mk.pack_balanced([3.0, 1.0, 2.0], 2))) == [[0], [1, 2]]
    return 0


def ops(backend: str) -> None:
    """Two groups of two rewards, and a loss whose ratios are 1."""
    import torch

    import m2kernels as mk

    reward = torch.tensor([1.0, 0.0, 0.5, 0.5], device=backend)
    advantage = mk.group_advantage(reward, torch.tensor([0, 0, 1, 1], device=backend), backend=backend)
    assert advantage.tolist() == [0.5, -0.5, 0.0, 0.0], advantage
    logp = torch.tensor([-1.0, -2.0, -1.5], device=backend, requires_grad=True)
    seq = torch.tensor([0, 0, 1], device=backend)
    out = mk.policy_loss(logp, logp.detach(), advantage[:2], seq, denom=2.0, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert grad.tolist() == [-0.25, -0.25, 0.25], grad
    print(f"{backend}: group_advantage and policy_loss are right")


if __name__ == "__main__":
    raise SystemExit(main())
