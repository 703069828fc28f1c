"""What this machine can run: per op and backend, available or the reason why not."""

import importlib
import importlib.util

from m2kernels import _native
from m2kernels._backend import BACKENDS

TENSOR_OPS = ("group_advantage", "policy_loss", "tree_attention")


def doctor() -> dict[str, dict[str, str | None]]:
    """Report every op and backend of this installation; nothing is run on a device.

    Returns:
        op -> backend -> None when available, else the reason, plus ``"environment"`` -> name ->
        version. All plain strings and None: ``json.dumps`` takes it as it is.
    """
    report: dict[str, dict[str, str | None]] = {}
    for op in TENSOR_OPS:
        reason = importlib.import_module(f"m2kernels.{op}").unsupported_reason
        report[op] = {backend: reason(backend) for backend in BACKENDS}
    planner = importlib.util.find_spec("m2kernels._planner")
    report["pack_balanced"] = {"cpu": None if planner else "_planner is not installed"}
    report["plan_tree"] = {"cpu": None if planner else "_planner is not installed"}
    report["environment"] = _native.environment()
    return report
