"""Triton kernels of tree attention: what a program computes. Launches are in ``_tree_attention_triton.py``.

q, out, dq, d_out are [rows, heads, DIM], k, v, dk, dv [rows, kv_heads, DIM], behind tensor descriptors that end at
the plan's last row: what lies behind it loads as 0 and is never written. lse is [heads, rows] in base 2: with
s = q . k and c = scale / ln 2, a probability is exp2(c s - lse), one multiply-add and one instruction.

Row j is visible to row i iff j <= i < subtree_end[j]. The planner has classed the tiles, so a masked loop does the
few partial ones and a bare one the rest.
"""

import triton
import triton.language as tl


@triton.jit
def _place(program, ranks, wave):
    """Program -> (rank in the schedule, head): `wave` heads at a time, so that their keys stay in L2."""
    inside = program % (ranks * wave)
    return inside // wave, program // (ranks * wave) * wave + inside % wave


@triton.jit
def _load(tiles, row, head, ROWS: tl.constexpr, DIM: tl.constexpr):
    return tl.reshape(tiles.load([row, head, 0]), (ROWS, DIM))


@triton.jit
def _store(tiles, row, head, x, ROWS: tl.constexpr, DIM: tl.constexpr):
    tiles.store([row, head, 0], tl.reshape(x.to(tiles.dtype), (ROWS, 1, DIM)))


