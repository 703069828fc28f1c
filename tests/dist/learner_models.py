"""Tiny random models and a fixed batch for the learner's tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from m2train.config import Recipe, parse
from m2train.learner.batch import Sample, TrainBatch

# Vocabulary 131: not a multiple of anything, so that padding happens under every TP.
_SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.08,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = ("llama", "llama_tied", "qwen2", "qwen3")
OVERLAPPED = ("llama_tied", "qwen3")  # tied and untied head
LOSS_SCALE = 4.0


def write_model(folder: Path, variant: str, dtype: torch.dtype = torch.float32, layers: int = 4) -> Path:
    """Save a random model: llama (untied, llama3 rope), llama_tied, qwen2 (tied, biases), qwen3 (untied, qk-norm)."""
    shape = _SHAPE | {"num_hidden_layers": layers}
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(7)
    if variant == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=_LLAMA3_ROPE))
    elif variant == "llama_tied":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    elif variant == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=24, tie_word_embeddings=False))
    for name, parameter in model.named_parameters():  # norms of 1 and biases of 0 would hide mistakes
        if "norm" in name or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_batch(seed: int = 0, num: int = 12, *, old: bool = True) -> TrainBatch:
    """Replies of unequal lengths; old log-probs off by enough that some tokens are clipped."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(num):
        context = int(torch.randint(3, 20, (1,), generator=g))
        reply = int(torch.randint(1, 17, (1,), generator=g))
        level = -4.9 + 0.5 * torch.randn(reply, generator=g)
        samples.append(
            Sample(
                token_ids=torch.randint(0, 131, (context + reply,), generator=g),
                loss_start=context,
                rollout_logp=level + 0.1 * torch.randn(reply, generator=g),
                advantage=float(torch.randn(1, generator=g)),
                seq_id=i,
                old_logp=level if old else None,
            )
        )
    return TrainBatch(samples=samples, denom=num * 16.0, temperature=0.8)


def make_tree_batch(seed: int = 0, *, old: bool = True) -> TrainBatch:
    """Eight replies to three contexts behind one system prompt, two of them slices of one dialogue; some begin alike,
    two are equal, one is how another begins."""
    g = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 131, (count,), generator=g).tolist()

    system, question, answer = ids(5), ids(9), ids(6)
    contexts = [system + question, system + question + answer + ids(7), system + ids(12)]
    samples = []
    for context, count in zip(contexts, (4, 3, 1), strict=True):
        base = ids(11)
        for reply in (base, base[:4] + ids(8), base[:7], base)[:count]:
            level = -4.9 + 0.5 * torch.randn(len(reply), generator=g)
            samples.append(
                Sample(
                    token_ids=torch.tensor(context + reply),
                    loss_start=len(context),
                    rollout_logp=level + 0.1 * torch.randn(len(reply), generator=g),
                    advantage=float(torch.randn(1, generator=g)),
                    seq_id=len(samples),
                    old_logp=level if old else None,
                )
            )
    return TrainBatch(samples=samples, denom=len(samples) * 16.0, temperature=0.8)


def make_recipe(
    tp: int = 1, pp: int = 1, dp: int = 1, *, algo: dict[str, Any] | None = None, **learner: Any
) -> Recipe:
    """fp32, 12 replies a step. eps = 1 makes Adam's update almost linear in the gradient: with a small eps it is the
    gradient's sign, and rounding noise of 1e-7 in a gradient near zero becomes a full step in either direction."""
    settings = {
        "dtype": "float32",
        "packing": "tree",
        "lr": 0.05,
        "eps": 1.0,
        "micro_batch_tokens": 256,
        "threads": 1,
        "timeout_s": 90.0,
    }
    return parse(
        {
            "steps": 10,
            "algo": {"group_size": 3, "max_new_tokens": 16, "entropy_coef": 0.01} | (algo or {}),
            "rollout": {"cases_per_step": 4, "max_context_tokens": 32, "temperature": 0.8},
            "learner": settings | {"tp": tp, "pp": pp, "dp": dp, "start_timeout_s": 90.0} | learner,
        }
    )


def torchrun_environment() -> dict[str, str]:
    """One thread per rank, no torch.compile."""
    return os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def run_ranks(
    worker: str, folder: Path, sizes: tuple[int, int, int], *arguments: str, limit_s: float = 200.0
) -> None:
    """`worker FOLDER TP PP DP ...` under torchrun, in a process group of its own that is ended whole when it hangs."""
    world = sizes[0] * sizes[1] * sizes[2]
    command = [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--nnodes=1"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(Path(__file__).with_name(worker)), str(folder), *map(str, sizes), *arguments),
    ]
    process = subprocess.Popen(
        command,
        env=torchrun_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"{worker} {sizes} hung:\n{output[-3000:]}") from None
    assert process.returncode == 0, output[-6000:]
