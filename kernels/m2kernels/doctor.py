"""What this machine can run: per op and backend, available or the reason why not."""

import importlib
import importlib.util

from m2kernels import _native
from m2kernels._backend import BACKENDS
from m2kernels._head import HEAD_BACKENDS
from m2kernels.tree_attention import TREE_BACKENDS

OPS = {
    "group_advantage": BACKENDS,
    "policy_loss": BACKENDS,
    "linear_logprob": HEAD_BACKENDS,
    "linear_policy_loss": HEAD_BACKENDS,
    "tree_attention": TREE_BACKENDS,
    "logprob": HEAD_BACKENDS,
}
"""The tensor ops, and the backends that each one has."""


def doctor() -> dict[str, dict[str, str | None]]:
    """Report every op and backend of this installation; nothing is run on a device.

    Returns:
        op -> backend -> None when available, else the reason, plus ``"environment"`` -> name ->
        version. All plain strings and None: ``json.dumps`` takes it as it is.
    """
    report: dict[str, dict[str, str | None]] = {}
    for op, backends in OPS.items():
        reason = importlib.import_module(f"m2kernels.{op}").unsupported_reason
        report[op] = {backend: reason(backend) for backend in backends}
    planner = importlib.util.find_spec("m2kernels._planner")
    report["pack_balanced"] = {"cpu": None if planner else "_planner is not installed"}
    report["plan_tree"] = {"cpu": None if planner else "_planner is not installed"}
    report["environment"] = _native.environment()
    return report
