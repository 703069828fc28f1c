"""Where the head's driver waits for a GPU, and for what: CPU tensors that say `is_cuda`, host reads counted.

The driver asks for one number a chunk (linear_policy_loss) or a call (linear_logprob's backward), and a chunk's only
when its row kernel has been queued, so that the GPU has work meanwhile.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from m2kernels import _head, _live_rows
from m2kernels._head import Head, HeadProblem
from m2kernels._head_grads import HeadGrads, WeightTarget
from m2kernels._head_kernels import Upstream
from m2kernels._head_policy import loss_and_grads
from m2kernels._head_torch import TorchHead
from m2kernels._live_rows import LiveRows
from m2kernels._policy_grads import PolicyTerms
from m2kernels.linear_logprob import head_backward, row_stats
from m2kernels.policy_loss import LossSpec

ROWS, VOCAB, DEPTH, CHUNKS = 96, 300, 16, 3
aten = torch.ops.aten
READS = {
    aten.nonzero.default: "nonzero",
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "item",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.unique_dim.default: "unique",
}


class Reads(TorchDispatchMode):
    """Writes reads of a tensor on the host into `journal`."""

    def __init__(self, journal):
        super().__init__()
        self.journal = journal

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.journal.append(READS[func])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def journal(monkeypatch):
    """What is queued and waited for, in order, on tensors that say that they are a GPU's."""
    found = []

    class Count:
        def __init__(self, value):
            found.append("sent")
            with torch.utils._python_dispatch._disable_current_modes():
                self.value = int(value)

        def get(self):
            found.append("waited")
            return self.value

    grad = TorchHead.grad

    def recorded(self, *args):
        found.append("row kernel")
        return grad(self, *args)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(_live_rows, "HostCount", Count)
    monkeypatch.setattr(TorchHead, "grad", recorded)
    # Bad ids are looked for on a CPU alone, by the device's name.
    monkeypatch.setattr(importlib.import_module("m2kernels.policy_loss"), "_raise_bad_seq", lambda num_bad: None)
    monkeypatch.setattr(_head, "check_ids", lambda *_: None)
    return found


def make_problem(rows):
    g = torch.Generator().manual_seed(0)
    return HeadProblem(
        torch.randn(ROWS, DEPTH, generator=g), torch.randn(VOCAB, DEPTH, generator=g), None,
        torch.randint(0, VOCAB - 9, (ROWS,), generator=g),
        torch.randint(0, ROWS, (ROWS,), generator=g) if rows else None, None, 1.0, None, VOCAB - 9, 0, None, "torch",
        4 * VOCAB * ROWS // CHUNKS, torch.float32,
    )  # fmt: skip


def make_terms(live):
    """Rows whose number is below `live`, modulo a chunk's, have an advantage."""
    seq = torch.arange(ROWS)
    advantage = torch.where(seq % (ROWS // CHUNKS) < live, 1.0, 0.0)
    return PolicyTerms(
        old_logp=None, advantage=advantage, seq=seq, rollout_logp=None, ref_logp=None, spec=LossSpec(),
        per_token=True, denom=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("rows", [False, True], ids=["slices", "rows"])
@pytest.mark.parametrize("live", [7, ROWS // CHUNKS, 0])
def test_policy_loss_waits_behind_each_chunks_row_kernel(journal, monkeypatch, rows, live):
    problem, terms = make_problem(rows), make_terms(live)
    with Reads(journal):
        out, sums = loss_and_grads(problem, terms, (True, True, False), WeightTarget())
    assert journal == ["sent", "row kernel", "waited"] * CHUNKS
    monkeypatch.undo()  # as on a CPU, where a number costs nothing to read
    want, exact = loss_and_grads(problem, terms, (True, True, False), WeightTarget())
    grads, exact = sums.finish(), exact.finish()
    assert torch.equal(out.logp, want.logp) and torch.equal(out.loss, want.loss)
    for got, expected in zip(grads[:2], exact[:2], strict=True):
        torch.testing.assert_close(got, expected)


def test_logprob_waits_once_in_backward(journal):
    head = Head(make_problem(rows=True))
    to_logp = torch.where(torch.arange(ROWS) % 2 == 0, 1.0, 0.0)
    with Reads(journal):
        stats = row_stats(head, entropy=True)
        assert journal == []
        head_backward(head, stats, Upstream(to_logp, None), HeadGrads(head, (True, True, False)))
    assert journal == ["sent", "waited"] + ["row kernel"] * 2


def test_positions_of_a_known_number_are_those_of_nonzero():
    """The path of a GPU on CPU tensors: a count that is on its way."""
    g = torch.Generator().manual_seed(0)
    for share in (0.0, 0.4, 1.0):
        grads = [(torch.rand(500, generator=g) < share) * torch.randn(500, generator=g) for _ in range(2)]
        grads[0][3] = torch.nan
        want, sent = LiveRows(grads), LiveRows(grads)
        sent._count = _live_rows.HostCount(sent._mask.sum())
        assert torch.equal(sent.positions(), want.positions()) and sent.positions().dtype == torch.int64
        assert (sent.part() is None) == (want.positions().numel() == 500)
        assert not sent.known_empty()
    assert LiveRows([torch.zeros(4), None]).known_empty()
    assert LiveRows([torch.zeros(4)]).positions().shape == (0,)
