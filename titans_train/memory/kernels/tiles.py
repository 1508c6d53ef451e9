"""Functions of a tile of numbers, for the kernels: activations, the layer norm inside the memory; and what both ways
begin a chunk with.

Shapes: z, x, u [T, D] with D padded to a power of two; zeros beyond `width`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from titans_train.memory.recurrence import NORM_EPS as EPS

NORM_EPS = tl.constexpr(EPS)


@triton.jit
def value(z, GELU: tl.constexpr):
    """f(z)"""
    if GELU:
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    return z * tl.sigmoid(z)


@triton.jit
def slope(z, GELU: tl.constexpr):
    """f'(z)"""
    if GELU:
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def curvature(z, GELU: tl.constexpr):
    """f''(z)"""
    if GELU:
        return (2 - z * z) * tl.exp(-0.5 * z * z) * 0.3989422804014327
    s = tl.sigmoid(z)
    return s * (1 - s) * (2 + z - 2 * z * s)


@triton.jit
def normalised(z, inside, width):
    """LayerNorm(z) without gain, and 1 / standard deviation [T, 1]. inside: [1, D], which columns there are."""
    mean = tl.sum(z, 1)[:, None] / width
    centred = tl.where(inside, z - mean, 0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1)[:, None] / width + NORM_EPS)
    return centred * rstd, rstd


@triton.jit
def pull(u, x, rstd, inside, width):
    """The adjoint of the norm applied to u (norm.Normalised.pull)."""
    mean, along = tl.sum(u, 1)[:, None] / width, tl.sum(u * x, 1)[:, None] / width
    return tl.where(inside, rstd * (u - mean - x * along), 0)


@triton.jit
def pull_backward(u, x, rstd, pulled, d_pulled, inside, width):
    """Gradients of u and of what was normalised, where pulled = pull(u) (norm.Normalised.pull_backward)."""
    d_u = pull(d_pulled, x, rstd, inside, width)
    d_x = -rstd * (d_pulled * (tl.sum(u * x, 1)[:, None] / width) + u * (tl.sum(d_pulled * x, 1)[:, None] / width))
    through_rstd = tl.sum(d_pulled * pulled, 1)[:, None] * -rstd / width
    return d_u, pull(d_x, x, rstd, inside, width) + through_rstd * x


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, summed in the dtype of a."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def load_rows(pointer, at, inside, dtype):
    return tl.load(pointer + at, mask=inside, other=0.0).to(dtype)


@triton.jit
def at_row(pointer, row, size):
    """Of what may be absent."""
    if pointer is not None:
        pointer += row * size
    return pointer


@triton.jit
def rows_of_coefficients(coefs, stride, T, t):
    """Of a chunk's tokens: C [T, T], A and B [T, 1] (gates.ChunkCoefficients)."""
    at = coefs + t * stride
    square = (t < T)[:, None] & (t < T)[None, :]
    writes = tl.load(at[:, None] + 2 + t[None, :], mask=square, other=0.0)
    decay = tl.load(at, mask=t < T, other=0.0)[:, None]
    return writes, decay, tl.load(at + 1, mask=t < T, other=0.0)[:, None]


@triton.jit
def end_coefficients(coefs, last, stride, T, t):
    """Of its end: A_b, B_b, C[b] [T, 1], E_b, F[b] [T, 1]."""
    end = coefs + (T - 1) * stride
    writes = tl.load(end + 2 + t, mask=t < T, other=0.0)[:, None]
    momentum_writes = tl.load(last + 2 + t, mask=t < T, other=0.0)[:, None]
    return tl.load(end), tl.load(end + 1), writes, tl.load(last + 1), momentum_writes


@triton.jit
def anchor(
    k, v, w1, w2, gain, bias, z, T: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, DEEP: tl.constexpr, NORM: tl.constexpr,
    GELU: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at the anchor: the gradient of 1/2 |M(k) - v|^2 by what the last layer gives; and that, normalised, with 1 /
    standard deviation (without norm: anything). k, v: the chunk's; w1, w2, gain, bias: the row's. STORE: fills z, what
    the first layer gives.
    """
    dtype: tl.constexpr = w2.dtype.element_ty
    t, i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    columns, real = (i < D)[None, :], (t < T)[:, None]
    inside, token = real & columns, t[:, None] * D
    keys = load_rows(k, token + i[None, :], inside, dtype)
    out = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    for h in range(0, H, BLOCK_H):
        hidden = h + j
        if DEEP:
            few = (i < D)[:, None] & (hidden < H)[None, :]
            weights = tl.load(w1 + i[:, None] * H + hidden[None, :], mask=few, other=0.0)
            pre = dot(keys, weights, PRECISION)
            if STORE:
                tl.store(z + t[:, None] * H + hidden[None, :], pre, mask=real & (hidden < H)[None, :])
            x = value(pre, GELU)
        else:
            x = load_rows(k, token + hidden[None, :], real & (hidden < D)[None, :], dtype)
        tile = hidden[:, None] * D + i[None, :]
        out += dot(x, tl.load(w2 + tile, mask=(hidden < H)[:, None] & columns, other=0.0), PRECISION)
    values = load_rows(v, token + i[None, :], inside, dtype)
    delta, x_hat, rstd = out - values, out, out
    if NORM:
        gains = tl.load(gain + i, mask=i < D, other=0.0)[None, :]
        biases = tl.load(bias + i, mask=i < D, other=0.0)[None, :]
        x_hat, rstd = normalised(out, columns, D)
        error = biases + load_rows(k, token + i[None, :], inside, dtype) + x_hat * gains - values
        delta = tl.where(real, pull(gains * error, x_hat, rstd, columns, D), 0)
    return delta, x_hat, rstd


@triton.jit
def copy(to, source, size, BLOCK: tl.constexpr):
    """source[:size] into to."""
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(to + at, tl.load(source + at, mask=at < size), mask=at < size)


@triton.jit
def move(to, source, size, BLOCK: tl.constexpr):
    """Adds source[:size] to `to`, and leaves zeros there."""
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        moved = tl.load(to + at, mask=at < size) + tl.load(source + at, mask=at < size)
        tl.store(to + at, moved, mask=at < size)
        tl.store(source + at, tl.zeros([BLOCK], moved.dtype), mask=at < size)
