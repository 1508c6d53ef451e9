"""Backward of the chunks of a segment (../chunk_backward.py): one program per row, from the last chunk to the first.

States before each chunk are given (forward.scan_forward, KEEP); what a chunk's forward knew is made again. The adjoints
of the state move in place. Tiles of the hidden width pass four times: keys at the anchor; the read; its backward and
that of the update; and, once the adjoint of the error is known, the keys. In between a tile's numbers lie in `z`,
`back`, `read`, `neg_x` and `neg_z` [rows, T, H]. "neg" are negated adjoints, since both factors of a write enter with
a minus.

Shapes as in forward.py; states_* [rows, chunks, ...].
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.kernels.tiles import (
    curvature,
    dot,
    end_coefficients,
    load_rows,
    move,
    normalised,
    pull,
    pull_backward,
    rows_of_coefficients,
    slope,
    value,
)


@triton.jit
def scan_backward(
    q, k, v, d_y, weight_rows, last_row, states_w1, states_s1, states_w2, states_s2, gain, bias, starts,
    d_w1, d_s1, d_w2, d_s2, d_document_w1, d_document_s1, d_document_w2, d_document_s2,
    d_q, d_k, d_v, d_weight_rows, d_last_row, d_gain, d_bias, z, back, read, neg_x, neg_z,
    length, first, chunks, rows, T, D, H,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Moves d_w*, d_s* from after the segment to before it; fills d_q, d_k, d_v and the gradients of the coefficients;
    adds to d_gain, d_bias and d_document_*.
    """
    dtype: tl.constexpr = d_w2.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns = (i < D)[None, :]
    real = (t < T)[:, None]
    inside = real & columns
    square = real & (t < T)[None, :]
    gains, biases = 1.0, 0.0
    if NORM:
        gains = tl.load(gain + row * D + i, mask=i < D, other=0.0)[None, :]
        biases = tl.load(bias + row * D + i, mask=i < D, other=0.0)[None, :]
    size = D * H
    for step in range(chunks):
        chunk = chunks - 1 - step
        token = (row * length + first + chunk * T + t)[:, None] * D
        at = token + i[None, :]
        state = (row * chunks + chunk) * size
        keys = load_rows(k, at, inside, dtype)

        # Keys at the anchor again
        out = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            some = (hidden < H)[:, None] & columns
            if DEEP:
                few = (i < D)[:, None] & (hidden < H)[None, :]
                w1 = tl.load(states_w1 + state + i[:, None] * H + hidden[None, :], mask=few, other=0.0)
                pre = dot(keys, w1, PRECISION)
                tl.store(z + (row * T + t)[:, None] * H + hidden[None, :], pre, mask=real & (hidden < H)[None, :])
                x = value(pre, GELU)
            else:
                x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            w2 = tl.load(states_w2 + state + hidden[:, None] * D + i[None, :], mask=some, other=0.0)
            out += dot(x, w2, PRECISION)
        delta = out - load_rows(v, at, inside, dtype)
        if NORM:
            x_hat, rstd = normalised(out, columns, D)
            error = tl.where(inside, biases + keys + x_hat * gains - load_rows(v, at, inside, dtype), 0)
            delta = tl.where(real, pull(gains * error, x_hat, rstd, columns, D), 0)
        tl.debug_barrier()

        # The read again
        coefficients, decay, carry = rows_of_coefficients(weight_rows, row, chunk, rows, chunks, T, t)
        end_decay, end_carry, end_writes, end_momentum, end_momentum_writes = end_coefficients(
            weight_rows, last_row, row, chunk, rows, chunks, T, t
        )
        queries = load_rows(q, at, inside, dtype)
        pairs = dot(queries, tl.trans(keys), PRECISION)
        scores = tl.zeros([BLOCK_T, BLOCK_T], dtype)
        result = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            some = (hidden < H)[:, None] & columns
            w2 = tl.load(states_w2 + state + hidden[:, None] * D + i[None, :], mask=some, other=0.0)
            if DEEP:
                few = (i < D)[:, None] & (hidden < H)[None, :]
                across = state + i[:, None] * H + hidden[None, :]
                within = real & (hidden < H)[None, :]
                beside = (row * T + t)[:, None] * H + hidden[None, :]
                pre = tl.load(z + beside, mask=within, other=0.0)
                x = value(pre, GELU)
                through = dot(delta, tl.trans(w2), PRECISION)
                w1 = tl.load(states_w1 + across, mask=few, other=0.0)
                read1 = decay * dot(queries, w1, PRECISION)
                read1 -= dot(pairs * coefficients, through * slope(pre, GELU), PRECISION)
                if MOMENTUM:
                    s1 = tl.load(states_s1 + across, mask=few, other=0.0)
                    read1 += carry * dot(queries, s1, PRECISION)
                tl.store(back + beside, through, mask=within)
                tl.store(read + beside, read1, mask=within)
                x_read = value(read1, GELU)
            else:
                x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
                x_read = load_rows(q, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            scores += dot(x_read, tl.trans(x), PRECISION)
            if NORM:
                result += decay * dot(x_read, w2, PRECISION)
                if MOMENTUM:
                    s2 = tl.load(states_s2 + state + hidden[:, None] * D + i[None, :], mask=some, other=0.0)
                    result += carry * dot(x_read, s2, PRECISION)
        d_out = load_rows(d_y, at, inside, dtype)
        d_gains = tl.zeros([1, BLOCK_D], dtype)
        d_biases = tl.zeros([1, BLOCK_D], dtype)
        if NORM:
            result -= dot(scores * coefficients, delta, PRECISION)
            y_hat, y_rstd = normalised(result, columns, D)
            d_gains += tl.sum(d_out * y_hat, 0)[None, :]
            d_biases += tl.sum(d_out, 0)[None, :]
            d_out = tl.where(real, pull(gains * d_out, y_hat, y_rstd, columns, D), 0)
        tl.debug_barrier()

        # Backward of the read and of the update
        d_scores = dot(d_out, tl.trans(delta), PRECISION)
        d_coefficients = -scores * d_scores
        d_scores *= coefficients
        neg_delta = dot(tl.trans(scores * coefficients), d_out, PRECISION)
        neg_keys = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        d_queries = tl.zeros([BLOCK_T, BLOCK_D], dtype)
        d_pairs = tl.zeros([BLOCK_T, BLOCK_T], dtype)
        d_decay = tl.zeros([BLOCK_T], dtype)
        d_carry = tl.zeros([BLOCK_T], dtype)
        d_end_writes = tl.zeros([BLOCK_T], dtype)
        d_end_momentum_writes = tl.zeros([BLOCK_T], dtype)
        d_end_decay = tl.sum(d_decay)
        d_end_carry = d_end_decay
        d_end_momentum = d_end_decay
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            some = (hidden < H)[:, None] & columns
            tile = hidden[:, None] * D + i[None, :]
            within = real & (hidden < H)[None, :]
            beside = (row * T + t)[:, None] * H + hidden[None, :]
            if DEEP:
                pre = tl.load(z + beside, mask=within, other=0.0)
                x = value(pre, GELU)
                read1 = tl.load(read + beside, mask=within, other=0.0)
                x_read = value(read1, GELU)
            else:
                x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
                x_read = load_rows(q, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            w2 = tl.load(states_w2 + state + tile, mask=some, other=0.0)
            vw2 = tl.load(d_w2 + row * size + tile, mask=some, other=0.0)
            p = dot(x, vw2, PRECISION)
            d_end_writes -= tl.sum(p * delta, 1)
            neg_delta += end_writes * p
            neg_x_tile = dot(end_writes * delta, tl.trans(vw2), PRECISION)
            d_end_decay += tl.sum(vw2 * w2)
            p = dot(d_out, tl.trans(w2), PRECISION)
            d_read = decay * p
            d_decay += tl.sum(p * x_read, 1)
            if MOMENTUM:
                s2 = tl.load(states_s2 + state + tile, mask=some, other=0.0)
                vs2 = tl.load(d_s2 + row * size + tile, mask=some, other=0.0)
                p = dot(x, vs2, PRECISION)
                d_end_momentum_writes -= tl.sum(p * delta, 1)
                neg_delta += end_momentum_writes * p
                neg_x_tile += dot(end_momentum_writes * delta, tl.trans(vs2), PRECISION)
                d_end_carry += tl.sum(vw2 * s2)
                d_end_momentum += tl.sum(vs2 * s2)
                p = dot(d_out, tl.trans(s2), PRECISION)
                d_read += carry * p
                d_carry += tl.sum(p * x_read, 1)
                vs2 = end_momentum * vs2 + end_carry * vw2 + dot(tl.trans(x_read), carry * d_out, PRECISION)
                tl.store(d_s2 + row * size + tile, vs2, mask=some)
            vw2 = end_decay * vw2 + dot(tl.trans(x_read), decay * d_out, PRECISION)
            d_read -= dot(d_scores, x, PRECISION)
            neg_x_tile += dot(tl.trans(d_scores), x_read, PRECISION)
            if DEEP:
                few = (i < D)[:, None] & (hidden < H)[None, :]
                across = i[:, None] * H + hidden[None, :]
                through = tl.load(back + beside, mask=within, other=0.0)
                inner = slope(pre, GELU)
                delta1 = through * inner
                w1 = tl.load(states_w1 + state + across, mask=few, other=0.0)
                vw1 = tl.load(d_w1 + row * size + across, mask=few, other=0.0)
                d_read *= slope(read1, GELU)
                p = dot(delta1, tl.trans(vw1), PRECISION)
                d_end_writes -= tl.sum(p * keys, 1)
                neg_keys += end_writes * p
                neg_delta1 = dot(end_writes * keys, vw1, PRECISION)
                d_end_decay += tl.sum(vw1 * w1)
                p = dot(d_read, tl.trans(w1), PRECISION)
                d_queries += decay * p
                d_decay += tl.sum(p * queries, 1)
                if MOMENTUM:
                    s1 = tl.load(states_s1 + state + across, mask=few, other=0.0)
                    vs1 = tl.load(d_s1 + row * size + across, mask=few, other=0.0)
                    p = dot(delta1, tl.trans(vs1), PRECISION)
                    d_end_momentum_writes -= tl.sum(p * keys, 1)
                    neg_keys += end_momentum_writes * p
                    neg_delta1 += dot(end_momentum_writes * keys, vs1, PRECISION)
                    d_end_carry += tl.sum(vw1 * s1)
                    d_end_momentum += tl.sum(vs1 * s1)
                    p = dot(d_read, tl.trans(s1), PRECISION)
                    d_queries += carry * p
                    d_carry += tl.sum(p * queries, 1)
                    vs1 = end_momentum * vs1 + end_carry * vw1 + dot(tl.trans(carry * queries), d_read, PRECISION)
                    tl.store(d_s1 + row * size + across, vs1, mask=few)
                vw1 = end_decay * vw1 + dot(tl.trans(decay * queries), d_read, PRECISION)
                tl.store(d_w1 + row * size + across, vw1, mask=few)
                d_pairs += dot(d_read, tl.trans(delta1), PRECISION)
                neg_delta1 += dot(tl.trans(pairs * coefficients), d_read, PRECISION)
                neg_back = neg_delta1 * inner
                neg_delta += dot(neg_back, w2, PRECISION)
                vw2 -= dot(tl.trans(neg_back), delta, PRECISION)
                tl.store(neg_z + beside, neg_delta1 * through * curvature(pre, GELU), mask=within)
            else:
                tl.store(d_q + token + hidden[None, :], d_read, mask=real & (hidden < D)[None, :])
            tl.store(d_w2 + row * size + tile, vw2, mask=some)
            tl.store(neg_x + beside, neg_x_tile, mask=within)
        if DEEP:
            d_coefficients -= d_pairs * pairs
            d_pairs *= coefficients
            d_queries -= dot(d_pairs, keys, PRECISION)
            neg_keys += dot(tl.trans(d_pairs), queries, PRECISION)

        # Backward of the keys at the anchor
        neg_out, d_values = neg_delta, neg_delta
        if NORM:
            neg_u, neg_out = pull_backward(gains * error, x_hat, rstd, delta, neg_delta, columns, D)
            d_values = gains * neg_u
            d_gains -= tl.sum(neg_u * error + d_values * x_hat, 0)[None, :]
            d_biases -= tl.sum(d_values, 0)[None, :]
            neg_out += pull(gains * d_values, x_hat, rstd, columns, D)
            neg_keys += d_values
            place = row * D + i[None, :]
            tl.store(d_gain + place, tl.load(d_gain + place, mask=columns, other=0.0) + d_gains, mask=columns)
            tl.store(d_bias + place, tl.load(d_bias + place, mask=columns, other=0.0) + d_biases, mask=columns)
        tl.debug_barrier()
        for h in range(0, H, BLOCK_H):
            hidden = h + j
            some = (hidden < H)[:, None] & columns
            tile = hidden[:, None] * D + i[None, :]
            within = real & (hidden < H)[None, :]
            beside = (row * T + t)[:, None] * H + hidden[None, :]
            w2 = tl.load(states_w2 + state + tile, mask=some, other=0.0)
            neg_x_tile = tl.load(neg_x + beside, mask=within, other=0.0) + dot(neg_out, tl.trans(w2), PRECISION)
            if DEEP:
                few = (i < D)[:, None] & (hidden < H)[None, :]
                across = i[:, None] * H + hidden[None, :]
                pre = tl.load(z + beside, mask=within, other=0.0)
                x = value(pre, GELU)
                neg_pre = tl.load(neg_z + beside, mask=within, other=0.0) + neg_x_tile * slope(pre, GELU)
                vw1 = tl.load(d_w1 + row * size + across, mask=few, other=0.0)
                vw1 -= dot(tl.trans(keys), neg_pre, PRECISION)
                tl.store(d_w1 + row * size + across, vw1, mask=few)
                w1 = tl.load(states_w1 + state + across, mask=few, other=0.0)
                neg_keys += dot(neg_pre, tl.trans(w1), PRECISION)
            else:
                x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
                tl.store(d_k + token + hidden[None, :], neg_x_tile, mask=real & (hidden < D)[None, :])
            vw2 = tl.load(d_w2 + row * size + tile, mask=some, other=0.0)
            tl.store(d_w2 + row * size + tile, vw2 - dot(tl.trans(x), neg_out, PRECISION), mask=some)
        tl.debug_barrier()
        if not DEEP:
            neg_keys += tl.load(d_k + at, mask=inside, other=0.0)
            d_queries += tl.load(d_q + at, mask=inside, other=0.0)
        if NORM:
            d_queries += load_rows(d_y, at, inside, dtype)
        tl.debug_barrier()
        tl.store(d_k + at, -neg_keys, mask=inside)
        tl.store(d_q + at, d_queries, mask=inside)
        tl.store(d_v + at, d_values, mask=inside)
        ends = (t == T - 1)[:, None]
        d_coefficients += tl.where(ends, d_end_writes[None, :], 0)
        by_row = d_weight_rows + (t.to(tl.int64) * rows + row) * chunks * (T + 2) + chunk * (T + 2)
        tl.store(by_row[:, None] + 2 + t[None, :], d_coefficients, mask=square)
        tl.store(by_row, d_decay + tl.where(t == T - 1, d_end_decay, 0), mask=t < T)
        tl.store(by_row + 1, d_carry + tl.where(t == T - 1, d_end_carry, 0), mask=t < T)
        last = d_last_row + (row * chunks + chunk) * (T + 2)
        tl.store(last + 1, d_end_momentum)
        tl.store(last + 2 + t, d_end_momentum_writes, mask=t < T)
        if DOCUMENTS:  # noqa: SIM102 (known when compiled)
            if tl.load(starts + row * length + first + chunk * T) != 0:
                move(d_document_w2 + row * size, d_w2 + row * size, size, 1024)
                if MOMENTUM:
                    move(d_document_s2 + row * size, d_s2 + row * size, size, 1024)
                if DEEP:
                    move(d_document_w1 + row * size, d_w1 + row * size, size, 1024)
                    if MOMENTUM:
                        move(d_document_s1 + row * size, d_s1 + row * size, size, 1024)
                tl.debug_barrier()
