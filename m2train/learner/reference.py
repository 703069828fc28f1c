"""The reference policy of a KL term: the weights that the run started from.

A copy of this rank's parameters lies in host memory and trades places with the model's own while reference log-probs
are computed, so that a device holds one set of weights and every layout works as it does for the policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Reference:
    """Weights that never change.

    Args:
        parameters: the model's, as they are now, by name; copied.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._kept = {
            name: torch.empty(p.shape, dtype=p.dtype, pin_memory=p.is_cuda).copy_(p.detach())
            for name, p in parameters.items()
        }

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the model has these weights; afterwards its own again, to the bit."""
        self._exchange(parameters)
        try:
            yield
        finally:
            self._exchange(parameters)

    def _exchange(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, kept in self._kept.items():
            here = parameters[name].data
            own = here.clone()
            here.copy_(kept)
            kept.copy_(own)
