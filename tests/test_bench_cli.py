"""The command line, one whole run in real processes, comparisons on a fake machine, and how workers are booted."""

import json
import math
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench_rows import CASE_FILE, make_row

from m2train.bench import callgrind, cli, compare, host, pool, profile, runner, selftest
from m2train.bench.build import Build
from m2train.bench.pool import WorkerError
from m2train.bench.rows import append_row, read_rows
from m2train.bench.timers import make_timer

ROOT = Path(__file__).parents[1]


def m2bench(monkeypatch, *words):
    """The exit code of `m2bench words...`."""
    monkeypatch.setattr(sys, "argv", ["m2bench", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture
def cases(tmp_path):
    folder = tmp_path / "cases"
    folder.mkdir()
    (folder / "bench_tiny.py").write_text(CASE_FILE)
    return folder


@pytest.mark.parametrize("command", [None, *(c.name or c.callback.__name__ for c in cli.app.registered_commands)])
def test_every_command_has_help(monkeypatch, capsys, command):
    assert m2bench(monkeypatch, *filter(None, [command]), "--help") == 0
    out = capsys.readouterr().out
    if command in ("check", "run"):
        assert "case[/impl[/shape[/phase]]]" in out, "the pattern must be shown as it is typed"


# ------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.timeout(280)
def test_run_writes_rows_and_refuses_wrong_results(monkeypatch, cases, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ("run", "tiny/[!s]*", "-s", "smoke", "--cases", cases, "--cache", "both", "--device", "cpu")
    few = ("--no-calibrate", "--seconds", "0.02", "--ceilings", tmp_path / "none.json")
    code = m2bench(monkeypatch, *words, *few, "-o", out)
    assert code == 1  # `off` is wrong
    rows = read_rows([out])
    seen = {(r.identity.impl, r.identity.phase, r.identity.cache): r for r in rows}
    assert len(seen) == len(rows) == 5 * 2 * 2
    for phase in ("fwd", "both"):
        for cache in ("cold", "warm"):
            good = seen["m2", phase, cache]
            assert good.status == "ok" and good.timing.processes == 3 and len(good.timing.samples) == 3
            assert (
                good.timing.median > 0 and good.timing.ratio.to == "torch" and good.timing.low <= good.timing.median
            )
            assert good.numerics.bitwise_repeat and good.numerics.batch_invariant
            assert good.physics.bytes == {"fwd": 512, "both": 1024}[phase] and "calibrate" in good.physics.note
            assert seen["torch", phase, cache].timing.ratio is None and good.ours
            assert not seen["torch", phase, cache].ours
            assert "over" in seen["off", phase, cache].reason and seen["off", phase, cache].timing is None
            assert seen["gone", phase, cache].reason == "not installed"
            bound = seen["bound", phase, cache]  # its results are wrong too, and nobody minds
            assert bound.status == "ok" and bound.ceiling and not good.ceiling and bound.timing.median > 0
            assert bound.numerics.verdict == "unchecked" and "a ceiling" in bound.numerics.reason
            assert [(r.to, r.ceiling) for r in good.timing.others] == [("bound", True)]
    assert rows[0].machine["id"] and rows[0].build["packages"]["torch"]
    text = capsys.readouterr().out
    assert "tiny/off/small/fwd float32 cold: refused" in text
    assert "tiny/bound/small/fwd float32 cold CEILING" in text and "time over others': bound (ceiling) x" in text
    assert "not checked: a ceiling" in text
    # What `repro` prints is a command that this very program takes.
    assert m2bench(monkeypatch, "repro", seen["m2", "fwd", "cold"].id, out) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("m2bench run "))
    assert "tiny/m2/small/fwd" in command and "--cache cold" in command and "--timer cpu" in command


# ------------------------------------------------------------------------------------------------- other verbs


def test_list_and_env(monkeypatch, cases, capsys):
    assert m2bench(monkeypatch, "list", "--json", "--cases", cases, "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out)
    impls = found["cases"]["tiny"]["impls"]
    assert impls["gone"]["unsupported_reason"] == "not installed" and impls["m2"]["kind"] == "ours"
    assert impls["bound"]["kind"] == "ceiling"
    assert found["peers"]["liger"]["pin"] == "0.8.5"
    assert m2bench(monkeypatch, "list", "--cases", cases, "--device", "cpu") == 0
    assert "gone: not installed" in capsys.readouterr().out
    assert m2bench(monkeypatch, "env", "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["machine"]["id"]
    monkeypatch.setattr("m2train.bench.env.unfit", lambda machine, build: ["too loud"])
    assert m2bench(monkeypatch, "env", "--strict", "--device", "cpu") == 4


@pytest.mark.parametrize(
    "words",
    [
        ("run", "--no-such-option"),
        ("run", "nope"),
        ("run", "--timer", "events", "tiny"),
        ("run", "--cache", "lukewarm"),
        ("repro", "ffff"),
        ("report", "no-such.jsonl"),
        ("selftest", "--let-through", "everything"),
        ("profile", "tiny", "--tool", "gdb", "--print"),
        ("profile", "tiny/m2/small/bwd", "--print"),
        ("compare", "a.jsonl", "HEAD"),
    ],
)
def test_mistakes_of_users_are_64(monkeypatch, cases, words, tmp_path):
    monkeypatch.setenv("M2BENCH_CASES", str(cases))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "a.jsonl").write_text(make_row().to_json())
    assert m2bench(monkeypatch, *words) == 64


def test_report(monkeypatch, tmp_path, capsys):
    append_row(tmp_path / "rows.jsonl", make_row())
    assert m2bench(monkeypatch, "report", tmp_path / "rows.jsonl", "-o", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "rows.csv"}
    readme = tmp_path / "README.md"
    from m2train.bench.report.readme import BEGIN, END

    readme.write_text(f"{BEGIN}\nstale\n{END}\n")
    words = ("report", tmp_path / "rows.jsonl", "--readme", readme)
    assert m2bench(monkeypatch, *words, "--check") == 1
    assert m2bench(monkeypatch, *words) == 0
    assert m2bench(monkeypatch, *words, "--check") == 0


def test_selftest_fails_when_something_is_missed(monkeypatch, capsys):
    outcomes = [
        selftest.Outcome(name="A/A", caught=True, detail="x"),
        selftest.Outcome(name="late", caught=False, detail="y"),
    ]
    monkeypatch.setattr(selftest, "selftest", lambda *args, **options: iter(outcomes))
    assert m2bench(monkeypatch, "selftest", "--device", "cpu") == 5
    assert "MISSED late" in capsys.readouterr().out
    monkeypatch.setattr(selftest, "selftest", lambda *args, **options: iter(outcomes[:1]))
    assert m2bench(monkeypatch, "selftest", "--device", "cpu") == 0


def test_reports_of_shapes_with_dots_are_found(monkeypatch, tmp_path):
    """`qwen3-1.7b-256-35pct`: what follows the dot is no suffix."""
    name = tmp_path / "linear_policy_loss-m2-qwen3-1.7b-256-35pct-both"
    asked = []

    def run(command, **_):
        asked.append(command[command.index("--import") + 1])
        return subprocess.CompletedProcess(command, 1, "", "no such file")

    monkeypatch.setattr(profile.subprocess, "run", run)
    with pytest.raises(ValueError, match="ncu cannot read"):
        profile.measured_dram(["ncu", "-o", str(name), "python"])
    assert asked == [f"{name}.ncu-rep"]


def test_profile_commands(monkeypatch, cases, tmp_path, capsys):
    monkeypatch.setenv("M2BENCH_CASES", str(cases))
    for tool in profile.TOOLS:
        words = ("profile", "tiny/m2/small/both", "--tool", tool, "--print", "--device", "cpu", "-o", tmp_path)
        assert m2bench(monkeypatch, *words) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"CUDA_INJECTION64_PATH=none {tool} ") and "--once" in text
        assert "tiny/m2/small/both" in text and "--dtype float32" in text
    command = profile.command("tiny", "ncu", tmp_path, cases, "cpu", None)
    assert "--profile-from-start off" in " ".join(command)  # nvtx, which could filter too, may be missing
    assert profile.launched(command) == ("tiny", "m2", "small", "fwd", "float32")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert m2bench(monkeypatch, "profile", "tiny", "--tool", "ncu", "--device", "cpu", "-o", tmp_path / "p") == 64


def test_once_launches_one_and_measures_nothing(monkeypatch, cases, capsys):
    monkeypatch.setenv("M2BENCH_CASES", str(cases))
    assert m2bench(monkeypatch, "run", "tiny/m2/small/both", "--once", "--device", "cpu") == 0
    assert capsys.readouterr().out == ""
    for pattern in ("tiny/m2/small", "tiny/nope/small/fwd", "tiny/gone/small/fwd"):
        assert m2bench(monkeypatch, "run", pattern, "--once", "--device", "cpu") == 64


class FakeServer:
    """A worker without a process: its third implementation takes the GPU with it."""

    def __init__(self, log, broken):
        self.log, self.broken, self.facts = log, broken, {"machine": {"id": "x", "cpu": "y"}, "build": {}}

    def ask(self, op, **request):
        self.log.append(op)
        if op == "open":
            if request["shape"] == "unbuilt":
                return {"failed": "the case cannot be built: KeyError: 'n'"}
            return {"bytes": 8, "cache": 64}
        if op == "choose":
            return {"impls": ["m2", "torch", "bad"], "ours": ["m2"], "skipped": {}, "phases": ["fwd"],
                    "ceilings": [], "baseline": "torch", "rotates": False, "cost": {"fwd": (8.0, 1.0)}}  # fmt: skip
        if op == "check":
            if "bad" in request["impls"]:
                return {"lost": "bad", "reason": "it broke the CUDA context"}
            entry = {"numerics": {"verdict": "ok"}, "memory": {}}
            return dict.fromkeys(request["impls"], entry)
        assert op == "measure" and request["impls"] == ["m2", "torch"]
        if self.broken:
            raise WorkerError("a measuring process ended with -9")
        names = request["impls"]
        return {"samples": {n: [1.0, 1.1, 1.2] for n in names}, "launches": dict.fromkeys(names, 1),
                "launch_us": dict.fromkeys(names, 2.0), "energy_j": {}, "stopped": "budget", "stale": {}, "unit": "s",
                "note": "", "timer": "events",
                "gpu": {"m2": {"sm_clock_mhz": 1980, "power_w": 650.5, "throttle": "0x4"}, "torch": {}}}  # fmt: skip

    def post(self, op, **request):
        self.posted = (op, request)

    def answer(self, op):
        return self.ask(self.posted[0], **self.posted[1])


def fake_run(monkeypatch, tmp_path, *, broken=False, **options):
    """Rows of a run of a case with three shapes on fake processes, and what these were asked."""
    cases = tmp_path / "cases"
    cases.mkdir()
    shapes = 'shapes={"small": {"n": 64}, "unbuilt": {}, "large": {"n": 4096}}, first=("large",)'
    (cases / "bench_tiny.py").write_text(
        CASE_FILE.replace('shapes={"small": {"n": 64}, "large": {"n": 4096}}, nightly=("large",)', shapes)
    )
    log = []

    @contextmanager
    def fake_workers(configs):
        log.append("start")
        yield [FakeServer(log, broken) for _ in configs]

    monkeypatch.setattr(pool, "workers", fake_workers)
    asked = runner.RunOptions(cases=cases, processes=2, calibrate=False, ceilings=tmp_path / "none", **options)
    return list(runner.run(asked, lambda text: None)), log


def test_an_implementation_that_breaks_the_gpu_is_refused_alone(monkeypatch, tmp_path):
    rows, log = fake_run(monkeypatch, tmp_path, patterns=("tiny/*/small",))
    found = {row.identity.impl: row for row in rows}
    assert found["bad"].status == "refused" and "broke the CUDA context" in found["bad"].reason
    assert found["m2"].status == found["torch"].status == "ok" and log.count("start") == 2
    # The clock that was used, not the one that was asked for.
    assert {found[name].identity.timer for name in ("m2", "torch")} == {"events"}
    assert "--timer events" in found["m2"].repro
    # The state under a row's own load: bit 2 is a cap of the power.
    want = {"sm_clock_mhz": [1980] * 3, "power_w": [650.5] * 3, "throttle": 4}
    assert found["m2"].machine["during"] == want and "during" not in found["torch"].machine


def test_what_breaks_is_a_row_and_the_run_goes_on(monkeypatch, tmp_path):
    rows, log = fake_run(monkeypatch, tmp_path, broken=True)
    reasons = {row.identity.shape: row.reason for row in rows if row.identity.impl == "*"}
    assert "ended with -9" in reasons["small"] and "ended with -9" in reasons["large"]
    assert "cannot be built" in reasons["unbuilt"] and {r.status for r in rows} == {"refused"}


def test_a_time_limit_is_said_and_takes_the_most_wanted_first(monkeypatch, tmp_path):
    rows, _ = fake_run(monkeypatch, tmp_path, minutes=10.0)
    assert list(dict.fromkeys(row.identity.shape for row in rows)) == ["large", "small", "unbuilt"]
    (tmp_path / "again").mkdir()
    rows, log = fake_run(monkeypatch, tmp_path / "again", minutes=0.0)
    assert [row.status for row in rows] == ["skipped"] * 3 and "--minutes" in rows[0].reason
    assert "check" not in log


# ------------------------------------------------------------------------------------------------- compare


def test_compare_files(monkeypatch, tmp_path, capsys):
    sides = {"a": 1e-3, "same": 1.001e-3, "slow": 2e-3}
    for name, median in sides.items():
        append_row(tmp_path / f"{name}.jsonl", make_row(median=median))
    a, same, slow = (tmp_path / f"{name}.jsonl" for name in sides)
    assert m2bench(monkeypatch, "compare", a, same, "--gate", "--strict") == 0
    assert "SAME" in capsys.readouterr().out
    out = tmp_path / "verdicts.json"
    assert m2bench(monkeypatch, "compare", a, slow, "--gate", "-o", out) == 2
    assert json.loads(out.read_text())["rows"][0]["verdict"] == "SLOWER"
    assert m2bench(monkeypatch, "compare", a, slow) == 0
    assert m2bench(monkeypatch, "compare", slow, a, "--gate") == 0
    append_row(a, make_row(phase="fwd"))  # a row that the other side lacks must not pass a gate unseen
    capsys.readouterr()
    assert m2bench(monkeypatch, "compare", a, same, "--gate") == 2
    assert "BROKEN on B: policy_loss/m2/32k fwd float32 cold: not in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ({"case": "new_op"}, 0, "not compared: new_op/m2/32k both float32 cold: new in"),
        ({"case": "new_op", "status": "refused"}, 2, "BROKEN on B: new_op/m2/32k both float32 cold: wrong in"),
        ({"impl": "peer", "status": "refused"}, 0, "SAME"),
        ({"impl": "peer", "status": "skipped"}, 0, "SAME"),
    ],
)
def test_a_gate_on_files_lets_new_rows_through_unless_ours_are_wrong(monkeypatch, tmp_path, capsys, more, code, said):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file in (a, b):
        append_row(file, make_row())
    append_row(b, make_row(**more))
    assert m2bench(monkeypatch, "compare", a, b, "--gate") == code
    out = capsys.readouterr().out
    assert said in out and ("BROKEN" in out) == (code == 2)


