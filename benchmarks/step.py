"""Step bench: the learner alone, on saved or synthetic rollouts; random weights of a model's shape, or its own.

    python benchmarks/step.py --model smollm2-135m --layers 4 --steps 8
    python benchmarks/step.py --weights smollm2-135m --rollouts runs/demo-0 --variants none,varlen,tree
    python benchmarks/step.py --memory --packed-tokens 8192 --recompute --variants tree,eager-head,full-head

Starts the ranks with torchrun, as the trainer does, and alternates between variants step by step, so that all see the
same machine:

    tree         what the trainer does: shared prefixes are computed once, fused LM head and loss
    varlen       replies share micro-batches, one after another
    none         one reply a micro-batch
    eager-head   tree, with all logits of a micro-batch's scored rows at once and the loss on them
    full-head    tree, with the logits of every packed row at once, as heads without row selection have them

First one step of each is compared: loss, log-probs and the gradient of every tensor have to be those of `none` (or of
the last variant) before anything is timed. Then prints tokens/s, MFU against the GEMM rate measured on this machine,
phases and peak memory of each, and an Amdahl table: the share of the step that an op has, times what a variant of the
op gains alone, predicts what the step gains; the measured gain stands beside it. --mllog adds a file of `:::MLLOG`
lines, an interval for each step.

--memory starts each variant in processes of its own, for what one has freed may stay with its process, and prints the
peak resident memory of a step beside that of the first variant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import m2kernels as mk
from m2train.bench import ceilings, env, shapes, stats
from m2train.bench.mllog import MLLog
from m2train.bench.models import model_config, write_random_model
from m2train.bench.parity import gap, parity_table, run_step, worst
from m2train.bench.steps import make_recipe, packed_batch, recorded_batch, step_flops, synthetic_batch

if TYPE_CHECKING:
    from m2train.learner.model import HeadOutput, HeadRows

VARIANTS = ("tree", "varlen", "none", "eager-head", "full-head")
DEFAULT = "tree,varlen,none,eager-head"
PHASES = {"forward and backward": "learner/forward_backward_s", "optimizer": "learner/optimizer_s"}
OP_REPEATS = 5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Of a tensor's largest gradient: far above rounding, far below a wrong row."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", choices=sorted(shapes.MODELS))
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--weights", help="train this model instead: a Hugging Face folder, or smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--groups", type=int, default=4, help="of synthetic rollouts")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="mean tokens")
    parser.add_argument("--reply", type=int, default=48, help="mean tokens; lognormal with a long tail")
    parser.add_argument("--longest", type=int, default=256, help="tokens of a reply at most")
    parser.add_argument("--rollouts", type=Path, help="a run directory whose rollouts are trained on instead")
    parser.add_argument("--rollout-step", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="of each variant, after one that is not counted")
    parser.add_argument("--variants", default=DEFAULT)
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare the variants (gradients are kept twice)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="compare peak memory, each variant in its own processes"
    )
    parser.add_argument(
        "--packed-tokens", type=int, help="synthetic rollouts that pack into so many tokens, one micro-batch of trees"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="activations of a layer are computed again in backward"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    for name in ("tp", "pp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), help="default: CPU time for one rank of one thread, else wall"
    )
    parser.add_argument("-o", "--out", type=Path, help="append the result to this file, a JSON line")
    parser.add_argument("--mllog", type=Path, help="write intervals and results to this file as MLPerf's log lines")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    if args.weights and args.layers:
        parser.error("--layers makes a model with random weights; --weights names one that is there")
    alone = args.tp * args.pp * args.dp * args.threads == 1 and not torch.cuda.is_available()
    args.clock = args.clock or ("cpu" if alone else "wall")
    unknown = set(args.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if set(EAGER) & set(args.variants) and args.tp > 1:
        parser.error(f"variants {' and '.join(EAGER)} have the whole vocabulary on a rank: they need --tp 1")
    if args.packed_tokens:
        args.micro_batch_tokens = args.packed_tokens
    return args


# ------------------------------------------------------------------------------------------------- a rank


def eager_head(hidden: torch.Tensor, weight: torch.Tensor, head: HeadRows) -> HeadOutput:
    """The learner's head with all logits of the scored rows at once, then the loss: a `HeadFunction`."""
    log_p = log_probs(hidden.index_select(0, head.rows), weight, head)
    return eager_loss(log_p.gather(1, head.target[:, None])[:, 0], entropy_of(log_p), head)


