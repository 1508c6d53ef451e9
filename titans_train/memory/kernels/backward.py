"""Backward of the chunks of a segment (../chunk_backward.py): one program per row, from the last chunk to the first.

States before each chunk are given (forward.scan_forward, KEEP); what a chunk's forward knew is made again. The adjoints
of the state move in place; those of an anchor that is not the state join them where its chunk begins. Tiles of the
hidden width pass five times (passes.py): keys at the anchor; the read; its backward and that of the update in the last
layer, and in the first; and, once the adjoint of the error is known, the keys. What a pass leaves to a later one lies
in memory (z, back, read, neg_x, neg_back, neg_z [rows, T, H]; deltas, x_hats [rows, T, D]), and what is given is loaded
again: registers hold some eight tiles [T, D], no more.

"neg" are negated adjoints, since both factors of a write enter with a minus. Shapes as in forward.py; states_*
[rows, chunks, ...].
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.kernels.passes import first_layer, keys_backward, last_layer, read_again
from titans_train.memory.kernels.tiles import anchor, at_row, load_rows, move, pull, pull_backward


@triton.jit
def _error(
    k, v, gain, bias, d_gain, d_bias, deltas, x_hats, rstd, neg_delta, T: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Through the norm of the keys' error: adds to d_gain and d_bias. Gives the adjoints of what the last layer gave
    and of the values.
    """
    dtype: tl.constexpr = deltas.dtype.element_ty
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    columns = (i < D)[None, :]
    inside, at = (t < T)[:, None] & columns, t[:, None] * D + i[None, :]
    gains = tl.load(gain + i, mask=i < D, other=0.0)[None, :]
    biases = tl.load(bias + i, mask=i < D, other=0.0)[None, :]
    delta = tl.load(deltas + at, mask=inside, other=0.0)
    x_hat = tl.load(x_hats + at, mask=inside, other=0.0)
    error = biases + load_rows(k, at, inside, dtype) + x_hat * gains - load_rows(v, at, inside, dtype)
    error = tl.where(inside, error, 0)
    neg_u, neg_out = pull_backward(gains * error, x_hat, rstd, delta, neg_delta, columns, D)
    d_values = gains * neg_u
    d_gains = tl.load(d_gain + i, mask=i < D) - tl.sum(neg_u * error + d_values * x_hat, 0)
    tl.store(d_gain + i, d_gains, mask=i < D)
    tl.store(d_bias + i, tl.load(d_bias + i, mask=i < D) - tl.sum(d_values, 0), mask=i < D)
    return neg_out + pull(gains * d_values, x_hat, rstd, columns, D), d_values