class FakeMachine:
    """Two builds whose launches take a fixed time, times a factor that drifts for both alike and one of a process."""

    def __init__(self, slowdown, wrong_side=None, uneven=0.0, without="", closed=""):
        self.slowdown, self.wrong_side, self.clock, self.started = slowdown, wrong_side, 0, []
        self.armed = []
        self.without, self.closed = without, closed  # sides that lack m2, sides that cannot run the shape "large"
        self.uneven, self.dice = uneven, random.Random(0)

    @contextmanager
    def workers(self, configs):
        self.started.append([config.site.name for config in configs])
        yield [FakeWorker(self, config.site.name) for config in configs]


class FakeWorker:
    def __init__(self, machine, name):
        self.machine, self.name = machine, name
        self.own = math.exp(machine.uneven * machine.dice.gauss(0, 1))

    def ask(self, op, **request):
        if op == "open":
            closed = request["shape"] == "large" and self.name in self.machine.closed
            return {"skip": "needs a GPU"} if closed else {}
        if op == "choose":
            names = ["torch"] if self.name in self.machine.without else ["m2", "torch"]
            return {"impls": names, "ours": ["m2"], "skipped": {}, "phases": ["fwd"], "rotates": True}
        if op == "check":
            wrong = self.name == self.machine.wrong_side
            return {"m2": {"numerics": {"verdict": "refused" if wrong else "ok", "reason": "off"}}}
        if op == "arm":
            self.machine.armed.append(request["cores"])
            return {"per_sample": request.get("per_sample") or 3}
        assert op == "sample" and request == {"count": 1}
        self.machine.clock += 1
        drift = 1 + 0.3 * math.sin(self.machine.clock / 40) + 0.02 * (self.machine.clock * 7919 % 101 / 101)
        return [1e-3 * drift * self.own * (1 + self.machine.slowdown * (self.name == "b"))]