def full_head(hidden: torch.Tensor, weight: torch.Tensor, head: HeadRows) -> HeadOutput:
    """The same with all logits of every row."""
    log_p = log_probs(hidden, weight, head)
    return eager_loss(log_p[head.rows, head.target], entropy_of(log_p)[head.rows], head)


EAGER = {"eager-head": eager_head, "full-head": full_head}


def log_probs(hidden: torch.Tensor, weight: torch.Tensor, head: HeadRows) -> torch.Tensor:
    """float32 [rows, V]."""
    logits = (hidden @ weight[: head.vocab_size].t()).float()
    return torch.log_softmax(logits if head.temperature == 1.0 else logits / head.temperature, dim=-1)


@torch.no_grad()
def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    """float32 [rows]; a metric, without a gradient."""
    return -log_p.exp().mul_(log_p).sum(-1)


def eager_loss(logp: torch.Tensor, entropy: torch.Tensor, head: HeadRows) -> HeadOutput:
    """The policy loss of log-probs as `HeadFunction` returns it."""
    from m2train.learner.model import HeadOutput

    loss = head.loss
    if loss is None:
        return HeadOutput(logp, entropy, None, {})
    found = mk.policy_loss(
        logp,
        loss.old_logp,
        loss.advantage,
        loss.seq,
        denom=loss.denom,
        spec=loss.spec,
        rollout_logp=loss.rollout_logp,
    )
    return HeadOutput(logp.detach(), entropy, found.loss, found.metrics)


