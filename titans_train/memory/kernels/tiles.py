"""Functions of a tile of numbers, for the kernels: activations, the layer norm inside the memory.

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
def rows_of_coefficients(weight_rows, row, chunk, rows, chunks, T, t):
    """Of a chunk's tokens: C [T, T], A and B [T, 1] (gates.ChunkCoefficients)."""
    at = weight_rows + (t.to(tl.int64) * rows + row) * chunks * (T + 2) + chunk * (T + 2)
    square = (t < T)[:, None] & (t < T)[None, :]
    writes = tl.load(at[:, None] + 2 + t[None, :], mask=square, other=0.0)
    decay = tl.load(at, mask=t < T, other=0.0)[:, None]
    return writes, decay, tl.load(at + 1, mask=t < T, other=0.0)[:, None]


@triton.jit
def end_coefficients(weight_rows, last_row, row, chunk, rows, chunks, T, t):
    """Of its end: A_b, B_b, C[b] [T, 1], E_b, F[b] [T, 1]."""
    end = weight_rows + ((T - 1) * rows + row) * chunks * (T + 2) + chunk * (T + 2)
    last = last_row + (row * chunks + chunk) * (T + 2)
    writes = tl.load(end + 2 + t, mask=t < T, other=0.0)[:, None]
    momentum_writes = tl.load(last + 2 + t, mask=t < T, other=0.0)[:, None]
    return tl.load(end), tl.load(end + 1), writes, tl.load(last + 1), momentum_writes


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