@pytest.mark.parametrize(("slowdown", "verdict"), [(0.0, "SAME"), (0.15, "SLOWER"), (-0.15, "FASTER")])
def test_compare_builds_sees_through_drift(monkeypatch, cases, tmp_path, slowdown, verdict):
    machine = FakeMachine(slowdown)
    monkeypatch.setattr(compare, "workers", machine.workers)
    monkeypatch.setattr(compare, "build", lambda ref, where, say: Build(ref=ref, sha=ref * 10, site=tmp_path / ref))
    options = compare.CompareOptions(cases=cases, pairs=4)
    found = compare.compare("a", "b", options, lambda text: None)
    assert [line.judgement.verdict for line in found.lines] == [verdict]
    assert found.lines[0].name == "tiny/m2/small/fwd float32 warm"
    assert found.lines[0].judgement.ratio == pytest.approx(1 + slowdown, rel=0.01)
    assert machine.started == [["a", "b"], ["b", "a"], ["a", "b"], ["b", "a"]]
    assert verdict in compare.render(found)


@pytest.mark.parametrize(
    ("threads", "device", "cores"),
    [(1, "cpu", [[3], [5], [9], [3]]), (2, "cpu", [[3, 5], [5, 9], [9, 3], [3, 5]]), (3, "cpu", [None] * 4)]
    + [(1, "cuda", [None] * 4)],
)
def test_both_sides_of_a_pair_run_on_one_core(monkeypatch, cases, tmp_path, threads, device, cores):
    """Another one each time; anywhere on a GPU, or where all cores are asked for."""
    machine = FakeMachine(0.0)
    monkeypatch.setattr(compare.os, "sched_getaffinity", lambda _: {9, 3, 5})
    monkeypatch.setattr(compare, "workers", machine.workers)
    monkeypatch.setattr(compare, "build", lambda ref, where, say: Build(ref=ref, sha=ref * 10, site=tmp_path / ref))
    options = compare.CompareOptions(cases=cases, pairs=4, threads=threads, device=device)
    compare.compare("a", "b", options, lambda text: None)
    assert machine.armed == [each for each in cores for _ in "ab"]


