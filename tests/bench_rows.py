"""Rows, cases and fake clocks that the tests of m2bench share."""

from m2train.bench.schema import Identity, Numerics, Physics, Ratio, Row, Timing, row_id

CASE_FILE = '''
import torch
from m2train.bench.case import Case, Ceiling, Skip, SlowStart, Subset, case


def double(x):
    return 2 * x


def off(x):
    return 2 * x + 0.01


@case("tiny", shapes={"small": {"n": 64}, "large": {"n": 4096}}, nightly=("large",))
def tiny(s):
    """Twice a vector."""
    x = s.randn(s.n)
    if s.name == "large":
        raise Skip("too large for a test")
    return Case(
        oracle=double, inputs=(x,), grad=s.randn(s.n),
        impls={"m2": double, "torch": lambda x: x + x, "off": off, "gone": Skip("not installed"),
               "slow": SlowStart(double), "bound": Ceiling(lambda x: 1 * x)},
        bytes={"fwd": 8.0 * s.n, "both": 16.0 * s.n}, flops=1.0 * s.n,
        subset=Subset(inputs=lambda t: (t[0][:8],), output=lambda y: y[:8]),
    )
'''


def make_row(*, median=1e-3, impl="m2", status="ok", created="2026-01-01T00:00:00.000+00:00", gpu=None, **changes):
    """A row; `changes` are of its identity."""
    identity = Identity(
        **{
            "case": "policy_loss",
            "impl": impl,
            "shape": "32k",
            "dtype": "float32",
            "phase": "both",
            "cache": "cold",
            "timer": "cpu",
            "device": "cpu",
            "threads": 1,
        }
        | changes
    )
    timing = None
    if status == "ok":
        timing = Timing(
            unit="s",
            median=median,
            low=median * 0.99,
            high=median * 1.01,
            p10=median * 0.98,
            p90=median * 1.02,
            samples=[[median * 0.995, median * 1.005], [median * 0.99, median * 1.01], [median, median]],
            launches=4,
            processes=3,
            stopped="converged",
            ratio=None if impl == "torch" else Ratio(to="torch", value=0.5, low=0.48, high=0.52),
        )
    machine = {"id": "abc", "cpu": "Test CPU", "cores": 2, "cache_bytes": 2**20, "load": 0.1}
    return Row(
        id=row_id(identity, created, "abc"),
        created=created,
        status=status,
        ours=impl == "m2",
        reason="" if status == "ok" else f"because of <b>{impl}</b>",
        identity=identity,
        timing=timing,
        physics=Physics(
            bytes=1e6,
            flops=1e6,
            bandwidth=1e10,
            peak=1e11,
            floor_s=1e-6,
            sol_s=1e-4,
            sol_percent=10.0,
            bound="memory",
        ),
        numerics=Numerics(verdict="ok", error=1e-8, error_ratio=1.1, bitwise_repeat=True, batch_invariant=False),
        machine=machine | ({"gpu": {"name": gpu}} if gpu else {}),
        build={"sha": "0123456789abcdef", "dirty": False, "packages": {"torch": "2.13.0"}, "python": "3.11"},
        repro="m2bench run policy_loss/m2/32k/both",
    )
