"""Comparing two ways to run a training step."""

import pytest
import torch

from m2train.bench.parity import Gap, Step, gap, parity_table, worst


def step(shift=0.0, where="b", loss=1.0):
    grads = {"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([[0.5], [0.25]]), "c": torch.zeros(2)}
    grads[where] = grads[where] + shift
    return Step(loss=loss, logp=[torch.tensor([-1.0]), torch.tensor([-2.0 + shift])], grads=grads)


def test_gap_is_absolute_and_of_each_tensors_largest():
    assert gap(step(), step()) == Gap(loss=0.0, logp=0.0, grad=0.0, relative=0.0, tensor="c")
    found = gap(step(0.125, loss=1.5), step())
    assert (found.loss, found.logp, found.grad, found.relative, found.tensor) == (0.5, 0.125, 0.125, 0.25, "b")
    assert gap(step(0.125, "a"), step()).relative == 0.125 / 8
    assert gap(step(1e-9, "c"), step()).relative == 1.0, "a gradient where there is to be none"
    assert step().largest_grad == 8.0


def test_other_models_are_not_compared():
    other = Step(loss=0.0, logp=[], grads={"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="other models or batches"):
        gap(step(), other)


def test_the_worst_of_all_ranks_and_the_table():
    one = Gap(loss=1e-3, logp=1e-5, grad=1e-7, relative=3e-6, tensor="a")
    two = Gap(loss=0.0, logp=2e-5, grad=1e-8, relative=4e-6, tensor="b")
    both = worst([one, two])
    assert both == Gap(loss=1e-3, logp=2e-5, grad=1e-7, relative=4e-6, tensor="b")
    fields = {name: getattr(both, name) for name in ("loss", "logp", "grad", "relative", "tensor")}
    lines = parity_table({"base": "none", "loss": -0.5, "largest_grad": 0.034, "gaps": {"tree": fields}})
    assert lines[0] == "first step against none: loss -0.5, largest gradient 0.034"
    assert lines[2].split() == ["tree", "1.0e-03", "2.0e-05", "1.0e-07", "4.0e-06", "b"]
    assert parity_table(None) == ["variants were not compared"]
