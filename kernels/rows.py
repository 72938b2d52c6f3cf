"""Tensors (..., C) as the rows (M, C) that kernels compute on; without Triton, so that anyone may ask."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(t: Tensor) -> Tensor:
    """t (..., C) as (M, C)."""
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def as_taken(t: Tensor) -> Tensor:
    """t as kernels take it without a view of it: itself where it is contiguous, else `as_rows`."""
    return t if t.dim() > 1 and t.is_contiguous() else as_rows(t)


def unrowed(y: Tensor, x: Tensor) -> Tensor:
    """Rows y (M, N), which nobody else holds, in the grid of x (..., K): to autograd no view, as stock's isn't one."""
    return y if x.dim() == y.dim() else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


def rows_in(t: Tensor) -> int:
    """M of t (M, C), or of t (..., C) seen so."""
    if t.dim() == 2:
        return t.shape[0]
    return t.numel() // t.shape[-1] if t.shape[-1] else t.shape[:-1].numel()


def sample_rows(t: Tensor) -> Tensor:
    """`as_rows` of a contiguous t, by the strides of all that are so shaped: a single row's may be any."""
    c = t.shape[-1]
    return t if t.dim() == 2 else t.detach().as_strided((t.shape[:-1].numel(), c), (c, 1))


def rounded(count: int, steps: int = 8) -> int:
    """`count` rows rounded up to so many steps an octave, and to a multiple of 32."""
    step = max(32, 1 << (max(count, 1) - 1).bit_length() >> steps.bit_length())
    return -(-count // step) * step
