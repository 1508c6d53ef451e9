"""The chunks of a segment, written and read: one program per row, which walks over them.

The state does not fit on chip beside what a chunk needs: it stays in memory (in the L2 cache where the rows are few)
and passes through in tiles of the hidden width, twice per chunk: for the keys at the anchor, and, once their error is
known, for the rest. A memory of depth 1 is the last layer alone, with keys and queries as its inputs.

Shapes: q, k, v, y [rows, length, D]; weights and momentum of the first layer [rows, D, H], of the last [rows, H, D];
coefficients [T, rows, chunks, T + 2] and the last momentum row [rows, chunks, T + 2] (gates.Coefficients); gain, bias
[rows, D].
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.kernels.tiles import (
    copy,
    dot,
    end_coefficients,
    load_rows,
    normalised,
    pull,
    rows_of_coefficients,
    slope,
    value,
)


@triton.jit
def scan_forward(
    q, k, v, y, weight_rows, last_row, w1, s1, w2, s2, gain, bias,
    starts, document_w1, document_s1, document_w2, document_s2, states_w1, states_s1, states_w2, states_s2,
    length, first, chunks, rows, T, D, H,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, DOCUMENTS: tl.constexpr, READ: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Moves the state over the chunks, in place. READ: fills y. KEEP: fills states_* with those before chunks."""
    dtype: tl.constexpr = w2.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns = (i < D)[None, :]
    real = (t < T)[:, None]
    inside = real & columns
    if NORM:
        gains = tl.load(gain + row * D + i, mask=i < D, other=0.0)[None, :]
        biases = tl.load(bias + row * D + i, mask=i < D, other=0.0)[None, :]
    size = D * H
    for chunk in range(chunks):
        if DOCUMENTS:  # noqa: SIM102 (known when compiled)
            if tl.load(starts + row * length + first + chunk * T) != 0:
                copy(w2 + row * size, document_w2 + row * size, size, 1024)
                if MOMENTUM:
                    copy(s2 + row * size, document_s2 + row * size, size, 1024)
                if DEEP:
                    copy(w1 + row * size, document_w1 + row * size, size, 1024)
                    if MOMENTUM:
                        copy(s1 + row * size, document_s1 + row * size, size, 1024)
                tl.debug_barrier()
        at = (row * length + first + chunk * T + t)[:, None] * D + i[None, :]
        keys = load_rows(k, at, inside, dtype)

        # Keys at the anchor, and the gradient of 1/2 |M(k) - v|^2 by what the last layer gives
        out = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            tile = row * size + hidden[:, None] * D + i[None, :]
            some = (hidden < H)[:, None] & columns
            if DEEP:
                across = row * size + i[:, None] * H + hidden[None, :]
                weights = tl.load(w1 + across, mask=(i < D)[:, None] & (hidden < H)[None, :], other=0.0)
                x = value(dot(keys, weights, PRECISION), GELU)
            else:
                beside = (row * length + first + chunk * T + t)[:, None] * D + hidden[None, :]
                x = load_rows(k, beside, real & (hidden < D)[None, :], dtype)
            out += dot(x, tl.load(w2 + tile, mask=some, other=0.0), PRECISION)
        delta = out - load_rows(v, at, inside, dtype)
        if NORM:
            x_hat, rstd = normalised(out, columns, D)
            error = biases + keys + x_hat * gains - load_rows(v, at, inside, dtype)
            delta = tl.where(real, pull(gains * error, x_hat, rstd, columns, D), 0)

        # The rest by tiles: the read, layer by layer, and the state after the chunk
        coefficients, decay, carry = rows_of_coefficients(weight_rows, row, chunk, rows, chunks, T, t)
        end_decay, end_carry, end_writes, end_momentum, end_momentum_writes = end_coefficients(
            weight_rows, last_row, row, chunk, rows, chunks, T, t
        )
        queries = load_rows(q, at, inside, dtype)
        masked = dot(queries, tl.trans(keys), PRECISION) * coefficients
        scores = tl.zeros([BLOCK_T, BLOCK_T], dtype)
        result = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            tile = hidden[:, None] * D + i[None, :]
            some = (hidden < H)[:, None] & columns
            weights2 = tl.load(w2 + row * size + tile, mask=some, other=0.0)
            if DEEP:
                across = i[:, None] * H + hidden[None, :]
                few = (i < D)[:, None] & (hidden < H)[None, :]
                weights1 = tl.load(w1 + row * size + across, mask=few, other=0.0)
                z = dot(keys, weights1, PRECISION)
                x = value(z, GELU)
                back = dot(delta, tl.trans(weights2), PRECISION)
                delta1 = back * slope(z, GELU)
                if READ:
                    read = decay * dot(queries, weights1, PRECISION)
                    read -= dot(masked, delta1, PRECISION)
                if KEEP:
                    tl.store(states_w1 + (row * chunks + chunk) * size + across, weights1, mask=few)
                moved = end_decay * weights1
                if MOMENTUM:
                    momentum1 = tl.load(s1 + row * size + across, mask=few, other=0.0)
                    if READ:
                        read += carry * dot(queries, momentum1, PRECISION)
                    if KEEP:
                        tl.store(states_s1 + (row * chunks + chunk) * size + across, momentum1, mask=few)
                    moved += end_carry * momentum1
                    written = dot(tl.trans(keys), end_momentum_writes * delta1, PRECISION)
                    tl.store(s1 + row * size + across, end_momentum * momentum1 - written, mask=few)
                moved -= dot(tl.trans(keys), end_writes * delta1, PRECISION)
                tl.store(w1 + row * size + across, moved, mask=few)
                if READ:
                    x_read = value(read, GELU)
            else:
                beside = (row * length + first + chunk * T + t)[:, None] * D + hidden[None, :]
                x = load_rows(k, beside, real & (hidden < D)[None, :], dtype)
                if READ:
                    x_read = load_rows(q, beside, real & (hidden < D)[None, :], dtype)
            if READ:
                scores += dot(x_read, tl.trans(x), PRECISION)
                result += decay * dot(x_read, weights2, PRECISION)
            if KEEP:
                tl.store(states_w2 + (row * chunks + chunk) * size + tile, weights2, mask=some)
            moved2 = end_decay * weights2
            if MOMENTUM:
                momentum2 = tl.load(s2 + row * size + tile, mask=some, other=0.0)
                if READ:
                    result += carry * dot(x_read, momentum2, PRECISION)
                if KEEP:
                    tl.store(states_s2 + (row * chunks + chunk) * size + tile, momentum2, mask=some)
                moved2 += end_carry * momentum2
                written2 = dot(tl.trans(x), end_momentum_writes * delta, PRECISION)
                tl.store(s2 + row * size + tile, end_momentum * momentum2 - written2, mask=some)
            moved2 -= dot(tl.trans(x), end_writes * delta, PRECISION)
            tl.store(w2 + row * size + tile, moved2, mask=some)
        if READ:
            result -= dot(scores * coefficients, delta, PRECISION)
            if NORM:
                y_hat, _ = normalised(result, columns, D)
                result = biases + queries + y_hat * gains
            tl.store(y + at, result, mask=inside)
        tl.debug_barrier()
