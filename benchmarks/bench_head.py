"""The LM head with its policy loss, forward and backward, on the CPU: mk.linear_policy_loss beside torch.

Every implementation gives the loss and the gradients of hidden and weight for the same tokens; each
is checked against float64 before it is timed. Rounds are interleaved; what is printed is the median
over rounds of (its time / ours in the same round), and the peak memory beyond inputs, returned
gradients and one float32 copy of the weight's gradient. The others are spared the entropy, which
ours measures as well.

    python benchmarks/bench_head.py [--shape small|large] [--dtype fp32|bf16] [--rounds 5] [--threads 1 --clock cpu]

eager       full logits of all rows, loss maths in torch, autograd
gathered    the same on pre-gathered rows
chunked     pre-gathered rows in chunks, gradients taken in each chunk, dW summed in float32: what
            one writes by hand; chunks of the same byte budget as ours, or one chunk where that fits
torch_lce   torch's F.linear_cross_entropy, chunked (a mean over tokens of -logp: another loss, the
            same GEMMs), on pre-gathered rows
liger, trl  LigerFusedLinearGRPOLoss and TRL's chunked path, where importable
"""

import argparse
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import m2kernels as mk
from m2kernels._head import CHUNK_BYTES

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SHAPES = {"small": (576, 49152, 2048), "large": (2048, 151936, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Inputs:
    """One training batch: hidden [N, D], weight [V, D], and M selected tokens."""

    hidden: torch.Tensor
    weight: torch.Tensor
    rows: torch.Tensor
    target: torch.Tensor
    old_logp: torch.Tensor
    advantage: torch.Tensor
    seq: torch.Tensor
    denom: float


def make_inputs(depth: int, vocab: int, rows: int, dtype: torch.dtype, share: float = 0.35) -> Inputs:
    """Rows in runs, as replies lie between prompts; logits with a spread of about 3."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, depth, generator=g)
    weight = torch.randn(vocab, depth, generator=g) * (3 / depth**0.5)
    picked = torch.arange(rows)[torch.arange(rows) % 64 >= 64 - int(64 * share + 0.5)]
    count = picked.numel()
    seq = torch.arange(count) // 90
    advantage = torch.randn(int(seq[-1]) + 1, generator=g)
    target = torch.randint(0, vocab, (count,), generator=g)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.no_grad():
        old = mk.linear_logprob(hidden, weight, target, rows=picked).logp
    old = old + 0.1 * torch.randn(count, generator=g)
    return Inputs(hidden, weight, picked, target, old, advantage, seq, float(count))


def loss_sum(logp: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """GRPO's clipped objective, summed over tokens and negated."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).sum()


def _leaves(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()


def ours(x: Inputs, **options: object) -> Result:
    """mk.linear_policy_loss."""
    hidden, weight = _leaves(x)
    out = mk.linear_policy_loss(
        hidden, weight, x.target, x.old_logp, x.advantage, x.seq, denom=x.denom, rows=x.rows, **options
    )
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return out.loss.detach(), hidden.grad, weight.grad


def composed(x: Inputs) -> Result:
    """mk.policy_loss(mk.linear_logprob(...)): what another loss would take, four GEMMs."""
    hidden, weight = _leaves(x)
    logp = mk.linear_logprob(hidden, weight, x.target, rows=x.rows).logp
    loss = mk.policy_loss(logp, x.old_logp, x.advantage, x.seq, denom=x.denom).loss
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def eager(x: Inputs) -> Result:
    """Full logits of all rows."""
    hidden, weight = _leaves(x)
    logits = F.linear(hidden, weight).float()
    target = torch.zeros(len(hidden), dtype=torch.int64)
    target[x.rows] = x.target
    logp = logits.log_softmax(-1).gather(1, target[:, None])[:, 0][x.rows]
    loss = loss_sum(logp, x.old_logp, x.advantage[x.seq]) / x.denom
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def gathered(x: Inputs) -> Result:
    """Full logits of the selected rows."""
    hidden, weight = _leaves(x)
    logp = F.linear(hidden[x.rows], weight).float().log_softmax(-1).gather(1, x.target[:, None])[:, 0]
    loss = loss_sum(logp, x.old_logp, x.advantage[x.seq]) / x.denom
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def chunked(x: Inputs, budget: int = CHUNK_BYTES["cpu"]) -> Result:
    """Selected rows in chunks; gradients are taken in each chunk."""
    count, vocab = len(x.rows), len(x.weight)
    parts = -(-count * vocab * 4 // budget)
    step = -(-count // parts)
    selected = x.hidden[x.rows]
    d_selected, total = torch.empty_like(selected), torch.zeros(())
    d_weight: torch.Tensor | None = None
    for start in range(0, count, step):
        part = slice(start, start + step)
        hidden, weight = selected[part].detach().requires_grad_(), x.weight.detach().requires_grad_()
        logp = F.linear(hidden, weight).float().log_softmax(-1).gather(1, x.target[part, None])[:, 0]
        loss = loss_sum(logp, x.old_logp[part], x.advantage[x.seq[part]]) / x.denom
        d_selected[part], dw = torch.autograd.grad(loss, [hidden, weight])
        if step >= count:
            d_weight = dw
        elif d_weight is None:
            d_weight = dw.float()
        else:
            d_weight += dw
        total += loss.detach()
    d_hidden = torch.zeros_like(x.hidden)
    d_hidden[x.rows] = d_selected
    assert d_weight is not None
    return total, d_hidden, d_weight.to(x.weight.dtype)


def chunked_whole(x: Inputs) -> Result:
    """The same in one chunk."""
    return chunked(x, 1 << 62)


def torch_lce(x: Inputs) -> Result:
    """torch's own fused head; the mean of -logp, not the policy loss."""
    hidden, weight = _leaves(x)
    options = torch.nn.LinearCrossEntropyOptions()
    loss = F.linear_cross_entropy(hidden[x.rows], weight, x.target, options=options)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def implementations() -> tuple[dict[str, Callable[[Inputs], Result]], dict[str, str]]:
    """Those that run here, and why the others do not."""
    found: dict[str, Callable[[Inputs], Result]] = {
        "ours": ours,
        "composed": composed,
        "eager": eager,
        "gathered": gathered,
        "chunked": chunked,
        "chunked_whole": chunked_whole,
    }
    missing = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch_lce"] = torch_lce
    else:
        missing["torch_lce"] = f"torch {torch.__version__} has no chunked F.linear_cross_entropy"
    for name, module in (("liger", "liger_kernel"), ("trl", "trl")):
        there = importlib.util.find_spec(module) is not None
        missing[name] = f"{module} is " + ("here, but runs on a GPU" if there else "not installed")
    return found, missing


class PeakMemory:
    """Largest resident size of this process beyond that at entry, in bytes, polled by a thread."""

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._base = self.peak = self._resident()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak -= self._base

    @staticmethod
    def _resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def _poll(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, self._resident())


def check(name: str, got: Result, want: Result) -> float:
    """The largest relative error (2-norm) beside float64; raises when it is not rounding."""
    limit, worst = (2e-3 if got[1].dtype == torch.float32 else 0.3), 0.0
    for part, mine, theirs in zip(("loss", "d hidden", "d weight"), got, want, strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        if not error < limit:
            raise RuntimeError(f"{name}: {part} is off by {error:.2e}; a wrong implementation must not be timed")
        worst = max(worst, error)
    return worst


def reference(x: Inputs) -> Result:
    """float64, in chunks; weight's gradient in float32 to save memory."""
    hidden, weight = x.hidden.double(), x.weight.double()
    d_hidden, total = torch.zeros_like(hidden), torch.zeros((), dtype=torch.float64)
    d_weight = torch.zeros(x.weight.shape, dtype=torch.float32)
    for start in range(0, len(x.rows), 64):
        part = slice(start, start + 64)
        h = hidden[x.rows[part]]
        logits = (h @ weight.T).requires_grad_()
        logp = logits.log_softmax(-1).gather(1, x.target[part, None])[:, 0]
        loss = loss_sum(logp, x.old_logp[part].double(), x.advantage[x.seq[part]].double()) / x.denom
        (dz,) = torch.autograd.grad(loss, [logits])
        d_hidden[x.rows[part]] = dz @ weight
        d_weight += (dz.T @ h).float()
        total += loss.detach()
    return total, d_hidden, d_weight


def run(shape: str, dtype: str, rounds: int, names: list[str] | None, clock: Callable[[], float]) -> None:
    """Check, time and print one table."""
    depth, vocab, count = SHAPES[shape]
    x = make_inputs(depth, vocab, count, DTYPES[dtype])
    found, missing = implementations()
    found = {k: v for k, v in found.items() if names is None or k == "ours" or k in names}
    want = reference(x)
    memory, errors = {}, {}
    for name, fn in found.items():
        with PeakMemory() as peak:
            got = fn(x)
        returned = sum(g.numel() * g.element_size() for g in got[1:])
        memory[name] = max(peak.peak - returned - vocab * depth * 4, 0)
        errors[name] = f"{check(name, got, want):.1e}" if name != "torch_lce" else "-"
        del got
    del want
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, fn in found.items():
            start = clock()
            fn(x)
            seconds[name].append(clock() - start)
    gemm = 6 * len(x.rows) * depth * vocab / 1e9
    print(
        f"\n{shape} {dtype}: D={depth} V={vocab} rows={count} selected={len(x.rows)} "
        f"threads={torch.get_num_threads()}"
    )
    print(f"{'':<14} {'time / ours':>12} {'ms':>9} {'GF/s':>7} {'MiB':>8} {'of eager':>9} {'error':>8}")
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, seconds["ours"], strict=True))
        middle = statistics.median(times)
        share = f"{memory[name] / memory['eager']:.1%}" if memory.get("eager") else "-"
        print(
            f"{name:<14} {ratio:>12.2f} {middle * 1e3:>9.1f} {gemm / middle:>7.0f} "
            f"{memory[name] / 2**20:>8.0f} {share:>9} {errors[name]:>8}"
        )
    for name, why in missing.items():
        print(f"{name:<14} not run: {why}")


def main() -> None:
    """Run the shapes and dtypes asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="implementations to run beside ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a machine that is not idle"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    for shape in args.shape:
        for dtype in args.dtype:
            run(shape, dtype, args.rounds, args.only, clock)


if __name__ == "__main__":
    main()
