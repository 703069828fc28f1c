"""Case files, selection, shapes, peers, recorded workloads."""

import json
from pathlib import Path

import pytest
import torch
from bench_rows import CASE_FILE
from runs import write_rollouts

import m2kernels as mk
from m2train.bench import ceilings, env, launch, models, peers, recorder, registry, shapes, steps
from m2train.bench.case import Case, CaseSpec, Ceiling, Setup, Skip, SlowStart, case, compiled
from m2train.bench.registry import Selector

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "bench_tiny.py").write_text(CASE_FILE)
    return registry.load(tmp_path)


def test_the_project_has_its_cases():
    specs = registry.load(ROOT / "benchmarks")
    names = {"policy_loss", "group_advantage", "packer", "weight_sync", "learner_step"} | set(SMALL)
    assert names <= specs.keys()
    for spec in specs.values():
        assert spec.doc and set(spec.smoke) <= set(spec.shapes)


HEADS = ("lm_head", "linear_policy_loss", "linear_nll")
SMALL = {
    "policy_loss": ("2k", "fwd"),
    "group_advantage": ("128", "fwd"),
    "packer": ("256x8", "fwd"),
    "tree_plan": ("8x6-44k", "fwd"),
    "tree_micro_batches": ("8x6-44k", "fwd"),
    "tree_attention": ("4x3-2k", "both"),
}
SMALL |= dict.fromkeys(HEADS, ("smollm2-135m-128-50pct", "fwd"))
SMALL_RUNS = [(name, *run) for name, run in SMALL.items()] + [("lm_head", "smollm2-135m-128-50pct-entropy", "fwd")]


@pytest.mark.parametrize(("name", "shape", "phase"), SMALL_RUNS)
def test_cases_are_right_at_a_small_shape(name, shape, phase):
    """Each of our implementations passes its check: a case that refuses everything would time nothing."""
    from m2train.bench.check import Checker

    spec = registry.load(ROOT / "benchmarks")[name]
    made = [spec.make(shape, spec.dtypes[0], CPU, seed=seed) for seed in (0, 1)]
    checker = Checker(made[0], made[1], phase)
    ours = [n for n in made[0].ours if callable(made[0].impls.get(n))]
    assert ours
    for impl in [*ours, made[0].baseline]:
        found = checker.run(impl)
        assert found.verdict == "ok", f"{impl}: {found.reason}"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lm_head", "smollm2-135m-128-50pct"),
        ("lm_head", "smollm2-135m-128-50pct-entropy"),
        ("linear_policy_loss", "smollm2-135m-128-50pct"),
    ],
)
def test_gemms_of_a_head_are_those_of_its_selected_rows(name, shape):
    """Nothing in m2bench checks a ceiling, so this does: three products, and results that fit the case's gradient."""
    made = registry.load(ROOT / "benchmarks")[name].make(shape, torch.float32, CPU)
    hidden, weight, target = made.inputs[:3]
    rows = hidden[: len(target)]
    assert 0 < len(target) < len(hidden) and made.ceilings == ("gemms",)
    results, grads = launch.launch(
        made, launch.callable_of(made, "gemms"), launch.as_leaves(made, made.inputs), "both"
    )
    z = rows @ weight.T
    upstream = made.grad if isinstance(made.grad, tuple) else (made.grad,)
    assert [x.shape for x in launch.floats(results)] == [g.shape for g in upstream]
    assert float(launch.floats(results)[0].flatten()[0].detach()) == pytest.approx(float(z[0, 0]), rel=1e-4)
    torch.testing.assert_close(grads[0][: len(target)], z @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads[1], z.T @ rows, rtol=1e-4, atol=1e-3)


def test_heads_are_asked_for_entropies():
    """The targets of speed are for log-probs with entropies, of all rows, at three sizes of three models."""
    shapes_of = registry.load(ROOT / "benchmarks")["lm_head"].shapes
    for model in ("qwen3-1.7b", "qwen3-8b", "qwen2.5-32b"):
        for tokens in (4096, 16384, 32768):
            assert shapes_of[f"{model}-{tokens}-100pct-entropy"]["entropy"]