@triton.jit
def _chunk(
    q, k, v, d_y, coefs, last, states_w1, states_s1, states_w2, states_s2, anchor_w1, anchor_w2, gain, bias,
    d_w1, d_s1, d_w2, d_s2, d_anchor_w1, d_anchor_w2, d_q, d_k, d_v, d_coefs, d_last, d_gain, d_bias,
    z, back, read, neg_x, neg_back, neg_z, deltas, x_hats, stride,
    PARTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk; pointers as in passes.py."""
    dtype: tl.constexpr = d_w2.dtype.element_ty
    t, i = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside, at = (t < T)[:, None] & (i < D)[None, :], t[:, None] * D + i[None, :]
    delta, x_hat, rstd = anchor(
        k, v, anchor_w1, anchor_w2, gain, bias, z, T, D, H,
        BLOCK_T, BLOCK_D, BLOCK_H, DEEP, NORM, GELU, DEEP, PRECISION,
    )  # fmt: skip
    tl.store(deltas + at, delta, mask=inside)
    if NORM:
        tl.store(x_hats + at, x_hat, mask=inside)
    tl.debug_barrier()
    scores, d_out = read_again(
        q, k, d_y, coefs, states_w1, states_s1, states_w2, states_s2, anchor_w2, gain, bias, d_gain, d_bias,
        z, back, read, deltas, stride, PARTS, T, D, H,
        BLOCK_T, BLOCK_D, BLOCK_H, DEEP, MOMENTUM, NORM, GELU, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    neg_delta, d_decay, d_carry, d_writes, d_momentum_writes, d_end_decay, d_end_carry, d_end_momentum = last_layer(
        q, k, coefs, last, states_w2, states_s2, d_w2, d_s2, d_q, d_coefs, z, read, neg_x, deltas, scores, d_out,
        stride, T, D, H, BLOCK_T, BLOCK_D, BLOCK_H, DEEP, MOMENTUM, GELU, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    neg_keys = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    if DEEP:
        neg_delta, neg_keys, by_decay, by_carry, by_writes, by_momentum_writes, by_end1, by_end2, by_end3 = first_layer(
            q, k, d_y, coefs, last, states_w1, states_s1, anchor_w2, d_w1, d_s1, d_q, d_coefs,
            z, back, read, neg_back, neg_z, neg_delta, stride, T, D, H,
            BLOCK_T, BLOCK_D, BLOCK_H, MOMENTUM, NORM, GELU, PRECISION,
        )  # fmt: skip
        d_decay, d_carry = d_decay + by_decay, d_carry + by_carry
        d_writes, d_momentum_writes = d_writes + by_writes, d_momentum_writes + by_momentum_writes
        d_end_decay, d_end_carry = d_end_decay + by_end1, d_end_carry + by_end2
        d_end_momentum += by_end3
        tl.debug_barrier()
    elif NORM:
        tl.store(d_q + at, tl.load(d_q + at, mask=inside) + load_rows(d_y, at, inside, dtype), mask=inside)
    # The last token's row has more: what the state after the chunk gave
    tl.store(d_coefs + t * stride, d_decay + tl.where(t == T - 1, d_end_decay, 0), mask=t < T)
    tl.store(d_coefs + t * stride + 1, d_carry + tl.where(t == T - 1, d_end_carry, 0), mask=t < T)
    end = d_coefs + (T - 1) * stride + 2 + t
    tl.store(end, tl.load(end, mask=t < T, other=0.0) + d_writes, mask=t < T)
    tl.store(d_last + 1, d_end_momentum)
    tl.store(d_last + 2 + t, d_momentum_writes, mask=t < T)

    neg_out, d_values = neg_delta, neg_delta
    if NORM:
        neg_out, d_values = _error(
            k, v, gain, bias, d_gain, d_bias, deltas, x_hats, rstd, neg_delta, T, D, BLOCK_T, BLOCK_D
        )  # fmt: skip
        neg_keys += d_values
    tl.store(d_v + at, d_values, mask=inside)
    neg_keys = keys_backward(
        k, anchor_w1, anchor_w2, d_anchor_w1, d_anchor_w2, d_k, z, neg_x, neg_back, neg_z, deltas, neg_out, neg_keys,
        T, D, H, BLOCK_T, BLOCK_D, BLOCK_H, DEEP, GELU, PRECISION,
    )  # fmt: skip
    tl.debug_barrier()
    if not DEEP:
        neg_keys += tl.load(d_k + at, mask=inside, other=0.0)
    tl.store(d_k + at, -neg_keys, mask=inside)


@triton.jit(do_not_specialize=["length", "first", "chunks", "rows"], do_not_specialize_on_alignment=["starts"])
def scan_backward(
    q, k, v, d_y, weight_rows, last_row, states_w1, states_s1, states_w2, states_s2, gain, bias, starts,
    d_w1, d_s1, d_w2, d_s2, d_document_w1, d_document_s1, d_document_w2, d_document_s2,
    d_q, d_k, d_v, d_weight_rows, d_last_row, d_gain, d_bias, z, back, read, neg_x, neg_back, neg_z, deltas, x_hats,
    d_anchor_w1, d_anchor_w2, length, first, chunks, rows,
    PARTS: tl.constexpr, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, MOMENTUM: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Moves d_w*, d_s* from after the segment to before it; fills d_q, d_k, d_v and the gradients of the coefficients;
    adds to d_gain, d_bias and d_document_*. d_anchor_*: zeros, if PARTS > 1.
    """
    row = tl.program_id(0).to(tl.int64)
    size: tl.constexpr = D * H
    stride = tl.cast(rows, tl.int64) * chunks * (T + 2)
    z, back, read, neg_x = z + row * T * H, back + row * T * H, read + row * T * H, neg_x + row * T * H
    neg_back, neg_z = neg_back + row * T * H, neg_z + row * T * H
    deltas, x_hats = deltas + row * T * D, x_hats + row * T * D
    if PARTS > 1:
        d_anchor_w1, d_anchor_w2 = at_row(d_anchor_w1, row, size), d_anchor_w2 + row * size
    else:
        d_anchor_w1, d_anchor_w2 = at_row(d_w1, row, size), d_w2 + row * size
    for step in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - step
        token = (row * length + first + chunk * T) * D
        place = row * chunks + chunk
        opening = place - chunk % PARTS
        _chunk(
            q + token, k + token, v + token, d_y + token, weight_rows + place * (T + 2), last_row + place * (T + 2),
            at_row(states_w1, place, size), at_row(states_s1, place, size), states_w2 + place * size,
            at_row(states_s2, place, size), at_row(states_w1, opening, size), states_w2 + opening * size,
            at_row(gain, row, D), at_row(bias, row, D), at_row(d_w1, row, size), at_row(d_s1, row, size),
            d_w2 + row * size, at_row(d_s2, row, size), d_anchor_w1, d_anchor_w2, d_q + token, d_k + token, d_v + token,
            d_weight_rows + place * (T + 2), d_last_row + place * (T + 2), at_row(d_gain, row, D),
            at_row(d_bias, row, D), z, back, read, neg_x, neg_back, neg_z, deltas, x_hats, stride, PARTS, T, D, H,
            BLOCK_T, BLOCK_D, BLOCK_H, DEEP, MOMENTUM, NORM, GELU, PRECISION,
        )  # fmt: skip
        if PARTS > 1:  # noqa: SIM102 (known when compiled)
            if chunk % PARTS == 0:
                move(d_w2 + row * size, d_anchor_w2, size, 1024)
                if DEEP:
                    move(d_w1 + row * size, d_anchor_w1, size, 1024)
                tl.debug_barrier()
        if DOCUMENTS:  # noqa: SIM102 (known when compiled)
            if (tl.load(starts + row * length + first + chunk * T) != 0) & (chunk % PARTS == 0):
                move(d_document_w2 + row * size, d_w2 + row * size, size, 1024)
                if MOMENTUM:
                    move(d_document_s2 + row * size, d_s2 + row * size, size, 1024)
                if DEEP:
                    move(d_document_w1 + row * size, d_w1 + row * size, size, 1024)
                    if MOMENTUM:
                        move(d_document_s1 + row * size, d_s1 + row * size, size, 1024)
        tl.debug_barrier()
