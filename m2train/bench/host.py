"""Boots a worker, if need be on the modules of another build: `python -P host.py [SITE]`.

SITE holds m2kernels and m2train of the commit that is measured; the harness, m2train.bench, is always the one beside
this file, so that both sides of a comparison are measured by the same code. Imports nothing of the package itself.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def use_site(site: Path) -> None:
    """Put a build in front of everything else, an editable installation's import hooks included.

    Raises:
        SystemExit: the build is not what would be imported.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith(("_editable", "__editable__"))]
    sys.path.insert(0, str(site))
    for name in ("m2kernels", "m2train"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(site.resolve()):
            raise SystemExit(f"m2bench worker: {name} would come from {spec and spec.origin}, not from {site}")


def use_this_harness() -> None:
    """Make m2train.bench the package beside this file, whatever m2train is."""
    spec = importlib.util.spec_from_file_location(
        "m2train.bench", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None and spec.loader is not None
    import m2train

    module = importlib.util.module_from_spec(spec)
    sys.modules["m2train.bench"] = module
    spec.loader.exec_module(module)
    m2train.bench = module  # type: ignore[attr-defined]


def main() -> None:
    """Boot and serve."""
    if len(sys.argv) > 1:
        use_site(Path(sys.argv[1]))
    use_this_harness()
    from m2train.bench.worker import serve

    serve()


if __name__ == "__main__":
    main()