def test_a_ceiling_is_neither_a_baseline_nor_ours():
    for options in ({"baseline": "bound"}, {"ours": ("bound",)}):
        with pytest.raises(ValueError, match="'bound' is a ceiling"):
            Case(impls={"torch": abs, "bound": Ceiling(abs)}, inputs=(), oracle=abs, **({"ours": ()} | options))


def test_no_cases_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv(registry.CASES_ENV, str(tmp_path))
    with pytest.raises(ValueError, match="no bench_.*--cases"):
        registry.cases_folder(None)
    assert registry.cases_folder(ROOT / "benchmarks") == ROOT / "benchmarks"


@pytest.mark.parametrize(
    ("pattern", "suite", "found"),
    [
        ("*", "smoke", ["small"]),
        ("tiny", "paper", ["small"]),
        ("tiny", "nightly", ["small", "large"]),
        ("tiny/*/large", "smoke", ["large"]),
        ("t*/m2", "smoke", ["small"]),
    ],
)
def test_select(tiny, pattern, suite, found):
    assert [shape for _, shape, _ in registry.select(tiny, [pattern], suite)] == found


@pytest.mark.parametrize(
    ("pattern", "suite", "message"),
    [
        ("nope", "smoke", "matches no case"),
        ("tiny/*/nope", "smoke", "matches no case"),
        ("a/b/c/d/e", "smoke", "expected case"),
        ("tiny//small", "smoke", "expected case"),
        ("tiny", "huge", "expected one of smoke"),
    ],
)
def test_select_mistakes(tiny, pattern, suite, message):
    with pytest.raises(ValueError, match=message):
        registry.select(tiny, [pattern], suite)


def test_implementations_and_phases(tiny):
    made = tiny["tiny"].make("small", torch.float32, CPU)
    runnable, skipped = registry.split_impls(made, Selector(), "smoke")
    assert runnable == ["m2", "torch", "off"]
    assert skipped["gone"] == "not installed" and "suite smoke" in skipped["slow"] and "ceiling" in skipped["bound"]
    assert registry.split_impls(made, Selector(impl="slow"), "smoke")[0] == ["torch", "slow"]  # with its baseline
    assert {"slow", "bound"} < set(registry.split_impls(made, Selector(), "paper")[0])
    with pytest.raises(ValueError, match="no implementation matches"):
        registry.split_impls(made, Selector(impl="x"), "smoke")
    assert registry.split_phases(made, Selector()) == ["fwd", "both"]
    assert registry.split_phases(made, Selector(phase="bwd")) == ["bwd"]
    with pytest.raises(ValueError, match="no phase matches"):
        registry.split_phases(made, Selector(phase="x"))
    assert made.cost("both") == (1024.0, None) and made.cost("fwd") == (512.0, 64.0)
    with pytest.raises(Skip, match="too large"):
        tiny["tiny"].make("large", torch.float32, CPU)


