"""The LM head's backend in plain torch: the readable reference, any device, holds a chunk's logits.

Its GEMM is one call a chunk, so bits may depend on the other rows; the C++ and Triton backends are
invariant. The tile width is the same 128.
"""

from typing import Any

import torch
from torch.nn import functional as F

from m2kernels._head_kernels import HeadKernels, HeadSettings, RowStats, TileStats, Upstream


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[C, D] x [Vl, D] -> [C, Vl]: float32 where the device has such a GEMM, else the input dtype."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return F.linear(hidden, weight)


def _capped(logits: torch.Tensor, settings: HeadSettings) -> torch.Tensor:
    """Logits as they came from the GEMM -> f32 [C, Vl], a new tensor, before the temperature."""
    z = logits.float()
    if settings.bias is not None:
        z = z + settings.bias.float()
    if settings.softcap is not None:
        z = torch.tanh(z / settings.softcap) * settings.softcap
    return z


def _inverse(settings: HeadSettings) -> float | torch.Tensor:
    """1 / temperature, to multiply [C, Vl] by."""
    inverse = settings.inv_temperature
    return inverse[:, None] if isinstance(inverse, torch.Tensor) else inverse


def _targets(settings: HeadSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, 1]: column of the target, 0 where another rank holds it, and whether it is here."""
    return settings.target.clamp(min=0)[:, None], (settings.target >= 0)[:, None]


class TorchHead(HeadKernels):
    """Backend ``torch``."""

    tile = 128

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        settings: HeadSettings,
        *,
        entropy: bool,
        keep: bool,
        lend: torch.Tensor | None = None,
    ) -> tuple[TileStats, Any]:
        """See :meth:`HeadKernels.forward`; the scratch is the logits and the weight's dtype."""
        logits = head_logits(hidden, weight)
        stats = self.tile_stats(logits, settings, entropy=entropy)
        return stats, (logits, weight.dtype) if keep else None

    def recompute(
        self, hidden: torch.Tensor, weight: torch.Tensor, settings: HeadSettings, lend: torch.Tensor | None = None
    ) -> Any:
        """See :meth:`HeadKernels.recompute`."""
        return head_logits(hidden, weight), weight.dtype

    def grad(self, kept: Any, settings: HeadSettings, rows: RowStats, upstream: Upstream) -> torch.Tensor:
        """See :meth:`HeadKernels.grad`."""
        logits, dtype = kept
        return self.logits_grad(logits, settings, rows, upstream).to(dtype)

    def logit_bytes(self, dtype: torch.dtype) -> int:
        """See :meth:`HeadKernels.logit_bytes`: its arithmetic is in float32 whatever the GEMM gives."""
        return max(dtype.itemsize, 4)

    def tile_stats(self, logits: torch.Tensor, settings: HeadSettings, *, entropy: bool) -> TileStats:
        """Statistics of logits [C, Vl] that are there already."""
        z = _capped(logits, settings) * _inverse(settings)
        z[:, settings.num_valid :] = -torch.inf
        rows, width = z.shape
        column, held = _targets(settings)
        if width == 0:
            empty = z.new_empty(rows, 0)
            return TileStats(z.new_zeros(rows), empty, empty, empty if entropy else None)
        own = z.gather(1, column)
        z.scatter_(1, column, torch.where(held, -torch.inf, own))
        tiles = -(-width // self.tile)
        z = F.pad(z, (0, tiles * self.tile - width), value=-torch.inf).view(rows, tiles, self.tile)
        top = z.amax(dim=2)
        # A tile without a column has nothing to subtract: -inf - -inf would be NaN.
        below = z - torch.where(top == -torch.inf, 0, top)[:, :, None]
        e = below.exp()
        moment = None
        if entropy:
            moment = torch.where(e == 0, 0, below * e).sum(dim=2)
        return TileStats(own[:, 0], top, e.sum(dim=2), moment)

    def logits_grad(
        self, logits: torch.Tensor, settings: HeadSettings, rows: RowStats, upstream: Upstream
    ) -> torch.Tensor:
        """Gradient of logits [C, Vl] (before bias, cap and temperature), a new tensor of their dtype."""
        capped = _capped(logits, settings)
        z = capped * _inverse(settings)
        z[:, settings.num_valid :] = -torch.inf
        below = (z - rows.log_norm[:, None]) - rows.log_norm_low[:, None]
        p = below.exp()
        g = upstream.logp[:, None]
        slope = -g * p
        if slope.shape[1]:
            # At the target 1 - p is -expm1(logp): exact for confident tokens too.
            at, held = _targets(settings)
            slope.scatter_(1, at, torch.where(held, -g * torch.expm1(rows.logp)[:, None], slope.gather(1, at)))
        if upstream.entropy is not None:
            assert rows.entropy is not None
            ge = upstream.entropy[:, None]
            # Where p is 0 its logarithm may be -inf; p log p is 0 there.
            spread = torch.where(p == 0, 0, p * (below + rows.entropy[:, None]))
            slope = torch.where(ge == 0, slope, slope - ge * spread)
        slope = slope * _inverse(settings)
        if settings.softcap is not None:
            flatter = 1 - (capped / settings.softcap).square()
            flatter[:, settings.num_valid :] = 0  # a bias may hold NaN there
            slope = slope * flatter
        live = upstream.logp != 0
        if upstream.entropy is not None:
            live = live | (upstream.entropy != 0)
        return torch.where(live[:, None], slope, 0).to(logits.dtype)
