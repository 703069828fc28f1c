"""Cheats and mistakes are refused, each by its own guard, and honest code passes."""

import dataclasses

import pytest
import torch

from m2train.bench import check, faults, launch, selftest
from m2train.bench.case import Case, CaseSpec, Setup, SlowStart, Subset
from m2train.bench.check import Checker, Guards
from m2train.bench.memory import measure_memory, with_share
from m2train.bench.schema import Memory
from m2train.bench.timers import Timer

CPU = torch.device("cpu")
PLANTS = {"wrong": faults.wrong, "late": faults.late, "cached": faults.cached}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_fault_is_refused_by_its_guard(name):
    spec = faults.spec_of(PLANTS[name])
    assert selftest.check_planted(spec, CPU, Guards()) is not None
    others = {other: other == name for other in PLANTS}
    assert selftest.check_planted(faults.spec_of(PLANTS[name]), CPU, Guards(**others)) is not None


@pytest.mark.parametrize("name", PLANTS)
def test_planted_fault_passes_without_its_guard(name):
    """So the guard is what catches it."""
    spec = faults.spec_of(PLANTS[name])
    assert selftest.check_planted(spec, CPU, Guards(**{name: False})) is None


def spec_with(fn, *, oracle=None, **options):
    """A case of y = 2 x with an implementation `fn`."""

    def build(s: Setup):
        return Case(
            oracle=oracle or (lambda x: 2 * x),
            inputs=(s.randn(40, 3),),
            impls={"torch": lambda x: x + x, "m2": fn},
            **options,
        )

    return CaseSpec(name="x", build=build, shapes={"a": {}}, dtypes=(torch.float32,), smoke=("a",))


def verdict(fn, *, phase="fwd", name="m2", **options):
    spec = spec_with(fn, **options)
    case = spec.make("a", torch.float32, CPU)
    return Checker(case, spec.make("a", torch.float32, CPU, seed=1), phase).run(name)


def test_honest_code_passes():
    found = verdict(lambda x: 2 * x, subset=Subset(inputs=lambda t: (t[0][:7],), output=lambda y: y[:7]))
    assert found.verdict == "ok" and found.bitwise_repeat and found.batch_invariant
    assert found.error == 0.0 and found.error_ratio is None  # doubling is exact: the yardstick has no error


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: x.mul_(2), "writes to its inputs"),
        (lambda x: torch.where(x > 0, 2 * x, float("nan")), "NaN"),
        (lambda x: (2 * x)[:5], r"\[5, 3\], not \[40, 3\]"),
        (lambda x: (2 * x, 2 * x), "2 results; the oracle has 1"),
    ],
)
def test_mistakes_are_refused(fn, reason):
    found = verdict(fn)
    assert found.verdict == "refused"
    assert pytest.importorskip("re").search(reason, found.reason)


def test_slow_launches_are_repeated_less(monkeypatch):
    """Ours once, a peer not at all: whether it repeats is then unknown, which is not the same as no."""
    calls = []

    def fn(x):
        calls.append(x)
        return 2 * x

    verdict(fn)
    usual = len(calls)
    calls.clear()
    monkeypatch.setattr(check, "SLOW_S", 0.0)
    assert verdict(fn).bitwise_repeat is True and len(calls) == usual - 1
    calls.clear()
    assert verdict(fn, ours=("torch",)).bitwise_repeat is None and len(calls) == usual - 2


