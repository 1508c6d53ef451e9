"""What a chunk's backward is made of (backward.py): its passes over the tiles of the hidden width.

Pointers are to the chunk's own: tokens (`q`, `d_q`, ...), the state before it (`states_*`), the weights at which its
inner gradients were taken (`anchor_*`; those before it, but for later parts of a chunk), its rows of coefficients
(`coefs`, `stride` numbers apart) and last momentum row (`last`); and to the row's own: adjoints of the state (`d_w*`,
`d_s*`) and of the anchor (`d_anchor_*`), gain and bias, and the numbers that go from one pass to another ([T, H] or,
`deltas`, [T, D]).
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.kernels.tiles import (
    curvature,
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
def read_again(
    q, k, d_y, coefs, states_w1, states_s1, states_w2, states_s2, anchor_w2, gain, bias, d_gain, d_bias,
    z, back, read, deltas, stride, PARTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The read again: fills back and read, adds to d_gain and d_bias. Gives the scores and the adjoint of what the last
    layer gave.
    """
    dtype: tl.constexpr = states_w2.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns, real = (i < D)[None, :], (t < T)[:, None]
    inside, token = real & columns, t[:, None] * D
    coefficients, decay, carry = rows_of_coefficients(coefs, stride, T, t)
    queries = load_rows(q, token + i[None, :], inside, dtype)
    delta = tl.load(deltas + token + i[None, :], mask=inside, other=0.0)
    masked = coefficients
    if DEEP:
        keys = load_rows(k, token + i[None, :], inside, dtype)
        masked = dot(queries, tl.trans(keys), PRECISION) * coefficients
    scores = tl.zeros([BLOCK_T, BLOCK_T], dtype)
    result = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    for h in range(0, H, BLOCK_H):
        hidden = h + j
        some = (hidden < H)[:, None] & columns
        tile = hidden[:, None] * D + i[None, :]
        w2 = tl.load(states_w2 + tile, mask=some, other=0.0)
        if DEEP:
            few = (i < D)[:, None] & (hidden < H)[None, :]
            across = i[:, None] * H + hidden[None, :]
            within, beside = real & (hidden < H)[None, :], t[:, None] * H + hidden[None, :]
            pre = tl.load(z + beside, mask=within, other=0.0)
            at_anchor = w2
            if PARTS > 1:
                at_anchor = tl.load(anchor_w2 + tile, mask=some, other=0.0)
            through = dot(delta, tl.trans(at_anchor), PRECISION)
            tl.store(back + beside, through, mask=within)
            read1 = decay * dot(queries, tl.load(states_w1 + across, mask=few, other=0.0), PRECISION)
            if MOMENTUM:
                read1 += carry * dot(queries, tl.load(states_s1 + across, mask=few, other=0.0), PRECISION)
            read1 -= dot(masked, through * slope(pre, GELU), PRECISION)
            tl.store(read + beside, read1, mask=within)
            x, x_read = value(pre, GELU), value(read1, GELU)
        else:
            x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            x_read = load_rows(q, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
        scores += dot(x_read, tl.trans(x), PRECISION)
        if NORM:
            result += dot(decay * x_read, w2, PRECISION)
            if MOMENTUM:
                result += dot(carry * x_read, tl.load(states_s2 + tile, mask=some, other=0.0), PRECISION)
    d_out = load_rows(d_y, token + i[None, :], inside, dtype)
    if NORM:
        coefficients, _, _ = rows_of_coefficients(coefs, stride, T, t)
        result -= dot(scores * coefficients, delta, PRECISION)
        y_hat, y_rstd = normalised(result, columns, D)
        tl.store(d_gain + i, tl.load(d_gain + i, mask=i < D) + tl.sum(d_out * y_hat, 0), mask=i < D)
        tl.store(d_bias + i, tl.load(d_bias + i, mask=i < D) + tl.sum(d_out, 0), mask=i < D)
        gains = tl.load(gain + i, mask=i < D, other=0.0)[None, :]
        d_out = tl.where(real, pull(gains * d_out, y_hat, y_rstd, columns, D), 0)
    return scores, d_out


@triton.jit
def last_layer(
    q, k, coefs, last, states_w2, states_s2, d_w2, d_s2, d_q, d_coefs, z, read, neg_x, deltas, scores,
    d_out, stride, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the read and of the update in the last layer, whose adjoints move on: fills neg_x, the coefficients'
    gradients and, in the place of `read`, its adjoint (of one layer: d_q). Gives the error's adjoint and the gradients
    of the other coefficients.
    """
    dtype: tl.constexpr = d_w2.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns, real = (i < D)[None, :], (t < T)[:, None]
    token = t[:, None] * D
    coefficients, decay, carry = rows_of_coefficients(coefs, stride, T, t)
    end_decay, end_carry, end_writes, end_momentum, end_momentum_writes = end_coefficients(coefs, last, stride, T, t)
    delta = tl.load(deltas + token + i[None, :], mask=real & columns, other=0.0)
    d_scores = dot(d_out, tl.trans(delta), PRECISION)
    tl.store(d_coefs + t[:, None] * stride + 2 + t[None, :], -scores * d_scores, mask=real & (t < T)[None, :])
    d_scores *= coefficients
    neg_delta = dot(tl.trans(scores * coefficients), d_out, PRECISION)
    by_weights = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    by_momentum = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    d_decay = tl.zeros([BLOCK_T], dtype)
    d_carry = tl.zeros([BLOCK_T], dtype)
    d_end_decay = tl.sum(d_decay)
    d_end_carry = d_end_decay
    d_end_momentum = d_end_decay
    for h in range(0, H, BLOCK_H):
        hidden = h + j
        some = (hidden < H)[:, None] & columns
        tile = hidden[:, None] * D + i[None, :]
        within, beside = real & (hidden < H)[None, :], t[:, None] * H + hidden[None, :]
        if DEEP:
            x = value(tl.load(z + beside, mask=within, other=0.0), GELU)
            read1 = tl.load(read + beside, mask=within, other=0.0)
            x_read = value(read1, GELU)
        else:
            x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            x_read = load_rows(q, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
        w2 = tl.load(states_w2 + tile, mask=some, other=0.0)
        vw2 = tl.load(d_w2 + tile, mask=some, other=0.0)
        by_weights += dot(x, vw2, PRECISION)
        neg_x_tile = end_writes * dot(delta, tl.trans(vw2), PRECISION)
        d_end_decay += tl.sum(vw2 * w2)
        p = dot(d_out, tl.trans(w2), PRECISION)
        d_read = decay * p
        d_decay += tl.sum(p * x_read, 1)
        if MOMENTUM:
            s2 = tl.load(states_s2 + tile, mask=some, other=0.0)
            vs2 = tl.load(d_s2 + tile, mask=some, other=0.0)
            by_momentum += dot(x, vs2, PRECISION)
            neg_x_tile += end_momentum_writes * dot(delta, tl.trans(vs2), PRECISION)
            d_end_carry += tl.sum(vw2 * s2)
            d_end_momentum += tl.sum(vs2 * s2)
            p = dot(d_out, tl.trans(s2), PRECISION)
            d_read += carry * p
            d_carry += tl.sum(p * x_read, 1)
        neg_x_tile += dot(tl.trans(d_scores), x_read, PRECISION)
        tl.store(neg_x + beside, neg_x_tile, mask=within)
        d_read -= dot(d_scores, x, PRECISION)
        if DEEP:
            tl.store(read + beside, d_read * slope(read1, GELU), mask=within)
        else:
            tl.store(d_q + token + hidden[None, :], d_read, mask=real & (hidden < D)[None, :])
        if MOMENTUM:
            vs2 = end_momentum * vs2 + end_carry * vw2 + dot(tl.trans(carry * x_read), d_out, PRECISION)
            tl.store(d_s2 + tile, vs2, mask=some)
        vw2 = end_decay * vw2 + dot(tl.trans(decay * x_read), d_out, PRECISION)
        tl.store(d_w2 + tile, vw2, mask=some)
    neg_delta += end_writes * by_weights + end_momentum_writes * by_momentum
    d_end_writes, d_end_momentum_writes = -tl.sum(by_weights * delta, 1), -tl.sum(by_momentum * delta, 1)
    return (
        neg_delta, d_decay, d_carry, d_end_writes, d_end_momentum_writes, d_end_decay, d_end_carry, d_end_momentum
    )  # fmt: skip


@triton.jit
def first_layer(
    q, k, d_y, coefs, last, states_w1, states_s1, anchor_w2, d_w1, d_s1, d_q, d_coefs, z, back, read,
    neg_back, neg_z, neg_delta, stride, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, MOMENTUM: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same in the first of two layers: fills neg_back, neg_z and d_q, adds to the coefficients' gradients. Gives
    the error's adjoint, that of the keys, and the gradients of the other coefficients.
    """
    dtype: tl.constexpr = d_w1.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    real = (t < T)[:, None]
    inside, at = real & (i < D)[None, :], t[:, None] * D + i[None, :]
    coefficients, decay, carry = rows_of_coefficients(coefs, stride, T, t)
    end_decay, end_carry, end_writes, end_momentum, end_momentum_writes = end_coefficients(coefs, last, stride, T, t)
    keys, queries = load_rows(k, at, inside, dtype), load_rows(q, at, inside, dtype)
    masked = dot(queries, tl.trans(keys), PRECISION) * coefficients
    d_pairs = tl.zeros([BLOCK_T, BLOCK_T], dtype)
    by_weights = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    by_momentum = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    read_weights = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    read_momentum = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    d_end_decay = tl.sum(tl.zeros([BLOCK_T], dtype))
    d_end_carry = d_end_decay
    d_end_momentum = d_end_decay
    for h in range(0, H, BLOCK_H):
        hidden = h + j
        few = (i < D)[:, None] & (hidden < H)[None, :]
        across = i[:, None] * H + hidden[None, :]
        within, beside = real & (hidden < H)[None, :], t[:, None] * H + hidden[None, :]
        pre = tl.load(z + beside, mask=within, other=0.0)
        through = tl.load(back + beside, mask=within, other=0.0)
        d_read = tl.load(read + beside, mask=within, other=0.0)
        inner = slope(pre, GELU)
        delta1 = through * inner
        w1 = tl.load(states_w1 + across, mask=few, other=0.0)
        vw1 = tl.load(d_w1 + across, mask=few, other=0.0)
        by_weights += dot(delta1, tl.trans(vw1), PRECISION)
        read_weights += dot(d_read, tl.trans(w1), PRECISION)
        neg_delta1 = end_writes * dot(keys, vw1, PRECISION)
        d_end_decay += tl.sum(vw1 * w1)
        if MOMENTUM:
            s1 = tl.load(states_s1 + across, mask=few, other=0.0)
            vs1 = tl.load(d_s1 + across, mask=few, other=0.0)
            by_momentum += dot(delta1, tl.trans(vs1), PRECISION)
            read_momentum += dot(d_read, tl.trans(s1), PRECISION)
            neg_delta1 += end_momentum_writes * dot(keys, vs1, PRECISION)
            d_end_carry += tl.sum(vw1 * s1)
            d_end_momentum += tl.sum(vs1 * s1)
            vs1 = end_momentum * vs1 + end_carry * vw1 + dot(tl.trans(queries), carry * d_read, PRECISION)
            tl.store(d_s1 + across, vs1, mask=few)
        vw1 = end_decay * vw1 + dot(tl.trans(queries), decay * d_read, PRECISION)
        tl.store(d_w1 + across, vw1, mask=few)
        d_pairs += dot(d_read, tl.trans(delta1), PRECISION)
        neg_delta1 += dot(tl.trans(masked), d_read, PRECISION)
        tl.store(neg_z + beside, neg_delta1 * through * curvature(pre, GELU), mask=within)
        tl.store(neg_back + beside, neg_delta1 * inner, mask=within)
        tile = hidden[:, None] * D + i[None, :]
        w2 = tl.load(anchor_w2 + tile, mask=(hidden < H)[:, None] & (i < D)[None, :], other=0.0)
        neg_delta += dot(neg_delta1 * inner, w2, PRECISION)
    keys, queries = load_rows(k, at, inside, dtype), load_rows(q, at, inside, dtype)
    d_end_writes, d_end_momentum_writes = -tl.sum(by_weights * keys, 1), -tl.sum(by_momentum * keys, 1)
    d_decay, d_carry = tl.sum(read_weights * queries, 1), tl.sum(read_momentum * queries, 1)
    neg_keys = end_writes * by_weights + end_momentum_writes * by_momentum
    d_queries = decay * read_weights + carry * read_momentum
    coefficients, _, _ = rows_of_coefficients(coefs, stride, T, t)
    place, square = d_coefs + t[:, None] * stride + 2 + t[None, :], real & (t < T)[None, :]
    d_coefficients = tl.load(place, mask=square, other=0.0) - d_pairs * dot(queries, tl.trans(keys), PRECISION)
    tl.store(place, d_coefficients, mask=square)
    d_pairs *= coefficients
    d_queries -= dot(d_pairs, keys, PRECISION)
    neg_keys += dot(tl.trans(d_pairs), queries, PRECISION)
    if NORM:
        d_queries += load_rows(d_y, at, inside, dtype)
    tl.store(d_q + at, d_queries, mask=inside)
    return (
        neg_delta, neg_keys, d_decay, d_carry, d_end_writes, d_end_momentum_writes, d_end_decay, d_end_carry,
        d_end_momentum,
    )  # fmt: skip


@triton.jit
def keys_backward(
    k, anchor_w1, anchor_w2, d_anchor_w1, d_anchor_w2, d_k, z, neg_x, neg_back, neg_z, deltas, neg_out, neg_keys,
    T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, GELU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of the keys at the anchor, whose adjoints are added to. Gives the keys'."""
    dtype: tl.constexpr = d_anchor_w2.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns, real = (i < D)[None, :], (t < T)[:, None]
    inside, token = real & columns, t[:, None] * D
    keys = load_rows(k, token + i[None, :], inside, dtype)
    delta = tl.load(deltas + token + i[None, :], mask=inside, other=0.0)
    for h in range(0, H, BLOCK_H):
        hidden = h + j
        some = (hidden < H)[:, None] & columns
        tile = hidden[:, None] * D + i[None, :]
        within, beside = real & (hidden < H)[None, :], t[:, None] * H + hidden[None, :]
        w2 = tl.load(anchor_w2 + tile, mask=some, other=0.0)
        neg_x_tile = tl.load(neg_x + beside, mask=within, other=0.0) + dot(neg_out, tl.trans(w2), PRECISION)
        vw2 = tl.load(d_anchor_w2 + tile, mask=some, other=0.0)
        if DEEP:
            few = (i < D)[:, None] & (hidden < H)[None, :]
            across = i[:, None] * H + hidden[None, :]
            pre = tl.load(z + beside, mask=within, other=0.0)
            x = value(pre, GELU)
            neg_pre = tl.load(neg_z + beside, mask=within, other=0.0) + neg_x_tile * slope(pre, GELU)
            vw1 = tl.load(d_anchor_w1 + across, mask=few, other=0.0)
            vw1 -= dot(tl.trans(keys), neg_pre, PRECISION)
            tl.store(d_anchor_w1 + across, vw1, mask=few)
            w1 = tl.load(anchor_w1 + across, mask=few, other=0.0)
            neg_keys += dot(neg_pre, tl.trans(w1), PRECISION)
            vw2 -= dot(tl.trans(tl.load(neg_back + beside, mask=within, other=0.0)), delta, PRECISION)
        else:
            x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
            tl.store(d_k + token + hidden[None, :], neg_x_tile, mask=real & (hidden < D)[None, :])
        tl.store(d_anchor_w2 + tile, vw2 - dot(tl.trans(x), neg_out, PRECISION), mask=some)
    return neg_keys
