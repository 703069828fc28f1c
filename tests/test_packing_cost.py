"""m2kernels.choose_packing: predicted times against a count by hand, and what must hold whatever the numbers."""

from dataclasses import replace

import pytest
from forests import dialogues, forests, replies
from hypothesis import given
from hypothesis import strategies as st

import m2kernels as mk
from m2kernels.packing_cost import ASSUMED, MIN_GAIN, pairs_apart

EVEN = ASSUMED["cpu"]
positive = st.floats(1e-3, 1e3)
costs = st.builds(
    mk.KernelCosts,
    tree_forward=positive,
    tree_backward=positive,
    varlen_forward=positive,
    varlen_backward=positive,
    source=st.just("drawn"),
)
flops = st.builds(mk.ModelFlops, token=positive, pair=st.floats(0, 1), row=st.floats(0, 1e3))


@st.composite
def works(draw):
    """A batch: a forest never has more tokens or pairs than its sequences apart, nor fewer pairs than tokens."""
    tokens = draw(st.integers(1, 10**6))
    pairs = draw(st.integers(tokens, 10**10))
    return mk.PackingWork(
        tree_tokens=tokens,
        tree_pairs=pairs,
        varlen_tokens=tokens + draw(st.integers(0, 10**7)),
        varlen_pairs=pairs + draw(st.integers(0, 10**11)),
        rows=draw(st.integers(0, 10**6)),
    )


@given(forests())
def test_work_is_what_the_sequences_say(case):
    sequences, keys = case
    plan = mk.plan_tree(sequences, keys=keys)
    apart = mk.plan_tree(sequences, keys=range(len(sequences)))
    work = mk.PackingWork.of([plan], rows=7)
    assert (work.tree_tokens, work.tree_pairs, work.rows) == (plan.num_rows, plan.num_pairs, 7)
    assert (work.varlen_tokens, work.varlen_pairs) == (apart.num_rows, apart.num_pairs)
    twice = mk.PackingWork.of([plan, plan])
    assert twice.tree_pairs == 2 * plan.num_pairs and twice.varlen_tokens == 2 * apart.num_rows


def test_times_counted_by_hand():
    """Each product of a model of one weight matrix a token, one head of size 1, and a head of one column."""
    work = mk.PackingWork(tree_tokens=10, tree_pairs=40, varlen_tokens=30, varlen_pairs=90, rows=6)
    model = mk.ModelFlops(token=2.0, pair=4.0, row=2.0)
    kernels = mk.KernelCosts(tree_forward=2, tree_backward=3, varlen_forward=1, varlen_backward=1.5, source="given")
    got = mk.choose_packing(work, model, kernels)
    # Forward one product a weight, backward two; attention two forward, five backward, two FLOPs an element each.
    assert got.tree_time == 10 * 3 * 2 + 40 * (2 * 2 * 2 + 5 * 2 * 3) + 6 * 3 * 2
    assert got.varlen_time == 30 * 3 * 2 + 90 * (2 * 2 * 1 + 5 * 2 * 1.5) + 6 * 3 * 2
    again = mk.choose_packing(work, model, kernels, recompute=True)
    assert again.tree_time - got.tree_time == 10 * 2 + 40 * 4 * 2
    assert again.varlen_time - got.varlen_time == 30 * 2 + 90 * 4
    scoring = mk.choose_packing(work, model, kernels, backward=False, recompute=True)
    assert scoring.tree_time == 10 * 2 + 40 * 4 * 2 + 6 * 2
    assert "33% of the tokens" in got.reason and "44% of the attention" in got.reason and "given" in got.reason


@given(works(), flops, costs, st.floats(0, 0.9), st.booleans(), st.booleans())
def test_the_forest_is_chosen_exactly_for_its_gain(work, model, kernels, min_gain, recompute, backward):
    got = mk.choose_packing(work, model, kernels, min_gain=min_gain, recompute=recompute, backward=backward)
    assert (got.packing == "tree") == (got.tree_time < (1 - min_gain) * got.varlen_time) or got.gain == min_gain
    assert got.reason.startswith(got.packing + ":") and kernels.source in got.reason


