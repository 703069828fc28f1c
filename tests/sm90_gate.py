"""What every Triton kernel becomes on sm_90a, with no GPU: `make check-sm90`, once per Triton version.

Each shipped configuration is compiled for an H100 through the launch that the ops make, on tensors
without data (device "meta"). Refused are: a GEMM without wgmma or without TMA, spilled registers (a
stack frame, or any access to local memory in the machine code), more shared memory than a block can
have. Prints a table; exits 1 on a breach, and first proves on bad configurations that it can.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from m2kernels import _group_advantage_triton as group_advantage
from m2kernels import _head_triton as head
from m2kernels import _policy_loss_triton as policy_loss
from m2kernels import _tree_attention_triton as tree
from m2kernels._head_kernels import HeadSettings, RowStats, TileStats, Upstream
from m2kernels._triton import TREE_BLOCKS, TREE_DIMS, Launch
from m2kernels.plan_tree import TreePlan, plan_tree
from m2kernels.policy_loss import KINDS, KLS

MAX_SHARED = 232448  # bytes a block of sm_90 can opt in to
NUM_SMS = 132


class NoDevice:
    """Stands for an H100 where Triton asks for the active driver; compiling asks for nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    name: str
    launch: Launch
    gemm: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of it; registers a thread, bytes, and counts of instructions."""

    registers: int
    stack: int
    local: int
    shared: int
    wgmma: int
    tma: int
    scratch: int


def _tool(name: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(folder / name)


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def compile_case(case: Case) -> Result:
    """Compile for sm_90a and read the machine code."""
    launch = case.launch
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.meta)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "k.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(_tool("cuobjdump"), "-res-usage", str(cubin))
        sass = _output(_tool("nvdisasm"), "-c", str(cubin))
    return Result(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=compiled.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        tma=len(re.findall(r"\bUTMA(?:LDG|STG)\b", sass)),
        scratch=compiled.metadata.global_scratch_size,
    )


def breaches(case: Case, got: Result) -> list[str]:
    """What is wrong with it; empty when it passes."""
    wrong = []
    if got.stack or got.local:
        wrong.append(f"registers spill: {got.stack} B of stack, {got.local} accesses to local memory")
    if got.shared > MAX_SHARED:
        wrong.append(f"{got.shared} B of shared memory; a block can have {MAX_SHARED}")
    if got.scratch:
        wrong.append(f"{got.scratch} B of global scratch; a launch would ask for triton.set_allocator")
    if case.gemm and not got.wgmma:
        wrong.append("no wgmma")
    if case.gemm and not got.tma:
        wrong.append("no TMA")
    return wrong


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _head_settings(dtype: torch.dtype, rows: int, vocab: int, extras: bool) -> HeadSettings:
    target = _meta(rows, dtype=torch.int64)
    if not extras:
        return HeadSettings(target=target, bias=None, inv_temperature=1.0, softcap=None, num_valid=vocab)
    bias = _meta(vocab, dtype=dtype)
    return HeadSettings(target=target, bias=bias, inv_temperature=_meta(rows), softcap=30.0, num_valid=vocab - 7)


REAL = (4096, 152064)
ODD = ((1, 152064), (4093, 50257), (17, 1))
"""Rows and ids: Triton compiles anew for an integer of 1, and for one that 16 does not divide."""


def head_forward(dtype: torch.dtype, entropy: bool, keep: bool, extras: bool, size: tuple[int, int] = REAL) -> Launch:
    """The forward GEMM; E has rows of whole 128 bytes, as the op makes it."""
    rows, vocab = size
    dim = 5120
    hidden, weight = _meta(rows, dim, dtype=dtype), _meta(vocab, dim, dtype=dtype)
    settings = _head_settings(dtype, rows, vocab, extras)
    stats = head._new_statistics(hidden, rows, vocab, entropy)
    scratch = _meta(rows, -(-vocab // 64) * 64, dtype=dtype)[:, :vocab] if keep else None
    return head.forward_launch(hidden, weight, settings, stats, scratch, NUM_SMS)


def head_rows(
    dtype: torch.dtype, entropy: bool, kept: bool, extras: bool, grad: bool, size: tuple[int, int] = REAL
) -> Launch:
    """The row kernels on E, or on logits."""
    rows, vocab = size
    matrix = _meta(rows, vocab, dtype=dtype)
    settings = _head_settings(dtype, rows, vocab, extras)
    stats = head._new_statistics(matrix, rows, vocab, entropy)
    if not grad:
        return head.logits_launch(matrix, settings, stats)
    row = RowStats(_meta(rows), _meta(rows), _meta(rows), _meta(rows) if entropy else None)
    anchor = stats.top if kept else None
    upstream = Upstream(_meta(rows), _meta(rows) if entropy else None)
    return head.grad_launch(matrix, matrix, settings, anchor, row, upstream)


def odd_cases() -> Iterator[Case]:
    """Sizes of 1 and such as 16 does not divide, with all options: other code than that of the real shapes."""
    for size in ODD:
        tag = " {}x{}".format(*size)
        for dtype in (torch.bfloat16, torch.float32):
            short = str(dtype).removeprefix("torch.")
            extras = size[1] > 7
            yield Case(f"head_forward {short} keep{tag}", head_forward(dtype, True, True, extras, size), gemm=True)
            yield Case(f"head_backward {short}{tag}", head_rows(dtype, True, True, extras, True, size))
            yield Case(f"logits_forward {short}{tag}", head_rows(dtype, True, False, extras, False, size))
            yield Case(f"logits_backward {short}{tag}", head_rows(dtype, True, False, extras, True, size))
        rows, tiles = size[0], -(-size[1] // head.TILE)
        fields = [_meta(tiles, rows).t() for _ in range(3)]
        yield Case(f"head_merge{tag}", head.merge_launch(TileStats(_meta(rows), *fields), _meta(4, rows)))
        yield from (case for case in policy_cases(size[0], min(size), tag) if " k" not in case.name)
        rewards, flags, group = _meta(rows), _meta(rows, dtype=torch.bool), _meta(rows, dtype=torch.int64)
        launch = group_advantage.advantage_launch(rewards, rewards, group, flags, True, True, 1e-6)
        yield Case(f"group_advantage{tag}", launch)


def policy_cases(tokens: int = 32768, sequences: int = 4096, tag: str = "") -> Iterator[Case]:
    """The policy loss: every kind with every kl, with nothing optional and with everything."""
    for kind, kl in itertools.product(range(len(KINDS)), range(len(KLS))):
        for full in (False, True):
            if not full and kl:
                continue
            optional = [_meta(tokens) if full else None for _ in range(3)]
            mask = _meta(tokens, dtype=torch.bool) if full else None
            seq = _meta(tokens, dtype=torch.int64 if full else torch.int32)
            launches, _ = policy_loss.forward_launches(
                _meta(tokens), _meta(tokens), _meta(sequences), seq, mask, *optional, kind, kl,
                0.2, 0.28, 3.0, 0.1, 0.1, 2.0 if full else math.inf, full, False, 100.0,
            )  # fmt: skip
            for launch in launches:
                if launch.kernel is policy_loss.kernels.token_kernel or (full and kl == 0):
                    name = launch.kernel.__name__.removesuffix("_kernel")
                    yield Case(f"policy_loss {name} {KINDS[kind]} {KLS[kl]}" + " options" * full + tag, launch)
    halves = (_meta(tokens), _meta(tokens))
    yield Case("policy_loss scale" + tag, policy_loss.scale_launch(_meta(), halves, halves))


def advantage_cases() -> Iterator[Case]:
    """The group advantage, with and without its second pass."""
    rows, flags = _meta(4096), _meta(4096, dtype=torch.bool)
    for divide in (False, True):
        group = _meta(4096, dtype=torch.int64 if divide else torch.int32)
        launch = group_advantage.advantage_launch(rows, rows, group, flags if divide else None, divide, divide, 1e-6)
        yield Case("group_advantage" + " loo std valid" * divide, launch)


def tree_launches(
    dtype: torch.dtype, dim: int, plan: TreePlan, fused: bool, heads: int = 32, kv_heads: int = 8
) -> Iterator[Launch]:
    """A forward and a backward pass over a plan; `fused` is the backward that is not deterministic."""
    rows = plan.num_rows
    q, out, d_out, dq = (_meta(rows, heads, dim, dtype=dtype) for _ in range(4))
    k, v, dk, dv = (_meta(rows, kv_heads, dim, dtype=dtype) for _ in range(4))
    shape = tree.TreeShape.of(q, k, plan, dim**-0.5)
    lse, delta = _meta(heads, shape.stride), _meta(heads, shape.stride)
    units = plan.tiles.backward_units(2)
    partial = _meta(units.num_slots, kv_heads, 2, plan.tiles.block, dim)
    sums = _meta(rows, heads, dim) if fused else None
    if not fused:
        yield tree.forward_launch(shape, q, k, v, out, lse)
        yield tree.dq_launch(shape, q, k, v, d_out, dq, lse, delta)
    if plan.tiles.kv_block != plan.tiles.block:
        return  # the other passes know nothing of forward tiles
    yield tree.dkdv_launch(shape, units, q, k, v, d_out, dk, dv, partial, sums, lse, delta)
    if fused:
        return
    yield tree.delta_launch(shape, out, d_out, delta)
    yield tree.reduce_launch(shape, units, partial, dk, dv)


def tree_cases() -> Iterator[Case]:
    """Tree attention: dtypes, head_dims, the tiles that a plan may have, both backwards."""
    shapes = [(block, finer) for block in TREE_BLOCKS for finer in TREE_BLOCKS if finer <= block]
    for dtype, dim, (block, kv_block) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), TREE_DIMS, shapes
    ):
        plan = plan_tree([range(2000), [*range(1000), *range(2000, 3000)]], block=block, kv_block=kv_block).to("meta")
        tag = f"{str(dtype).removeprefix('torch.')} D={dim} {block}x{kv_block}"
        for fused in (False, True):
            for launch in tree_launches(dtype, dim, plan, fused):
                product = launch.kernel.__name__ in ("tree_forward_kernel", "tree_dq_kernel", "tree_dkdv_kernel")
                name = launch.kernel.__name__.removesuffix("_kernel") + " fused" * fused
                yield Case(f"{name} {tag}", launch, gemm=product and dtype != torch.float32)


def tree_group_cases() -> Iterator[Case]:
    """Query heads to a KV head: a loop bound of the dK/dV pass; 4 is in `tree_cases`."""
    plan = plan_tree([range(2000), [*range(1000), *range(2000, 3000)]]).to("meta")
    for heads, kv_heads in ((8, 8), (16, 8), (40, 8), (9, 3)):
        dim = 64 if heads == 9 else 128
        for fused in (False, True):
            for launch in tree_launches(torch.bfloat16, dim, plan, fused, heads, kv_heads):
                if launch.kernel.__name__ == "tree_dkdv_kernel":
                    yield Case(f"tree_dkdv{' fused' * fused} {heads} on {kv_heads} heads D={dim}", launch, gemm=True)


def cases() -> Iterator[Case]:
    """Every kernel in every shipped configuration."""
    yield from advantage_cases()
    yield from policy_cases()
    yield from odd_cases()
    yield from merge_cases()
    yield from tree_cases()
    yield from tree_group_cases()
    for dtype in head.GEMM_CONFIGS:
        short = str(dtype).removeprefix("torch.")
        for entropy in (False, True):
            for extras in (False, True):
                tag = short + " entropy" * entropy + " bias,softcap,T[rows]" * extras
                for keep in (False, True):
                    name = f"head_forward {tag}" + " keep" * keep
                    yield Case(name, head_forward(dtype, entropy, keep, extras), gemm=True)
                if entropy != extras:
                    continue  # the row kernels have registers to spare: none of the flags, or all
                yield Case(f"head_backward {tag}", head_rows(dtype, entropy, True, extras, True))
                yield Case(f"logits_backward {tag}", head_rows(dtype, entropy, False, extras, True))
                yield Case(f"logits_forward {tag}", head_rows(dtype, entropy, False, extras, False))


def merge_cases() -> Iterator[Case]:
    """The merge of tiles, with and without entropy."""
    for moments in (False, True):
        tiles = [_meta(1188, 4096).t() for _ in range(2 + moments)]
        stats = TileStats(_meta(4096), tiles[0], tiles[1], tiles[2] if moments else None)
        yield Case("head_merge" + " entropy" * moments, head.merge_launch(stats, _meta(4, 4096)))


def _with_meta(launch: Launch, **changes: Any) -> Launch:
    return replace(launch, meta={**launch.meta, **changes})


def bad_cases() -> Iterator[tuple[Case, str]]:
    """Configurations that must be refused, and the word that the refusal must hold."""
    good = head_forward(torch.bfloat16, True, True, False)
    yield Case("head_forward with 4 warps", _with_meta(good, num_warps=4), gemm=True), "spill"
    yield Case("head_forward with 6 stages", _with_meta(good, num_stages=6), gemm=True), "shared memory"
    row = head_rows(torch.bfloat16, True, True, False, True)
    yield Case("head_backward taken for a GEMM", row, gemm=True), "no wgmma"


def recompiled() -> Iterator[str]:
    """Tree kernels that a forest of another length would compile anew; a trainer has a new one every micro-batch."""
    plans = [
        plan_tree([range(n), [*range(n // 2), -1, -2]], block=128, kv_block=128).to("meta") for n in (1598, 2741)
    ]
    assert plans[0].num_rows % 16 == 0 and plans[1].num_rows % 16, "Triton would tell these two apart"
    for pair in zip(*(tree_launches(torch.bfloat16, 128, plan, False) for plan in plans), strict=True):
        first, second = (one.kernel.warmup(*one.args, grid=one.grid, **one.meta) for one in pair)
        if first is not second:
            yield pair[0].kernel.__name__


def main() -> int:
    """Compile everything; 1 when a configuration is refused, or a bad one is not."""
    driver.set_active(NoDevice())
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    failed = False
    for case, word in [] if pattern else bad_cases():
        wrong = "; ".join(breaches(case, compile_case(case)))
        if word not in wrong:
            print(f"sm_90 gate: {case.name} must be refused for {word!r}; got {wrong or 'no refusal'}")
            failed = True
    for name in [] if pattern else recompiled():
        print(f"sm_90 gate: {name} is compiled again for a forest of another length")
        failed = True
    print(f"Triton {triton.__version__}, sm_90a")
    print(f"{'kernel':58} {'regs':>5} {'stack':>6} {'local':>6} {'smem':>7} {'wgmma':>6} {'tma':>4}")
    for case in cases():
        if pattern not in case.name:
            continue
        got = compile_case(case)
        wrong = breaches(case, got)
        print(
            f"{case.name:58} {got.registers:5} {got.stack:6} {got.local:6} {got.shared:7} {got.wgmma:6} {got.tma:4}",
            *[f"REFUSED: {w}" for w in wrong],
            flush=True,
        )
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
