"""`m2bench list`: what there is, and why some of it cannot run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from m2train.bench import peers, registry
from m2train.bench.case import CaseSpec, Skip, SlowStart


def listing(folder: Path, device: str) -> dict[str, Any]:
    """Cases with shapes, dtypes and implementations, and the peers; plain JSON values."""
    where = torch.device(device)
    return {
        "cases": {name: _case(spec, where) for name, spec in registry.load(folder).items()},
        "peers": {
            name: {"reason": peers.reason(name, where), "version": peers.version(name), "pin": entry.pin}
            for name, entry in peers.PEERS.items()
        },
    }


def _case(spec: CaseSpec, device: torch.device) -> dict[str, Any]:
    """Implementations are those at the first smoke shape: which ones there are may depend on the shape."""
    found: dict[str, Any] = {
        "about": spec.doc,
        "shapes": list(spec.shapes),
        "smoke": list(spec.smoke),
        "nightly": list(spec.nightly),
        "dtypes": [registry.dtype_name(dtype) for dtype in spec.dtypes],
    }
    try:
        case = spec.make((*spec.smoke, *spec.shapes)[0], spec.dtypes[0], device)
    except Skip as skip:
        return found | {"unsupported_reason": str(skip), "impls": {}}
    impls = {}
    for name, impl in case.impls.items():
        kind = "ours" if name in case.ours else "baseline" if name == case.baseline else "peer"
        kind = "ceiling" if name in case.ceilings else kind
        note = "takes seconds to get ready or to run" if isinstance(impl, SlowStart) else None
        impls[name] = {
            "kind": kind,
            "unsupported_reason": str(impl) if isinstance(impl, Skip) else None,
            "note": note,
        }
    return found | {"unsupported_reason": None, "impls": impls, "phases": list(case.all_phases())}


def render(found: dict[str, Any]) -> str:
    """The listing as text."""
    lines = []
    for name, case in found["cases"].items():
        lines.append(f"{name}: {case['about']}")
        if case["unsupported_reason"]:
            lines.append(f"  cannot run here: {case['unsupported_reason']}")
        marks = {shape: " (smoke)" for shape in case["smoke"]} | {shape: " (nightly)" for shape in case["nightly"]}
        lines.append("  shapes  " + ", ".join(shape + marks.get(shape, "") for shape in case["shapes"]))
        lines.append("  dtypes  " + ", ".join(case["dtypes"]))
        for impl, entry in case["impls"].items():
            state = entry["unsupported_reason"] or entry["note"] or "available"
            lines.append(f"  {entry['kind']:<8}  {impl}: {state}")
    lines.append("peers (optional, none is installed with m2train):")
    for name, entry in found["peers"].items():
        state = entry["reason"] or f"available, version {entry['version']}"
        lines.append(f"  {name}: {state}")
    return "\n".join(lines)
