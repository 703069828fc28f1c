"""Triton kernels of the policy loss: what a program computes. Launches are in ``_policy_loss_triton.py``.

The maths is that of csrc/ops/policy_math.h, in double, and so are the sums.
"""

import triton
import triton.language as tl

from m2kernels._policy_loss_torch import MAX_ESS_WEIGHT, MAX_LOG_RATIO
from m2kernels.metrics import RAW_METRICS

GSPO: tl.constexpr = tl.constexpr(1)
CISPO: tl.constexpr = tl.constexpr(2)
LOG_RATIO_LIMIT: tl.constexpr = tl.constexpr(MAX_LOG_RATIO)
ESS_LIMIT: tl.constexpr = tl.constexpr(MAX_ESS_WEIGHT)
NUM_RAW: tl.constexpr = tl.constexpr(len(RAW_METRICS))
OBJECTIVE: tl.constexpr = tl.constexpr(len(RAW_METRICS))
"""Slot of the objective's sum, behind the metrics."""


@triton.jit
def _ratio(log_ratio):
    """exp, bounded so that fp32 can hold it; a NaN passes."""
    return tl.exp(tl.where(log_ratio > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, log_ratio))


@triton.jit
def _sequence_of(seq_ptr, num_tokens, base, name, BLOCK: tl.constexpr):
    """Token numbers from `base` on, and which are of sequence `name`: ids ascend, so those are a run."""
    i = base + tl.arange(0, BLOCK)
    inside = i < num_tokens
    return i, inside & (tl.load(seq_ptr + i, mask=inside, other=0) == name)


@triton.jit
def _first_start(seq_ptr, num_tokens, tile, TILE: tl.constexpr):
    """Where the first sequence that starts in this tile starts; the tile's end when none does."""
    i = tile + tl.arange(0, TILE)
    inside = i < num_tokens
    current = tl.load(seq_ptr + i, mask=inside, other=0)
    before = tl.load(seq_ptr + i - 1, mask=inside & (i > 0), other=0)
    end = tl.minimum(tile + TILE, num_tokens)
    return tl.min(tl.where(inside & ((i == 0) | (current != before)), i, end), 0), end


