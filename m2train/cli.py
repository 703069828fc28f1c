"""The command line: a user's mistake is one line and exit code 2, a failure of the run one line and exit code 1."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from m2train.config import ConfigError, Recipe, load
from m2train.errors import RunError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.partition(":")[0]
)

RecipeArg = Annotated[Path, typer.Argument(help="recipe (TOML)")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="override a setting: section.key=value")]


@app.command()
def train(
    recipe: RecipeArg,
    settings: SetOption = None,
    run_dir: Annotated[Path | None, typer.Option(help="default: runs/<name>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard the run that is there")] = False,
    rollouts_only: Annotated[bool, typer.Option("--rollouts-only", help="sample and grade; train nothing")] = False,
    train_from: Annotated[
        Path | None, typer.Option(help="train on the rollouts of this run directory; start no engine")
    ] = None,
) -> None:
    """Train as RECIPE says."""
    if rollouts_only and train_from:
        raise ConfigError(
            "--rollouts-only and --train-from exclude each other: one has no learner, the other no engines"
        )
    if resume and restart:
        raise ConfigError("--resume and --restart exclude each other")
    config = load(recipe, settings or [])
    _run(config, run_dir or Path("runs") / config.name, resume, restart, rollouts_only, train_from)


def _run(
    recipe: Recipe, root: Path, resume: bool, restart: bool, rollouts_only: bool, train_from: Path | None
) -> None:
    from m2train import loop
    from m2train.host import allow_open_files
    from m2train.preflight import check
    from m2train.progress import Progress
    from m2train.report import write_report
    from m2train.run import open_run, summary
    from m2train.rundir import RunDir

    if train_from is not None and train_from.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"--train-from {train_from} is the run directory itself, or in it; name another --run-dir")
    allow_open_files()
    check(recipe, train_from=train_from, rollouts_only=rollouts_only)
    run_dir = RunDir(root)
    if resume and run_dir.is_empty():  # what a scheduler's job that always resumes wants
        print(f"m2train: no run in {root} to go on with: starting one", file=sys.stderr)
    run_dir.start(recipe, resume=resume, restart=restart, rollouts_only=rollouts_only, train_from=train_from)

    async def go(progress: Progress) -> None:
        async with open_run(recipe, run_dir, progress, rollouts_only=rollouts_only, train_from=train_from) as run:
            await loop.train(run)

    with Progress() as progress:
        try:
            asyncio.run(go(progress))
        except BaseException as err:
            known = isinstance(err, RunError | ConfigError | OSError | KeyboardInterrupt)
            with contextlib.suppress(OSError):  # a full disk: the cause on the screen must stay the first one
                run_dir.write_status("failed", cause_of(err) if known else f"{type(err).__name__}: {cause_of(err)}")
                write_report(root)
            raise
        run_dir.write_status("finished")
        report = write_report(root)
        progress.finish(summary(root) | {"report": str(report)})
    run_dir.close()


@app.command()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="run directories")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="of a comparison")] = None,
) -> None:
    """Write RUN_DIR/report.html; of several runs, a comparison with the first: FIRST/compare.html."""
    from m2train.metrics import METRICS_FILE
    from m2train.report import write_report
    from m2train.report.compare import COMPARISON_FILE, write_comparison

    for run_dir in run_dirs:
        if not any((run_dir / name).is_file() for name in ("config.toml", METRICS_FILE)):
            raise ConfigError(f"{run_dir} is no run directory: it has neither config.toml nor {METRICS_FILE}")
    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output} is a folder; expected the name of a file, such as compare.html")
    if len(run_dirs) > 1:
        typer.echo(write_comparison(run_dirs, output or run_dirs[0] / COMPARISON_FILE))
        return
    if output is not None:
        raise ConfigError("--output names a comparison; expected several run directories")
    typer.echo(write_report(run_dirs[0]))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="say also whether this recipe could run")] = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines and bug reports")] = False,
) -> None:
    """Say what works on this machine and why the rest does not.

    Exit code 1: RECIPE could not run here, or could not be read; the cause is told.
    """
    from m2train.doctor import diagnose, diagnose_file, render

    findings = diagnose_file(recipe, settings or []) if recipe else diagnose()
    typer.echo(json.dumps(findings, indent=1) if as_json else render(findings))
    if findings.get("recipe", {}).get("problems"):
        raise typer.Exit(1)


def cause_of(err: BaseException) -> str:
    """One line that says what ended a run."""
    if isinstance(err, KeyboardInterrupt):
        return "interrupted"
    if isinstance(err, OSError) and err.errno is not None:
        where = f" ({err.filename})" if err.filename else ""
        return f"{err.strerror}{where}"
    return " ".join(str(err).split()) or type(err).__name__


def main() -> None:
    """Entry point of the `m2train` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends a run like Ctrl-C: cleanly
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()  # ends the process itself: 0, 2 for bad usage, 130 when interrupted
    except ConfigError as err:
        print(f"m2train: {cause_of(err)}", file=sys.stderr)
        sys.exit(2)
    except (RunError, OSError, ValueError) as err:
        print(f"m2train: {cause_of(err)}", file=sys.stderr)
        sys.exit(1)