@pytest.mark.parametrize(("limit", "pairs"), [(0.1, range(9, 24)), (0.01, [24]), (9.0, [8])])
def test_noisy_rows_get_more_pairs_until_they_could_show_a_slowdown(monkeypatch, cases, tmp_path, limit, pairs):
    machine = FakeMachine(0.12, uneven=0.045)
    monkeypatch.setattr(compare, "workers", machine.workers)
    monkeypatch.setattr(compare, "build", lambda ref, where, say: Build(ref=ref, sha=ref * 10, site=tmp_path / ref))
    found = compare.compare("a", "b", compare.CompareOptions(cases=cases, limit=limit), lambda text: None)
    judged = found.lines[0].judgement
    assert len(machine.started) == judged.units == len(found.lines[0].ratios)
    assert judged.units in pairs and (judged.limit <= limit or judged.units == 24)


def test_compare_refuses_a_side_that_is_wrong(monkeypatch, cases, tmp_path):
    monkeypatch.setattr(compare, "workers", FakeMachine(0.0, wrong_side="b").workers)
    monkeypatch.setattr(compare, "build", lambda ref, where, say: Build(ref=ref, sha=ref, site=tmp_path / ref))
    found = compare.compare("a", "b", compare.CompareOptions(cases=cases, pairs=2), lambda text: None)
    assert not found.lines and found.broken == ["tiny/m2/small/fwd float32 warm: wrong (off) on side B"]
    assert found.regressed


