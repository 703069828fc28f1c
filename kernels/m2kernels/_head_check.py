"""Argument checks of the head ops, which end in a :class:`m2kernels._head.HeadProblem`."""

import math

import torch
from torch import distributed as dist

from m2kernels._backend import choose_backend
from m2kernels._check import INTEGERS, check_device, check_dtype, check_ids, check_vector
from m2kernels._head import CHUNK_BYTES, HEAD_BACKENDS, HeadProblem, head_reason

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """Name under which an op finds a process group again."""
    return None if group is None else str(group.group_name)


def check_temperature(
    op: str, temperature: float | torch.Tensor, num_rows: int, like: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """(per row or None, scalar); a row's temperature is not looked at, a scalar must be over 0."""
    if isinstance(temperature, torch.Tensor):
        check_vector(op, "temperature", temperature, num_rows)
        check_dtype(op, "temperature", temperature, (torch.float32,))
        check_device(op, "temperature", temperature, like)
        return temperature.detach(), 1.0
    if not 0 < temperature < math.inf:  # not math.isfinite: torch.compile makes guards of comparisons
        raise ValueError(f"{op}: got temperature {temperature}; expected a number over 0")
    return None, float(temperature)


def gemm_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check_tensors(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raise ValueError for a wrong shape, dtype or device."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{op}: {name} is a {type(tensor).__name__}; expected a plain tensor; pass its .full_tensor(), or "
                "its .to_local() where that is a vocabulary shard, with tp_group and vocab_start"
            )
        if tensor.dim() != 2:
            hint = "; flatten it: .flatten(0, -2)" if tensor.dim() > 2 else ""
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected a 2-D tensor{hint}")
        check_dtype(op, name, tensor, FLOATS)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has {hidden.shape[1]} columns, weight {weight.shape[1]}; expected the same; "
            "weight is [vocabulary, columns of hidden]"
        )
    check_device(op, "weight", weight, hidden)
    if rows is not None and rows.dtype == torch.bool:
        raise ValueError(
            f"{op}: rows is a mask; expected row numbers, int32 or int64; pass rows.nonzero()[:, 0], and the targets "
            "of those rows"
        )
    for name, ids in (("target", target), ("rows", rows)):
        if ids is not None:
            check_vector(
                op,
                name,
                ids,
                None if rows is not None and name == "rows" else len(rows if rows is not None else hidden),
            )
            check_dtype(op, name, ids, INTEGERS)
            check_device(op, name, ids, hidden)
    if bias is not None:
        check_vector(op, "bias", bias, weight.shape[0])
        check_dtype(op, "bias", bias, FLOATS)
        check_device(op, "bias", bias, hidden)


def make_problem(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    backend: str,
    chunk_bytes: int | None,
) -> HeadProblem:
    """Arguments of the public function -> those of the op; raises ValueError."""
    _check_tensors(op, hidden, weight, target, rows, bias)
    temperatures, scalar = check_temperature(op, temperature, target.shape[0], hidden)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{op}: got softcap {softcap}; expected a number over 0, or None")
    if vocab_start < 0 or (vocab_start and tp_group is None):
        raise ValueError(f"{op}: got vocab_start {vocab_start} and tp_group {tp_group}; a shard needs its group")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"{op}: got vocab_size {vocab_size}; expected at least 1")
    whole = vocab_size if tp_group is not None else min(vocab_size or weight.shape[0], weight.shape[0])
    check_ids(op, "target", target, whole)
    if rows is not None:
        check_ids(op, "rows", rows, hidden.shape[0])
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    if budget < 1:
        raise ValueError(f"{op}: got chunk_bytes {budget}; expected at least 1")
    dtype = gemm_dtype(hidden, weight)
    chosen = choose_backend(op, backend, lambda name: head_reason(name, hidden, dtype), HEAD_BACKENDS)
    return HeadProblem(
        hidden, weight, bias, target, rows, temperatures, scalar, softcap, vocab_size, vocab_start,
        group_name(tp_group), chosen, budget, dtype,
    )  # fmt: skip