class Rank:
    """One rank under torchrun: builds the trainer once, then runs the variants in turn."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from m2train.learner import parallel
        from m2train.learner.trainer import Trainer

        parallel.start_process_group(1800.0)
        self.args = args
        folder = model_folder(args, folder)
        self.config = read_config(folder)
        self.batch = load(args, self.config["vocab_size"])
        self.tokens = sum(s.token_ids.numel() for s in self.batch.samples)
        layout = {"tp": args.tp, "pp": args.pp, "dp": args.dp, "threads": args.threads}
        # Built for trees, which is able to do the others too; all of them are set in turn.
        recipe = make_recipe(
            self.batch,
            dtype=args.dtype,
            lr=1e-30,  # below the resolution of any weight: every step sees the same ones
            micro_batch_tokens=args.micro_batch_tokens,
            packing="tree",
            recompute=args.recompute,
            **layout,
        )
        self.trainer = Trainer(recipe, folder)

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """Make the trainer this variant."""
        policy, recipe = self.trainer.policy, self.trainer.recipe
        fused = policy.head
        learner = recipe.learner.model_copy(update={"packing": "tree" if name in EAGER else name})
        self.trainer.recipe = recipe.model_copy(update={"learner": learner})
        policy.head = EAGER.get(name, fused)
        try:
            yield
        finally:
            policy.head = fused

    def step(self, name: str, batch: Any = None) -> dict[str, float]:
        """One step, on the batch unless another is given; seconds, phases (elapsed time), this rank's peak memory."""
        from torch import distributed as dist

        cuda = torch.cuda.is_available()
        with self.variant(name):
            dist.barrier()
            reset_peak(cuda)
            start = now(self.args.clock)
            result = self.trainer.train([batch or self.batch])[0]
            seconds = now(self.args.clock) - start
        found = {"seconds": seconds, "peak_bytes": float(peak(cuda))}
        if result.metrics:
            found |= {phase: result.metrics[key] for phase, key in PHASES.items()}
            found["micro_batches"] = result.metrics["learner/micro_batches"]
            found["unique_tokens"] = result.metrics["learner/unique_tokens"]
            found["packing_efficiency"] = result.metrics["learner/packing_efficiency"]
        return found

    def parity(self) -> dict[str, Any]:
        """Each variant's first step against that of `none`, or of the last one; the worst of all ranks."""
        from torch import distributed as dist

        base = "none" if "none" in self.args.variants else self.args.variants[-1]
        with self.variant(base):
            wanted = run_step(self.trainer, self.batch)
        found: dict[str, Any] = {}
        for name in self.args.variants:
            if name == base:
                continue
            with self.variant(name):
                mine = gap(run_step(self.trainer, self.batch), wanted)
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, mine)
            found[name] = asdict(worst(gathered))
        return {"base": base, "loss": wanted.loss, "largest_grad": wanted.largest_grad, "gaps": found}

    def op_seconds(self) -> dict[str, float]:
        """Seconds a step that head and loss take alone, forward and backward, over the micro-batches of rank 0."""
        from m2train.learner.model import DTYPES, HeadLoss, HeadRows
        from m2train.learner.packing import Costs, build_micro_batch, plan_step
        from m2train.learner.parallel import device
        from m2train.learner.trainer import loss_spec

        with self.variant("tree"):
            plan = plan_step(self.batch, self.trainer.recipe, Costs.of(self.trainer.hf))
        policy, dtype = self.trainer.policy, DTYPES[self.args.dtype]
        rows_v, width = self.config["vocab_size"] // self.args.tp, self.config["hidden_size"]
        weight = (torch.randn(rows_v, width) * 0.02).to(device(), dtype).requires_grad_()
        weight.main_grad = torch.zeros(rows_v, width, device=device())  # type: ignore[attr-defined]
        total = {"tree": 0.0, "eager-head": 0.0}
        for members, forest in zip(plan.members[0], plan.forests, strict=True):
            micro = build_micro_batch(self.batch, members, forest, device())
            hidden = torch.randn(micro.tokens.shape[1], width).to(device(), dtype).requires_grad_()
            loss = HeadLoss(
                old_logp=micro.old_logp,
                advantage=micro.advantage,
                seq=micro.seq,
                rollout_logp=micro.rollout_logp,
                denom=self.batch.denom,
                spec=loss_spec(self.trainer.recipe.algo),
            )
            target = micro.target % rows_v
            head = HeadRows(rows=micro.rows, target=target, temperature=1.0, vocab_size=rows_v, loss=loss)
            found: dict[str, list[float]] = {name: [] for name in total}
            for _ in range(OP_REPEATS + 1):  # in turn, so that both see the same machine; the first round is dropped
                for name in total:
                    with self.variant(name):
                        start = now(self.args.clock)
                        value = policy.head(hidden, weight, head).loss
                        assert value is not None
                        value.backward()
                        found[name].append(now(self.args.clock) - start)
            for name, seconds in found.items():
                total[name] += median(seconds[1:])
        return total


