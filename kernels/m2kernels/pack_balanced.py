"""Balanced packing of items into bins: largest first, then refinement, under hard caps.

One item is a sequence or a tree, a bin a micro-batch or a rank. The cost (say, FLOPs) is what is
balanced; weights (unique tokens, loss rows) are what must not exceed memory. The work is done in
C++ (csrc/planner/pack.cpp) with the GIL released.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

Numbers: TypeAlias = "Sequence[float] | np.ndarray[Any, Any] | torch.Tensor"
_OP = "pack_balanced"


def _array(name: str, values: Any, ndim: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """`values` as float64 with `ndim` dimensions, all finite and not negative."""
    if hasattr(values, "detach"):  # numpy refuses a tensor that wants a gradient
        values = values.detach()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_OP}: {name} is not an array of numbers: {error}") from error
    if array.size == 0 and ndim == 2:
        array = array.reshape(len(array), -1 if len(array) else 0)
    if array.ndim != ndim:
        raise ValueError(f"{_OP}: {name} has shape {array.shape}; expected {ndim} dimension(s)")
    bad = np.argwhere(~(np.isfinite(array) & (array >= 0)))
    if bad.size:
        at = tuple(int(i) for i in bad[0])
        raise ValueError(f"{_OP}: {name}{list(at)} is {array[at]}; expected a finite number of at least 0")
    return array


def _check_items(size: np.ndarray, cap: np.ndarray, names: list[str]) -> None:
    """Raise ValueError that names the first item over a cap."""
    over = np.argwhere(size > cap)
    if over.size:
        item, column = (int(i) for i in over[0])
        raise ValueError(
            f"{_OP}: item {item} has {names[column]} {size[item, column]:g}, over the cap "
            f"{cap[column]:g}; split or drop the item, or raise the cap"
        )


def _count(name: str, value: Any) -> int:
    """A count that the caller may leave out: None gives 0."""
    if value is None:
        return 0
    number = int(value)
    if number != value or not 1 <= number < 2**31:
        raise ValueError(f"{_OP}: {name} is {value}; expected an integer of at least 1 and below 2**31, or None")
    return number


def _resources(
    cost: np.ndarray, max_cost: float | None, weights: Any, max_weights: Any
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The capped columns: sizes [n, k], caps [k], names [k]."""
    size, cap, names = np.empty((len(cost), 0)), np.empty(0), []
    if max_cost is not None:
        bound = float(max_cost)
        if not (bound >= 0 and math.isfinite(bound)):
            raise ValueError(f"{_OP}: max_cost is {max_cost}; expected a finite number or None")
        size, cap, names = cost[:, None], np.array([bound]), ["cost"]
    if (weights is None) != (max_weights is None):
        raise ValueError(f"{_OP}: weights and max_weights come together; got only one of them")
    if weights is not None:
        columns, bounds = _array("weights", weights, 2), _array("max_weights", max_weights, 1)
        if len(cost) and columns.shape != (len(cost), len(bounds)):
            raise ValueError(
                f"{_OP}: weights has shape {columns.shape}; expected "
                f"{(len(cost), len(bounds))}: a row an item, a column a cap"
            )
        if len(cost):
            size = np.concatenate([size, columns], axis=1)
        else:
            size = np.empty((0, size.shape[1] + len(bounds)))
        cap = np.concatenate([cap, bounds])
        names += [f"weight {k}" for k in range(len(bounds))]
    return np.ascontiguousarray(size), cap, names


def pack_balanced(
    cost: Numbers,
    num_bins: int | None = None,
    *,
    max_cost: float | None = None,
    weights: Any = None,
    max_weights: Any = None,
    max_items: int | None = None,
) -> list[list[int]]:
    """Pack items into bins of nearly equal cost, never over a cap.

    Args:
        cost: [n] finite numbers of at least 0 (list, numpy array or CPU tensor).
        num_bins: exactly this many bins, balanced: the most expensive bin is made cheap. A bin is
            empty only if n < num_bins. None: as few bins as are found, then balanced.
        max_cost: cap on a bin's cost.
        weights: [n, k] further sizes of each item.
        max_weights: [k] caps on a bin's sum of each weight.
        max_items: cap on the number of items in a bin.

    Returns:
        The item numbers in each bin, ascending. The same arguments give the same bins.

    Raises:
        ValueError: an item is over a cap (named), num_bins is ruled out by the caps (the message
            says whether that is proven or only not found), or an argument is malformed.
    """
    costs = _array("cost", cost, 1)
    bins, item_cap = _count("num_bins", num_bins), _count("max_items", max_items)
    size, cap, names = _resources(costs, max_cost, weights, max_weights)
    _check_items(size, cap, names)
    if len(costs) == 0:
        return [[] for _ in range(bins)]
    from m2kernels import _planner

    status, used, bound, bin_of = _planner.pack(costs, size, cap, item_cap, bins)
    if status == 2:
        raise ValueError(
            f"{_OP}: {len(costs)} items cannot be packed into {bins} bins: the caps rule it out "
            f"(proven; they force at least {max(bound, bins + 1)} bins); use more bins or raise "
            "a cap"
        )
    if status == 1:
        raise ValueError(
            f"{_OP}: no packing of {len(costs)} items into {bins} bins was found (not proven "
            f"impossible: the caps force at least {bound}); use more bins or raise a cap"
        )
    order = np.argsort(bin_of, kind="stable")
    ends = np.cumsum(np.bincount(bin_of, minlength=used))
    return [part.tolist() for part in np.split(order, ends[:-1])]
