"""Problems for the Triton head, their float64 oracle, and torch's answer in float32 as the yardstick.

The yardstick is stricter than torch at the same dtype: logits of 16-bit operands in float32, which
only the last step rounds.
"""

from dataclasses import dataclass, replace

import torch
from kernel_testing import assert_kernel
from torch import Tensor

from m2kernels._head_kernels import HeadSettings, RowStats, TileStats, Upstream


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """A chunk of rows, its settings, and the gradients that reach it."""

    hidden: Tensor
    weight: Tensor
    settings: HeadSettings
    grad_logp: Tensor
    grad_entropy: Tensor | None

    @property
    def target(self) -> Tensor:
        return self.settings.target

    @property
    def upstream(self) -> Upstream:
        return Upstream(self.grad_logp, self.grad_entropy)

    def pick(self, rows: Tensor) -> "HeadCase":
        """Some rows, in any order; for settings that are the same for all rows."""
        assert not isinstance(self.settings.inv_temperature, Tensor)
        return replace(
            self,
            hidden=self.hidden[rows],
            settings=replace(self.settings, target=self.target[rows]),
            grad_logp=self.grad_logp[rows],
            grad_entropy=None if self.grad_entropy is None else self.grad_entropy[rows],
        )

    def to(self, device: str) -> "HeadCase":
        s = self.settings
        settings = replace(
            s,
            target=s.target.to(device),
            bias=None if s.bias is None else s.bias.to(device),
            inv_temperature=s.inv_temperature.to(device)
            if isinstance(s.inv_temperature, Tensor)
            else s.inv_temperature,
        )
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, settings=settings, **moved)


def make_case(dtype, rows, dim, vocab, *, entropy=True, extras=False, scale=3.0, offset=0.0, seed=0):
    """Ragged in every way that `rows`, `dim`, `vocab` make it. `extras`: bias, cap, row temperatures,
    and padding columns that hold NaN."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, dim, generator=g)
    weight = torch.randn(vocab, dim, generator=g) * (scale / dim**0.5)
    if offset:
        hidden[:, -1], weight[:, -1] = 1.0, offset
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    target = torch.randint(0, vocab - 9, (rows,), generator=g)
    target[: rows // 3] = (hidden[: rows // 3].float() @ weight[: vocab - 9].float().t()).argmax(1)  # confident
    target[-1] = -1  # another shard's
    settings = HeadSettings(target=target, bias=None, inv_temperature=1.0, softcap=None, num_valid=vocab)
    if extras:
        weight[vocab - 9 :] = float("nan")
        bias = torch.randn(vocab, generator=g).to(dtype)
        bias[-1] = float("nan")
        bias[1] = -torch.inf  # a banned id
        target[target == 1] = 2
        temperature = 0.5 + torch.rand(rows, generator=g)
        settings = HeadSettings(
            target=target, bias=bias, inv_temperature=temperature, softcap=20.0, num_valid=vocab - 9
        )
    grad = torch.randn(rows, generator=g)
    grad_entropy = torch.randn(rows, generator=g) if entropy else None
    grad[1] = 0.0
    if grad_entropy is not None:
        grad_entropy[1] = 0.0
    return HeadCase(hidden=hidden, weight=weight, settings=settings, grad_logp=grad, grad_entropy=grad_entropy)


def answer(case: HeadCase, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, d loss / d raw) of plain torch in `dtype`, by autograd; rows of target -1 give no logp."""
    s = case.settings
    raw = case.hidden.to(dtype) @ case.weight.to(dtype).t()
    if s.bias is not None:
        raw = raw + s.bias.to(dtype)
    raw = raw.detach()[:, : s.num_valid].requires_grad_()
    z = raw if s.softcap is None else s.softcap * torch.tanh(raw / s.softcap)
    inverse = s.inv_temperature
    z = z * (inverse.to(dtype)[:, None] if isinstance(inverse, Tensor) else inverse)
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0, p * log_p).sum(1)
    held = case.target >= 0
    picked = log_p.gather(1, case.target.clamp(min=0)[:, None])[:, 0]
    # For a row whose target lives elsewhere the other shard's logp counts; here it is a constant, so
    # only -p, the part through the normaliser, reaches this shard.
    loss = (torch.where(held, picked, -torch.logsumexp(z, 1)) * case.grad_logp.to(dtype)).sum()
    if case.grad_entropy is not None:
        loss = loss + (entropy * case.grad_entropy.to(dtype)).sum()
    (dz,) = torch.autograd.grad(loss, raw)
    full = dz.new_zeros(dz.shape[0], case.weight.shape[0])
    full[:, : s.num_valid] = dz
    # The slope of a banned id is inf * 0 for autograd; the truth is 0.
    return picked.detach(), entropy.detach(), torch.where(full.isnan(), 0, full)


def merged(kernels, stats: TileStats, target: Tensor) -> RowStats:
    """What the driver makes of the statistics of a single shard."""
    return kernels.merge(stats._replace(z_target=torch.where(target >= 0, stats.z_target, -torch.inf)))


def check_head(kernels, case: HeadCase, eps: float = 1e-6) -> None:
    """Forward and gradient of `kernels` on the case's device against float64."""
    entropy = case.grad_entropy is not None
    stats, kept = kernels.forward(case.hidden, case.weight, case.settings, entropy=entropy, keep=True)
    check_statistics(kernels, case, stats, eps)
    rows = oracle_rows(case)
    dz = kernels.grad(kept, case.settings, rows, case.upstream)
    check_gradient(case, dz, eps)


def check_statistics(kernels, case: HeadCase, stats: TileStats, eps: float) -> None:
    """Merged statistics against float64, on rows whose target is here."""
    rows = merged(kernels, stats, case.target)
    oracle, plain = answer(case, torch.float64), answer(case, torch.float32)
    held = case.target >= 0
    assert_kernel("logp", rows.logp[held], plain[0][held], oracle[0][held], eps=eps)
    if case.grad_entropy is not None:
        assert rows.entropy is not None
        assert_kernel("entropy", rows.entropy, plain[1], oracle[1], eps=eps)


def oracle_rows(case: HeadCase) -> RowStats:
    """Exact row statistics, rounded: the gradient is then tested on its own, target elsewhere included."""
    s = case.settings
    raw = case.hidden.double() @ case.weight.double().t()
    if s.bias is not None:
        raw = raw + s.bias.double()
    z = raw[:, : s.num_valid]
    z = z if s.softcap is None else s.softcap * torch.tanh(z / s.softcap)
    inverse = s.inv_temperature
    z = z * (inverse.double()[:, None] if isinstance(inverse, Tensor) else inverse)
    log_norm = torch.logsumexp(z, 1)
    logp, entropy, _ = answer(case, torch.float64)
    high = log_norm.float()
    return RowStats(high, (log_norm - high.double()).float(), logp.float(), entropy.float())


def check_gradient(case: HeadCase, dz: Tensor, eps: float) -> None:
    """The gradient of the raw logits against float64; the yardstick is rounded to dz's dtype."""
    oracle, plain = answer(case, torch.float64)[2], answer(case, torch.float32)[2].to(dz.dtype)
    assert dz.shape == oracle.shape
    # 16-bit E and 16-bit dz: two roundings to the yardstick's one.
    assert_kernel("dz", dz, plain, oracle, ratio=2.0 if dz.dtype == torch.float32 else 2.5, eps=eps)
    assert not dz[1].any(), "a row without a gradient must give zeros"
    assert not dz[:, case.settings.num_valid :].any(), "padding must get no gradient"