def model_folder(args: argparse.Namespace, scratch: Path) -> Path:
    """Where the model is: one with weights of its own, or the random one in the scratch folder."""
    if args.weights is None:
        return scratch
    from m2train.models import resolve_model

    return resolve_model(args.weights)


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def now(clock: str) -> float:
    """Seconds, once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() if clock == "cpu" else time.perf_counter()


def reset_peak(cuda: bool) -> None:
    """Forget earlier peaks of memory."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(cuda: bool) -> int:
    """Bytes at the most since `reset_peak`: of the allocator, or of the resident set."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load(args: argparse.Namespace, vocab: int) -> Any:
    """The batch: recorded or synthetic."""
    if args.packed_tokens is not None:
        return packed_batch(args.packed_tokens, vocab)
    if args.rollouts is not None:
        return recorded_batch(args.rollouts, args.rollout_step)
    prompts = shapes.ragged(args.groups, args.prompt, 4 * args.prompt, seed=1)
    lengths = shapes.ragged(args.groups * args.group_size, args.reply, args.longest)
    return synthetic_batch(prompts, lengths, args.group_size, vocab)


def rank_main(args: argparse.Namespace) -> None:
    """What torchrun starts; rank 0 writes the measurements."""
    from torch import distributed as dist

    torch.set_num_threads(args.threads)
    rank = Rank(args, args.worker)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.variants}
    first = dist.get_rank() == 0
    log = MLLog(args.mllog if first else None)
    log.event("submission_benchmark", f"{args.model} step")
    parity = None if args.no_check or len(args.variants) < 2 else rank.parity()
    if parity is not None and any(one["relative"] > TOLERANCE[args.dtype] for one in parity["gaps"].values()):
        raise SystemExit(f"variants do not compute the same step, so none is timed: {parity}")
    if args.memory:  # a step that allocates what the optimizer keeps, on one reply
        rank.step(args.variants[0], replace(rank.batch, samples=rank.batch.samples[:1]))
    for number in range(1 if args.memory else 0, args.steps + 1):
        order = args.variants if number % 2 else args.variants[::-1]
        for name in order:
            with log.interval("step", variant=name, step_num=number, counted=number > 0) as ended:
                one = rank.step(name)
                ended |= {"seconds": one["seconds"], "tokens": rank.tokens}
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, one)
            # Ranks wait for each other: the slowest one's time counts, and the largest memory.
            one = gathered[0] | {k: max(g[k] for g in gathered) for k in ("seconds", "peak_bytes")}
            if number:
                found[name].append(one)
    ops = rank.op_seconds() if first and {"tree", "eager-head"} <= set(args.variants) else {}
    if first:
        (args.worker / "result.json").write_text(json.dumps({"steps": found, "ops": ops, "parity": parity}))
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------- the parent


def measure(args: argparse.Namespace, folder: Path, *more: str) -> dict[str, Any]:
    """Start the ranks on a random model and read what they measured; `more` are further arguments of theirs."""
    ranks = args.tp * args.pp * args.dp
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={ranks}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(Path(__file__).resolve()), *sys.argv[1:], *more, "--worker", str(folder)),
    ]
    extra = {"OMP_NUM_THREADS": str(args.threads)}
    if not torch.cuda.is_available():
        extra["TORCHDYNAMO_DISABLE"] = "1"  # as the trainer: Megatron's jit_fuser would compile for seconds
    subprocess.run(command, env=os.environ | extra, check=True)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def main() -> None:
    """Measure and print."""
    args = arguments()
    if args.worker is not None:
        rank_main(args)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="m2bench-step-") as scratch:
        folder = Path(scratch)
        if args.weights is None:
            write_random_model(folder, model_config(args.model, layers=args.layers), args.dtype)
        config = read_config(model_folder(args, folder))
        if args.memory:
            each = [measure(args, folder, "--variants", name) for name in args.variants]
            found = {"steps": {n: s for one in each for n, s in one["steps"].items()}, "ops": {}, "parity": None}
        else:
            found = measure(args, folder)
    best = ceilings.measure(device, args.threads, 0.3)
    peak_rate = best["bf16" if args.dtype == "bfloat16" else "fp32"] * args.tp * args.pp * args.dp
    batch = load(args, config["vocab_size"])
    tokens, flops = sum(s.token_ids.numel() for s in batch.samples), step_flops(config, batch)
    result = {
        "model": args.weights or args.model,
        "layers": config["num_hidden_layers"],
        "dtype": args.dtype,
        "ranks": {"tp": args.tp, "pp": args.pp, "dp": args.dp, "threads": args.threads},
        "clock": args.clock,
        "separate": args.memory,
        "batch": {"replies": len(batch.samples), "tokens": tokens, "flops": flops},
        "rollouts": {"name": args.rollouts.name, "step": args.rollout_step} if args.rollouts else None,
        "peak_flops": peak_rate,
        "machine": env.machine(device),
        "build": env.build(Path(__file__).parent),
        **found,
    }
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(render(result, tokens, flops, peak_rate))
    if args.memory:
        print("\n".join(memory_table(result["steps"])))


def render(result: dict[str, Any], tokens: int, flops: float, peak_rate: float) -> str:
    """The tables."""
    b, first = result["batch"], next(iter(result["steps"]))
    lines = [
        f"{result['model']}, {result['layers']} layers, {result['dtype']}, {result['ranks']}",
        f"{b['replies']} replies, {tokens} tokens, {flops:.3g} FLOPs a step with every reply by itself (what `tree` "
        "shares raises its MFU); "
        f"GEMM rate of this machine {peak_rate:.3g} FLOP/s; clock: {result['clock']} time, phases: wall",
        "",
        f"{'variant':<11} {'step s [rounds]':<24} {'tokens/s':>9} {'MFU %':>6} {'fwd+bwd s':>9} {'optim. s':>8} "
        f"{'peak MiB':>8} {'computed':>8} {'micro-b.':>8} {'fill %':>6} time / {first}'s [rounds]",
    ]
    for name, steps in result["steps"].items():
        seconds = [s["seconds"] for s in steps]
        middle = median(seconds)
        low, high = stats.bootstrap_median([seconds])
        phase = [median(s[p] for s in steps) for p in PHASES]
        lines.append(
            f"{name:<11} {f'{middle:.3f} [{low:.3f}, {high:.3f}]':<24} {tokens / middle:>9.0f} "
            f"{100 * flops / middle / peak_rate:>6.1f} {phase[0]:>9.3f} {phase[1]:>8.3f} "
            f"{max(s['peak_bytes'] for s in steps) / 2**20:>8.0f} {steps[0]['unique_tokens']:>8.0f} "
            f"{steps[0]['micro_batches']:>8.0f} {100 * steps[0]['packing_efficiency']:>6.1f} "
            f"{against(result['steps'], name)}"
        )
    if not result["separate"]:  # in processes of their own neither gradients nor single ops are compared
        lines += ["", *parity_table(result["parity"]), "", *amdahl(result["steps"], result["ops"])]
    return "\n".join(lines)


def memory_table(steps: dict[str, list[dict[str, float]]]) -> list[str]:
    """Peak resident memory of each variant, and how much lower the first one's is."""
    peaks = {name: max(s["peak_bytes"] for s in found) for name, found in steps.items()}
    first, *others = peaks
    lines = [f"peak memory of a step, {first}: {peaks[first] / 2**20:.0f} MiB"]
    for name in others:
        lower = 100 * (1 - peaks[first] / peaks[name])
        lines.append(f"  {name}: {peaks[name] / 2**20:.0f} MiB; {first} is {lower:.1f} % lower")
    return lines


