"""The chunks of a segment, written and read: one program per row, which walks over them.

The state does not fit on chip beside what a chunk needs: it stays in memory (in the L2 cache where the rows are few)
and passes through in tiles of the hidden width, twice per chunk: for the keys at the anchor, and, once their error is
known, for the rest. A memory of depth 1 is the last layer alone, with keys and queries as its inputs.

Chunks of more tokens than fit on chip are walked over in parts, PARTS to a chunk: the keys of each meet the anchor,
which is the weights before the chunk, while the state moves part by part. Below, T and `chunks` are then of parts.

Shapes: q, k, v, y [rows, length, D]; weights and momentum of the first layer [rows, D, H], of the last [rows, H, D];
coefficients [T, rows, chunks, T + 2] and the last momentum row [rows, chunks, T + 2] (gates.Coefficients); gain, bias
[rows, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.kernels.tiles import (
    anchor,
    at_row,
    copy,
    dot,
    end_coefficients,
    load_rows,
    normalised,
    rows_of_coefficients,
    slope,
    value,
)


@triton.jit
def _layers(
    q, k, y, coefs, last, w1, s1, w2, s2, anchor_w1, anchor_w2, gain, bias, states_w1, states_s1, states_w2, states_s2,
    delta, stride, PARTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rest by tiles: the read, layer by layer, and the state after the chunk. Pointers are to the chunk's and the
    row's own.
    """
    dtype: tl.constexpr = w2.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns, real = (i < D)[None, :], (t < T)[:, None]
    inside, token = real & columns, t[:, None] * D
    coefficients, decay, carry = rows_of_coefficients(coefs, stride, T, t)
    end_decay, end_carry, end_writes, end_momentum, end_momentum_writes = end_coefficients(coefs, last, stride, T, t)
    keys = load_rows(k, token + i[None, :], inside, dtype)
    queries = load_rows(q, token + i[None, :], inside, dtype)
    masked = dot(queries, tl.trans(keys), PRECISION) * coefficients
    scores = tl.zeros([BLOCK_T, BLOCK_T], dtype)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    for h in tl.range(0, H, BLOCK_H, disable_licm=True):
        hidden = h + j
        tile, some = hidden[:, None] * D + i[None, :], (hidden < H)[:, None] & columns
        weights2 = tl.load(w2 + tile, mask=some, other=0.0)
        if DEEP:
            across, few = i[:, None] * H + hidden[None, :], (i < D)[:, None] & (hidden < H)[None, :]
            weights1 = tl.load(w1 + across, mask=few, other=0.0)
            if PARTS > 1:
                z = dot(keys, tl.load(anchor_w1 + across, mask=few, other=0.0), PRECISION)
                back = dot(delta, tl.trans(tl.load(anchor_w2 + tile, mask=some, other=0.0)), PRECISION)
            else:
                z, back = dot(keys, weights1, PRECISION), dot(delta, tl.trans(weights2), PRECISION)
            x = value(z, GELU)
            delta1 = back * slope(z, GELU)
            if READ:
                read = decay * dot(queries, weights1, PRECISION)
                read -= dot(masked, delta1, PRECISION)
            if KEEP:
                tl.store(states_w1 + across, weights1, mask=few)
            moved = end_decay * weights1
            if MOMENTUM:
                momentum1 = tl.load(s1 + across, mask=few, other=0.0)
                if READ:
                    read += carry * dot(queries, momentum1, PRECISION)
                if KEEP:
                    tl.store(states_s1 + across, momentum1, mask=few)
                moved += end_carry * momentum1
                written = dot(tl.trans(keys), end_momentum_writes * delta1, PRECISION)
                tl.store(s1 + across, end_momentum * momentum1 - written, mask=few)
            moved -= dot(tl.trans(keys), end_writes * delta1, PRECISION)
            tl.store(w1 + across, moved, mask=few)
            if READ:
                x_read = value(read, GELU)
        else:
            x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            if READ:
                x_read = load_rows(q, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
        if READ:
            scores += dot(x_read, tl.trans(x), PRECISION)
            result += dot(decay * x_read, weights2, PRECISION)
        if KEEP:
            tl.store(states_w2 + tile, weights2, mask=some)
        moved2 = end_decay * weights2
        if MOMENTUM:
            momentum2 = tl.load(s2 + tile, mask=some, other=0.0)
            if READ:
                result += dot(carry * x_read, momentum2, PRECISION)
            if KEEP:
                tl.store(states_s2 + tile, momentum2, mask=some)
            moved2 += end_carry * momentum2
            written2 = dot(tl.trans(end_momentum_writes * x), delta, PRECISION)
            tl.store(s2 + tile, end_momentum * momentum2 - written2, mask=some)
        moved2 -= dot(tl.trans(end_writes * x), delta, PRECISION)
        tl.store(w2 + tile, moved2, mask=some)
    if READ:
        coefficients, _, _ = rows_of_coefficients(coefs, stride, T, t)
        result -= dot(scores * coefficients, delta, PRECISION)
        if NORM:
            y_hat, _ = normalised(result, columns, D)
            gains = tl.load(gain + i, mask=i < D, other=0.0)[None, :]
            biases = tl.load(bias + i, mask=i < D, other=0.0)[None, :]
            result = biases + load_rows(q, token + i[None, :], inside, dtype) + y_hat * gains
        tl.store(y + token + i[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["length", "first", "chunks", "rows"], do_not_specialize_on_alignment=["starts"])
def scan_forward(
    q, k, v, y, weight_rows, last_row, w1, s1, w2, s2, gain, bias,
    starts, document_w1, document_s1, document_w2, document_s2, states_w1, states_s1, states_w2, states_s2,
    anchor_w1, anchor_w2, length, first, chunks, rows,
    PARTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, DOCUMENTS: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Moves the state over the chunks, in place. READ: fills y. KEEP: fills states_* with those before chunks.
    anchor_*: working space, if PARTS > 1.
    """
    row = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = D * H
    stride = tl.cast(rows, tl.int64) * chunks * (T + 2)
    w1, s1, w2, s2 = at_row(w1, row, size), at_row(s1, row, size), w2 + row * size, at_row(s2, row, size)
    gain, bias = at_row(gain, row, D), at_row(bias, row, D)
    if PARTS > 1:
        anchor_w1, anchor_w2 = at_row(anchor_w1, row, size), anchor_w2 + row * size
    else:
        anchor_w1, anchor_w2 = w1, w2
    for chunk in tl.range(chunks, disable_licm=True):
        if DOCUMENTS:  # noqa: SIM102 (known when compiled)
            if (tl.load(starts + row * length + first + chunk * T) != 0) & (chunk % PARTS == 0):
                copy(w2, document_w2 + row * size, size, 1024)
                if MOMENTUM:
                    copy(s2, document_s2 + row * size, size, 1024)
                if DEEP:
                    copy(w1, document_w1 + row * size, size, 1024)
                    if MOMENTUM:
                        copy(s1, document_s1 + row * size, size, 1024)
                tl.debug_barrier()
        if PARTS > 1:  # noqa: SIM102 (known when compiled)
            if chunk % PARTS == 0:
                copy(anchor_w2, w2, size, 1024)
                if DEEP:
                    copy(anchor_w1, w1, size, 1024)
                tl.debug_barrier()
        token, place = (row * length + first + chunk * T) * D, row * chunks + chunk
        delta, _, _ = anchor(
            k + token, v + token, anchor_w1, anchor_w2, gain, bias, None, T, D, H,
            BLOCK_T, BLOCK_D, BLOCK_H, DEEP, NORM, GELU, False, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        _layers(
            q + token, k + token, at_row(y, token, 1), weight_rows + place * (T + 2), last_row + place * (T + 2),
            w1, s1, w2, s2, anchor_w1, anchor_w2, gain, bias, at_row(states_w1, place, size),
            at_row(states_s1, place, size), at_row(states_w2, place, size), at_row(states_s2, place, size),
            delta, stride, PARTS, T, D, H,
            BLOCK_T, BLOCK_D, BLOCK_H, DEEP, MOMENTUM, NORM, GELU, READ, KEEP, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