@pytest.mark.parametrize(
    ("machine", "code", "said"),
    [
        ({"closed": "ab"}, 0, "not compared: tiny/large: needs a GPU"),
        ({"closed": "b"}, 2, "BROKEN on B: tiny/large: lost on side B: needs a GPU"),
        ({"closed": "a"}, 0, "not compared: tiny/large: new on side B; on side A: needs a GPU"),
        (
            {"without": "a"},
            0,
            "not compared: tiny/m2/small/fwd float32 warm: absent (no such implementation) on side A",
        ),
        (
            {"without": "b"},
            2,
            "BROKEN on B: tiny/m2/small/fwd float32 warm: absent (no such implementation) on side B",
        ),
        ({"wrong_side": "a"}, 0, "not compared: tiny/m2/small/fwd float32 warm: wrong (off) on side A"),
        ({"wrong_side": "b", "without": "a"}, 2, "BROKEN on B: tiny/m2/small/fwd float32 warm: wrong (off)"),
        ({"closed": "ab", "without": "ab"}, 64, "nothing to compare"),
    ],
)
def test_a_gate_fails_for_what_side_b_broke_alone(monkeypatch, cases, tmp_path, capsys, machine, code, said):
    monkeypatch.setattr(compare, "workers", FakeMachine(0.0, **machine).workers)
    monkeypatch.setattr(compare, "build", lambda ref, where, say: Build(ref=ref, sha=ref, site=tmp_path / ref))
    words = ("--gate", "--pairs", 2, "--cases", cases, "--device", "cpu")
    rows = ("--rows", "tiny/*/small", "--rows", "tiny/*/large")
    assert m2bench(monkeypatch, "compare", "a", "b", *words, *rows) == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err and ("BROKEN" in shown.out) == (code == 2)


