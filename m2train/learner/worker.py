"""One rank of the learner: `python -m m2train.learner.worker RUN_DIR` under torchrun.

Rank 0 polls the session folder for commands and passes them on; all ranks carry them out. While idle, rank 0 sends an
empty command every few seconds, so that waiting ranks do not run into the process group's timeout. A rank that fails
writes its one-line cause where the controller looks for it, its traceback into the log, and ends the process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2train.config import Recipe
from m2train.host import die_with_parent, forks_die_too, parent_of
from m2train.learner import protocol
from m2train.learner.protocol import Session, Watch, read_json, write_first, write_json

if TYPE_CHECKING:
    import torch
    from torch import distributed as dist

    from m2train.learner.trainer import StepResult, Trainer

_IDLE_S = 10.0
_LOST_S = 120.0
_PEER_LOST = ("connection closed by peer", "connection reset", "broken pipe", "remote process exited")


@dataclass(kw_only=True)
class Worker:
    """The command loop of one rank.

    Args:
        session: where commands come from.
        trainer: this rank's learner.
        control: gloo group for commands; None: the default group.
        watch: of the controller's heartbeat, for ranks that are not its children.
    """

    session: Session
    trainer: Trainer
    control: dist.ProcessGroup | None
    watch: Watch | None = None
    number: int = field(default=0, init=False)

    def serve(self) -> None:
        """Answer commands until told to close, or until the controller is gone."""
        from torch import distributed as dist

        self.reply({"seconds": 0.0}, None)
        while True:
            box: list[dict[str, Any]] = [self.next_command()] if dist.get_rank() == 0 else [{}]
            dist.broadcast_object_list(box, src=0, group=self.control)
            command = box[0]
            if command["op"] == "idle":
                continue
            self.number += 1
            if command["op"] == "close":
                self.reply({}, None)
                return
            if command["op"] == "lost":
                return
            started = time.perf_counter()
            answer, tensors = self.carry_out(command)
            self.reply(answer | {"seconds": time.perf_counter() - started}, tensors)

    def next_command(self) -> dict[str, Any]:
        """On rank 0: the next command, `idle` after a while without one, `lost` when the controller is gone."""
        path, started = self.session.command(self.number + 1), time.monotonic()
        while time.monotonic() - started < _IDLE_S:
            command = read_json(path)
            if command is not None:
                return command
            if self.watch is not None and self.watch.silence() > _LOST_S:
                return {"op": "lost"}
            time.sleep(protocol.POLL_S)
        return {"op": "idle"}

    def carry_out(self, command: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
        """Do one command; the answer is complete on rank 0."""
        from m2train.learner.batch import load_batch

        op = command["op"]
        if op == "export":
            return {"facts": self.trainer.export(Path(command["path"]), command["dtype"])}, None
        if op == "save":
            self.trainer.save(Path(command["path"]))
            return {}, None
        batches = [load_batch(self.session.batch(self.number, i)) for i in range(command["batches"])]
        if op == "logprobs":
            return {}, _pack([self.trainer.logprobs(batches[0])])
        assert op == "train", op
        results: list[StepResult] = self.trainer.train(batches)
        return {"metrics": [r.metrics for r in results]}, _pack([r.logp for r in results])

    def reply(self, answer: dict[str, Any], tensors: dict[str, torch.Tensor] | None) -> None:
        """On rank 0: write the answer, tensors first."""
        from safetensors.torch import save
        from torch import distributed as dist

        from m2train.files import write_atomic

        if dist.get_rank() != 0:
            return
        if tensors is not None:
            write_atomic(self.session.tensors(self.number), save(tensors))
        write_json(self.session.reply(self.number), answer)


def _pack(results: list[list[torch.Tensor]]) -> dict[str, torch.Tensor] | None:
    """Log-probs of all samples of all batches, one after another, with their lengths."""
    import torch

    flat = [logp for result in results for logp in result]
    if not flat:
        return None
    return {"logp": torch.cat(flat), "lengths": torch.tensor([x.numel() for x in flat])}


def _take_session(run_dir: Path, name: str | None) -> tuple[str, bool]:
    """The session to serve, and whether the controller started these ranks. Without a name: the next untaken one."""
    if name is not None:
        return name, True
    while True:
        current = read_json(protocol.current_session(run_dir))
        if current is not None and not current["local"]:
            session = Session(run_dir, current["name"])
            try:
                taken = write_first(session.served, {"host": os.uname().nodename, "pid": os.getpid()})
            except FileNotFoundError:
                taken = False
            # A new controller removes the name of an old session, then the session: it may have come in between.
            if taken and read_json(protocol.current_session(run_dir)) == current:
                return current["name"], False
        time.sleep(0.2)


def run(run_dir: Path, name: str | None) -> None:
    """Join the ranks, build the learner, serve one session."""
    forks_die_too()
    if name is not None:
        die_with_parent()
        # It took a while to come here. If torchrun died meanwhile, the kernel has nothing left to tell us, and our
        # parent is a stranger.
        if parent_of(os.getppid()) != int(os.environ[protocol.CONTROLLER]):
            return
    try:
        _serve(run_dir, name)
    except BaseException as err:  # noqa: B902  (reported, then the process ends)
        _report(run_dir, name, err)
    else:
        from torch import distributed as dist

        dist.destroy_process_group()


def _serve(run_dir: Path, name: str | None) -> None:
    rank = int(os.environ["RANK"])
    found: tuple[str, bool] | None = _take_session(run_dir, name) if rank == 0 or name is not None else None
    # Heavy imports come after the cheap wait.
    from torch import distributed as dist

    from m2train.learner import parallel

    parallel.start_process_group(_timeout(run_dir, found))
    box = [found]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    _Known.name, local = box[0]
    session = Session(run_dir, _Known.name)
    setup = read_json(session.recipe)
    assert setup is not None, session.recipe
    recipe = Recipe.model_validate(setup["recipe"])
    if recipe.learner.deterministic:  # Transformer Engine asks this, and nothing else, when its attention is made
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")

    from m2train.learner.trainer import Trainer

    control = parallel.control_group(recipe.learner.timeout_s)
    checkpoint = Path(setup["checkpoint"]) if setup["checkpoint"] else None
    trainer = Trainer(recipe, Path(setup["model_dir"]), checkpoint, control)
    watch = None if local else Watch(session.alive)
    Worker(session=session, trainer=trainer, control=control, watch=watch).serve()


class _Known:
    """The session's name once a rank knows it, for the report of a failure."""

    name: str | None = None


def _timeout(run_dir: Path, found: tuple[str, bool] | None) -> float:
    setup = read_json(Session(run_dir, found[0]).recipe) if found is not None else None
    return Recipe.model_validate(setup["recipe"]).learner.timeout_s if setup is not None else 24 * 3600.0


def _report(run_dir: Path, name: str | None, err: BaseException) -> None:
    traceback.print_exc()
    sys.stderr.flush()
    name = name or _Known.name
    if name is not None:
        line = protocol.one_line(err)
        follows = any(sign in line.lower() for sign in _PEER_LOST)  # another rank failed first and tells why
        if not follows:
            rank = os.environ.get("RANK", "?")
            write_first(Session(run_dir, name).error, {"rank": rank, "cause": line})
    os._exit(1)  # no clean-up: it could wait for ranks that wait for us


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="m2train.learner.worker", description="One learner rank, under torchrun.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--session", help="the session to serve; without it, wait for the next one of this run")
    args = parser.parse_args()
    run(args.run_dir.absolute(), args.session)


if __name__ == "__main__":
    main()
