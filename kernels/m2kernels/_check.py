"""Argument checks that every op shares. Each message says: got, expected, what to do."""

import torch

INTEGERS = (torch.int32, torch.int64)


def check_vector(op: str, name: str, tensor: torch.Tensor, length: int | None = None) -> None:
    """Raise ValueError unless `tensor` is 1-D, and of `length` where that is given."""
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        want = "a 1-D tensor" if length is None else f"shape [{length}]"
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {want}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        got, *names = (str(d).removeprefix("torch.") for d in (tensor.dtype, *allowed))
        raise ValueError(
            f"{op}: {name} is {got}; expected {' or '.join(names)}; convert it with .to(torch.{names[0]})"
        )


def check_device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}; expected {like.device}, where the first "
            f"argument is; move it with .to({str(like.device)!r})"
        )


def check_ids(op: str, name: str, ids: torch.Tensor, limit: int | None) -> None:
    """Raise ValueError for an id outside [0, limit); eager on CPU only, elsewhere it would sync."""
    if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or (limit is not None and high >= limit):
        bound = "" if limit is None else f" and below {limit}"
        raise ValueError(f"{op}: {name} holds {low} to {high}; expected ids from 0{bound}")
