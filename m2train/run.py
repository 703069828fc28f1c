"""Everything a run consists of, opened together and closed together."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from m2train.concurrency import gather_or_cancel
from m2train.config import ConfigError, Recipe
from m2train.errors import RunError
from m2train.exports import open_export_folder
from m2train.learner.client import LearnerClient
from m2train.metrics import MetricsWriter, read_metrics
from m2train.models import resolve_model
from m2train.phases import Phases
from m2train.progress import Progress
from m2train.records import StepRollouts
from m2train.rollout.chat import ChatTemplate
from m2train.rollout.engine import EnginePool
from m2train.rollout.journal import Journal
from m2train.rollout.sampler import Sampler
from m2train.rundir import RunDir, rollout_file
from m2train.verifier import CaseSampler, CaseScript, Verifier, build_verifier, load_cases, split_cases

T = TypeVar("T")


@dataclass(kw_only=True)
class Run:
    """The parts that the algorithm in `loop.py` uses; `open_run` makes one.

    `engines` is None when training on saved rollouts, `learner` is None when only rolling out.
    """

    recipe: Recipe
    dir: RunDir
    chat: ChatTemplate
    verifier: Verifier
    cases: CaseSampler
    heldout: Sequence[CaseScript]
    engines: EnginePool | None
    learner: LearnerClient | None
    metrics: MetricsWriter
    progress: Progress
    source: Path | None
    first_step: int
    exports: Path
    phases: Phases = field(default_factory=Phases)
    _published: int | None = None
    _restarts: int = 0
    _sync_row: dict[str, float] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The weight version that the engines hold."""
        if self.engines is None:
            raise AssertionError("no engines: nothing is sampled in this run")
        return self.engines.version

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Time a phase of the step, mark it for the profiler, and show it."""
        self.progress.phase(name)
        return self.phases(name)

    def case(self, case_id: str) -> CaseScript:
        """The script of this id."""
        return next(case for case in load_cases() if case.id == case_id)

    async def publish(self, step: int) -> None:
        """Give the engines the weights before `step`, unless they have them."""
        if self.learner is None or self.engines is None or self._published == step:
            return
        path = self.exports / "weights.safetensors"
        export = await asyncio.to_thread(self.learner.export, path)
        sync = await self.engines.update_weights(path, self.dir.weight_version(step))
        self._sync_row |= {f"sync/{name}": seconds for name, seconds in (export | sync).items()}
        self._published = step

    def saved_rollouts(self, step: int) -> Path | None:
        """The step's rollouts, if an earlier process completed them or the run trains on another's."""
        if self.source is not None:
            return rollout_file(self.source, step)
        path = self.dir.rollouts(step)
        return path if path.exists() else None

    @contextlib.contextmanager
    def sampler(self, journal_path: Path, *, greedy: bool = False) -> Iterator[Sampler]:
        """A sampler whose generations are journaled under the current weight version."""
        if self.engines is None:
            raise AssertionError("sampling without engines")
        journal = Journal(journal_path, self.version)
        if journal.num_recovered:
            self.progress.note(f"{journal.num_recovered} generations recovered from {journal_path.name}")
        try:
            yield Sampler(self.engines, self.recipe, journal, greedy=greedy)
        finally:
            journal.close()

    async def gather(self, name: str, jobs: Sequence[Coroutine[None, None, T]]) -> list[T]:
        """Run jobs concurrently, in order of result, showing progress; the first failure ends the others."""
        done = 0
        self.progress.phase(name, 0, len(jobs))

        async def counted(job: Coroutine[None, None, T]) -> T:
            nonlocal done
            result = await job
            done += 1
            self.progress.phase(name, done, len(jobs))
            return result

        return await gather_or_cancel([counted(job) for job in jobs])

    def record(self, step: int, row: dict[str, float]) -> None:
        """Write the step's row of metrics, with the time of each phase, and show it."""
        if not row:
            return
        full = {"step": step, **row, **self._sync_row, **self._engine_row(), **self.phases.take()}
        self._sync_row = {}
        self.metrics.append(full)
        self.progress.step(full)

    def _engine_row(self) -> dict[str, float]:
        """Restarts of engines since this process began; a new one is told."""
        if self.engines is None:
            return {}
        before, self._restarts = self._restarts, self.engines.restarts_total
        if self._restarts > before:
            self.progress.note(
                f"  engine restarts: {self._restarts - before} in this step, {self._restarts} so far; "
                f"see {self.dir.root / 'logs'}"
            )
        return {"engine/restarts": float(self._restarts)}

    def trusted(self, rollouts: StepRollouts, path: Path) -> StepRollouts:
        """Saved rollouts, if they come from the weights that this run has at that step.

        Raises:
            ConfigError: they were sampled by others (a `--rollouts-only` run that is now to be trained).
        """
        expected = self.dir.weight_version(rollouts.step)
        if self.learner is not None and self.source is None and rollouts.weight_version != expected:
            raise ConfigError(
                f"{path} was sampled by weights {rollouts.weight_version!r}; expected {expected!r}: use --train-from "
                f"{self.dir.root} with another --run-dir, or --restart"
            )
        return rollouts

    def checkpoint(self, step: int) -> None:
        """Save the learner after `step` steps if it is time."""
        every, last = self.recipe.checkpoint.every, self.recipe.steps
        if self.learner is None or (step % every and step != last):
            return
        with self.phase("checkpoint"):
            self.learner.save(self.dir.checkpoint(step))
        self.dir.prune_checkpoints(self.recipe.checkpoint.keep)

    def check_trust(self, row: dict[str, float]) -> None:
        """Stop a run whose rollouts no longer come from the policy that is trained.

        Raises:
            RunError: the log-probs differ by more than `mismatch_limit`.
        """
        limit, worst = self.recipe.mismatch_limit, row.get("mismatch/max_abs", 0.0)
        if limit is not None and not worst <= limit:
            raise RunError(
                f"learner and rollout log-probs differ by {worst:.3g}, over mismatch_limit = {limit:g}: the rollouts "
                f"cannot be trusted; compare dtypes (learner.dtype, rollout.dtype) and weight versions"
            )