def against(steps: dict[str, list[dict[str, float]]], name: str) -> str:
    """How many times the first variant's time one takes; rounds are paired."""
    first = next(iter(steps))
    if name == first:
        return ""
    mine, theirs = ([s["seconds"] for s in steps[which]] for which in (name, first))
    value, low, high = stats.bootstrap_ratio([mine], [theirs])
    return f"x{value:.3f} [{low:.3f}, {high:.3f}]"


def amdahl(steps: dict[str, list[dict[str, float]]], ops: dict[str, float]) -> Sequence[str]:
    """Share of an op x its own gain = predicted gain of the step, beside the measured one.

    Gains are times of the variant over times of `tree`: under 1 is faster.
    """
    if not ops:
        return ["no Amdahl table: it takes the variants tree and eager-head"]
    base = [s["seconds"] for s in steps["tree"]]
    share = ops["tree"] / median(base)
    gain = ops["eager-head"] / ops["tree"]
    predicted = 1 - share + share * gain
    measured, low, high = stats.bootstrap_ratio([[s["seconds"] for s in steps["eager-head"]]], [base])
    return [
        "op       share of the step  op: eager/fused    step: predicted  step: measured [over rounds]",
        f"LM head  {100 * share:>15.1f} %  {f'x{gain:.3f}':>17}  {f'x{predicted:.3f}':>15}  "
        f"x{measured:.3f} [{low:.3f}, {high:.3f}]",
    ]


if __name__ == "__main__":
    main()