def test_unknown_commit_is_a_message(cases):
    with pytest.raises(ValueError, match="neither a row file nor a commit"):
        compare.compare("no-such-ref", "HEAD", compare.CompareOptions(cases=ROOT / "benchmarks"), lambda text: None)


# ------------------------------------------------------------------------------------------------- processes


def test_worker_runs_on_the_given_build_with_this_harness(tmp_path):
    """The build is imported in place of what is installed here, editable or not; the harness stays this one."""
    for name in ("m2kernels", "m2train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MARK = 'build'\n")
    code = (
        f"import runpy, sys; from pathlib import Path; host = runpy.run_path({str(host.HERE / 'host.py')!r});"
        f"host['use_site'](Path({str(tmp_path)!r})); host['use_this_harness']();"
        "import m2kernels, m2train, m2train.bench.stats as s; print(m2kernels.MARK, m2train.MARK, s.__file__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["build", "build", str(host.HERE / "stats.py")]
    lost = subprocess.run(
        [sys.executable, "-P", "-c", code.replace(str(tmp_path), str(tmp_path / "none"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert lost.returncode != 0 and "m2kernels would come from" in lost.stderr


def test_timers_of_a_cpu():
    import torch

    with pytest.raises(ValueError, match="expected one of cpu, wall, callgrind"):
        make_timer("graph", torch.device("cpu"))
    with pytest.raises(ValueError, match="under valgrind only"):
        make_timer("callgrind", torch.device("cpu"))
    for name in ("cpu", "wall"):
        timer = make_timer(name, torch.device("cpu"))
        assert timer.time([lambda: sum(range(2000))] * 3) > 0 and timer.name == name


def test_callgrind_command():
    words = callgrind.command(Path("/x/y"))
    assert words[0] == "valgrind" and "--instr-atstart=no" in words and "--callgrind-out-file=/x/y" in words
    assert callgrind.unavailable() is None or callgrind.unavailable()
