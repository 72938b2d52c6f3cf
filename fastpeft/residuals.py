"""What a layer's result is added to, and the dropout on the way there."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import autograd, routes
from fastpeft.kernels.rows import as_rows


class Residual(NamedTuple):
    """What a layer's result is added to, `x + dropout(result)`."""

    x: Tensor
    dropout_p: float


def rows_of(residual: Residual | None, rows: Tensor) -> tuple[Tensor | None, float | None]:
    """A residual as the kernels add it to rows, and its dropout; None where there is none, or it is wider."""
    if residual is None or residual.x.dtype != rows.dtype:
        return None, None
    held = residual.x.contiguous()
    return held if held.dim() == rows.dim() else as_rows(held), residual.dropout_p


def added(y: Tensor, residual: Residual | None) -> Tensor:
    """y, added to a residual if there is one."""
    return y if residual is None else residual.x + dropped(y, residual.dropout_p)


def dropped(x: Tensor, dropout_p: float) -> Tensor:
    """`F.dropout(x, dropout_p)`, on the CPU with fewer random numbers."""
    if dropout_p == 0.0 or not routes.on_cpu(x) or torch.compiler.is_compiling() or routes.transformed():
        return F.dropout(x, dropout_p)
    return autograd.Dropout.apply(x, dropout_p)