@given(works(), flops, costs, positive)
def test_units_do_not_matter(work, model, kernels, unit):
    other = replace(model, token=model.token * unit, pair=model.pair * unit, row=model.row * unit)
    a, b = (mk.choose_packing(work, m, kernels).gain for m in (model, other))
    assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


@given(works(), flops)
def test_equal_kernels_never_lose(work, model):
    got = mk.choose_packing(work, replace(model, row=0.0), EVEN)
    spared = [1 - work.tree_tokens / work.varlen_tokens, 1 - work.tree_pairs / work.varlen_pairs]
    assert min(spared) - 1e-9 <= got.gain <= max(spared) + 1e-9
    headed = mk.choose_packing(work, model, EVEN)
    assert -1e-9 <= headed.gain <= got.gain + 1e-9, "the head is the same in both"


@given(works(), flops, costs, st.floats(1.01, 10))
def test_a_slower_kernel_is_never_chosen_sooner(work, model, kernels, factor):
    slower = replace(
        kernels, tree_forward=kernels.tree_forward * factor, tree_backward=kernels.tree_backward * factor
    )
    assert mk.choose_packing(work, model, slower).gain <= mk.choose_packing(work, model, kernels).gain


@pytest.mark.parametrize("device", ASSUMED)
def test_nothing_shared_is_varlen(device):
    plan = mk.plan_tree(replies(5, 1, 30, 20))
    choice = mk.choose_packing(mk.PackingWork.of([plan]), mk.ModelFlops(token=1.0, pair=1e-4), ASSUMED[device])
    assert choice.packing == "varlen" and choice.gain <= 0


def qwen3(weights, layers, heads):
    return mk.ModelFlops(token=2 * weights, pair=4 * heads * 128 * layers)


@pytest.mark.parametrize(
    ("sequences", "small", "large"),
    [
        (replies(1, 16, 4096, 2048), "tree", "tree"),
        (dialogues(8, 6, 4096, 1024, 256, 512), "tree", "tree"),
        (replies(1, 16, 1024, 4096), "varlen", "tree"),
        (replies(1, 8, 512, 8192), "varlen", "varlen"),
    ],
    ids=["half is prompt", "dialogues", "short prompt", "hardly a prompt"],
)
def test_workloads_on_a_gpu(sequences, small, large):
    """Models of 0.6B and 8B: a slow attention kernel costs the small one, of whose time attention is the larger part,
    more than a short prompt spares."""
    work = mk.PackingWork.of([mk.plan_tree(sequences)])
    choices = [mk.choose_packing(work, m, ASSUMED["cuda"]) for m in (qwen3(0.44e9, 28, 16), qwen3(6.95e9, 36, 32))]
    assert [c.packing for c in choices] == [small, large]


def test_nothing_at_all():
    nothing = mk.PackingWork.of([])
    choice = mk.choose_packing(nothing, mk.ModelFlops(token=1.0, pair=1.0), EVEN)
    assert choice.packing == "varlen" and choice.gain == 0.0 and MIN_GAIN == 0.05 and pairs_apart([]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_gain": 1.0}, "got min_gain 1.0; expected at least 0 and below 1"),
        (
            {"work": mk.PackingWork(tree_tokens=-1, tree_pairs=0, varlen_tokens=0, varlen_pairs=0)},
            "tree_tokens is -1",
        ),
        ({"model": mk.ModelFlops(token=float("nan"), pair=1.0)}, "token is nan"),
    ],
)
def test_bad_arguments(change, message):
    good = {"work": mk.PackingWork.of([]), "model": mk.ModelFlops(token=1.0, pair=1.0), "costs": EVEN}
    with pytest.raises(ValueError, match=message):
        mk.choose_packing(**(good | change))
