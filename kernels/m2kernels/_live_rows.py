"""Which rows have a gradient: those with a zero one take no part in the GEMMs of the gradients."""

from collections.abc import Sequence

import torch


class HostCount:
    """An integer of the device on its way to the host, while more work is queued.

    On a GPU the copy goes into pinned memory behind an event, and only :meth:`get` waits, for what
    was queued before this object was made and for nothing that came after.

    Args:
        value: int64 [].
    """

    def __init__(self, value: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.is_cuda:
            with torch.cuda.device(value.device):  # or pinning makes a context on another device
                self._value = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
                self._value.copy_(value, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def get(self) -> int:
        """The number."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._value)


class LiveRows:
    """Rows where some gradient is not zero. NaN is not zero: it is not hidden.

    Args:
        grads: f32[C] each, or None; at least one.
    """

    def __init__(self, grads: Sequence[torch.Tensor | None]) -> None:
        given = [g != 0 for g in grads if g is not None]
        self._mask = given[0]
        for other in given[1:]:
            self._mask = self._mask | other
        self._positions: torch.Tensor | None = None
        self._count = HostCount(self._mask.sum()) if self._mask.is_cuda else None

    def known_empty(self) -> bool:
        """Is there none, as far as can be said without waiting for a device?"""
        return self._count is None and self.positions().numel() == 0

    def positions(self) -> torch.Tensor:
        """int64, ascending. On a GPU the first call waits for their number, so work is queued before it."""
        if self._positions is not None:
            return self._positions
        if self._count is None:
            self._positions = self._mask.nonzero()[:, 0]
        else:  # nonzero() would wait for all that is queued; a stable sort is as long as its input
            order = self._mask.to(torch.uint8).argsort(descending=True, stable=True)
            self._positions = order[: self._count.get()]
        return self._positions

    def part(self) -> torch.Tensor | None:
        """:meth:`positions`, or None when that is all rows."""
        found = self.positions()
        return None if found.numel() == self._mask.numel() else found