@contextlib.asynccontextmanager
async def open_run(
    recipe: Recipe,
    run_dir: RunDir,
    progress: Progress,
    *,
    rollouts_only: bool = False,
    train_from: Path | None = None,
) -> AsyncIterator[Run]:
    """Start engines and learner side by side for a recipe that `preflight.check` passed; close both whatever happens.

    Raises:
        RunError: an engine or the learner did not start.
    """
    model = resolve_model(recipe.model.path)
    first = run_dir.latest_checkpoint() or 0 if not rollouts_only else 0
    chat = ChatTemplate(model, thinking=recipe.model.thinking)
    train_cases, heldout = split_cases(load_cases())
    progress.start(recipe, run_dir.root, done=first)
    exports, place = open_export_folder(run_dir.root, recipe, model)
    if train_from is None and not rollouts_only:
        progress.note(f"  {place}")
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, exports, ignore_errors=True)
        learner = None if rollouts_only else LearnerClient(recipe, run_dir.root, model)
        engines = None
        if not train_from:
            engines = EnginePool(
                recipe, model, run_dir.root, stop_token_ids=chat.stop_token_ids, publishes=learner is not None
            )
        starts: list[Awaitable[object]] = []
        if engines is not None:
            stack.push_async_callback(engines.close)
            starts.append(engines.start())
        if learner is not None:
            stack.callback(learner.close)
            checkpoint = run_dir.checkpoint(first) if first else None
            starts.append(asyncio.to_thread(learner.start, checkpoint))
        progress.phase("starting engines and learner")
        await asyncio.gather(*starts)
        metrics = MetricsWriter(run_dir.root)
        stack.callback(metrics.close)
        metrics.truncate(first - 1)
        yield Run(
            recipe=recipe,
            dir=run_dir,
            chat=chat,
            verifier=build_verifier(recipe.verifier),
            cases=CaseSampler(train_cases, recipe.seed),
            heldout=heldout,
            engines=engines,
            learner=learner,
            metrics=metrics,
            progress=progress,
            source=train_from,
            first_step=first,
            exports=exports,
        )


def summary(run_dir: Path) -> dict[str, object]:
    """What the last lines of a run say."""
    rows = read_metrics(run_dir)
    scores = [row["heldout/reward"] for row in rows if row.get("heldout/reward") is not None]
    rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    worst = [row["mismatch/max_abs"] for row in rows if row.get("mismatch/max_abs") is not None]
    lines: dict[str, object] = {}
    if scores:
        lines["held-out reward"] = f"{scores[0]:.3f} -> {scores[-1]:.3f} ({scores[-1] - scores[0]:+.3f})"
    if rewards:
        lines["training reward"] = f"{rewards[0]:.3f} -> {rewards[-1]:.3f}"
    if worst:
        lines["max |learner - rollout log-prob|"] = f"{max(worst):.2e}"
    return lines
