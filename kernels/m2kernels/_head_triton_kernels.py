"""Triton kernels of the LM head: what a program computes. Launches are in ``_head_triton.py``.

Everything is about z = softcap(raw) * inv_temperature, raw = h . w + bias, one row a token and one
column a vocabulary id. The row statistics are kept per *tile* of :data:`TILE` ids, so that shards
cut at a multiple of it (Megatron pads its vocabulary that way) give the same tiles, bit for bit.

``anchor`` is what z is measured from in a tile: its largest z, so that E = exp(z - anchor) is in
[0, 1]; ``SHIFT`` lowers it, so that E spends the exponents of float16 too. The target's column is
left out of every sum: log p = -log1p(sum of exp(z - z_target)) then loses nothing to cancellation.
"""

import triton
import triton.language as tl

TILE: tl.constexpr = tl.constexpr(128)
"""Vocabulary ids per tile of the statistics."""


@triton.jit
def _tile_position(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Walk GROUP_M rows of tiles together, so that a wave of programs shares both operands in L2."""
    group_size = GROUP_M * tiles_n
    first = (index // group_size) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = index % group_size
    return first + inside % height, inside // height


@triton.jit
def _scaled(raw, inv_temp, softcap):
    """raw -> z. tanh by exp: its error is a fraction of softcap, 1e-7, wherever raw is."""
    if softcap is not None:
        raw = softcap * (1.0 - 2.0 / (tl.exp(raw * (2.0 / softcap)) + 1.0))
    return raw * inv_temp


@triton.jit
def _masked(z, col, target, num_valid, AXIS: tl.constexpr):
    """z without padding and without the target, and z of the target (0 where it is not among them)."""
    z = tl.where(col < num_valid, z, -float("inf"))
    hit = col == target
    return tl.where(hit, -float("inf"), z), tl.sum(tl.where(hit, z, 0.0), AXIS, keep_dims=True)


@triton.jit
def _weighted(z, anchor, ENTROPY: tl.constexpr, AXIS: tl.constexpr):
    """E = exp(z - anchor), its sum and that of (z - anchor) E along AXIS, which keeps length 1."""
    above = z - anchor
    e = tl.exp(above)
    total = tl.sum(e, AXIS, keep_dims=True)
    moment = total
    if ENTROPY:
        # The bound keeps 0 * -inf out: e is 0 long before it.
        moment = tl.sum(e * tl.maximum(above, -1e4, propagate_nan=tl.PropagateNan.ALL), AXIS, keep_dims=True)
    return e, total, moment


@triton.jit
def _anchor(top, SHIFT: tl.constexpr):
    """The largest z -> what to subtract, and what to report: -inf for a tile without a column."""
    empty = top == -float("inf")
    return tl.where(empty, 0.0, top - SHIFT), tl.where(empty, top, top - SHIFT)


@triton.jit
def _store_statistics(
    at, inside, row, owns, z_target, anchor, total, moment,
    z_target_ptr, anchor_ptr, total_ptr, moment_ptr,
):  # fmt: skip
    """The partial sums are stored tile by tile, [num_tiles, num_rows]: rows are contiguous."""
    tl.store(anchor_ptr + at, anchor, mask=inside)
    tl.store(total_ptr + at, total, mask=inside)
    if moment_ptr is not None:
        tl.store(moment_ptr + at, moment, mask=inside)
    # One tile alone holds a row's target: no atomics, and no order to depend on.
    tl.store(z_target_ptr + row, z_target, mask=owns)


@triton.jit
def _halves(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """[ROWS, 2 HALF] -> the left and the right half of the columns; registers do not move."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _logits(
    acc, first, row, target, has_target, bias_ptr, row_temp_ptr, num_rows, num_cols, num_valid, inv_temp, softcap,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Products of columns from `first` on -> _masked z.

    Most tiles hold no padding and no row's target: both branches are the same for all threads, and
    skipping them takes a third of the arithmetic off the epilogue.
    """
    col = first + tl.arange(0, WIDTH)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < num_cols, other=0.0).to(tl.float32)[None, :]
    if row_temp_ptr is not None:
        z = _scaled(acc, tl.load(row_temp_ptr + row, mask=row < num_rows, other=0.0)[:, None], softcap)
    else:
        z = _scaled(acc, inv_temp, softcap)
    own = tl.zeros((z.shape[0], 1), tl.float32)
    if first + WIDTH > num_valid:
        z = tl.where(col[None, :] < num_valid, z, -float("inf"))
    if has_target:
        hit = col[None, :] == target[:, None]
        own = tl.sum(tl.where(hit, z, 0.0), 1, keep_dims=True)
        z = tl.where(hit, -float("inf"), z)
    return z, own


@triton.jit
def _finish_tile(
    acc, row, tile, target, kept, bias_ptr, row_temp_ptr, z_target_ptr, anchor_ptr, total_ptr, moment_ptr,
    num_rows, num_cols, num_valid, inv_temp, softcap, first_row, BLOCK_M: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One tile of products [BLOCK_M, TILE] -> its statistics, and E; half by half, or registers spill."""
    HALF: tl.constexpr = TILE // 2
    left, right = _halves(acc, BLOCK_M, HALF)
    first = tile * TILE
    here = (target >= first) & (target < first + TILE)
    has_target = tl.max(here.to(tl.int32), 0) > 0
    left, own_left = _logits(
        left, first, row, target, has_target, bias_ptr, row_temp_ptr, num_rows, num_cols, num_valid, inv_temp,
        softcap, HALF,
    )  # fmt: skip
    right, own_right = _logits(
        right, first + HALF, row, target, has_target, bias_ptr, row_temp_ptr, num_rows, num_cols, num_valid, inv_temp,
        softcap, HALF,
    )  # fmt: skip
    top = tl.maximum(tl.max(left, 1, keep_dims=True), tl.max(right, 1, keep_dims=True))
    anchor, reported = _anchor(top, SHIFT)
    e, total, moment = _weighted(left, anchor, moment_ptr is not None, 1)
    if kept is not None:
        kept.store([first_row, first], e.to(kept.dtype))
    e, total_right, moment_right = _weighted(right, anchor, moment_ptr is not None, 1)
    if kept is not None:
        kept.store([first_row, first + HALF], e.to(kept.dtype))
    inside = (row < num_rows)[:, None] & (first < num_cols)
    owns = inside & here[:, None]
    _store_statistics(
        tile * num_rows + row[:, None], inside, row[:, None], owns, own_left + own_right, reported,
        total + total_right, moment + moment_right, z_target_ptr, anchor_ptr, total_ptr, moment_ptr,
    )  # fmt: skip


@triton.jit
def head_forward_kernel(
    hidden,  # descriptor [num_rows, dim], block [BLOCK_M, BLOCK_K]
    weight,  # descriptor [num_cols, dim], block [BLOCK_N, BLOCK_K]
    kept,  # descriptor [num_rows, num_cols], block [BLOCK_M, TILE // 2]; None: E is not kept
    bias_ptr,  # [num_cols] or None
    row_temp_ptr,  # f32 [num_rows] or None
    target_ptr,  # int [num_rows], -1: not here
    z_target_ptr,  # f32 [num_rows]
    anchor_ptr,  # f32 [num_tiles, num_rows], and so total, moment (None: not wanted)
    total_ptr,
    moment_ptr,
    num_rows,
    num_cols,
    num_valid,
    dim,
    inv_temp,
    softcap,  # None: off
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Persistent GEMM; the logits live in registers only. One K order, whatever the batch.

    The two tiles of a wide block are finished one after the other: both at once would spill.
    """
    tl.static_assert(BLOCK_N == TILE or BLOCK_N == 2 * TILE)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(num_cols, BLOCK_N)
    steps = tl.cdiv(dim, BLOCK_K)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _tile_position(index, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            a = hidden.load([m * BLOCK_M, step * BLOCK_K])
            b = weight.load([n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        target = tl.load(target_ptr + row, mask=row < num_rows, other=-1).to(tl.int32)
        if BLOCK_N == TILE:
            _finish_tile(
                acc, row, n, target, kept, bias_ptr, row_temp_ptr, z_target_ptr, anchor_ptr, total_ptr,
                moment_ptr, num_rows, num_cols, num_valid, inv_temp, softcap, m * BLOCK_M, BLOCK_M, SHIFT,
            )  # fmt: skip
        else:
            left, right = _halves(acc, BLOCK_M, TILE)
            _finish_tile(
                left, row, 2 * n, target, kept, bias_ptr, row_temp_ptr, z_target_ptr, anchor_ptr, total_ptr,
                moment_ptr, num_rows, num_cols, num_valid, inv_temp, softcap, m * BLOCK_M, BLOCK_M, SHIFT,
            )  # fmt: skip
            _finish_tile(
                right, row, 2 * n + 1, target, kept, bias_ptr, row_temp_ptr, z_target_ptr, anchor_ptr,
                total_ptr, moment_ptr, num_rows, num_cols, num_valid, inv_temp, softcap, m * BLOCK_M, BLOCK_M, SHIFT,
            )  # fmt: skip


@triton.jit
def logits_forward_kernel(
    logits_ptr,  # [num_rows, num_cols], rows `stride` apart
    row_temp_ptr,
    target_ptr,
    z_target_ptr,
    anchor_ptr,
    total_ptr,
    moment_ptr,
    num_rows,
    num_cols,
    num_valid,
    stride,
    inv_temp,
    softcap,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The same statistics of logits that exist already: one pass over them."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    col = tile[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    live = row < num_rows
    at = row.to(tl.int64)[:, None, None] * stride + col
    z = tl.load(logits_ptr + at, mask=live[:, None, None] & (col < num_cols), other=0.0).to(tl.float32)
    if row_temp_ptr is not None:
        z = _scaled(z, tl.load(row_temp_ptr + row, mask=live, other=0.0)[:, None, None], softcap)
    else:
        z = _scaled(z, inv_temp, softcap)
    target = tl.load(target_ptr + row, mask=live, other=-1).to(tl.int32)
    z, z_target = _masked(z, col, target[:, None, None], num_valid, 2)
    anchor, reported = _anchor(tl.max(z, 2, keep_dims=True), 0.0)
    _, total, moment = _weighted(z, anchor, moment_ptr is not None, 2)
    first = tl.program_id(1) * TILES * TILE
    owns = live & (target >= first) & (target < first + TILES * TILE)
    tile_at = (tile[None, :] * num_rows + row[:, None])[:, :, None]
    inside = (live[:, None] & (tile * TILE < num_cols)[None, :])[:, :, None]
    _store_statistics(
        tile_at, inside, row[:, None, None], owns[:, None, None], tl.sum(z_target, 1, keep_dims=True),
        reported, total, moment, z_target_ptr, anchor_ptr, total_ptr, moment_ptr,
    )  # fmt: skip


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0 without cancellation: a confident target's gradient keeps its digits."""
    series = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(x > -0.1, 0.0 - series, 1.0 - tl.exp(x))


@triton.jit
def head_backward_kernel(
    source_ptr,  # E [num_rows, num_cols] of head_forward_kernel, or logits (anchor_ptr None)
    dz_ptr,  # like source; may be the same memory
    row_temp_ptr,
    target_ptr,
    anchor_ptr,  # f32 [num_tiles, num_rows], or None: source holds logits
    log_norm_ptr,  # f32 [num_rows], and so its low part, logp, entropy, both gradients
    log_norm_low_ptr,
    logp_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,  # None: no gradient through the entropy
    num_rows,
    num_cols,
    num_valid,
    stride,
    dz_stride,
    inv_temp,
    softcap,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """d loss / d raw: inv_temperature * slope * (g (onehot - p) - g_entropy p (log p + entropy))."""
    inf = float("inf")
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    col = tile[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    live = row < num_rows
    inside = live[:, None, None] & (col < num_cols)
    at = row.to(tl.int64)[:, None, None] * stride + col
    source = tl.load(source_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if row_temp_ptr is not None:
        scale = tl.load(row_temp_ptr + row, mask=live, other=1.0)
    else:
        scale = tl.full((BLOCK_ROWS,), inv_temp, tl.float32)
    target = tl.load(target_ptr + row, mask=live, other=-1).to(tl.int32)
    logp = tl.load(logp_ptr + row, mask=live, other=0.0)
    log_norm = tl.load(log_norm_ptr + row, mask=live, other=0.0)
    log_norm_low = tl.load(log_norm_low_ptr + row, mask=live, other=0.0)
    grad = tl.load(grad_logp_ptr + row, mask=live, other=0.0)
    hit = col == target[:, None, None]
    if anchor_ptr is not None:
        tile_at = tile[None, :] * num_rows + row[:, None]
        tile_inside = (tile < tl.cdiv(num_cols, TILE))[None, :] & live[:, None]
        anchor = tl.load(anchor_ptr + tile_at, mask=tile_inside, other=-inf)
        # log p = log E + (anchor - log_norm): an empty tile has E = 0 and an anchor of -inf.
        offset = (anchor - log_norm[:, None]) - log_norm_low[:, None]
        offset = tl.where(anchor == -inf, -inf, offset)[:, :, None]
        p = source * tl.exp(offset)
        log_p = tl.log(source) + offset
    else:
        z = _scaled(source, scale[:, None, None], softcap)
        log_p = (z - log_norm[:, None, None]) - log_norm_low[:, None, None]
        log_p = tl.where(col < num_valid, log_p, -inf)
        p = tl.exp(log_p)
    p = tl.where(hit, tl.exp(logp)[:, None, None], p)
    log_p = tl.where(hit, logp[:, None, None], log_p)
    dz = grad[:, None, None] * tl.where(hit, _one_minus_exp(logp)[:, None, None], 0.0 - p)
    if grad_entropy_ptr is not None:
        grad_entropy = tl.load(grad_entropy_ptr + row, mask=live, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=live, other=0.0)
        pull = tl.where(p == 0.0, 0.0, p * (log_p + entropy[:, None, None]))
        dz -= grad_entropy[:, None, None] * pull
        idle = (grad == 0.0) & (grad_entropy == 0.0)
    else:
        idle = grad == 0.0
    if softcap is not None:
        z = tl.where(log_p == -inf, 0.0, log_p + log_norm[:, None, None])
        t = z / (scale[:, None, None] * softcap)
        dz *= 1.0 - t * t
    dz *= scale[:, None, None]
    dz = tl.where(idle[:, None, None], 0.0, dz)
    out = row.to(tl.int64)[:, None, None] * dz_stride + col
    tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0 to full precision: what rounding took from 1 + x is put back by the quotient."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def head_merge_kernel(
    z_target_ptr,  # f32 [num_rows]
    anchor_ptr,  # f32 [num_rows, num_tiles], any strides; total and moment alike
    total_ptr,
    moment_ptr,  # or None
    out_ptr,  # f32 [4, num_rows]: log_norm, its low part, logp, entropy
    num_rows,
    num_tiles,
    row_stride,
    tile_stride,
    FAR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Tiles of the whole vocabulary -> rows, in double: the maths of merge_tiles in _head_kernels.py."""
    inf = float("inf")
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < num_rows
    own_z = tl.load(z_target_ptr + row, mask=live, other=0.0).to(tl.float64)
    top = tl.full((BLOCK_ROWS, BLOCK_TILES), -inf, tl.float32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        inside = live[:, None] & (tile < num_tiles)[None, :]
        at = row.to(tl.int64)[:, None] * row_stride + tile[None, :] * tile_stride
        top = tl.maximum(top, tl.load(anchor_ptr + at, mask=inside, other=-inf))
    largest = tl.max(top, 1).to(tl.float64)
    near = (largest - own_z <= FAR) & (own_z < inf)
    zero = tl.where(near, own_z, largest)
    others = tl.zeros((BLOCK_ROWS, BLOCK_TILES), tl.float64)
    weighted = tl.zeros((BLOCK_ROWS, BLOCK_TILES), tl.float64)
    for first in range(0, num_tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        inside = live[:, None] & (tile < num_tiles)[None, :]
        at = row.to(tl.int64)[:, None] * row_stride + tile[None, :] * tile_stride
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float64)
        anchor = tl.load(anchor_ptr + at, mask=inside, other=0.0).to(tl.float64)
        shift = tl.where(total == 0.0, 0.0, anchor - zero[:, None])
        scale = tl.exp(shift)
        others += scale * total
        if moment_ptr is not None:
            moment = tl.load(moment_ptr + at, mask=inside, other=0.0).to(tl.float64)
            weighted += tl.where(total == 0.0, 0.0, scale * (moment + shift * total))
    rest = tl.sum(others, 1)
    below = tl.where(near, 0.0, own_z - zero)
    own = tl.exp(below)
    log_sum = tl.where(near, _log1p(rest), tl.log(own + rest))
    log_norm = zero + log_sum
    high = log_norm.to(tl.float32)
    low = tl.where((high == inf) | (high == -inf), 0.0, log_norm - high.to(tl.float64))
    tl.store(out_ptr + row, high, mask=live)
    tl.store(out_ptr + num_rows + row, low.to(tl.float32), mask=live)
    tl.store(out_ptr + 2 * num_rows + row, (below - log_sum).to(tl.float32), mask=live)
    if moment_ptr is not None:
        mean = (tl.sum(weighted, 1) + tl.where(own == 0.0, 0.0, own * below)) / (own + rest)
        tl.store(out_ptr + 3 * num_rows + row, (log_sum - mean).to(tl.float32), mask=live)
