"""m2bench: correctness, then time, then a row that says on what machine and how sure.

Exit codes: 0 fine, 1 wrong results, 2 a regression (compare --gate), 3 unclear (compare --strict), 4 an unfit machine
(env --strict), 5 a planted fault was not caught (selftest), 64 a user's mistake, 70 a measuring process failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# Plain help: rich would read the brackets of "case[/impl]" as its markup.
app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)

USAGE, FAILED = 64, 70
Cases = Annotated[
    Path | None, typer.Option("--cases", help="folder of bench_*.py; default $M2BENCH_CASES, ./benchmarks")
]
Patterns = Annotated[list[str] | None, typer.Argument(help="case[/impl[/shape[/phase]]], with * and ?")]
Suite = Annotated[str, typer.Option("-s", "--suite", help="smoke | paper | nightly")]
Device = Annotated[str | None, typer.Option("--device", help="cpu | cuda; default: cuda where there is one")]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; CPU time is steadiest with 1")]
Workload = Annotated[Path | None, typer.Option("--workload", help="rollouts recorded by m2train.bench.recorder")]
CeilingsFile = Annotated[Path | None, typer.Option("--ceilings", help="default ~/.cache/m2bench/ceilings.json")]


@app.command("list")
def list_cases(
    cases: Cases = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Show cases, shapes and implementations, and why one of them cannot run here."""
    from m2train.bench.listing import listing, render

    found = listing(_folder(cases), _device(device))
    typer.echo(json.dumps(found, indent=1) if as_json else render(found))


@app.command()
def env(
    strict: Annotated[
        bool, typer.Option("--strict", help="exit 4 when figures of this machine should not be published")
    ] = False,
    device: Device = None,
) -> None:
    """Print the fingerprint of machine and build that goes into every row."""
    import torch

    from m2train.bench import env as environment

    machine, build = environment.machine(torch.device(_device(device))), environment.build(Path.cwd())
    reasons = environment.unfit(machine, build)
    typer.echo(json.dumps({"machine": machine, "build": build, "unfit": reasons}, indent=1))
    if strict and reasons:
        raise typer.Exit(4)


@app.command()
def calibrate(
    device: Device = None,
    threads: Threads = 1,
    seconds: Annotated[float, typer.Option(help="of each measurement")] = 1.0,
    ceilings: CeilingsFile = None,
) -> None:
    """Measure what this machine can do at best: bandwidths, GEMM rates, the floor of a launch."""
    import torch

    from m2train.bench import ceilings as store
    from m2train.bench import env as environment

    where, path = torch.device(_device(device)), ceilings or store.default_file()
    found = store.measure(where, threads, seconds)
    machine = environment.machine(where)
    store.store(path, machine["id"], where, threads, found)
    typer.echo(json.dumps({"file": str(path), "machine": machine["id"], "ceilings": found}, indent=1))


@app.command()
def check(
    patterns: Patterns = None,
    suite: Suite = "smoke",
    cases: Cases = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="instead of the case's own")] = None,
    workload: Workload = None,
) -> None:
    """Check numerics only: error against float64, gradients, repeatability, invariance, cheats. Exit 1: wrong."""
    from m2train.bench import runner
    from m2train.bench.display import Display

    where = _device(device)
    options = runner.RunOptions(
        cases=_folder(cases),
        patterns=tuple(patterns or ()),
        suite=suite,
        device=where,
        timer="wall",
        dtype=dtype,
        workload=workload,
    )
    with Display(timed=False) as display:
        for row in runner.check(options, display.say):
            display.row(row)
    if display.refused:
        raise typer.Exit(1)