@triton.jit
def _listed(kv_ptr, t, end, SPLIT: tl.constexpr):
    """First key, in tiles, of the t-th of a query block's tiles; the list's entries are SPLIT tiles each."""
    return tl.load(kv_ptr + t // SPLIT, mask=t < end, other=0) * SPLIT + t % SPLIT


@triton.jit
def _visible(row, key, subtree_end_ptr, num_rows):
    """[len(row), len(key)], of which one is a column. Keys behind the last row end at 0: seen by nobody."""
    end = tl.load(subtree_end_ptr + key, mask=key < num_rows, other=0)
    return (key <= row) & (row < end)


@triton.jit
def _attend(
    acc, total, top, q_tile, row, k, v, kv_head, kv_ptr, begin, end, subtree_end_ptr, num_rows, scale_log2,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles begin to end - 1 of the list into the running softmax."""
    tile = _listed(kv_ptr, begin, end, SPLIT)
    for t in tl.range(begin, end):
        first = tile * BLOCK_N
        tile = _listed(kv_ptr, t + 1, end, SPLIT)  # now, so that the next key's address never waits for it
        s = tl.dot(q_tile, _load(k, first, kv_head, BLOCK_N, DIM).T, input_precision=PRECISION)
        if MASKED:
            key = first + tl.arange(0, BLOCK_N)
            s = tl.where(_visible(row[:, None], key[None, :], subtree_end_ptr, num_rows), s, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        v_tile = _load(v, first, kv_head, BLOCK_N, DIM)
        acc = tl.dot(p.to(v.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "stride", "wave"])
def tree_forward_kernel(
    q,  # descriptor, tile [BLOCK_M, 1, DIM]; so out
    k,  # descriptor, tile [BLOCK_N, 1, DIM]; so v
    v,
    out,
    lse_ptr,  # f32 [heads, stride]
    subtree_end_ptr,  # int32 [num_rows]
    order_ptr,  # int32 [num_blocks]: query blocks, most tiles first
    start_ptr,  # TreeTiles.forward_start, forward_full, forward_kv
    full_ptr,
    kv_ptr,
    num_rows,
    num_blocks,
    stride,
    wave,
    scale_log2,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One query tile of one head over its list: the diagonal, the other partial tiles, the full ones."""
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    SPLIT: tl.constexpr = KV_BLOCK // BLOCK_N
    rank, head = _place(tl.program_id(0), num_blocks * PARTS, wave)
    block = tl.load(order_ptr + rank // PARTS)
    first = block * BLOCK + rank % PARTS * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    begin, full, end = tl.load(start_ptr + block), tl.load(full_ptr + block), tl.load(start_ptr + block + 1)
    q_tile = _load(q, first, head, BLOCK_M, DIM)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite: a row that a tile hides altogether then adds exp2(-inf) = 0, where -inf - -inf would be NaN.
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    acc, total, top = _attend(
        acc, total, top, q_tile, row, k, v, head // GROUP, kv_ptr, begin * SPLIT, full * SPLIT, subtree_end_ptr,
        num_rows, scale_log2, True, SPLIT, BLOCK_N, DIM, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q_tile, row, k, v, head // GROUP, kv_ptr, full * SPLIT, end * SPLIT, subtree_end_ptr,
        num_rows, scale_log2, False, SPLIT, BLOCK_N, DIM, PRECISION,
    )  # fmt: skip
    tl.store(lse_ptr + head * stride + row, top + tl.log2(total), mask=row < num_rows)
    _store(out, first, head, acc / total[:, None], BLOCK_M, DIM)


@triton.jit(do_not_specialize=["num_rows", "stride"])
def tree_delta_kernel(
    out_ptr,  # [num_rows, heads, DIM], dense
    grad_ptr,  # [num_rows, heads, DIM], rows and heads so many elements apart
    delta_ptr,  # f32 [heads, stride]
    num_rows,
    stride,
    grad_row_stride,
    grad_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = sum over DIM of out * d_out, for one head of some rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    inside = row < num_rows
    wide = row.to(tl.int64)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    o = tl.load(out_ptr + (wide * HEADS + head) * DIM + dim, mask=inside[:, None], other=0.0)
    g_at = wide * grad_row_stride + head.to(tl.int64) * grad_head_stride + dim
    g = tl.load(grad_ptr + g_at, mask=inside[:, None], other=0.0)
    tl.store(delta_ptr + head * stride + row, tl.sum(o.to(tl.float32) * g.to(tl.float32), 1), mask=inside)


@triton.jit
def _pull_queries(
    dq, q, d_out, q_tile, g_tile, lse, delta, first_row, row, head, k, v, kv_head, kv_ptr, begin, end,
    subtree_end_ptr, num_rows, scale_log2, MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Tiles begin to end - 1 of the list into dq / scale."""
    tile = _listed(kv_ptr, begin, end, SPLIT)
    for t in tl.range(begin, end):
        first = tile * BLOCK_N
        tile = _listed(kv_ptr, t + 1, end, SPLIT)
        if RELOAD:
            q_tile = _load(q, first_row, head, BLOCK_M, DIM)
            g_tile = _load(d_out, first_row, head, BLOCK_M, DIM)
        k_tile = _load(k, first, kv_head, BLOCK_N, DIM)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(g_tile, _load(v, first, kv_head, BLOCK_N, DIM).T, input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if MASKED:
            key = first + tl.arange(0, BLOCK_N)
            p = tl.where(_visible(row[:, None], key[None, :], subtree_end_ptr, num_rows), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "stride", "wave"])
def tree_dq_kernel(
    q,  # descriptor, tile [BLOCK_M, 1, DIM]; so d_out, dq
    k,  # descriptor, tile [BLOCK_N, 1, DIM]; so v
    v,
    d_out,
    dq,
    lse_ptr,  # f32 [heads, stride]; so delta
    delta_ptr,
    subtree_end_ptr,
    order_ptr,  # as in the forward
    start_ptr,
    full_ptr,
    kv_ptr,
    num_rows,
    num_blocks,
    stride,
    wave,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    RELOAD: tl.constexpr,
):
    """dq of one query tile of one head, over the list of the forward: no sum leaves the program.

    RELOAD: fetch the queries for every tile again; kept, float32 operands would not fit the registers.
    """
    PARTS: tl.constexpr = BLOCK // BLOCK_M
    SPLIT: tl.constexpr = KV_BLOCK // BLOCK_N
    rank, head = _place(tl.program_id(0), num_blocks * PARTS, wave)
    block = tl.load(order_ptr + rank // PARTS)
    first = block * BLOCK + rank % PARTS * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    begin, full, end = tl.load(start_ptr + block), tl.load(full_ptr + block), tl.load(start_ptr + block + 1)
    q_tile = _load(q, first, head, BLOCK_M, DIM)
    g_tile = _load(d_out, first, head, BLOCK_M, DIM)
    lse = tl.load(lse_ptr + head * stride + row, mask=row < num_rows, other=0.0)
    delta = tl.load(delta_ptr + head * stride + row, mask=row < num_rows, other=0.0)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    acc = _pull_queries(
        acc, q, d_out, q_tile, g_tile, lse, delta, first, row, head, k, v, head // GROUP, kv_ptr,
        begin * SPLIT, full * SPLIT, subtree_end_ptr, num_rows, scale_log2, True, SPLIT, BLOCK_M, BLOCK_N, DIM,
        PRECISION, RELOAD,
    )  # fmt: skip
    acc = _pull_queries(
        acc, q, d_out, q_tile, g_tile, lse, delta, first, row, head, k, v, head // GROUP, kv_ptr,
        full * SPLIT, end * SPLIT, subtree_end_ptr, num_rows, scale_log2, False, SPLIT, BLOCK_M, BLOCK_N, DIM,
        PRECISION, RELOAD,
    )  # fmt: skip
    _store(dq, first, head, acc * scale, BLOCK_M, DIM)


@triton.jit
def _pull_keys(
    dk, dv, k_tile, v_tile, key, q, d_out, lse_ptr, delta_ptr, dq_ptr, kv_head, first, num_first, second, num,
    subtree_end_ptr, num_rows, stride, scale_log2, MASKED: tl.constexpr, GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`num` query tiles, `num_first` from `first` on and the rest from `second` on, of each head of the group.

    Heads are the inner loop: they lie side by side in memory, and GROUP, unlike `num`, is known when compiling.
    """
    for t in tl.range(num * GROUP):
        index = t // GROUP
        tile = first + index
        if MASKED:
            tile = tl.where(index < num_first, tile, second + index - num_first)
        head = kv_head * GROUP + t % GROUP
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        at = head * stride + row
        q_tile = _load(q, tile * BLOCK_M, head, BLOCK_M, DIM)
        s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
        lse = tl.load(lse_ptr + at, mask=row < num_rows, other=0.0)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if MASKED:
            p = tl.where(_visible(row[None, :], key[:, None], subtree_end_ptr, num_rows), p, 0.0)
        g_tile = _load(d_out, tile * BLOCK_M, head, BLOCK_M, DIM)
        dv = tl.dot(p.to(q.dtype), g_tile, dv, input_precision=PRECISION)
        dp = tl.dot(v_tile, g_tile.T, input_precision=PRECISION)
        delta = tl.load(delta_ptr + at, mask=row < num_rows, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q_tile, dk, input_precision=PRECISION)
        if dq_ptr is not None:
            part = tl.dot(ds.T, k_tile, input_precision=PRECISION)
            corner = (tile.to(tl.int64) * (BLOCK_M * KV_HEADS * GROUP) + head) * DIM
            inside = tl.arange(0, BLOCK_M)[:, None] * (KV_HEADS * GROUP * DIM) + tl.arange(0, DIM)[None, :]
            tl.atomic_add(dq_ptr + corner + inside, part, mask=row[:, None] < num_rows, sem="relaxed")
    return dk, dv


@triton.jit
def _gather(x_ptr, row, head, num_rows, row_stride, head_stride, DIM: tl.constexpr):
    """What _load gives, by pointers. A tile that a loop multiplies again and again then stays in shared memory, where
    one from a descriptor of three axes would be kept in registers."""
    at = row.to(tl.int64)[:, None] * row_stride + head.to(tl.int64) * head_stride + tl.arange(0, DIM)[None, :]
    return tl.load(x_ptr + at, mask=row[:, None] < num_rows, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_units", "stride", "wave"])
def tree_dkdv_kernel(
    q,  # descriptor, tile [BLOCK_M, 1, DIM]; so d_out
    k_ptr,  # [num_rows, KV_HEADS, DIM], rows and heads so many elements apart; so v
    v_ptr,
    d_out,
    dk,  # descriptor, tile [BLOCK_N, 1, DIM]; so dv
    dv,
    partial_ptr,  # f32 [slots, kv_heads, 2, BLOCK, DIM]: dk and dv of the units that have a slot
    dq_ptr,  # f32 [num_rows, heads, DIM], zeros: dq / scale is added to it, in no fixed order; or None
    lse_ptr,  # f32 [heads, stride]; so delta
    delta_ptr,
    subtree_end_ptr,
    unit_ptr,  # int32 [num_units, 4]: KV block, first query block, past the last, slot or -1
    min_end_ptr,  # int32 [blocks]: smallest and largest subtree_end of a KV block
    max_end_ptr,
    num_rows,
    num_units,
    stride,
    wave,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    scale,
    scale_log2,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one KV tile of one KV head from one contiguous range of queries, all heads of the group."""
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    TILES: tl.constexpr = BLOCK // BLOCK_M
    rank, kv_head = _place(tl.program_id(0), num_units * PARTS, wave)
    unit = unit_ptr + rank // PARTS * 4
    block, begin, end, slot = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2), tl.load(unit + 3)
    min_end, max_end = tl.load(min_end_ptr + block), tl.load(max_end_ptr + block)
    first = block * BLOCK + rank % PARTS * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    # In query tiles: [low, high) see something, [full, full_end) everything; before is the diagonal, behind the rim.
    low, high = begin * TILES, tl.minimum(end * TILES, tl.cdiv(max_end, BLOCK_M))
    full = tl.minimum(tl.maximum(low, (block + 1) * TILES), high)
    whole = tl.where(min_end == num_rows, tl.cdiv(num_rows, BLOCK_M), min_end // BLOCK_M)
    full_end = tl.maximum(full, tl.minimum(high, whole))
    k_tile = _gather(k_ptr, key, kv_head, num_rows, k_row_stride, k_head_stride, DIM)
    v_tile = _gather(v_ptr, key, kv_head, num_rows, v_row_stride, v_head_stride, DIM)
    dk_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, DIM), tl.float32)
    dk_acc, dv_acc = _pull_keys(
        dk_acc, dv_acc, k_tile, v_tile, key, q, d_out, lse_ptr, delta_ptr, dq_ptr, kv_head, low, full - low,
        full_end, full - low + high - full_end, subtree_end_ptr, num_rows, stride, scale_log2, True, GROUP,
        KV_HEADS, DIM, BLOCK_M, PRECISION,
    )  # fmt: skip
    dk_acc, dv_acc = _pull_keys(
        dk_acc, dv_acc, k_tile, v_tile, key, q, d_out, lse_ptr, delta_ptr, dq_ptr, kv_head, full, full_end - full,
        full_end, full_end - full, subtree_end_ptr, num_rows, stride, scale_log2, False, GROUP,
        KV_HEADS, DIM, BLOCK_M, PRECISION,
    )  # fmt: skip
    dk_acc *= scale
    if slot < 0:
        _store(dk, first, kv_head, dk_acc, BLOCK_N, DIM)
        _store(dv, first, kv_head, dv_acc, BLOCK_N, DIM)
    else:
        inside = (rank % PARTS * BLOCK_N + tl.arange(0, BLOCK_N))[:, None] * DIM + tl.arange(0, DIM)[None, :]
        partial_ptr += ((slot.to(tl.int64) * KV_HEADS + kv_head) * 2) * (BLOCK * DIM)
        tl.store(partial_ptr + inside, dk_acc)
        tl.store(partial_ptr + BLOCK * DIM + inside, dv_acc)


@triton.jit(do_not_specialize=["num_rows"])
def tree_reduce_kernel(
    partial_ptr,  # f32 [slots, KV_HEADS, 2, BLOCK, DIM]
    dk_ptr,  # [num_rows, KV_HEADS, DIM], dense; so dv
    dv_ptr,
    split_ptr,  # int32 [splits, 3]: KV block, its first slot, how many
    num_rows,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a split KV block: the parts added in their order."""
    split = split_ptr + tl.program_id(0) * 3
    block, slot, parts = tl.load(split), tl.load(split + 1), tl.load(split + 2)
    kv_head = tl.program_id(1)
    inner = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = inner[:, None] * DIM + tl.arange(0, DIM)[None, :]
    dk = tl.zeros((ROWS, DIM), tl.float32)
    dv = tl.zeros((ROWS, DIM), tl.float32)
    for part in range(parts):
        at = ((slot + part).to(tl.int64) * KV_HEADS + kv_head) * 2 * (BLOCK * DIM)
        dk += tl.load(partial_ptr + at + inside)
        dv += tl.load(partial_ptr + at + BLOCK * DIM + inside)
    row = block * BLOCK + inner
    place = (row.to(tl.int64)[:, None] * KV_HEADS + kv_head) * DIM + tl.arange(0, DIM)[None, :]
    tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=row[:, None] < num_rows)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=row[:, None] < num_rows)