def test_own_memory_is_beyond_results_and_what_the_case_allows():
    big = 32 << 20
    spec = CaseSpec(
        name="x",
        build=lambda s: Case(
            oracle=lambda x: x * 2,
            inputs=(torch.ones(1 << 20),),
            impls={"torch": lambda x: torch.ones(big // 4).mul_(2)[: len(x)].clone()},
            allowance={"fwd": 8 << 20},
        ),
        shapes={"a": {}},
        dtypes=(torch.float32,),
        smoke=("a",),
    )
    case = spec.make("a", torch.float32, CPU)
    found = measure_memory(case, case.impls["torch"], "fwd", CPU)
    assert found.peak is not None and found.results == 4 << 20 and found.own == found.peak - (12 << 20)
    assert big - (9 << 20) < found.own < big + (4 << 20)
    half = Memory(own=found.own // 2)
    assert with_share(half, found).own_share == pytest.approx(0.5, abs=0.01)
    assert with_share(Memory(own=1), None).own_share is None and with_share(Memory(), found).own_share is None


def test_wrong_gradient_is_refused():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return grad

    options = {"grad": torch.ones(40, 3)}
    assert verdict(Halved.apply, phase="fwd", **options).verdict == "ok"
    for phase in ("both", "bwd"):
        assert "of result 1" in verdict(Halved.apply, phase=phase, **options).reason


def test_wrong_baseline_is_refused():
    """It is everyone's yardstick; its own error must not be measured by itself."""
    found = verdict(lambda x: 2 * x, name="torch", oracle=lambda x: 2.1 * x)
    assert found.verdict == "refused"


def test_repeat_and_batch_are_reported_not_refused():
    calls = []

    def jitter(x):
        calls.append(1)
        return 2 * x * (1 + 1e-7 * (len(calls) % 2))

    found = verdict(jitter)
    assert found.verdict == "ok" and found.bitwise_repeat is False
    subset = Subset(inputs=lambda t: (t[0][:7],), output=lambda y: y[:7])
    found = verdict(lambda x: 2 * x * (1 + 1e-7 * (len(x) < 40)), subset=subset)
    assert found.verdict == "ok" and found.batch_invariant is False


def test_verify_decides_where_results_are_not_unique():
    """A list is refilled like a tensor, so that a cached result of it is noticed too."""
    kept = []

    def build(s: Setup):
        values = s.randint(100, 20).tolist()
        return Case(
            verify=lambda out, inputs: None if out == sorted(inputs[0]) else "not sorted",
            inputs=(values,),
            impls={
                "torch": sorted,
                "reverse": lambda v: sorted(v)[::-1],
                "cached": lambda v: kept.append(sorted(v)) or kept[0],
            },
            quality=lambda out: {"first": float(out[0])},
        )

    spec = CaseSpec(name="x", build=build, shapes={"a": {}}, dtypes=(torch.float32,), smoke=("a",))
    case = spec.make("a", torch.float32, CPU)
    checker = Checker(case, spec.make("a", torch.float32, CPU, seed=1), "fwd")
    before = list(case.inputs[0])
    good = checker.run("torch")
    assert good.verdict == "ok" and good.quality == {"first": float(min(before))}
    assert checker.run("reverse").reason == "not sorted"
    assert "does not follow the inputs" in checker.run("cached").reason
    assert case.inputs[0] == before  # the inputs are as they were


def test_unchecked_case_is_impossible():
    with pytest.raises(ValueError, match="nothing but a ceiling is timed unchecked"):
        Case(inputs=(), impls={"torch": abs})
    with pytest.raises(ValueError, match="none of the implementations"):
        Case(inputs=(), impls={"m2": abs}, oracle=abs)


class WorkClock(Timer):
    """Counts elements of work instead of time: what a perfectly quiet machine would say."""

    name = "cpu"

    def time(self, launches):
        return sum(one().numel() for one in launches) / len(launches) * 1e-9


def test_slowdown_of_three_percent_is_found(monkeypatch):
    monkeypatch.setattr(selftest, "make_timer", lambda name, device: WorkClock())
    found = {o.name: o for o in selftest.selftest(CPU, seconds=0.01)}
    assert all(o.caught for o in found.values()), found
    assert "SLOWER" in found["slowdown"].detail and "SAME" in found["A/A"].detail
    for fault in selftest.FAULTS:
        missed = [o.name for o in selftest.selftest(CPU, fault, seconds=0.01) if not o.caught]
        assert missed == [fault]


def test_ring_exceeds_the_cache():
    case = spec_with(lambda x: 2 * x).make("a", torch.float32, CPU)
    size = launch.input_bytes(case.inputs)
    ring, note = launch.make_ring(case, "cold", 10 * size)
    assert len(ring) * size > 30 * size and not note
    assert len({inputs[0].data_ptr() for inputs in ring}) == len(ring)
    assert len(launch.make_ring(case, "warm", 10 * size)[0]) == 1
    ring, note = launch.make_ring(case, "cold", 10_000 * size)
    assert len(ring) == launch.MAX_RING and "short of 3 x" in note
    some = dataclasses.replace(case, least_read=size // 4)  # the others' layouts of the same data keep no cache busy
    ring, note = launch.make_ring(some, "cold", 10 * size)
    assert len(ring) * (size // 4) > 30 * size and not note


def test_backward_is_timed_without_its_forward():
    seen = []

    def fn(x):
        seen.append("forward")
        return 2 * x

    case = spec_with(fn, grad=torch.ones(40, 3)).make("a", torch.float32, CPU)
    ring, _ = launch.make_ring(case, "warm", 0)
    launches = launch.prepare(case, fn, ring, "bwd")
    launch.arm(launches)
    seen.append("clock")
    (grad,) = launches[0]()
    assert seen == ["forward", "clock"] and torch.equal(grad, torch.full((40, 3), 2.0))


def test_memory_of_what_is_saved():
    def fn(x):
        return (x.exp() * 2).sum(-1)

    spec = spec_with(fn, oracle=lambda x: (x.exp() * 2).sum(-1), grad=torch.ones(40))
    case = spec.make("a", torch.float32, CPU)
    found = measure_memory(case, fn, "both", CPU)
    assert found.saved_for_backward == 40 * 3 * 4  # exp keeps its result; inputs do not count
    assert found.peak is None or found.peak >= 0
    assert found.results == 40 * 4 + 40 * 3 * 4  # the result and the gradient


def test_slow_start_is_called_like_a_function():
    case = spec_with(SlowStart(lambda x: 2 * x)).make("a", torch.float32, CPU)
    assert launch.callable_of(case, "m2")(3) == 6


def test_refill_refuses_other_shapes():
    a, b = torch.zeros(3), torch.ones(4)
    assert not check.can_refill((a,), (b,)) and not check.can_refill((5,), (6,))
    assert not check.can_refill(([1],), ([1, 2],)) and check.can_refill((a, 5), (a + 1, 5))


def test_a_case_whose_results_could_be_cached_unseen_is_refused():
    """Not skipped: the seed changes the shape, so that no other values can be put into the same inputs."""
    spec = spec_with(lambda x: 2 * x)
    build = lambda s: Case(  # noqa: E731
        oracle=lambda x: 2 * x, inputs=(s.randn(3 + int(s.randint(9, 1))),), impls={"torch": lambda x: x + x}
    )
    spec = dataclasses.replace(spec, build=build)
    with pytest.raises(ValueError, match="pure=False"):
        Checker(spec.make("a", torch.float32, CPU), spec.make("a", torch.float32, CPU, seed=1), "fwd")


def test_a_wrong_baseline_of_small_results_is_refused():
    """Its limit is relative to the oracle's values, however small they are."""
    found = verdict(lambda x: 2e-6 * x, oracle=lambda x: 2e-6 * x, name="torch")
    assert found.verdict == "refused"  # x + x