@app.command()
def run(
    patterns: Patterns = None,
    suite: Suite = "paper",
    timer: Annotated[
        str | None, typer.Option(help="cpu | wall | callgrind; on CUDA graph | events | kineto | wall")
    ] = None,
    cache: Annotated[str, typer.Option(help="cold | warm | both")] = "cold",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="append rows to this file (JSON Lines)")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="append rows to DIR/<machine>/<commit>.jsonl, as benchmarks/results is laid out"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="one launch, nothing measured: for profilers")] = False,
    cases: Cases = None,
    device: Device = None,
    threads: Threads = 1,
    dtype: Annotated[str | None, typer.Option(help="instead of the case's own")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: the suite's")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="of sampling per implementation and process")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="begin nothing after so long; most wanted shapes first")
    ] = None,
    workload: Workload = None,
    ceilings: CeilingsFile = None,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="leave the speed of light out")] = False,
) -> None:
    """Check, time, and write rows. Exit 1: an implementation was refused for wrong results."""
    from m2train.bench import ceilings as store
    from m2train.bench import runner
    from m2train.bench.display import Display
    from m2train.bench.rows import append_row

    where = _device(device)
    if cache not in ("cold", "warm", "both"):
        raise ValueError(f"got cache {cache!r}; expected cold, warm or both")
    options = runner.RunOptions(
        cases=_folder(cases),
        patterns=tuple(patterns or ()),
        suite=suite,
        device=where,
        timer=_timer(timer, where),
        cache=cache,
        threads=threads,
        dtype=dtype,
        workload=workload,
        ceilings=ceilings or store.default_file(),
        calibrate=not no_calibrate,
        processes=processes,
        seconds=seconds,
        minutes=minutes,
    )
    if once:
        from m2train.bench.profile import launch_once

        launch_once(options)
        return
    with Display() as display:
        for row in runner.run(options, display.say):
            display.row(row)
            if out is not None:
                append_row(out, row)
            if results is not None:
                append_row(_result_file(results, row), row)
    if display.refused:
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="git ref, or row file: the side that is compared against")],
    b: Annotated[str, typer.Argument(help="git ref, or row file")],
    rows: Annotated[
        list[str] | None, typer.Option("--rows", help="case[/impl[/shape[/phase]]]; default: our rows of suite smoke")
    ] = None,
    gate: Annotated[
        bool, typer.Option("--gate", help="exit 2 when a row is SLOWER, wrong on B, or lost by B")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit 3 when a row is UNCLEAR")] = False,
    pairs: Annotated[int, typer.Option(min=2, help="pairs of processes")] = 8,
    margin: Annotated[
        float | None, typer.Option(help="effects up to this are SAME; default 0.03 on a CPU, 0.01 on CUDA")
    ] = None,
    limit: Annotated[
        float, typer.Option(min=0.0, help="up to three times the pairs for rows whose detection limit is above this")
    ] = 0.1,
    timer: Annotated[str | None, typer.Option(help="as of run; callgrind compares instructions")] = None,
    cache: Annotated[str, typer.Option(help="cold | warm")] = "warm",
    cases: Cases = None,
    device: Device = None,
    threads: Threads = 1,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the verdicts as JSON")] = None,
) -> None:
    """Say per row whether B is the SAME, FASTER, SLOWER, or whether that is UNCLEAR."""
    from m2train.bench import compare as comparing

    options = comparing.CompareOptions(
        cases=_folder(cases) if not comparing.both_files(a, b) else Path(),
        patterns=tuple(rows or ()),
        device=(where := _device(device)),
        timer=_timer(timer or ("events" if where == "cuda" else None), where),
        cache=cache,
        threads=threads,
        pairs=pairs,
        margin=margin if margin is not None else (0.01 if where == "cuda" else 0.03),
        limit=limit,
    )
    found = comparing.compare(a, b, options, _note)
    typer.echo(comparing.render(found))
    if out is not None:
        out.write_text(json.dumps(comparing.as_json(found), indent=1) + "\n")
    if gate and found.regressed:
        raise typer.Exit(2)
    if strict and any(line.judgement.verdict == "UNCLEAR" for line in found.lines):
        raise typer.Exit(3)


@app.command()
def profile(
    pattern: Annotated[str, typer.Argument(help="case/impl/shape/phase (fwd | both); left out: the first there is")],
    tool: Annotated[str, typer.Option("--tool", help="ncu | nsys | proton")] = "ncu",
    only_print: Annotated[bool, typer.Option("--print", help="print the command, run nothing")] = False,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="with ncu: put the measured DRAM bytes into this file's newest row")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of the reports")] = Path("profiles"),
    cases: Cases = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="instead of the case's first")] = None,
) -> None:
    """Print the exact command of a profiler for one launch, and run it where the tool is installed."""
    from m2train.bench import dram
    from m2train.bench import profile as profiling

    if rows is not None and tool != "ncu":
        raise ValueError(f"--rows takes DRAM bytes, which ncu counts; got --tool {tool}")
    command = profiling.command(pattern, tool, out, _folder(cases), _device(device), dtype)
    typer.echo(profiling.printed(command))
    if only_print:
        return
    code = profiling.run(tool, command, out)
    if code == 0 and rows is not None:
        typer.echo(dram.merge(rows, profiling.launched(command), profiling.measured_dram(command)))
    raise typer.Exit(code)


