"""Types of the compiled planner (csrc/planner/bindings.cpp)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def pack(
    cost: NDArray[np.float64],
    size: NDArray[np.float64],
    cap: NDArray[np.float64],
    max_items: int,
    num_bins: int,
) -> tuple[int, int, int, NDArray[np.int32]]: ...
def plan_tree(
    sequences: list[NDArray[Any]],
    key: NDArray[np.int64],
    wide: bool,
    block: int,
    kv_block: int,
    min_gain: float,
) -> dict[str, Any]: ...