def test_inputs_depend_on_the_seed_alone(tiny):
    a, b, c = (tiny["tiny"].make("small", torch.float32, CPU, seed=seed).inputs[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_registering_mistakes(tiny):
    with pytest.raises(ValueError, match="no shape c; it has a, b"):
        case("x", shapes={"a": {}, "b": {}}, smoke=("c",))
    with pytest.raises(ValueError, match="two cases are called 'tiny'"):
        case("tiny", shapes={"a": {}})(lambda s: s)
    setup = Setup(name="a", dims={"n": 3}, dtype=torch.float32, device=CPU, generator=torch.Generator())
    assert setup.n == 3
    with pytest.raises(AttributeError, match="no dimension 'm'; it has"):
        _ = setup.m


def test_compiled_is_not_compiled_before_it_is_called(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: calls.append(options) or fn)
    found = compiled(lambda x: x + 1)
    assert isinstance(found, SlowStart) and not calls
    assert found.fn(1) == 2 and found.fn(2) == 3 and calls == [{"dynamic": False}]


# ------------------------------------------------------------------------------------------------- peers


def test_missing_peer_is_a_reason(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "absent", peers.Peer(module="no_such_module", distribution="nope", pin="1.2"))
    monkeypatch.setitem(peers.PEERS, "gpu", peers.Peer(module="json"))
    monkeypatch.setitem(peers.PEERS, "host", peers.Peer(module="json", needs_gpu=False))
    assert peers.reason("absent", CPU) == "no_such_module is not installed (pip install nope==1.2)"
    assert peers.reason("gpu", CPU) == "json needs a GPU"
    assert peers.peer("host", CPU, "json", lambda m: m.dumps) is json.dumps
    found = peers.peer("host", CPU, "json", lambda m: m.no_such_function)
    assert isinstance(found, Skip) and "does not offer it: AttributeError" in str(found)
    assert isinstance(peers.peer("absent", CPU, "x", lambda m: m), Skip)


def test_every_peer_answers():
    for name in peers.PEERS:
        reason = peers.reason(name, CPU)
        assert reason is None or reason


# ------------------------------------------------------------------------------------------------- shapes


def test_ragged_lengths():
    lengths = shapes.ragged(4000, 500, 4096)
    assert lengths == shapes.ragged(4000, 500, 4096) and lengths != shapes.ragged(4000, 500, 4096, seed=1)
    assert 1 <= min(lengths) and max(lengths) <= 4096
    assert sum(lengths) / 4000 == pytest.approx(500, rel=0.05)
    assert sorted(lengths)[3800] > 2.5 * 500  # the tail


def test_parameters_of_models():
    """Against the sizes that the models are named after (norms and biases are left out)."""
    billions = {
        "qwen2.5-32b": 32.76,
        "qwen3-8b": 8.19,
        "qwen3-1.7b": 1.72,
        "llama-3.1-8b": 8.03,
        "smollm2-135m": 0.1345,
    }
    for name, expected in billions.items():
        assert shapes.MODELS[name].parameters / 1e9 == pytest.approx(expected, rel=0.005), name


def test_recorder(tmp_path, tiny):
    run = write_rollouts(tmp_path / "run", steps=3, groups=2, group_size=4)
    found = recorder.record(run)
    assert len(found["lengths"]) == 6 and all(len(group) == 4 for group in found["lengths"])
    assert len(recorder.record(run, steps=1)["prompts"]) == 2
    assert "token_ids" not in json.dumps(found)
    path = tmp_path / "w.json"
    path.write_text(json.dumps(found))
    workload = shapes.load_workload(path)
    assert workload.name == "run" and len(workload.flat) == 24 and sum(map(len, workload.advantages)) == 24
    specs = registry.load(ROOT / "benchmarks", path)
    for name in ("policy_loss", "group_advantage", "packer"):
        assert "run" in specs[name].shapes
        assert specs[name].make("run", torch.float32, CPU).inputs
    with pytest.raises(ValueError, match="no rollouts"):
        recorder.record(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="record it again"):
        shapes.load_workload(path)


# ------------------------------------------------------------------------------------------------- steps


def test_step_flops():
    """By hand for one token of one reply: 6 per weight of the layers and of the head, and one attention pair."""
    config = models.model_config("smollm2-135m", layers=1)
    batch = steps.synthetic_batch((1,), (1,), 1, config["vocab_size"])
    weights = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    pairs = 1 + 2  # two tokens, causal
    by_hand = 3 * (2 * 2 * weights + 4 * 9 * 64 * pairs + 2 * 576 * 49152)
    assert steps.step_flops(config, batch) == by_hand
    with pytest.raises(ValueError, match="expected 2 prompts x 3"):
        steps.synthetic_batch((1, 1), (1, 1), 3, 10)
    with pytest.raises(ValueError, match="got model"):
        models.model_config("x")


def test_packed_batch_packs_into_its_tokens():
    batch = steps.packed_batch(2048, 1000)
    plan = mk.plan_tree([s.token_ids for s in batch.samples])
    assert plan.num_rows == 2048 and sum(s.reply_length for s in batch.samples) == 720
    with pytest.raises(ValueError, match="multiple of 1024"):
        steps.packed_batch(1500, 1000)


def test_recipe_takes_the_batch():
    batch = steps.synthetic_batch((5, 90), (7, 3, 8, 2), 2, 100)
    recipe = steps.make_recipe(batch, dtype="float32", lr=1e-9, micro_batch_tokens=64)
    assert recipe.learner.micro_batch_tokens >= 98
    assert {s.token_ids.numel() for s in batch.samples} == {12, 8, 98, 92}


# ------------------------------------------------------------------------------------------------- ceilings


CEILINGS = {"copy": 1e10, "copy_cached": 1e11, "fp32": 1e11, "bf16": 2e11, "launch_cpu": 1e-6}


@pytest.mark.parametrize(
    ("moved", "flops", "options", "bound", "sol"),
    [
        (1e7, 1e6, {}, "memory", 1e-3),
        (1e7, 1e6, {"in_cache": True}, "memory", 1e-4),
        (1e3, 1e9, {}, "compute", 1e-2),
        (1e3, 1e9, {"dtype": "bfloat16"}, "compute", 5e-3),
        (8.0, 1.0, {}, "launch", 1e-6),
    ],
)
def test_speed_of_light(moved, flops, options, bound, sol):
    settings = {"seconds": 2 * sol, "dtype": "float32", "timer": "cpu", "in_cache": False, "threads": 1} | options
    found = ceilings.physics(moved, flops, CEILINGS, **settings)
    assert found.bound == bound and found.sol_s == pytest.approx(sol) and found.sol_percent == pytest.approx(50)


def test_no_speed_of_light_without_a_ceiling_or_a_time():
    settings = {"dtype": "float32", "timer": "cpu", "in_cache": False}
    assert "calibrate" in ceilings.physics(1.0, 1.0, None, seconds=1.0, threads=1, **settings).note
    assert ceilings.physics(1.0, 1.0, CEILINGS, seconds=1.0, threads=2, **settings).sol_percent is None
    assert ceilings.physics(1.0, 1.0, CEILINGS, seconds=None, threads=1, **settings).sol_percent is None
    assert ceilings.physics(None, None, CEILINGS, seconds=1.0, threads=1, **settings).bound is None


def test_ceilings_are_kept_by_machine_and_threads(tmp_path):
    path = tmp_path / "c.json"
    ceilings.store(path, "m1", CPU, 1, CEILINGS)
    ceilings.store(path, "m1", CPU, 2, {"copy": 5.0})
    assert ceilings.stored(path, "m1", CPU, 1) == CEILINGS
    assert ceilings.stored(path, "m1", CPU, 2) == {"copy": 5.0}
    assert ceilings.stored(path, "m2", CPU, 1) is None and ceilings.stored(tmp_path / "x", "m1", CPU, 1) is None


# ------------------------------------------------------------------------------------------------- environment


def test_fingerprint():
    machine, build = env.machine(CPU), env.build(ROOT)
    assert machine["id"] == env.machine(CPU)["id"] and machine["cores"] > 0 and machine["cache_bytes"] > 0
    assert build["packages"]["torch"] == str(torch.__version__) and build["libraries"]
    assert json.dumps([machine, build])
    import socket

    assert socket.gethostname() not in json.dumps([machine, build]).split('"')


def test_unfit():
    good = {"load": 0.0, "cores": 8}
    assert env.unfit(good, {"sha": "a", "dirty": False}) == []
    assert "uncommitted" in env.unfit(good, {"sha": "a", "dirty": True})[0]
    assert "load average" in env.unfit(good | {"load": 7.0}, {"sha": "a", "dirty": False})[0]
    gpu = {"gpu": {"mig": "Enabled", "ecc": "Disabled", "throttle": "0x0000000000000004"}}
    text = " ".join(env.unfit(good | gpu, {"sha": "a", "dirty": False}))
    assert "MIG" in text and "ECC" in text and "0x4" in text
    assert env.throttle_bits({"throttle": "0x0000000000000001"}) == 0  # idle
    assert env.spread([{"power_w": 300}, {"power_w": 500, "throttle": "0x4"}])["power_w"] == [300, 500, 500]


def test_result_folders():
    assert env.slug({"cpu": "x", "gpu": {"name": "NVIDIA H100 80GB HBM3"}}) == "h100"
    assert env.slug({"cpu": "AMD EPYC 9B14 96-Core Processor"}) == "amd-epyc-9b14"


def test_case_objects_are_what_the_registry_holds(tiny):
    assert isinstance(tiny["tiny"], CaseSpec) and isinstance(tiny["tiny"].make("small", torch.float32, CPU), Case)