@app.command()
def report(
    files: Annotated[
        list[Path] | None, typer.Argument(help="row files or folders; default benchmarks/results")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="folder for report.html, report.md and rows.csv")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option("--readme", help="write the table between this file's markers")
    ] = None,
    check_only: Annotated[
        bool, typer.Option("--check", help="with --readme: exit 1 if the table is not that of the rows")
    ] = False,
) -> None:
    """Write Markdown, one self-contained HTML page and CSV from rows; or the README's table."""
    from m2train.bench.report import readme as table
    from m2train.bench.report import write_report

    committed = files is None and readme is not None  # none yet is a state of the README too
    rows = [] if committed and not Path("benchmarks/results").exists() else _rows(files)
    if readme is not None:
        if table.update(readme, rows, write=not check_only):
            typer.echo(f"{readme}: the table is that of the rows")
        elif check_only:
            typer.echo(f"{readme} and the rows disagree; run `m2bench report --readme {readme}`", err=True)
            raise typer.Exit(1)
        else:
            typer.echo(f"{readme}: table written")
    if readme is None or out is not None:
        for path in write_report(rows, out or Path("report")):
            typer.echo(path)


@app.command()
def repro(
    row_id: Annotated[str, typer.Argument(help="id of a row, or its beginning")],
    files: Annotated[
        list[Path] | None, typer.Argument(help="row files or folders; default benchmarks/results")
    ] = None,
) -> None:
    """Print the command that measures a row again, and what it was measured with."""
    rows = [row for row in _rows(files) if row.id.startswith(row_id)]
    if len({row.id for row in rows}) != 1:
        raise ValueError(f"{len(rows)} rows have an id that starts with {row_id!r}; expected exactly one")
    row = rows[0]
    sha, dirty = row.build.get("sha"), row.build.get("dirty")
    typer.echo(
        f"git checkout {sha}" + ("  # had uncommitted changes" if dirty else "") if sha else "# commit unknown"
    )
    typer.echo(row.repro)
    typer.echo(f"# {row.created}, {row.machine.get('gpu', {}).get('name') or row.machine.get('cpu')}", err=True)


@app.command()
def selftest(
    let_through: Annotated[
        str | None, typer.Option("--let-through", help="turn one guard off: slowdown | wrong | late | cached")
    ] = None,
    device: Device = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="of each of the two timings")] = 6.0,
) -> None:
    """Plant a slowdown and three cheats; exit 5 unless all are caught and equal code is not told apart."""
    import torch

    from m2train.bench.selftest import FAULTS
    from m2train.bench.selftest import selftest as run_selftest

    if let_through is not None and let_through not in FAULTS:
        raise ValueError(f"got --let-through {let_through!r}; expected one of {', '.join(FAULTS)}")
    missed = []
    for outcome in run_selftest(torch.device(_device(device)), let_through, seconds=seconds):
        typer.echo(f"{'ok    ' if outcome.caught else 'MISSED'} {outcome.name:<9} {outcome.detail}")
        if not outcome.caught:
            missed.append(outcome.name)
    if missed:
        typer.echo(f"selftest failed: {', '.join(missed)}", err=True)
        raise typer.Exit(5)


def _folder(given: Path | None) -> Path:
    from m2train.bench.registry import cases_folder

    return cases_folder(given)


def _device(given: str | None) -> str:
    import torch

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if given not in ("cpu", "cuda"):
        raise ValueError(f"got device {given!r}; expected cpu or cuda")
    if given == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: no CUDA device is visible to torch; see `m2train doctor`")
    return given


def _timer(given: str | None, device: str) -> str:
    import torch

    from m2train.bench.timers import check_timer, default_timer

    return check_timer(given or default_timer(torch.device(device)), device)


def _rows(files: list[Path] | None) -> list[Any]:
    from m2train.bench.rows import read_rows

    given = files or [Path("benchmarks/results")]
    missing = [str(path) for path in given if not path.exists()]
    if missing:
        raise ValueError(f"no row file {', '.join(missing)}; `m2bench run -o FILE` writes one")
    return read_rows(given)


def _result_file(folder: Path, row: Any) -> Path:
    from m2train.bench.env import slug

    return folder / slug(row.machine) / f"{(row.build.get('sha') or 'unknown')[:12]}.jsonl"


def _note(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """Entry point of the `m2bench` command."""
    from m2train.bench.pool import WorkerError

    try:
        code = app(standalone_mode=False)
    except (ValueError, WorkerError, OSError) as err:
        print(f"m2bench: {' '.join(str(err).split())}", file=sys.stderr)
        sys.exit(USAGE if isinstance(err, ValueError) else FAILED)
    except typer.Abort:
        sys.exit(130)
    except Exception as err:
        # Click's own mistakes (an unknown option) are exceptions of its own base class, which typer does not export.
        show = getattr(err, "show", None)
        if show is None:
            raise
        show()
        sys.exit(USAGE)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