@triton.jit
def sequence_kernel(
    logp_ptr,
    old_logp_ptr,
    rollout_logp_ptr,  # or None
    seq_ptr,
    mask_ptr,  # or None
    log_ratio_ptr,  # out, f64 [num_tokens]: mean of logp - old_logp over the token's sequence
    share_ptr,  # out, f64: 1 / its live tokens
    tis_log_ptr,  # out, f64: sum of old_logp - rollout_logp; None without rollouts
    num_tokens,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over each sequence that starts in a tile, given to each of its tokens."""
    start, end = _first_start(seq_ptr, num_tokens, tl.program_id(0) * TILE, TILE)
    while start < end:
        name = tl.load(seq_ptr + start)
        total = tl.zeros((BLOCK,), tl.float64)
        tis = tl.zeros((BLOCK,), tl.float64)
        live_tokens = tl.zeros((BLOCK,), tl.float64)
        base = start
        count = BLOCK
        while count == BLOCK:
            i, member = _sequence_of(seq_ptr, num_tokens, base, name, BLOCK)
            live = member
            if mask_ptr is not None:
                live &= tl.load(mask_ptr + i, mask=member, other=0) != 0
            old = tl.load(old_logp_ptr + i, mask=live, other=0.0).to(tl.float64)
            total += tl.load(logp_ptr + i, mask=live, other=0.0).to(tl.float64) - old
            if rollout_logp_ptr is not None:
                tis += old - tl.load(rollout_logp_ptr + i, mask=live, other=0.0).to(tl.float64)
            live_tokens += live.to(tl.float64)
            count = tl.sum(member.to(tl.int32), 0)
            base += count
        num_live = tl.sum(live_tokens, 0)
        share = 1.0 / tl.where(num_live > 0.0, num_live, 1.0)
        log_ratio = tl.sum(total, 0) * share
        tis_log = tl.sum(tis, 0)
        for first in range(start, base, BLOCK):
            i = first + tl.arange(0, BLOCK)
            zero = tl.zeros((BLOCK,), tl.float64)
            tl.store(log_ratio_ptr + i, zero + log_ratio, mask=i < base)
            tl.store(share_ptr + i, zero + share, mask=i < base)
            if tis_log_ptr is not None:
                tl.store(tis_log_ptr + i, zero + tis_log, mask=i < base)
        start = base


@triton.jit
def _load(ptr, i, live):
    """f32 or f64 -> f64, 0 where not live or not given."""
    if ptr is None:
        x = tl.zeros_like(live.to(tl.float64))
    else:
        x = tl.load(ptr + i, mask=live, other=0.0).to(tl.float64)
    return x


@triton.jit
def _policy_term(
    ratio,
    log_ratio,
    weight,
    advantage,
    logp,
    clip_low,
    clip_high,
    dual_clip,
    KIND: tl.constexpr,
):
    """The clipped objective, its slopes through the ratio and beside it, and where each clip acted."""
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    over = ratio > high
    under = ratio < low
    if KIND == CISPO:
        dual = over & under
        direct = weight * tl.where(over, high, tl.where(under, low, ratio)) * advantage
        term = direct * logp
        via_ratio = tl.zeros_like(term)
    else:
        over &= advantage > 0.0
        under &= advantage < 0.0
        dual = (ratio > dual_clip) & (advantage < 0.0)
        bound = tl.where(dual, dual_clip, tl.where(under, low, tl.where(over, high, ratio)))
        term = weight * bound * advantage
        via_ratio = tl.where(over | under | dual | (log_ratio > LOG_RATIO_LIMIT), 0.0, term)
        direct = tl.zeros_like(term)
    return term, via_ratio, direct, under, over, dual


@triton.jit
def _reference_kl(y, KL: tl.constexpr):
    """k(logp, ref_logp) and its slope in logp, of y = logp - ref_logp; k3 when none is named."""
    if KL == 1:
        kl = y
        slope = tl.zeros_like(y) + 1.0
    elif KL == 2:
        kl = 0.5 * y * y
        slope = y
    else:
        e = tl.exp(0.0 - y)
        kl = e + y - 1.0
        slope = 1.0 - e
    return kl, slope


@triton.jit
def token_kernel(
    logp_ptr,
    old_logp_ptr,
    advantage_ptr,
    seq_ptr,
    mask_ptr,  # and the next three: or None
    entropy_ptr,
    rollout_logp_ptr,
    ref_logp_ptr,
    log_ratio_ptr,  # of sequence_kernel, or None
    share_ptr,
    tis_log_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,  # or None
    direct_ptr,  # gspo, f64 [num_tokens]: slopes that finish_kernel puts together; else None
    via_ratio_ptr,
    partial_ptr,  # f64 [NUM_SLOTS, programs]
    num_tokens,
    num_advantages,
    clip_low: "fp64",
    clip_high: "fp64",
    dual_clip: "fp64",
    kl_coef: "fp64",
    entropy_coef: "fp64",
    tis_cap: "fp64",
    denom: "fp64",
    KIND: tl.constexpr,
    KL: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    APPLY_TIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens; nothing here needs another token."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num_tokens
    seq = tl.load(seq_ptr + i, mask=inside, other=0)
    before = tl.load(seq_ptr + i - 1, mask=inside & (i > 0), other=0)
    live = inside
    if mask_ptr is not None:
        live &= tl.load(mask_ptr + i, mask=inside, other=0) != 0
    if PER_TOKEN:
        name = i.to(tl.int64)
    else:
        name = seq.to(tl.int64)
    known = live & (name >= 0) & (name < num_advantages)
    bad = tl.where(inside & (i > 0) & (seq < before), 1.0, 0.0) + tl.where(live & (known == 0), 1.0, 0.0)
    advantage = _load(advantage_ptr, name, known)
    logp = _load(logp_ptr, i, live)
    old = _load(old_logp_ptr, i, live)
    entropy = _load(entropy_ptr, i, live)
    token_log_ratio = logp - old
    token_ratio = _ratio(token_log_ratio)
    share = tl.full((BLOCK,), 1.0, tl.float64)
    log_ratio = token_log_ratio
    ratio = token_ratio
    if KIND == GSPO:
        share = _load(share_ptr, i, live)
        log_ratio = _load(log_ratio_ptr, i, live)
        ratio = _ratio(log_ratio)
    if tis_log_ptr is not None:
        tis = _ratio(_load(tis_log_ptr, i, live))
    elif rollout_logp_ptr is not None:
        tis = _ratio(old - _load(rollout_logp_ptr, i, live))
    else:
        tis = tl.full((BLOCK,), 1.0, tl.float64)
    capped = live & (tis > tis_cap)
    tis = tl.where(capped, tis_cap, tis)
    weight = share
    if APPLY_TIS:
        weight = share * tis
    term, via_ratio, direct, under, over, dual = _policy_term(
        ratio, log_ratio, weight, advantage, logp, clip_low, clip_high, dual_clip, KIND
    )
    kl = tl.zeros((BLOCK,), tl.float64)
    if ref_logp_ptr is not None:
        kl, kl_slope = _reference_kl(logp - _load(ref_logp_ptr, i, live), KL)
        if KL != 0:
            # With a zero coefficient an infinite kl or entropy must not turn into a NaN.
            term -= kl_coef * share * tl.where(kl_coef != 0.0, kl, 0.0)
            direct -= kl_coef * share * tl.where(kl_coef != 0.0, kl_slope, 0.0)
    term += entropy_coef * share * tl.where(entropy_coef != 0.0, entropy, 0.0)
    if direct_ptr is not None:
        tl.store(direct_ptr + i, tl.where(live, direct, 0.0), mask=inside)
        tl.store(via_ratio_ptr + i, tl.where(live, via_ratio, 0.0), mask=inside)
    else:
        grad = tl.where(live, (0.0 - (direct + via_ratio)) / denom, 0.0)
        tl.store(grad_logp_ptr + i, grad.to(tl.float32), mask=inside)
    if grad_entropy_ptr is not None:
        grad = tl.where(live, (0.0 - entropy_coef * share) / denom, 0.0)
        tl.store(grad_entropy_ptr + i, grad.to(tl.float32), mask=inside)

    ess = tl.where(ratio * tis > ESS_LIMIT, ESS_LIMIT, ratio * tis)
    parts = tl.num_programs(0)
    out = partial_ptr + tl.program_id(0)
    tl.store(out, tl.sum(live.to(tl.float64), 0))
    tl.store(out + parts, tl.sum((live & under).to(tl.float64), 0))
    tl.store(out + 2 * parts, tl.sum((live & over).to(tl.float64), 0))
    tl.store(out + 3 * parts, tl.sum((live & dual).to(tl.float64), 0))
    tl.store(out + 4 * parts, tl.sum(tl.where(live, 0.0 - token_log_ratio, 0.0), 0))
    tl.store(out + 5 * parts, tl.sum(tl.where(live, token_ratio - 1.0 - token_log_ratio, 0.0), 0))
    tl.store(out + 6 * parts, tl.sum(tl.where(live, ess, 0.0), 0))
    tl.store(out + 7 * parts, tl.sum(tl.where(live, ess * ess, 0.0), 0))
    tl.store(out + 8 * parts, tl.sum(tl.where(live, tis, 0.0), 0))
    tl.store(out + 9 * parts, tl.sum(capped.to(tl.float64), 0))
    tl.store(out + 10 * parts, tl.sum(tl.where(live, kl, 0.0), 0))
    tl.store(out + 11 * parts, tl.sum(tl.where(live, entropy, 0.0), 0))
    tl.store(out + 12 * parts, tl.sum(bad, 0))
    tl.store(out + 13 * parts, tl.max(tl.where(live, ratio, 0.0), 0))
    tl.store(out + 14 * parts, tl.sum(tl.where(live, term, 0.0), 0))


@triton.jit
def _slot(sums, slot, k: tl.constexpr):
    return tl.sum(tl.where(slot == k, sums, 0.0), 0)


@triton.jit
def _finish(partial_ptr, parts, denom, stats_ptr, loss_ptr, BLOCK_PARTS: tl.constexpr, SLOTS: tl.constexpr):
    """Partial sums -> stats (raw, then final) and the loss; a bad sequence id makes it NaN."""
    slot = tl.arange(0, SLOTS)
    is_max = slot == NUM_RAW - 1
    total = tl.zeros((SLOTS, BLOCK_PARTS), tl.float64)
    for base in range(0, parts, BLOCK_PARTS):
        part = base + tl.arange(0, BLOCK_PARTS)
        inside = (slot <= OBJECTIVE)[:, None] & (part < parts)[None, :]
        v = tl.load(partial_ptr + slot[:, None] * parts + part[None, :], mask=inside, other=0.0)
        total = tl.where(is_max[:, None], tl.maximum(total, v), total + v)
    sums = tl.where(is_max, tl.max(total, 1), tl.sum(total, 1))
    # A NaN is in every sum but not in a maximum: the sum of the weights (finite otherwise) brings it.
    weight = _slot(sums, slot, 6)
    sums = tl.where(is_max, sums + (weight - weight), sums)
    tl.store(stats_ptr + slot, sums.to(tl.float32), mask=slot < NUM_RAW)
    num_tokens = _slot(sums, slot, 0)
    share = tl.where(num_tokens > 0.0, 1.0 / tl.where(num_tokens > 0.0, num_tokens, 1.0), 0.0)
    squares = _slot(sums, slot, 7)
    ess = _slot(sums, slot, 6)
    ess = tl.where(squares == 0.0, 0.0, ess * ess / tl.where(squares == 0.0, 1.0, squares))
    final = stats_ptr + NUM_RAW
    tl.store(final, (_slot(sums, slot, 1) * share).to(tl.float32))
    tl.store(final + 1, (_slot(sums, slot, 2) * share).to(tl.float32))
    tl.store(final + 2, (_slot(sums, slot, 3) * share).to(tl.float32))
    tl.store(final + 3, (_slot(sums, slot, 4) * share).to(tl.float32))
    tl.store(final + 4, (_slot(sums, slot, 5) * share).to(tl.float32))
    tl.store(final + 5, (ess * share).to(tl.float32))
    tl.store(final + 6, (_slot(sums, slot, 8) * share).to(tl.float32))
    tl.store(final + 7, (_slot(sums, slot, 9) * share).to(tl.float32))
    tl.store(final + 8, (_slot(sums, slot, 10) * share).to(tl.float32))
    tl.store(final + 9, (_slot(sums, slot, 11) * share).to(tl.float32))
    loss = (0.0 - _slot(sums, slot, 14)) / denom
    tl.store(loss_ptr, tl.where(_slot(sums, slot, 12) > 0.0, float("nan"), loss).to(tl.float32))


@triton.jit
def _spread(
    seq_ptr, mask_ptr, share_ptr, direct_ptr, via_ratio_ptr, grad_logp_ptr, num_tokens, tile, denom,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gspo: every live token of a sequence moves its ratio by its share of it."""
    start, end = _first_start(seq_ptr, num_tokens, tile, TILE)
    scale = -1.0 / denom
    while start < end:
        name = tl.load(seq_ptr + start)
        slope = tl.zeros((BLOCK,), tl.float64)
        base = start
        count = BLOCK
        while count == BLOCK:
            i, member = _sequence_of(seq_ptr, num_tokens, base, name, BLOCK)
            slope += tl.load(via_ratio_ptr + i, mask=member, other=0.0)
            count = tl.sum(member.to(tl.int32), 0)
            base += count
        common = tl.sum(slope, 0)
        for first in range(start, base, BLOCK):
            i = first + tl.arange(0, BLOCK)
            live = i < base
            if mask_ptr is not None:
                live &= tl.load(mask_ptr + i, mask=i < base, other=0) != 0
            slope_here = tl.load(direct_ptr + i, mask=live, other=0.0)
            slope_here += common * tl.load(share_ptr + i, mask=live, other=0.0)
            grad = tl.where(live, slope_here * scale, 0.0)
            tl.store(grad_logp_ptr + i, grad.to(tl.float32), mask=i < base)
        start = base


@triton.jit
def finish_kernel(
    partial_ptr,
    stats_ptr,
    loss_ptr,
    seq_ptr,
    mask_ptr,  # or None
    share_ptr,  # and the next two: None unless gspo
    direct_ptr,
    via_ratio_ptr,
    grad_logp_ptr,
    num_tokens,
    parts,
    denom: "fp64",
    BLOCK_PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 finishes the sums; program k + 1 takes the sequences of tile k (gspo)."""
    if tl.program_id(0) == 0:
        _finish(partial_ptr, parts, denom, stats_ptr, loss_ptr, BLOCK_PARTS, SLOTS)
    elif direct_ptr is not None:
        _spread(
            seq_ptr, mask_ptr, share_ptr, direct_ptr, via_ratio_ptr, grad_logp_ptr, num_tokens,
            (tl.program_id(0) - 1) * TILE, denom, TILE, BLOCK,
        )  # fmt: skip


@triton.jit
def scale_kernel(
    grad_ptr, logp_ptr, logp_out_ptr, num_logp, entropy_ptr, entropy_out_ptr, num_entropy, BLOCK: tl.constexpr
):
    """Both gradients times the upstream one, which is read on the device."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr)
    tl.store(logp_out_ptr + i, grad * tl.load(logp_ptr + i, mask=i < num_logp, other=0.0), mask=i < num_logp)
    inside = i < num_entropy
    tl.store(entropy_out_ptr + i, grad * tl.load(entropy_ptr + i, mask=inside, other=0.0), mask=inside)
