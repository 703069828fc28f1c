"""The Python in docs/ops.md runs, and what it computes is what plain transformers computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
PAGE = Path(__file__).parents[1] / "docs" / "ops.md"


@pytest.fixture(scope="module")
def blocks() -> list[dict[str, Any]]:
    """The names that each block leaves behind, in the order of the page."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    found = []
    for source in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(source, str(PAGE), "exec"), names)
        found.append(dict(names))
    return found


def log_probs(model: Any, prompt: torch.Tensor, reply: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=torch.cat([prompt, reply])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, reply[:, None])[:, 0]


def test_loss_from_hidden_states(blocks: list[dict[str, Any]]) -> None:
    found = blocks[0]
    model, ids = found["model"], found["ids"]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = torch.cat([log_probs(model, row[:40], row[40:]) for row in ids])
    torch.testing.assert_close(found["old"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found["out"].logp, found["old"], rtol=0, atol=0)


def test_tree_of_rollouts(blocks: list[dict[str, Any]]) -> None:
    """Log-probs and gradients equal those of one row per rollout."""
    found = blocks[1]
    model, prompt, replies = found["model"], found["prompt"], found["replies"]
    plan, text = found["plan"], PAGE.read_text()
    assert f"{plan.num_input_tokens} tokens as rows and {plan.num_rows} as a tree" in text
    got = {name: p.grad for name, p in model.named_parameters()}
    model.set_attn_implementation("sdpa")
    model.zero_grad(set_to_none=True)
    logp = [log_probs(model, prompt, reply) for reply in replies]
    torch.testing.assert_close(found["out"].logp, torch.cat(logp).detach(), rtol=0, atol=1e-5)
    # On-policy the ratio is exp(logp - logp.detach()): the gradient is that of advantage * logp.
    loss = -sum(a * x.sum() for a, x in zip(found["advantage"], logp, strict=True)) / sum(map(len, replies))
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
