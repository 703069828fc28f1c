"""One optimizer step of the learner in one process: packed by tree, by varlen, and one reply a micro-batch.

Megatron-core's model, optimizer and schedule, on random weights. The learning rate is so small that every step finds
the same weights, which makes each step's log-probs comparable with those before the first.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from m2train.bench import shapes
from m2train.bench.case import Case, Fn, Setup, Skip, SlowStart, case
from m2train.bench.models import model_config, write_random_model

TOLERANCE = 1e-3


class _Learner:
    """The trainer, built when first asked for: Megatron takes seconds to import."""

    def __init__(self, s: Setup) -> None:
        self._s = s
        self._trainer: Any = None
        self._batch: Any = None
        self._wanted: torch.Tensor | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="m2bench-")

    def _start(self) -> None:
        from torch import distributed as dist

        from m2train.bench.steps import make_recipe, synthetic_batch

        s = self._s
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if s.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
            )
        from megatron.core import parallel_state

        from m2train.learner.trainer import Trainer

        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
        config = model_config(s.model, layers=s.layers)
        folder = write_random_model(Path(self._folder.name), config, "float32")
        self._batch = synthetic_batch(s.prompts, s.lengths, s.group, config["vocab_size"])
        recipe = make_recipe(self._batch, dtype="float32", lr=1e-30, micro_batch_tokens=s.cap)
        self._trainer = Trainer(recipe, folder)
        self._wanted = torch.cat(self._trainer.logprobs(self._batch))

    def step(self, packing: str) -> Fn:
        def run() -> torch.Tensor:
            # A launch of phase fwd is made without a graph; this one has its own backward. Megatron's jit_fuser is
            # torch.compile, which CPU runs of the trainer turn off too.
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                if self._trainer is None:
                    self._start()
                trainer = self._trainer
                learner = trainer.recipe.learner.model_copy(update={"packing": packing})
                trainer.recipe = trainer.recipe.model_copy(update={"learner": learner})
                return torch.cat(trainer.train_step(self._batch).logp)

        return run

    def verify(self, result: Any, inputs: tuple[Any, ...]) -> str | None:
        assert self._wanted is not None
        gap = float((result - self._wanted).abs().max())
        return None if gap <= TOLERANCE else f"log-probs are off by {gap:.1e}; expected at most {TOLERANCE:g}"


@case(
    "learner_step",
    shapes={
        "smollm2-2-layers": {
            "model": "smollm2-135m",
            "layers": 2,
            "group": 4,
            "prompts": shapes.ragged(2, 40, 96, seed=1),
            "lengths": shapes.ragged(8, 24, 96),
            "cap": 512,
        },
        "smollm2-135m": {
            "model": "smollm2-135m",
            "layers": None,
            "group": 8,
            "prompts": shapes.ragged(8, 256, 1024, seed=1),
            "lengths": shapes.ragged(64, 128, 1024),
            "cap": 8192,
        },
    },
    nightly=("smollm2-135m",),
)
def learner_step(s: Setup) -> Case:
    """Forward, backward and update on a batch of replies."""
    for package, name in (("megatron", "megatron-core"), ("pydantic", "pydantic"), ("safetensors", "safetensors")):
        if importlib.util.find_spec(package) is None:
            raise Skip(f"{name} is not installed (pip install 'm2train[learner]')")
    learner = _Learner(s)
    return Case(
        verify=learner.verify,
        inputs=(),
        impls={name: SlowStart(learner.step(name)) for name in ("tree", "varlen", "none")},
        baseline="none",
        ours=("tree", "varlen"),
        rotate=False,
        pure=False,
        cuda_timer="wall",
    )
